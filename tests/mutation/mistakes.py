"""Mistakes to plant in the bodies of ops with shared or ready coefficients, and what one is."""

from dataclasses import dataclass, replace

from cases import Case

from mhc_mlx import ADDITIVE, DEEPSEEK_V4, PAPER, ROW_FIRST

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
EPS = replace(DEEPSEEK_V4, eps=0.01)
# Cases by what they exercise. 129 channels of float32 are one per load, on five simdgroups.
STATIC = Case("mhc_static", (5,), 4, 64)
RAGGED = Case("mhc_static", (5,), 3, 129, eps=0.5)
HALF = Case("mhc_static", (5,), 4, 64, "bfloat16")
LAYER = Case("mhc_layer", (5,), 4, 64, convention=ROW_FIRST)
TWICE = Case("mhc_static", (5,), 8, 4096, "float16")  # backward reads x twice
ADD = Case("stream_mix_add", (5,), 4, 64)
ADD_RAGGED = Case("stream_mix_add", (5,), 3, 129)
ADD_FOUR = Case("stream_mix_add", (5,), 4, 64, per_token=(True, True))
ADD_FIVE = Case("stream_mix_add", (5,), 5, 129, per_token=(True, True))
ADD_EACH = Case("stream_mix_add", (5,), 3, 129, per_token=(True, True))
TILED = Case("mhc_static", (5,), 10, 129)
TILED_EACH = Case("stream_mix_add", (5,), 10, 129, per_token=(True, True))
SINKHORN = Case("sinkhorn_knopp", (101,), 4, 4, convention=ROW_FIRST)
ADDITIVE_4 = Case("sinkhorn_knopp", (101,), 4, 4, convention=ADDITIVE)
SINKHORN_3 = Case("sinkhorn_knopp", (101,), 3, 3, convention=DEEPSEEK_V4)
SINKHORN_EPS = Case("sinkhorn_knopp", (101,), 3, 3, convention=EPS)
SINKHORN_64 = Case("sinkhorn_knopp", (3,), 64, 64, convention=replace(PAPER, iters=2))
LONG = Case("sinkhorn_knopp", (), 4, 4, convention=replace(ROW_FIRST, iters=300))
MANY = Case("mhc_layer", (70,), 4, 8, convention=ROW_FIRST)  # with a threadgroup for each token


@dataclass(frozen=True)
class Mistake:
    """``old`` becomes ``new`` in ``file``; ``caught`` is the rungs that must, and why."""

    what: str
    body: str
    case: Case
    old: str
    new: str
    caught: dict[str, str]
    file: str = ""  # of the body by default
    nth: int = 0  # which of several

    def __str__(self) -> str:
        return f"{self.body}: {self.what}"

    def __hash__(self) -> int:
        return hash(str(self))

    def edited(self, text: str) -> str:
        parts = text.split(self.old)
        assert len(parts) > self.nth + 1, f"{self}: {self.old!r} is not in the file"
        at = self.nth + 1
        return self.old.join(parts[:at]) + self.new + self.old.join(parts[at:])


def mistakes(body: str, file: str = ""):
    def one(what, case, old, new, nth=0, **caught):
        return Mistake(what, body, case, old, new, caught, file or f"{body}.metal", nth)

    return one


fused, common = mistakes("mhc_fused"), mistakes("mhc_fused", "include/common.h")
add, back = mistakes("stream_mix_add"), mistakes("mhc_fused_backward")
back_common = mistakes("mhc_fused_backward", "include/common.h")
add_common = mistakes("stream_mix_add", "include/common.h")
tiled, sums = mistakes("mhc_fused_backward_wide"), mistakes("sum_partials")
sink, sink_common = mistakes("sinkhorn_knopp"), mistakes("sinkhorn_knopp", "include/sinkhorn.h")
sink_back = mistakes("sinkhorn_knopp_backward")
walk = mistakes("sinkhorn_knopp_backward", "include/sinkhorn_backward.h")
OUTSIDE, BOUNDS, TWO = "out of bounds", "the bounds of an array", "which thread"
RACE, UNWRITTEN = "race", "nobody wrote"
WRONG, DIFFER, MORE = "of the bound", "differs between", "in all"

SHARED = [
    # helpers
    common(
        "unaligned slices loaded whole",
        STATIC,
        "if (aligned) return *packs<VEC>(p);",
        "return *packs<VEC>(p);",
        rules="misaligned",
    ),
    common(
        "no barrier in a sum",
        RAGGED,
        BARRIER,
        "",
        rules=UNWRITTEN,
    ),
    common(
        "barrier that orders nothing",
        RAGGED,
        BARRIER,
        "threadgroup_barrier(mem_flags::mem_none);",
        rules=RACE,
        dialect="mem_none",
        nvrtc="mem_none",
    ),
    common(
        "the last simdgroup left out",
        RAGGED,
        "s < SIMDS; ++s) v[a]",
        "s < SIMDS - 1; ++s) v[a]",
        parity=WRONG,
    ),
    common(
        "half a simdgroup at a simd operation",
        RAGGED,
        "v[a] = simd_sum(v[a]);",
        "if (simd_lane < 16) v[a] = simd_sum(v[a]);",
        rules="not all threads reach one barrier",
    ),
    common("post's scale dropped", LAYER, "scale * sigmoid(z)", "sigmoid(z)", parity=WRONG),
    common(
        "h_res loaded transposed",
        STATIC,
        "TRANSPOSED ? (k % N) * N + k / N : k",
        "TRANSPOSED ? k : (k % N) * N + k / N",
        parity=WRONG,
    ),
    common("double literal", LAYER, "return 1.0f / (1.0f +", "return 1.0 / (1.0f +", dialect="1.0"),
    common(
        "a reference in no address space",
        STATIC,
        "load_floats(thread float (&v)[VEC]",
        "load_floats(float (&v)[VEC]",
        dialect="address space",
    ),
    common(
        "threadgroup memory given to a device pointer",
        STATIC,
        "typename P, typename S> inline void load_mix(P H, S mix",
        "typename P> inline void load_mix(P H, device float* mix",
        dialect="device",
    ),
    back_common(
        "no barrier between two sums",
        ADD_EACH,
        BARRIER,
        "",
        nth=2,
        rules=RACE,
    ),
    back_common(
        "one simdgroup's sum for all", ADD_RAGGED, "g < THREADS / 32", "g < 1", parity=WRONG
    ),
    sink_common(
        "halves exchanged",
        SINKHORN,
        "const float other = simd_shuffle_xor(high ? v[j] : v[j + O]",
        "const float other = simd_shuffle_xor(high ? v[j + O] : v[j]",
        parity=WRONG,
    ),
    sink_common(
        "eps dropped along", SINKHORN_EPS, "? line_sum(p) + eps :", "? line_sum(p) :", parity=WRONG
    ),
    sink_common(
        "half a step too few", SINKHORN, "k < 2 * ITERS", "k < 2 * ITERS - 1", parity=WRONG
    ),
    sink_common(
        "no barrier across two simdgroups", SINKHORN_64, BARRIER, "", nth=0, rules=UNWRITTEN
    ),
    sink_common("no barrier after a gather", SINKHORN_64, BARRIER, "", nth=3, rules=RACE),
    # mhc_fused
    fused("no barrier after the coefficients", STATIC, BARRIER, "", rules=UNWRITTEN),
    fused(
        "barrier moved before the coefficients",
        STATIC,
        "mhc::load_gates<N, THREADS, GATES, false>(H_pre, pre, params, tid);",
        BARRIER + "mhc::load_gates<N, THREADS, GATES, false>(H_pre, pre, params, tid);\n"
        "#define threadgroup_barrier(flags)",
        rules=UNWRITTEN,
    ),
    fused("bound off by one", RAGGED, "if (c < C)", "if (c <= C)", rules=OUTSIDE),
    fused("wrong stride", RAGGED, "row + j * C + c", "row + j * (C + 1) + c", rules=OUTSIDE),
    fused("h_res transposed", STATIC, "mix[j * N + i] * f", "mix[i * N + j] * f", parity=WRONG),
    fused(
        "an unwritten tail",
        STATIC,
        "if (CACHED) *(device",
        "if (CACHED && c + VEC < C) *(device",
        rules="nobody writes",
    ),
    fused(
        "float assigned to bfloat",
        HALF,
        "static_cast<T>(MIX ? acc[i * CHANNEL_STEP + q] + post[i] * u[q] : u[q])",
        "(MIX ? acc[i * CHANNEL_STEP + q] + post[i] * u[q] : u[q])",
        dialect="bfloat",
        rules="does not compile",
    ),
    fused(
        "missing static_cast of a load",
        HALF,
        "u[e] += pre[j] * static_cast<float>(v.v[e])",
        "u[e] += pre[j] * v.v[e]",
        nvrtc="operator",
    ),
    fused(
        "early return",
        Case("mhc_static", (5,), 4, 8),
        "const int C = x_shape[2];",
        "const int C = x_shape[2]; if (int(tid) * VEC >= C) return;",
        rules="has returned",
        dialect="return",
    ),
    fused(
        "eps dropped", RAGGED, " + static_cast<float>(params[mhc::param::EPS])", "", parity=WRONG
    ),
    fused(
        "mean over all streams",
        STATIC,
        "static_cast<float>(C)",
        "static_cast<float>(C * N)",
        parity=WRONG,
    ),
    fused("branch forgotten", STATIC, "post[i] * u[q]", "u[q]", parity=WRONG),
    fused(
        "x read again",
        STATIC,
        "= CACHED ? xv[k * N + j] : mhc::load<T, VEC>",
        "= mhc::load<T, VEC>",
        traffic="x 3",
    ),
    fused("scratch not alternated", RAGGED, "parity ^= 1;", "", rules=RACE),
    fused(
        "two threads at one place",
        STATIC,
        "*)(out_row + i * C + c) = o[i]",
        "*)(out_row + i * C + c / 8 * 8) = o[i]",
        rules=TWO,
    ),
    fused("tokens taken twice", STATIC, "t += threadgroups_per_grid.x", "t += 1", rules=TWO),
    fused(
        "registers short of one",
        STATIC,
        "xv[CACHED_PASSES * (CACHED ? N : 1)]",
        "xv[CACHED_PASSES * (CACHED ? N : 1) - 1]",
        rules=BOUNDS,
    ),
    fused(
        "too much threadgroup memory",
        STATIC,
        "threadgroup float pre[N];",
        "threadgroup float pre[N + 8192];",
        rules="Metal has 32768",
        nvrtc="shared",
    ),
    # stream_mix_add
    add("h_post dropped", ADD, "= q * static_cast<float>", "= static_cast<float>", parity=WRONG),
    add(
        "wrong stride of h_res",
        ADD_FIVE,
        "(size_t(t) * N + i) * N + j",
        "(size_t(t) + i) * N + j",
        parity=WRONG,
        traffic=MORE,
    ),
    add(
        "wrong stride of h_res, in registers",
        ADD_FOUR,
        "size_t(t) * TOKEN_MIXES",
        "size_t(t) * N",
        parity=WRONG,
        traffic=MORE,
    ),
    add("h_res transposed", ADD_FOUR, "i * N + j : 0]", "j * N + i : 0]", parity=WRONG),
    add_common(
        "the first of each load", ADD_FOUR, "v[i + e] = pack[e]", "v[i + e] = pack[0]", parity=WRONG
    ),
    add("no barrier", ADD, BARRIER, "", rules=UNWRITTEN),
    add(
        "y of the first token",
        ADD,
        "y + size_t(t) * size_t(C) + c",
        "y + c",
        parity=WRONG,
        traffic=MORE,
    ),
    add("wrong width of a step", ADD, "c += THREADS * VEC", "c += THREADS", rules=TWO),
    # mhc_backward
    back(
        "a term of du dropped", STATIC, "(d[q] * w[q] - u[q] * slope)", "d[q] * w[q]", parity=WRONG
    ),
    back("slope without r", STATIC, "slope = r * r *", "slope = r *", parity=WRONG),
    back("dh_res transposed", STATIC, "g_res[i * N + j] +=", "g_res[j * N + i] +=", parity=WRONG),
    back("h_res transposed", STATIC, "m = mix[i * N + j]", "m = mix[j * N + i]", parity=WRONG),
    back("dweight without r", STATIC, "out[q] = u[q] * r;", "out[q] = u[q];", parity=WRONG),
    back(
        "a token's sums not cleared",
        ADD_EACH,
        "g_post[i] = 0.0f;",
        ";",
        parity=WRONG,
    ),
    back("no barrier after a token's coefficients", ADD_EACH, BARRIER, "", nth=1, rules=UNWRITTEN),
    back(
        "the last token left out", STATIC, "t < tokens;", "t + 1 < tokens;", rules="nobody writes"
    ),
    back(
        "sums in the wrong columns",
        STATIC,
        "group_partial + RES_AT",
        "group_partial + POST_AT",
        rules="nobody writes",
    ),
    back(
        "a running sum that starts from nothing",
        TWICE,
        "t < threadgroups_per_grid.x ? 0.0f :",
        "",
        rules=UNWRITTEN,
    ),
    # mhc_backward_tiled
    tiled("no barrier before a tile is used", TILED, BARRIER, "", nth=2, rules=UNWRITTEN),
    tiled("no barrier after a tile is used", TILED, BARRIER, "", nth=4, rules=RACE),
    tiled(
        "tile not padded",
        TILED,
        "c0 + c < C ? static_cast<float>(row[j * C + c0 + c]) : 0.0f",
        "static_cast<float>(row[j * C + c0 + c])",
        rules=OUTSIDE,
    ),
    tiled(
        "slices before the first",
        TILED,
        "(s == 0 ? 0.0f : split_sums[i * N + j])",
        "split_sums[i * N + j]",
        rules=UNWRITTEN,
    ),
    tiled(
        "running sum before the first",
        TILED,
        "if (!is_first_token) g_weight",
        "g_weight",
        rules=UNWRITTEN,
    ),
    tiled(
        "blocks rounded down",
        TILED,
        "EDGE = (N + 3) / 4",
        "EDGE = N / 4",
        rules="nobody writes",
    ),
    tiled("h_pre du dropped", TILED, "* du_tile[lane] : 0.0f", "* 0.0f : 0.0f", parity=WRONG),
    tiled(
        "a token's dh_post kept",
        TILED_EACH,
        "g_post[b] = 0.0f;",
        "",
        parity=WRONG,
    ),
    # sinkhorn_knopp
    sink(
        "orientation ignored",
        SINKHORN_3,
        "OUT_COLUMNS ? j * N + lane : lane * N + j",
        "lane * N + j",
        parity=WRONG,
    ),
    sink("idle lanes write", SINKHORN_3, "m < count && lane < N", "m < count", rules=TWO),
    sink("matrices past the last", SINKHORN, "m < count && lane", "lane", rules=TWO),
    # sinkhorn_knopp_backward
    sink_back("matrices past the last", SINKHORN, "m < count && lane", "lane", rules=TWO),
    sink_back("a divisor for all lanes", SINKHORN, "divisors + tid", "divisors", rules=RACE),
    walk("a sum dropped along", SINKHORN, "g[j] -= p[j] * dot;", ";", parity=WRONG),
    walk("p not restored", SINKHORN, "p[j] *= published", "shared", parity=WRONG),
    walk("a sum dropped across", SINKHORN, "q[j] -= p[j] * published", "shared", parity=WRONG),
    walk(
        "a shift's share of eps kept",
        SINKHORN_EPS,
        "shift_eps = 0.0f;\n",
        ";\n",
        nth=1,
        parity=WRONG,
    ),
    walk(
        "a shift's share of eps lost",
        SINKHORN_EPS,
        "lane, scratch) - shift_eps",
        "lane, scratch)",
        parity=WRONG,
    ),
    walk("ADDITIVE: a sum dropped", ADDITIVE_4, "(g[j] - dot) * r", "g[j] * r", parity=WRONG),
    walk(
        "its own divisor for all", ADDITIVE_4, "RECIPROCAL(all[j])", "RECIPROCAL(d)", parity=WRONG
    ),
    walk("eps after a softmax lost", SINKHORN_EPS, "p[j] / (p[j] + eps)", "1.0f", parity=WRONG),
    walk(
        "an element near 1 twice",
        SINKHORN,
        "g[j] * small_p - p[j] * small_g",
        "g[j] * small_p",
        parity=WRONG,
    ),
    walk("segments not shifted", LONG, "(k - begin) * STRIDE", "k * STRIDE", rules=OUTSIDE),
    # sum_partials
    sums("no barrier", MANY, BARRIER, "", rules=UNWRITTEN),
    sums(
        "rows skipped",
        MANY,
        "g += THREADS_PER_COLUMN",
        "g += THREADS_PER_COLUMN + 1",
        parity=WRONG,
        traffic=MORE,
    ),
    sums("sigmoid's slope dropped", MANY, " * mhc::sigmoid(-z)", "", parity=WRONG),
    sums(
        "a column too many",
        MANY,
        "if (tid < COLUMNS_PER_GROUP &&",
        "if (tid < COLUMNS_PER_GROUP + 1 &&",
        rules=BOUNDS,
    ),
]

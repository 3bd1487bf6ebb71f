"""The proof can fail: planted mistakes in the real bodies, each caught by the rungs that must.

`python tests/test_mutation.py` prints the table: mistake, body, rungs that caught it.

dialect: clang with Metal's address spaces, and the lint. nvrtc: NVIDIA's compiler.
rules: the simulator's (bounds, races, unwritten memory, divergence, limits).
parity: results against the float64 oracle. traffic: loads and stores per buffer.
"""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import mlx.core as mx
import pytest
import simulator
from cases import Case
from conftest import executor, missing
from test_parity import check, results
from test_traffic import words

from mhc_mlx import DEEPSEEK_V4, PAPER, ROW_FIRST, kernel, ops
from mhc_mlx.conventions import IDENTITY, KRONECKER, MHC_LITE

RUNGS = ("dialect", "nvrtc", "rules", "parity", "traffic")
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
EPS = replace(DEEPSEEK_V4, eps=0.01)
# Cases by what they exercise. 129 channels of float32 are one per load, on five simdgroups.
STATIC = Case("mhc_static", (5,), 4, 64)
RAGGED = Case("mhc_static", (5,), 3, 129, eps=0.5)
HALF = Case("mhc_static", (5,), 4, 64, "bfloat16")
LAYER = Case("mhc_layer", (5,), 4, 64, convention=ROW_FIRST)
LAYER_EPS = Case("mhc_layer", (5,), 4, 64, convention=EPS)
TWICE = Case("mhc_static", (5,), 8, 4096, "float16")  # backward reads x twice
ADD = Case("stream_mix_add", (5,), 4, 64)
ADD_RAGGED = Case("stream_mix_add", (5,), 3, 129)
ADD_EACH = Case("stream_mix_add", (5,), 3, 129, per_token=(True, True))
TILED = Case("mhc_static", (5,), 10, 129)
TILED_EACH = Case("stream_mix_add", (5,), 10, 129, per_token=(True, True))
SINKHORN = Case("sinkhorn_knopp", (101,), 4, 4, convention=ROW_FIRST)
SINKHORN_3 = Case("sinkhorn_knopp", (101,), 3, 3, convention=DEEPSEEK_V4)
SINKHORN_EPS = Case("sinkhorn_knopp", (101,), 3, 3, convention=EPS)
SINKHORN_64 = Case("sinkhorn_knopp", (3,), 64, 64, convention=replace(PAPER, iters=2))
LONG = Case("sinkhorn_knopp", (), 4, 4, convention=replace(ROW_FIRST, iters=300))
MANY = Case("mhc_layer", (70,), 4, 8, convention=ROW_FIRST)  # with a threadgroup for each token
READ = Case("stream_aggregate", (5,), 4, 64)
READ_EACH = Case("stream_aggregate", (5,), 3, 129, per_token=(True, False))
PRE = Case("mhc_pre", (5,), 4, 64, convention=PAPER)
PRE_RAGGED = Case("mhc_pre", (5,), 3, 129, convention=DEEPSEEK_V4)
PRE_5 = Case("mhc_pre", (5,), 5, 31, convention=PAPER)
PRE_MANY = Case("mhc_pre", (70,), 4, 64, convention=PAPER)
LITE = Case("mhc_pre", (5,), 3, 31, convention=MHC_LITE)
FACTORS = Case("mhc_pre", (5,), 4, 31, convention=KRONECKER)
PRE_LONG = Case("mhc_pre", (5,), 4, 160, convention=PAPER)  # several runs of k a simdgroup
PRE_4 = Case("mhc_pre", (5,), 4, 31, convention=PAPER)  # aligned, but no whole runs
PRE_HALF = Case("mhc_pre", (17,), 4, 64, "bfloat16", PAPER, phi="bfloat16")  # a simdgroup has 16
PRE_65 = Case("mhc_pre", (65,), 4, 8, convention=PAPER)  # chunks of 33 and 32 tokens
PRE_12 = Case("mhc_pre", (5,), 12, 33, convention=PAPER)  # threadgroups share a tile
IDENTITY_32 = Case("mhc_pre", (20,), 32, 8, convention=IDENTITY)  # three blocks, two shares
NORM_EPS = Case("mhc_pre", (5,), 4, 64, convention=PAPER, norm_eps=0.5)
PRE_EPS = Case("mhc_pre", (5,), 4, 64, convention=replace(EPS, pre_eps=0.1, post_eps=0.2))
FEW = Case("mhc_pre", (5,), 4, 64, convention=replace(PAPER, iters=2))
FEW_5 = Case("mhc_pre", (5,), 5, 31, convention=replace(PAPER, iters=2))
COEFFICIENTS = Case("mhc_coefficients", (5,), 4, 64, convention=PAPER)


@dataclass(frozen=True)
class Threads(Case):
    """A call with so many threads a threadgroup."""

    threads: int = 512


@dataclass(frozen=True)
class Slice(Case):
    """A call whose phi alone is not aligned."""

    def arrays(self, seed: int = 0) -> list[mx.array | None]:
        arrays = super().arrays(seed)
        phi = arrays[1]
        longer = mx.concatenate([phi.flatten()[:1], phi.flatten()])
        mx.eval(longer)
        arrays[1] = longer[1:].reshape(phi.shape)
        return arrays


ONE_CHUNK = Case("mhc_pre", (129,), 4, 8, convention=PAPER)  # several tiles of dp: see run()
PRE_BANDS = Threads("mhc_pre", (9,), 4, 64, convention=PAPER)  # two bands of eight slices
PRE_SLICE = Slice("mhc_pre", (5,), 4, 64, convention=PAPER)


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


fused, common = mistakes("mhc_fused"), mistakes("mhc_fused", "common.h")
add, back = mistakes("stream_mix_add"), mistakes("mhc_backward")
back_common = mistakes("mhc_backward", "common.h")
tiled, sums = mistakes("mhc_backward_tiled"), mistakes("sum_partials")
sink, sink_common = mistakes("sinkhorn_knopp"), mistakes("sinkhorn_knopp", "common.h")
sink_back = mistakes("sinkhorn_knopp_backward")
pre, pre_back = mistakes("mhc_pre"), mistakes("mhc_pre_backward")
outer, pre_common = mistakes("mhc_phi_gradient"), mistakes("mhc_pre", "common.h")
tiles, metal = mistakes("mhc_pre", "tiles.h"), mistakes("mhc_pre", "tiles_metal.h")
cuda = mistakes("mhc_pre", "tiles_cuda.h")
read, read_back = mistakes("stream_aggregate"), mistakes("stream_aggregate_backward")
exact, exact_back = mistakes("mixing_matrix"), mistakes("mixing_matrix_backward")
OUTSIDE, BOUNDS, TWO = "out of bounds", "the bounds of an array", "which thread"
RACE, UNWRITTEN = "race", "nobody wrote"
WRONG, DIFFER, MORE = "of the bound", "differs between", "in all"

MISTAKES = [
    # helpers
    common(
        "unaligned slices loaded whole",
        STATIC,
        "if (whole) return *packs<VEC>(p);",
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
    common("post's scale dropped", LAYER, "scale * sigmoid(h[i])", "sigmoid(h[i])", parity=WRONG),
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
    sink_common("eps dropped along", SINKHORN_EPS, "? d + eps :", "? d :", parity=WRONG),
    sink_common(
        "half a step too few", SINKHORN, "k < 2 * iters", "k < 2 * iters - 1", parity=WRONG
    ),
    sink_common(
        "no barrier across two simdgroups", SINKHORN_64, BARRIER, "", nth=3, rules=UNWRITTEN
    ),
    sink_common("no barrier after a gather", SINKHORN_64, BARRIER, "", nth=6, rules=RACE),
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
        "static_cast<T>(MIX ? acc[i * STEP + q] + post[i] * u[q] : u[q])",
        "(MIX ? acc[i * STEP + q] + post[i] * u[q] : u[q])",
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
    fused("eps dropped", RAGGED, " + params[0]", "", parity=WRONG),
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
    fused("scratch not alternated", RAGGED, "turn ^= 1;", "", rules=RACE),
    fused(
        "two threads at one place",
        STATIC,
        "*)(orow + i * C + c) = o[i]",
        "*)(orow + i * C + c / 8 * 8) = o[i]",
        rules=TWO,
    ),
    fused("tokens taken twice", STATIC, "t += threadgroups_per_grid.x", "t += 1", rules=TWO),
    fused(
        "registers short of one",
        STATIC,
        "xv[KEPT * (CACHED ? N : 1)]",
        "xv[KEPT * (CACHED ? N : 1) - 1]",
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
        ADD_EACH,
        "(size_t(t) * N + i) * N + j",
        "(size_t(t) + i) * N + j",
        parity=WRONG,
        traffic=MORE,
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
        "mine + RES_AT",
        "mine + POST_AT",
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
        "(s == 0 ? 0.0f : slices[i * N + j])",
        "slices[i * N + j]",
        rules=UNWRITTEN,
    ),
    tiled(
        "running sum before the first", TILED, "if (!first) g_weight", "g_weight", rules=UNWRITTEN
    ),
    tiled(
        "blocks rounded down",
        TILED,
        "EDGE = (N + 3) / 4",
        "EDGE = N / 4",
        rules="nobody writes",
    ),
    tiled("h_pre du dropped", TILED, "* dut[lane] : 0.0f", "* 0.0f : 0.0f", parity=WRONG),
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
    sink_back("a sum dropped along", SINKHORN, "(g[j] - dot) * r", "g[j] * r", parity=WRONG),
    sink_back("p not restored", SINKHORN, "p[j] *= d;", ";", parity=WRONG, nth=1),
    sink_back("a sum dropped across", SINKHORN, "(g[j] - dots[j])", "g[j]", parity=WRONG),
    sink_back("divisors read at once", SINKHORN, BARRIER, "", rules=RACE),
    sink_back("divisors written at once", LONG, BARRIER, "", rules=RACE, nth=1),
    sink_back(
        "softmax applied twice", SINKHORN, "if (START == mhc::START_SOFTMAX) g", "g", parity=WRONG
    ),
    sink_back("segments not shifted", LONG, "(k - begin) * THREADS", "k * THREADS", rules=BOUNDS),
    # sum_partials
    sums("no barrier", MANY, BARRIER, "", rules=UNWRITTEN),
    sums("rows skipped", MANY, "g += 32", "g += 33", parity=WRONG, traffic=MORE),
    sums("sigmoid's slope dropped", MANY, "h * (1.0f - h)", "h", parity=WRONG),
    sums("a column too many", MANY, "if (tid < 8 &&", "if (tid < 9 &&", rules=BOUNDS),
    # stream_aggregate and its backward
    read("no barrier", READ, BARRIER, "", rules=UNWRITTEN),
    read(
        "wrong stride of h_pre",
        READ_EACH,
        "size_t(t) * N + j",
        "size_t(t) + j",
        parity=WRONG,
        traffic=MORE,
    ),
    read_back("a token's sums not cleared", READ_EACH, "g_pre[j] = 0.0f;", ";", parity=WRONG),
    read_back("no barrier after a token's h_pre", READ_EACH, BARRIER, "", nth=1, rules=UNWRITTEN),
    read_back(
        "du of the first token",
        READ,
        "du + size_t(t) * size_t(C)",
        "du",
        parity=WRONG,
        traffic=MORE,
    ),
    # mhc_pre
    pre("no barrier before slices are added", PRE, BARRIER, "", rules=UNWRITTEN),
    pre("no barrier before the norm is used", PRE, BARRIER, "", nth=1, rules=RACE),
    pre("no barrier before the coefficients are used", PRE, BARRIER, "", nth=2, rules=UNWRITTEN),
    pre("a tile past the last token", PRE, "if (t < tokens && o", "if (o", rules=OUTSIDE),
    pre("outputs past the last", PRE_RAGGED, "t < tokens && o < OUTS", "t < tokens", rules=OUTSIDE),
    pre("u past the last token", PRE, " && first + uint(i) < tokens", "", rules=OUTSIDE),
    pre("norm forgotten", PRE, "unit = scale[i] * s", "unit = s", parity=WRONG),
    pre("mean over a stream", PRE, "static_cast<float>(K)", "static_cast<float>(C)", parity=WRONG),
    pre("norm_eps dropped", NORM_EPS, "params[3]", "params[0]", parity=WRONG),
    pre(
        "the last slice of k left out",
        PRE,
        "w < SLICES; ++w) s += sums[(w * TILE + i) * PITCH + q",
        "w < SLICES - 1; ++w) s += sums[(w * TILE + i) * PITCH + q",
        parity=WRONG,
    ),
    pre(
        "the norm of the first slice",
        PRE,
        "w < SLICES; ++w) s += sums[(w * TILE + i) * PITCH + WIDE",
        "w < 1; ++w) s += sums[(w * TILE + i) * PITCH + WIDE",
        parity=WRONG,
    ),
    pre(
        "runs of k skipped where rows are whole",
        PRE_LONG,
        "32 * SLICES",
        "64 * SLICES",
        rules=DIFFER,
    ),
    pre("no place for sum(x ** 2)", PRE, "PITCH = WIDE + 1", "PITCH = WIDE", rules=RACE),
    pre(
        "sums of one slice", PRE, "sums[SLICES * TILE * PITCH]", "sums[TILE * PITCH]", rules=BOUNDS
    ),
    pre("ragged rows loaded whole", PRE_4, "K % 32 == 0", "K % 4 == 0", rules=OUTSIDE),
    pre(
        "unaligned phi loaded whole",
        PRE_SLICE,
        "8 / mhc::PHI_ROWS>()>(phi)",
        "8 / mhc::PHI_ROWS>()>(x)",
        rules="misaligned",
    ),
    pre(
        "tiles of tokens exchanged",
        PRE_HALF,
        "band + m * 8) * PITCH",
        "band + (TILES - 1 - m) * 8) * PITCH",
        parity=WRONG,
    ),
    pre("bands of tokens at one place", PRE_BANDS, "+ band + m", "+ m", rules=RACE),
    pre(
        "tiles of outputs exchanged",
        PRE,
        "b * 8 + mhc::sum_output",
        "(BLOCK - 1 - b) * 8 + mhc::sum_output",
        parity=WRONG,
    ),
    pre("alpha of pre alone", PRE, "alpha[part]", "alpha[0]", parity=WRONG),
    pre("post_eps of pre", PRE_EPS, "params[2]", "params[0]", parity=WRONG),
    pre("bias saved", PRE, "+ o] = unit;", "+ o] = z;", parity=WRONG),
    pre("the token's norm not saved", PRE, "+ OUTS] = scale[i]", "+ OUTS] = 1.0f", parity=WRONG),
    pre(
        "norms saved past the last token",
        PRE,
        "begin == 0 && t < tokens",
        "begin == 0",
        rules=OUTSIDE,
    ),
    pre("norms saved by every share", PRE_12, "SAVE && begin == 0", "SAVE", rules=TWO),
    pre("u by every share", PRE_12, "tokens && begin == 0", "tokens", rules=UNWRITTEN),
    pre(
        "shares rounded down", IDENTITY_32, "+ SPLITS - 1) / SPLITS", ") / SPLITS", rules=UNWRITTEN
    ),
    pre(
        "a share past the last output",
        IDENTITY_32,
        "begin + SHARE < OUTS ? begin + SHARE : OUTS",
        "begin + SHARE",
        traffic="x",
    ),
    pre(
        "a tile for each of its shares",
        IDENTITY_32,
        "tile += threadgroups_per_grid.x / SPLITS",
        "tile += threadgroups_per_grid.x",
        rules="nobody writes",
    ),
    pre(
        "logits by columns",
        PRE_RAGGED,
        "COLUMNS ? q % N * N + q / N : q",
        "COLUMNS ? q : q % N * N + q / N",
        parity=WRONG,
    ),
    pre(
        "h_res by columns",
        PRE,
        "OUT_COLUMNS ? p[q % N][q / N] : p[q / N][q % N]",
        "p[q / N][q % N]",
        parity=WRONG,
    ),
    pre(
        "h_res by columns, a line per lane",
        PRE_5,
        "OUT_COLUMNS ? j * N + line : line * N + j",
        "line * N + j",
        parity=WRONG,
    ),
    pre("an iteration too few", FEW, "ITERS, static", "ITERS - 1, static", parity=WRONG),
    pre(
        "an iteration too few, a line per lane",
        FEW_5,
        "ITERS, static",
        "ITERS - 1, static",
        nth=1,
        parity=WRONG,
    ),
    pre("matrices past the last", PRE, "m < TILE && t < tokens", "m < TILE", rules=UNWRITTEN),
    pre("matrices past the tile", PRE_MANY, "m < TILE && t < tokens", "t < tokens", rules=BOUNDS),
    pre("idle lanes write", PRE_5, "live && line < N", "live", rules=TWO),
    pre(
        "h_pre of another token",
        PRE,
        "o[e] += pre[i * N + j] * v[e]",
        "o[e] += pre[j] * v[e]",
        parity=WRONG,
    ),
    pre("wrong width of a step", PRE, "c += 32 * VEC", "c += 32", rules=TWO),
    pre("u not divided by its norm", PRE, "o[e] * r * w[e]", "o[e] * w[e]", parity=WRONG),
    pre(
        "a square of each pack",
        PRE,
        "squared += o[e] * o[e]",
        "squared += o[0] * o[0]",
        parity=WRONG,
    ),
    pre_common(
        "eps dropped, a lane alone", PRE_EPS, "float d = eps;", "float d = 0.0f;", parity=WRONG
    ),
    pre_common(
        "lines for columns, a lane alone",
        PRE,
        "k % 2 == 0 ? p[a][b] : p[b][a]",
        "p[a][b]",
        parity=WRONG,
    ),
    pre_common(
        "half a step too few, a lane alone",
        FEW,
        "k < 2 * iters",
        "k < 2 * iters - 1",
        nth=1,
        parity=WRONG,
    ),
    # tiles of mhc_pre
    tiles("tokens past the last", PRE, "live[m] = t < tokens", "live[m] = true", rules=OUTSIDE),
    tiles("phi past the last output", PRE_RAGGED, "|| o < OUTS", "|| true", rules=OUTSIDE),
    tiles("runs past the row", PRE_LONG, "if (left > 0)", "if (true)", rules=OUTSIDE),
    tiles("k past the row", PRE_RAGGED, "if (e < left)", "if (true)", rules=OUTSIDE),
    tiles(
        "k past the row not zero",
        PRE_RAGGED,
        "r.p[e / VEC].v[e % VEC] = static_cast<T>(0.0f);",
        "",
        parity=WRONG,
    ),
    tiles("a run too many", PRE_LONG, "left = K - k - step", "left = K - k", rules=OUTSIDE),
    tiles("x stands still", PRE_LONG, "x_at[m] += step;", "", parity=WRONG, traffic=MORE),
    tiles("phi stands still", PRE_LONG, "p_at[b][q] += step;", "", parity=WRONG, traffic=MORE),
    tiles(
        "x from the first run",
        PRE,
        "size_t(first + x_k(lane))",
        "size_t(x_k(lane))",
        parity=WRONG,
        traffic=MORE,
    ),
    tiles("phi's first 8 outputs", PRE, "output + b * 8 +", "output +", parity=WRONG, traffic=MORE),
    tiles(
        "the first 8 tokens",
        PRE_HALF,
        "uint(m * 8 + x_row(lane))",
        "uint(x_row(lane))",
        parity=WRONG,
        traffic=MORE,
    ),
    tiles(
        "all products of 8 tokens",
        PRE_HALF,
        "multiply_add(sum[m]",
        "multiply_add(sum[0]",
        parity=WRONG,
    ),
    tiles(
        "half a simdgroup at a product",
        PRE,
        "multiply_add(sum",
        "if (lane < 16) multiply_add(sum",
        rules="simd operations",
    ),
    tiles("runs of k skipped", PRE_LONG, "k += step", "k += 2 * step", parity=WRONG, traffic=MORE),
    metal(
        "sums transposed",
        PRE,
        "sum_token(int lane, int) { return matrix_row",
        "sum_token(int lane, int) { return matrix_column",
        rules=RACE,
    ),
    metal(
        "x transposed",
        PRE,
        "x_row(int lane) { return matrix_row",
        "x_row(int lane) { return matrix_column",
        rules=RACE,
    ),
    metal(
        "phi transposed",
        PRE,
        "phi_row(int lane) { return matrix_column",
        "phi_row(int lane) { return matrix_row",
        rules=OUTSIDE,
    ),
    metal(
        "lanes in another order",
        PRE,
        "lane / 16 * 4 + lane / 2 % 4",
        "lane / 16 * 4 + lane / 4 % 4",
        rules=RACE,
    ),
    metal("half of a lane's k", PRE, "run_float(r, s + 4)", "run_float(r, s)", parity=WRONG),
    metal("one of a lane's outputs", PRE, "run_float(r[e], s)", "run_float(r[0], s)", parity=WRONG),
    metal("a product short", PRE, "s < 4; ++s) simdgroup", "s < 3; ++s) simdgroup", parity=WRONG),
    metal("a sum from nothing", PRE, "d = simdgroup_float8x8(0.0f)", "d", parity="finite"),
    metal("x for phi", PRE, "d, x.m[s], phi.m[s], d", "d, phi.m[s], x.m[s], d", parity=WRONG),
    metal(
        "a float for a matrix",
        PRE,
        "d = simdgroup_float8x8(0.0f)",
        "d = 0.0f",
        dialect="no viable conversion",
        rules="does not compile",
    ),
    metal(
        "a tile in no address space",
        PRE,
        "to_tile(thread XTile",
        "to_tile(XTile",
        dialect="address space",
    ),
    metal("half of the squares", PRE, "e < 8; ++e) s[0]", "e < 4; ++e) s[0]", parity=WRONG),
    metal("squares of other lanes", PRE, "ushort(8)", "ushort(16)", parity=WRONG),
    cuda("a shorter instruction", PRE, "m16n8k16", "m16n8k8", nvrtc="mma"),
    cuda("a float in an integer's register", PRE, '"=r"(w)', '"=f"(w)', nvrtc="cvt"),
    # mhc_pre_backward
    pre_back("no barrier before dh_pre", PRE, BARRIER, "", rules=UNWRITTEN),
    pre_back("no barrier before dz is used", PRE, BARRIER, "", nth=1, rules=RACE),
    pre_back("no barrier before the pull", PRE_RAGGED, BARRIER, "", nth=2, rules=RACE),
    pre_back("no barrier before dx", PRE, BARRIER, "", nth=3, rules=RACE),
    pre_back("no barrier after a tile", PRE_MANY, BARRIER, "", nth=4, rules=RACE),
    pre_back("gates past the last token", PRE, "if (t < tokens) {", "if (true) {", rules=OUTSIDE),
    pre_back(
        "dp past the last token", PRE, "if (t < tokens) {", "if (true) {", nth=1, rules=OUTSIDE
    ),
    pre_back(
        "dx past the last token", PRE, "if (t < tokens) {", "if (true) {", nth=2, rules=OUTSIDE
    ),
    pre_back("l past the last token", PRE, "o < OUTS && t < tokens", "o < OUTS", rules=OUTSIDE),
    pre_back("du past the last token", PRE, "READ && t < tokens", "READ", rules=OUTSIDE),
    pre_back("dh_pre past the last token", PRE, " && first + uint(i) < tokens", "", rules=OUTSIDE),
    pre_back(
        "unaligned phi loaded whole", PRE, "mhc::aligned<VEC>(phi)", "true", rules="misaligned"
    ),
    pre_back("sigmoid's slope dropped", PRE, "g = s * (1.0f - s)", "g = s", parity=WRONG),
    pre_back(
        "pre_eps dropped", PRE_EPS, "h = s + static_cast<float>(params[0])", "h = s", parity=WRONG
    ),
    pre_back(
        "post_scale dropped", PRE, "g *= static_cast<float>(params[1]) *", "g *=", parity=WRONG
    ),
    pre_back(
        "dh_pre dropped",
        COEFFICIENTS,
        "g *= static_cast<float>(dh_pre[t * N + o])",
        "g *= 1.0f",
        parity=WRONG,
        traffic="dh_pre 0",
    ),
    pre_back(
        "dz_res dropped",
        PRE,
        "g = static_cast<float>(dz_res[t * R + (o - GATED)])",
        "g = 0.0f",
        parity=WRONG,
        traffic="dz_res 0",
    ),
    pre_back("slope dropped", PRE, "(through - slope * norm)", "through", parity=WRONG),
    pre_back("slope without r", PRE, "slope = r * r *", "slope = r *", parity=WRONG),
    pre_back(
        "u of another token",
        PRE,
        "u[e] += pre[i * N + j] * v[e]",
        "u[e] += pre[j] * v[e]",
        parity=WRONG,
    ),
    pre_back("alpha dropped", PRE, "= g * a *", "= g *", parity=WRONG),
    pre_back(
        "dp without the token's norm",
        PRE,
        "= g * a * static_cast<float>(l[t * (OUTS + 1) + OUTS])",
        "= g * a",
        parity=WRONG,
        traffic="l 285",
    ),
    pre_back("dalpha without l", PRE, "sum_l += g * ", "sum_l += ", parity=WRONG),
    pre_back(
        "dbias of the last tile alone",
        PRE_MANY,
        "(again ? mine[o] : 0.0f) + sum;",
        "sum;",
        parity=WRONG,
        traffic="partial",
    ),
    pre_back(
        "a running sum that starts from nothing",
        PRE_MANY,
        "(again ? mine[o] : 0.0f)",
        "mine[o]",
        rules=UNWRITTEN,
    ),
    pre_back("the norm's own gradient dropped", PRE, "pull[i] * v[e]", "0.0f * v[e]", parity=WRONG),
    pre_back(
        "the pull without the token's norm",
        PRE,
        "-s * static_cast<float>(l[t * (OUTS + 1) + OUTS])",
        "-s",
        parity=WRONG,
        traffic="l 400",
    ),
    pre_back("dx_out dropped", PRE, "read + more[e]", "read", parity=WRONG),
    pre_back(
        "slope added", PRE, "* w[e] - u[e] * slopes[i]", "* w[e] + u[e] * slopes[i]", parity=WRONG
    ),
    pre_back("dweight without r", PRE, "u[e] * inverse[i];", "u[e];", parity=WRONG),
    pre_back(
        "phi of the first stream",
        PRE,
        "column = phi + (j * C + c)",
        "column = phi + c",
        parity=WRONG,
        traffic="phi",
    ),
    pre_back("wrong stride of phi", PRE, "column += K", "column += C", parity=WRONG, traffic="phi"),
    pre_back("dp of another output", PRE, "g = dps[o];", "g = dps[0];", parity=WRONG),
    pre_back("dp by every share", PRE_12, "if (begin == 0) dp", "dp", rules=TWO),
    pre_back("sums by every share", PRE_12, "if (begin == 0) {", "{", rules=TWO),
    pre_back(
        "shares of channels rounded down",
        PRE_12,
        "(C / VEC + SPLITS - 1) / SPLITS",
        "C / VEC / SPLITS",
        rules="nobody writes",
    ),
    pre_back(
        "a share past the last channel",
        PRE_12,
        "begin + share < C ? begin + share : C",
        "begin + share",
        rules=OUTSIDE,
    ),
    pre_back(
        "a tile for each of its shares",
        PRE_12,
        "owner = threadgroup_position_in_grid.x / SPLITS",
        "owner = threadgroup_position_in_grid.x",
        rules=OUTSIDE,
    ),
    # mhc_phi_gradient
    outer("no barrier before dp is used", PRE, BARRIER, "", rules=UNWRITTEN),
    outer("no barrier after dp is used", ONE_CHUNK, BARRIER, "", nth=1, rules=RACE),
    outer(
        "outputs past the last", PRE_5, "if (o0 + o < OUTS)", "if (o0 + o <= OUTS)", rules=OUTSIDE
    ),
    outer("dp past the last output", PRE_5, "e < EACH && o < OUTS", "e < EACH", rules=OUTSIDE),
    outer(
        "every chunk from the first token",
        PRE_MANY,
        "uint(chunk) * each",
        "0u",
        parity=WRONG,
        traffic=MORE,
    ),
    outer(
        "chunks rounded down",
        PRE_65,
        "(tokens + chunks - 1) / chunks",
        "tokens / chunks",
        parity=WRONG,
        traffic=MORE,
    ),
    outer(
        "a chunk past the last token",
        PRE_65,
        "begin + each < tokens ? begin + each : tokens",
        "begin + each",
        rules=OUTSIDE,
    ),
    outer(
        "tokens past the chunk",
        PRE,
        "end - t0 < uint(TILE) ? int(end - t0) : TILE",
        "TILE",
        rules=OUTSIDE,
    ),
    outer("dp past the chunk", PRE_65, "t < end && e", "t < tokens && e", traffic="dp"),
    outer("x past the row", PRE_RAGGED, "if (k < K) {", "{", rules=OUTSIDE),
    outer("sums past the row", PRE_RAGGED, "if (k < K) {", "{", nth=1, rules=TWO),
    outer(
        "spans rounded down",
        PRE_RAGGED,
        "(K + THREADS * VEC - 1) / (THREADS * VEC)",
        "K / (THREADS * VEC)",
        rules=OUTSIDE,
    ),
    outer(
        "packs of dp rounded down",
        PRE_5,
        "(EACH + 3) / 4",
        "EACH / 4",
        parity=WRONG,
        traffic="dp 320",
    ),
    outer("sums of a pack past the last", PRE_5, " && o < EACH; ++o) {", "; ++o) {", rules=BOUNDS),
    outer("dp of the pack before", PRE, "g.v[o - 4 * q]", "g.v[0]", parity=WRONG),
    # mixing_matrix and its backward
    exact("weights not divided", LITE, "line[c] / sum", "line[c]", parity=WRONG),
    exact("factors in another order", FACTORS, "R / 2 - 1 - b", "b", parity=WRONG),
    exact("a row too many", FACTORS, "id < rows", "id <= rows", rules=OUTSIDE),
    exact_back("softmax's sum added", LITE, "ds - dot / sum", "ds + dot / sum", parity=WRONG),
    exact_back(
        "sigmoid's slope dropped", FACTORS, "dp * own * (1.0f - own)", "dp * own", parity=WRONG
    ),
]


@contextlib.contextmanager
def planted(mistake: Mistake | None):
    """The bodies with the mistake in one of them."""
    plain = kernel.text

    def text(file: str) -> str:
        same = mistake is None or file != mistake.file
        return plain(file) if same else mistake.edited(plain(file))

    kernel.text = text
    kernel._build.cache_clear()
    try:
        yield
    finally:
        kernel.text = plain
        kernel._build.cache_clear()


def run(case: Case):
    options = {"threads_per_group": case.threads} if isinstance(case, Threads) else {}
    f = functools.partial(getattr(ops, case.op), **options)
    of_outer = ops.geometry.of_outer
    if case is ONE_CHUNK:
        ops.geometry.of_outer = lambda *shape: (*of_outer(*shape)[:3], 1)
    try:
        return results(f, case, [a for a in case.arrays() if a is not None])
    finally:
        ops.geometry.of_outer = of_outer


@functools.cache
def launches(case: Case, body: str) -> list[tuple]:
    """What the case launches of the body, a call for each variant."""
    calls = {}
    with executor("stand-in"):
        stand_in = kernel.launch

        def keep(*call):
            if call[0] == body:
                calls[str(call[5])] = call
            return stand_in(*call)

        kernel.launch = keep
        run(case)
    return list(calls.values())


@functools.cache
def compiled_by_nvrtc(body: str, source: str) -> str:
    import nvrtc

    error, figures = nvrtc.compile_cuda(body, source)
    if figures and figures["shared"] > 32 << 10:
        error = f"{figures['shared']} bytes of shared memory"
    return error or ("spills" if figures["spills"] else "")


@functools.cache
def traffic(case: Case) -> list[str]:
    with executor("simulator", few_groups=case is not MANY), simulator.recording() as records:
        run(case)
    return [words(r) for r in records]


def caught(case: Case, body: str, mistake: Mistake | None = None) -> dict[str, str]:
    """What each rung says of the body, with the mistake or as it is; "" is dropped."""
    import dialect
    import nvrtc

    says, normal = dict.fromkeys(RUNGS, ""), traffic(case)
    calls = launches(case, body)
    with planted(mistake), ThreadPoolExecutor(1) as pool:
        cuda = [(c[0], nvrtc.cuda_source(*c[:3], c[4], c[5])) for c in calls]
        compiled = pool.map(lambda one: compiled_by_nvrtc(*one), cuda)  # while the others run
        for call in calls:
            says["dialect"] += "; ".join(dialect.refusals(simulator.generated(*call[:6])))
        try:
            with executor("simulator", few_groups=case is not MANY):
                with simulator.recording() as records:
                    got = run(case)
            moved = [words(r) for r in records]
            says["traffic"] = "; ".join(set(moved) - set(normal))
            mx.eval(got)
            check(case, got)
        except simulator.SimulationError as error:
            says["rules"] = str(error)
        except AssertionError as error:
            says["parity"] = str(error)
        says["nvrtc"] = "".join(compiled)
    return {rung: message for rung, message in says.items() if message}


def unavailable() -> str | None:
    return next((f"{r}: {m}" for r in ("simulator", "dialect", "nvrtc") if (m := missing(r))), None)


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_caught(mistake, need):
    for rung in ("simulator", "dialect", "nvrtc"):
        need(rung)
    says = caught(mistake.case, mistake.body, mistake)
    assert set(says) == set(mistake.caught), says
    for rung, reason in mistake.caught.items():
        assert reason in says[rung], says[rung]


@pytest.mark.parametrize(
    "case, body", sorted({(m.case, m.body) for m in MISTAKES}, key=str), ids=str
)
def test_nothing_to_catch(case, body, need):
    """The same rungs on the bodies as they are."""
    for rung in ("simulator", "dialect", "nvrtc"):
        need(rung)
    assert caught(case, body) == {}


def test_enough():
    """Every body has mistakes, and every rung is the only one to catch some."""
    assert len(MISTAKES) >= 40
    bodies = {f.stem for f in kernel._FOLDERS[1].glob("*.metal")}
    assert {m.body for m in MISTAKES} == bodies
    assert {r for m in MISTAKES if len(m.caught) == 1 for r in m.caught} == set(RUNGS)


def main() -> None:
    if reason := unavailable():
        raise SystemExit(f"needs every rung, but {reason}")
    print(f"| mistake | body | {' | '.join(RUNGS)} |\n|---|---|{'---|' * len(RUNGS)}")
    for m in MISTAKES:
        says = caught(m.case, m.body, m)
        marks = " | ".join("caught" if r in says else "" for r in RUNGS)
        file = m.body if m.file == f"{m.body}.metal" else f"{m.body} ({m.file})"
        print(f"| {m.what} | {file} | {marks} |", flush=True)


if __name__ == "__main__":
    main()

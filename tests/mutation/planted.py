"""Mistakes planted by hand: what operators do not make, or what one rung alone can catch.

A quote is as short as can be, and need not be a whole token: it is edited where it first stands in
the file, or where it stands for the ``nth`` time, counted from 0.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
from cases import Case
from ops.test_traffic import RETURNS
from proof import results

from mhc_mlx import ADDITIVE, DEEPSEEK_V4, PAPER, ROW_FIRST, XING, launch, ops
from mhc_mlx.conventions import IDENTITY, KRONECKER, MHC_LITE


@contextlib.contextmanager
def planted(file: str, edit: Callable[[str], str]):
    """A file of kernels/ with its text edited."""
    read, caches = launch._read, (launch.text, launch._build)
    launch._read = lambda name: edit(read(name)) if name == file else read(name)
    for f in caches:
        f.cache_clear()
    try:
        yield
    finally:
        launch._read = read
        for f in caches:
            f.cache_clear()


@dataclass(frozen=True)
class Call(Case):
    """A case with options of the call, or of how it is launched."""

    threads: int | None = None
    few_groups: bool = True  # else a threadgroup for each token
    one_chunk: bool = False  # of tokens, in mhc_pre_backward_phi
    slice_of_phi: bool = False  # which is then not aligned

    def __str__(self) -> str:
        special = {"threads": self.threads, "one_chunk": self.one_chunk, "slice": self.slice_of_phi}
        marks = [f"{k}={v}" for k, v in special.items() if v]
        return "-".join([super().__str__(), *marks])

    def arrays(self, seed: int = 0) -> list[mx.array | None]:
        arrays = super().arrays(seed)
        if self.slice_of_phi:
            longer = mx.concatenate([arrays[1].flatten()[:1], arrays[1].flatten()])
            mx.eval(longer)
            arrays[1] = longer[1:].reshape(arrays[1].shape)
        return arrays


def run(case: Case) -> list[mx.array]:
    """Outputs and gradients of a case, launched as it says."""
    options = {"threads_per_group": case.threads} if getattr(case, "threads", None) else {}
    op, tiling = functools.partial(getattr(ops, case.op), **options), ops.tiling.phi_gradient_tiling
    if getattr(case, "one_chunk", False):
        ops.tiling.phi_gradient_tiling = lambda *shape: tiling(*shape)._replace(chunks=1)
    try:
        return results(op, case, [a for a in case.arrays() if a is not None])
    finally:
        ops.tiling.phi_gradient_tiling = tiling


@dataclass(frozen=True)
class Mistake:
    """``old`` becomes ``new`` where it stands for the ``nth`` time in ``file``."""

    what: str
    body: str
    file: str
    case: Case
    caught: dict[str, str]  # the rungs that must object, and words of what they say
    old: str
    new: str
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.body}: {self.what}"

    def edit(self, text: str) -> str:
        parts = text.split(self.old)
        assert len(parts) > self.nth + 1, f"{self}: {self.old!r} is not in {self.file}"
        at = self.nth + 1
        return self.old.join(parts[:at]) + self.new + self.old.join(parts[at:])


# What the rungs say.
OUTSIDE, BOUNDS = "rules: out of bounds", "rules: the bounds of an array"
TWO, UNALIGNED, NO_COMPILE = "rules: which thread", "rules: misaligned", "rules: does not compile"
RACE, UNWRITTEN, NOBODY = "rules: race", "rules: nobody wrote", "rules: nobody writes"
DIFFER, WRONG, MOVED = "rules: differs between", "parity: of the bound", "traffic: in all"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

# Ops with shared or ready coefficients. 129 channels of float32 are one a load.
STATIC = Case("mhc_static", (5,), 4, 64)
RAGGED = Case("mhc_static", (5,), 3, 129, eps=0.5)
HALF = Case("mhc_static", (5,), 4, 64, "bfloat16")
SMALL = Case("mhc_static", (5,), 4, 8)
TILED = Case("mhc_static", (5,), 10, 129)
LAYER = Case("mhc_layer", (5,), 4, 64, convention=ROW_FIRST)
MANY = Call("mhc_layer", (70,), 4, 8, convention=ROW_FIRST, few_groups=False)
ADD = Case("stream_mix_add", (5,), 4, 64)
ADD_FOUR = replace(ADD, per_token=(True, True))
SINKHORN = Case("sinkhorn_knopp", (101,), 4, 4, convention=ROW_FIRST)
SINKHORN_3 = Case("sinkhorn_knopp", (101,), 3, 3, convention=DEEPSEEK_V4)
SINKHORN_64 = Case("sinkhorn_knopp", (3,), 64, 64, convention=replace(PAPER, iters=2))
FAR = replace(SINKHORN_3, lead=(7,), convention=replace(ROW_FIRST, iters=100), scale=100.0)
ROUGH = replace(SINKHORN_3, convention=replace(ROW_FIRST, eps=0.1, iters=3))
ADDITIVE_4 = replace(SINKHORN, convention=ADDITIVE)
PLAIN = replace(XING, eps=0.1, iters=2, clamp=(-1.5, 1.0))  # cuts logits at either end
CUT = replace(SINKHORN_3, convention=PLAIN)
READ = Case("stream_aggregate", (5,), 4, 64)
READ_EACH = Case("stream_aggregate", (5,), 3, 129, per_token=(True, False))
NORM = Case("stream_norm", (5,), 4, 64, "bfloat16", per_token=(True, False))
NORM_7 = replace(NORM, lead=(7,))  # the last tile of two tokens has one
GATES = Case("gate_mix", (2,), 4, 2000, "bfloat16")  # four threadgroups share a token
GATES_RAGGED = Case("gate_mix", (5,), 3, 129)
SATURATED = Case("gate_mix", (5,), 4, 64, "bfloat16", scale=30.0)
NORM_12 = replace(NORM, n=12)  # three blocks of four streams, two of six rows of inject
# mhc_pre, in float32 and by products of matrices.
PRE = Case("mhc_pre", (5,), 4, 64, convention=PAPER)
PRE_4 = replace(PRE, C=31)  # aligned, but no whole runs
ROWS = Call("mhc_pre", (19,), 4, 8, convention=PAPER, threads=512)  # two, of simdgroups
TURNS = Call("mhc_pre", (19,), 8, 4, convention=PAPER, threads=64)  # two, of projection
PRE_12 = Case("mhc_pre", (5,), 12, 33, convention=PAPER)  # threadgroups share a tile
PRE_65 = Case("mhc_pre", (65,), 4, 8, convention=PAPER)  # chunks of 33 and 32 tokens
PRE_LONG = replace(PRE, C=160)  # several runs of k a simdgroup
PRE_RUNS = replace(PRE, C=256)  # two packs of u a lane
PRE_SLICE = Call("mhc_pre", (5,), 4, 64, convention=PAPER, slice_of_phi=True)
ONE_CHUNK = Call("mhc_pre", (129,), 4, 8, convention=PAPER, one_chunk=True)
MADE_TWICE = Call("mhc_pre", (5,), 4, 1280, convention=PAPER, threads=96)  # u, not kept
SHARED_U = Case("mhc_pre", (19,), 4, 1280, "bfloat16", PAPER)  # two simdgroups share u
IDENTITY_32 = Case("mhc_pre", (20,), 32, 8, convention=IDENTITY)  # three blocks, two shares
TRANSPOSED = Case("mhc_pre", (5,), 3, 31, convention=replace(MHC_LITE, transposed=True))
FACTORS = Case("mhc_pre", (5,), 4, 31, convention=KRONECKER)
RINGED = Case("mhc_pre", (17,), 4, 256, "bfloat16", PAPER, norm=False)  # several runs a slice
MULTIPLIED = replace(RINGED, C=64)  # three tiles
RAGGED_PRODUCTS = Case("mhc_pre", (5,), 3, 31, "bfloat16", DEEPSEEK_V4, norm=False)
CHUNKS = replace(MULTIPLIED, lead=(130,))  # of 65 tokens
STAGES = replace(MULTIPLIED, lead=(70,))  # of 64 tokens
TEAM = Call("mhc_pre", (19,), 4, 512, "bfloat16", PAPER, threads=64)  # simdgroups share a token
TWICE = replace(TEAM, C=2000)  # and read it twice
ONE_STREAM = Case("mhc_pre", (5,), 1, 8, "bfloat16", PAPER, eps=0.5)
# "Single pass" models, and mhc_pre at few tokens.
FEW = Case("mhc_pre", (2,), 4, 160, convention=PAPER)
RUNS = Case("mhc_head", (), 1, 8000, convention=PAPER)  # 250 runs in 8 slices: 31 or 32 each
LANES_16 = Case("mhc_coefficients", (2,), 4, 8, convention=replace(DEEPSEEK_V4, iters=1))
LANES_9 = replace(LANES_16, n=3, convention=PLAIN)
LANES_4 = replace(LANES_16, n=2, convention=PAPER, scale=100.0)  # exp overflows but of the largest
SEAM = Case("mhc_seam", (5,), 4, 64, per_token=(True, True))
SEAM_12 = replace(SEAM, n=12, C=31)
SEAM_ROUNDED = replace(SEAM, dtype="bfloat16", rounded=True)
SEAM_RAGGED = replace(SEAM_ROUNDED, n=3, C=129)
SEAM_LONG = Case("mhc_seam", (3,), 2, 10248, "bfloat16", per_token=(True, True))  # u is made twice

# Of each body, and of a header in it: case, what, who objects and why, old, new, nth.
# fmt: off
TABLE = {
    "mhc_fused common.h": [
        (STATIC, "unaligned slices in packs", UNALIGNED, "if (aligned) return", "return"),
        (RAGGED, "a barrier that orders nothing", f"{RACE}; dialect: mem_none; nvrtc: mem_none",
         BARRIER, BARRIER.replace("_threadgroup)", "_none)")),
        (RAGGED, "half a simdgroup at a simd operation", "rules: not all threads reach one barrier",
         "v[a] = simd_sum", "if (simd_lane < 16) v[a] = simd_sum"),
        (LAYER, "a double literal", "dialect: 1.0", "return 1.0f / (1", "return 1.0 / (1"),
        (STATIC, "a reference in no address space", "dialect: address space",
         "load_floats(thread float", "load_floats(float"),
        (STATIC, "threadgroup memory for a device pointer", "dialect: device",
         "typename P, typename S> METAL_FUNC void load_mix(P H, S mix",
         "typename P> METAL_FUNC void load_mix(P H, device float* mix"),
    ],
    "mhc_fused": [
        (HALF, "float assigned to bfloat", f"dialect: bfloat; {NO_COMPILE}",
         "static_cast<T>(MIX ?", "(MIX ?"),
        (HALF, "a load without a cast", "nvrtc: operator",
         "mhc::float_of(v, e)", "mhc::element(v, e)"),
        (SMALL, "an early return", "rules: has returned; dialect: return",
         "x_shape[2];", "x_shape[2]; if (int(tid) * VEC >= C) return;"),
        (STATIC, "x read again", "traffic: x 3", "if (CACHED) v", "if (!CACHED) v"),
        (STATIC, "two threads at one place", TWO, "i * C + c), o[i]", "i * C + c / 8 * 8), o[i]"),
        (STATIC, "too much threadgroup memory", "rules: Metal has 32768; nvrtc: shared",
         "float pre[N]", "float pre[N + 8192]"),
    ],
    "stream_mix_add": [
        (ADD_FOUR, "wrong stride of h_res", f"{WRONG}; {MOVED}", "(t) * TOKEN_MIXES", "(t) * N"),
        (ADD, "y of the first token", f"{WRONG}; {MOVED}", "y + size_t(t) * size_t(C)", "y"),
    ],
    "mhc_fused_backward": [
        (STATIC, "a term of du dropped", WRONG, "- u[q] * slope", ""),
        (STATIC, "the last token left out", NOBODY, "t < tokens;", "t + 1 < tokens;"),
    ],
    "mhc_fused_backward_wide": [
        (TILED, "tile not padded", OUTSIDE, "c0 + c < C ?", "true ?"),
        (TILED, "slices before the first", UNWRITTEN, "s == 0 ? 0.0f : ", ""),
    ],
    "sinkhorn_knopp": [
        (SINKHORN_3, "orientation ignored", WRONG, "OUT_COLUMNS ? j", "false ? j"),
    ],
    "sinkhorn_knopp sinkhorn.h": [
        (CUT, "large logits not clipped", WRONG, "v > high ? high : v", "v"),
        (CUT, "eps not in the first sum", WRONG, "if (START == START_EXP_PLAIN) sum += eps;", ""),
        (CUT, "elements in the lanes beyond the matrix", WRONG,
         "START_EXP_PLAIN) p[j] = in_range ? p[j] : 0.0f", "START_EXP_PLAIN) p[j] = p[j]"),
        (SINKHORN_64, "the first half's sums alone", WRONG, "scratch[64 + lane]", "scratch[lane]"),
        (FAR, "small elements lost", f"{WRONG}; {MOVED}", "if (from > FIRST)", "if (false)"),
        (SINKHORN, "halves exchanged", WRONG, "high ? first : second", "high ? second : first"),
    ],
    "sinkhorn_knopp_backward": [
        (SINKHORN, "a divisor for all lanes", RACE, "divisors + tid", "divisors"),
    ],
    "sinkhorn_knopp_backward sinkhorn_backward.h": [
        (SINKHORN, "p not restored", WRONG, "p[j] *= published", "published"),
        (RETURNS, "a return at a segment's end", MOVED, " && k - 1 > begin)", ")"),
        (ROUGH, "the share of eps added", WRONG, "scratch) - shift_eps", "scratch) + shift_eps"),
        (ADDITIVE_4, "its own divisor for all", WRONG, "RECIPROCAL(all[j])", "RECIPROCAL(d)"),
        (CUT, "a gradient of logits below the clamp", WRONG, "p[j] > numbers.low && ", ""),
        (CUT, "the largest logit as any other", WRONG, "largest ? -others :", "largest ? g[j] :"),
    ],
    "sum_partials": [
        (MANY, "a column too many", BOUNDS, "PER_GROUP && p <", "PER_GROUP + 1 && p <"),
    ],
    "stream_aggregate": [
        (READ_EACH, "wrong stride of h_pre", f"{WRONG}; {MOVED}", "(t) * N + j", "(t) + j"),
    ],
    "stream_aggregate_backward": [
        (READ, "du of the first token", f"{WRONG}; {MOVED}", "du + size_t(t) * size_t(C)", "du"),
    ],
    "stream_norm": [
        (NORM, "a mean over all streams", WRONG, "squares[a] / static_cast<float>(C)",
         "squares[a] / static_cast<float>(N * C)"),
        (NORM_7, "s of a token past the last", OUTSIDE, "if (t0 + q < tokens)", "if (true)"),
        (NORM, "no barrier before products are added", RACE, BARRIER, ""),
    ],
    "stream_norm_backward": [
        (NORM, "the norm's slope dropped", WRONG,
         "- mhc::float_of(streams[at + j], e) * slope", ""),
        (NORM, "dh_post of all tokens so far", WRONG, "POST_PER_TOKEN || is_first_token",
         "is_first_token"),
    ],
    "stream_norm_backward_weights": [
        (NORM_12, "ds in each block of rows", WRONG, "row_block == 0 ?", "true ?"),
    ],
    "gate_mix": [
        (GATES, "the first part of a token by all", TWO, "group % parts *", "0 *"),
        (GATES_RAGGED, "the sum for the mean", WRONG, "acc[e] / float(N)", "acc[e]"),
    ],
    "gate_mix_backward": [
        (SATURATED, "a slope that loses its digits", "parity: times what",
         "high * low *", "high * (1.0f - high) *"),
        (GATES_RAGGED, "channels past the last", TWO, " && c < C", ""),
    ],
    "mixing_matrix": [
        (TRANSPOSED, "transposes by rows", WRONG, "TRANSPOSED ?", "false ?"),
        (FACTORS, "factors in another order", WRONG, "NUM_LOGITS / 2 - 1 - b", "b"),
    ],
    "mixing_matrix_backward": [
        (FACTORS, "sigmoid's slope dropped", WRONG, " * mhc::sigmoid(-z_b)", ""),
    ],
    "mhc_pre": [
        (PRE, "mean over a stream", WRONG, "x_dot_x, K, alpha", "x_dot_x, C, alpha"),
        (IDENTITY_32, "a tile for each of its shares", NOBODY, "grid.x / SPLITS *", "grid.x *", 1),
        (IDENTITY_32, "a share past the last output", OUTSIDE,
         "= logit_begin + LOGITS_PER_GROUP <", "= -1 <"),
        (ROWS, "each row of simdgroups the first", DIFFER, "first + uint(first_row)", "first"),
        (replace(ROWS, n=3, C=11), "the same where runs are not whole", WRONG,
         "first + uint(first_row)", "first", 1),
    ],
    "mhc_pre coefficients.h": [
        (PRE, "h_res by columns", WRONG, "OUT_COLUMNS ? p", "false ? p"),
        (TURNS, "a matrix left out of each turn", NOBODY, "m0 += SIMDS", "m0 += 1 + SIMDS"),
    ],
    "mhc_pre read_tile.h": [
        (MADE_TWICE, "h_pre of another token", WRONG, "pre + i * N, C, C - c0",
         "pre, C, C - c0", 2),
        (SHARED_U, "no barrier after squares are added", RACE, BARRIER, "", 1),
        (PRE_RUNS, "a lane's second pack its first", DIFFER, "+ j) * C + k * 32 * VEC", "+ j) * C"),
    ],
    "mhc_pre streams.h": [
        (PRE, "r dropped", WRONG, "if (NORM) v *= r;", ""),
    ],
    "mhc_pre phi_product.h": [
        (PRE_4, "ragged rows loaded whole", OUTSIDE, "return K % 32", "return K % 4"),
        (PRE_SLICE, "unaligned phi loaded whole", UNALIGNED, ">()>(phi)", ">()>(x)"),
        (PRE_LONG, "tokens past the last", OUTSIDE, "token + uint(t) < tokens ? t", "true ? t"),
        (PRE, "half a simdgroup at a product", "rules: simd operations",
         "multiply_add(sum", "if (pointers.x_at[0] % 16 == 0) multiply_add(sum"),
    ],
    "mhc_pre metal/matrices.h": [
        (PRE, "sums transposed", RACE,
         "sum_token(int lane) { return matrix_row", "sum_token(int lane) { return matrix_column"),
        (PRE, "lanes in another order", RACE, "lane / 2 % 4", "lane / 4 % 4"),
        (PRE, "a float for a matrix", f"dialect: no matching function; {NO_COMPILE}",
         "(md, ma, mb, md)", "(md, ma, mb, d[0])"),
        (PRE, "a tile in no address space", "dialect: address space", "(thread XTile", "(XTile"),
    ],
    "mhc_pre cuda/ptx.h": [
        (PRE, "a longer instruction", "nvrtc: mma", "m16n8k8", "m16n8k16"),
    ],
    "mhc_pre cuda/matrices.h": [
        (PRE, "the last bits of phi", WRONG, "phi, PHI)", "phi, 0)"),
        (RINGED, "an element for two", WRONG, "= w << 16", "= w & 0xffff0000u"),
    ],
    "mhc_pre cuda/phi_product_ring.h": [
        (RINGED, "a run before it is there", UNWRITTEN, "<SLOTS - 1>", "<SLOTS>"),
        (RINGED, "a ring for all simdgroups", RACE, "runs.simd * SLOTS", "0 * SLOTS"),
        (PRE, "odd rows as even ones", DIFFER, "(lane / 4 & 1)", "0"),
    ],
    "mhc_pre_backward_generic": [
        (PRE_12, "dp by every share", TWO, "if (channel_begin == 0) dp", "dp"),
        (PRE, "phi of the first stream", f"{WRONG}; traffic: phi", "phi + (j * C + c)", "phi + c"),
    ],
    "mhc_pre_backward_phi": [
        (ONE_CHUNK, "no barrier after dp is used", RACE, BARRIER, "", 1),
        (PRE_65, "dp past the chunk", "traffic: dp", "t < end && e", "t < tokens && e"),
    ],
    "mhc_pre_partial_logits": [
        (FEW, "every run the first", f"{WRONG}; {MOVED}", "K, 32 * run", "K, 0"),
    ],
    "mhc_seam": [
        (SEAM, "no barrier before ready coefficients", UNWRITTEN,
         "  if (WRITE_BACK || !FROM_PARTIAL_LOGITS) thr", "  if (false) thr"),
        (SEAM_ROUNDED, "u not rounded", "parity: times what", "true, ROUND_U,", "true, false,"),
        (SEAM_LONG, "u cached where it is made twice", f"{WRONG}; traffic: x 1",
         "(!NORM || !U_CACHED)", "(!NORM)"),
    ],
    "mhc_seam coefficients.h": [
        (RUNS, "a run past the last", OUTSIDE, "SLICES < num_runs;", "SLICES <= num_runs;"),
        (LANES_4, "lines of two lanes by four", TWO, "if constexpr (N > 1", "if constexpr (N > 2"),
    ],
    "mhc_seam sinkhorn_elements.h": [
        (LANES_4, "all but the last of a line for its largest", "parity: not finite",
         "b < N; ++b) m =", "b < N - 1; ++b) m ="),
        (LANES_16, "softmax across the lines", WRONG,
         "line_of_element<false>(v, p", "line_of_element<true>(v, p"),
        (LANES_9, "eps beside the first sum", WRONG, "p / (sum + eps)", "p / sum + eps"),
        (LANES_9, "logits not clipped", WRONG, "logits[COLUMNS ?", "z[COLUMNS ?"),
        (LANES_9, "elements that two lanes write", TWO, "if (in_range) h_res", "h_res"),
    ],
    "mhc_seam_backward": [
        (SEAM_ROUNDED, "dweight of unrounded units", WRONG, "(ROUND_U ? st", "(false ? st"),
    ],
    "mhc_seam_backward seam_channel.h": [
        (SEAM_RAGGED, "out not rounded", WRONG, "static_cast<float>(static_cast<T>(o))", "o"),
        (SEAM, "dh_post of dout alone", WRONG, "ds[i] * y", "dout[i] * y"),
    ],
    "mhc_pre_backward_coefficients": [
        (MULTIPLIED, "the first token's matrix", WRONG, "i * MATRIX_LANES", "0"),
    ],
    "mhc_pre_backward_coefficients coefficient_gradient.h": [
        (MULTIPLIED, "another line's entry", WRONG, "entry_in_line == j", "line == j"),
    ],
    "mhc_pre_backward_coefficients_norm": [
        (TWICE, "dweight of the last token", f"{WRONG}; traffic: partial",
         "i > 0 || first != group_begin", "false"),
        (ONE_STREAM, "sums of dweight in packs", UNALIGNED, "2 * NUM_LOGITS % VEC == 0", "true"),
    ],
    "mhc_pre_backward_coefficients_norm stream_dots.h": [
        (TEAM, "no barrier before shares are added", UNWRITTEN, BARRIER, ""),
    ],
    "mhc_pre_backward_projection": [
        (CHUNKS, "sums of all chunks in one row", TWO, "(id / groups_per_chunk) *", "(0) *"),
        (MULTIPLIED, "another stream's phi", f"{WRONG}; {MOVED}", "phi + (j * C + c0)", "phi + c0"),
    ],
    "mhc_pre_backward_projection phi_gradient.h": [
        (RAGGED_PRODUCTS, "channels past the last", TWO, "if (e < remaining) to", "to"),
    ],
    "mhc_pre_backward_projection metal/phi_gradient_matrices.h": [
        (MULTIPLIED, "the last tile's sums alone", WRONG, "[p][e] +=", "[p][e] ="),
    ],
    "mhc_pre_backward_projection cuda/ptx.h": [
        (MULTIPLIED, "a transpose of bytes", "nvrtc: movmatrix", "m8n8.trans.b16 %0",
         "m8n8.trans.b8 %0"),
    ],
    "mhc_pre_backward_projection cuda/phi_gradient_matrices.h": [
        (MULTIPLIED, "dx_out in du's place", UNWRITTEN, "PASSED, from.dx_out", "DU, from.dx_out"),
        (MULTIPLIED, "tokens not in pairs", WRONG, "= transposed(reint", "= (reint"),
        (STAGES, "a tile too late", UNWRITTEN, "copies<SLOTS - 1>", "copies<SLOTS>"),
    ],
}
# What LLVM cannot keep in registers, or splits, while every value stays right.
FULL = Case("mhc_static", (2,), 4, 2048, "bfloat16")  # 128 packed bytes of a token a thread
PRE_HALF = Case("mhc_pre", (19,), 4, 64, "bfloat16", PAPER)
ADD_HALF = replace(ADD, dtype="bfloat16")
OPTIMISER = {
    "mhc_pre phi_product.h": [
        (PRE_HALF, "a helper that may not be inlined", "optimiser: not inlined",
         "METAL_FUNC void multiply_run", "inline void multiply_run"),
    ],
    "sinkhorn_knopp_backward sinkhorn.h": [
        (SINKHORN, "a place chosen at run time", "optimiser: arrays lie in memory",
         "value = high ? second : first", "value = v[high ? j + O : j]"),
    ],
    "sinkhorn_knopp metal/packs.h": [
        (SINKHORN_64, "loops over 64 columns unrolled whole", "optimiser: registers spilled",
         "unroll_count(16)", "unroll(full)"),
    ],
    "mhc_fused_backward metal/packs.h": [
        (FULL, "packs that need not stay packed", "optimiser: arrays lie in memory",
         "if constexpr (sizeof(T) == 2) pack.w[e / 2] += zero;", ""),
    ],
    "mhc_pre metal/packs.h": [
        (PRE, "addresses of a lane in registers all the time", "optimiser: registers spilled",
         "return v + int(zero);", "return v;"),
    ],
    "mhc_pre_backward_phi": [
        (PRE_65, "eight tokens at once", "optimiser: registers spilled", "(2, 8)", "(8, 2)"),
    ],
    "mhc_seam seam_channel.h": [
        (SEAM_12, "packs of twelve streams at once", "optimiser: arrays lie in memory",
         "() && N <= 8", "() || N <= 8"),
    ],
    "mhc_seam_backward common.h": [
        (SEAM, "pairs of floats in one branch", "optimiser: packs of 0", "VEC != 2", "VEC != 3"),
    ],
    "stream_mix_add metal/packs.h": [
        (ADD_HALF, "packs in loads of an element", "optimiser: load x 2",
         "else load_words(pack.w, (const device uint*)p);",
         "else UNROLL_FOR (int e = 0; e < VEC; ++e) set_element(pack, e, p[e]);"),
        (ADD, "loads that LLVM takes apart where they may not be aligned", "optimiser: packs of 0",
         "const vec<ulong, 2> v = *(const device vec<ulong, 2>*)(p + i);",
         "UNROLL_FOR (int k = 0; k < 4; ++k) w[i + k] = (*(const device vec<uint, 4>*)(p + i))[k]; "
         "continue; const ulong v[2] = {};"),
    ],
}
# fmt: on


def mistake(place: str, case: Case, what: str, caught: str, *edit) -> Mistake:
    body, _, header = place.partition(" ")
    rungs = dict(one.split(": ") for one in caught.split("; "))
    file = f"include/{header}" if header else f"{body}.metal"
    return Mistake(what, body, file, case, rungs, *edit)


PLANTED = [
    mistake(place, *row)
    for table in (TABLE, OPTIMISER)
    for place, rows in table.items()
    for row in rows
]

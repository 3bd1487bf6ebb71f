"""Mistakes to plant in mhc_pre, and the calls of it that its gradient's bodies take too."""

from dataclasses import dataclass, replace

import mlx.core as mx
from cases import Case

from mhc_mlx import DEEPSEEK_V4, PAPER
from mhc_mlx.conventions import IDENTITY, KRONECKER
from mutation.mistakes import (
    BARRIER,
    DIFFER,
    EPS,
    MORE,
    OUTSIDE,
    RACE,
    TWO,
    UNWRITTEN,
    WRONG,
    mistakes,
)


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


PRE = Case("mhc_pre", (5,), 4, 64, convention=PAPER)
PRE_RAGGED = Case("mhc_pre", (5,), 3, 129, convention=DEEPSEEK_V4)
PRE_5 = Case("mhc_pre", (5,), 5, 31, convention=PAPER)
PRE_MANY = Case("mhc_pre", (70,), 4, 64, convention=PAPER)
PRE_LONG = Case("mhc_pre", (5,), 4, 160, convention=PAPER)  # several runs of k a simdgroup
PRE_RUNS = Case("mhc_pre", (5,), 4, 256, convention=PAPER)  # two packs of u a lane
PRE_4 = Case("mhc_pre", (5,), 4, 31, convention=PAPER)  # aligned, but no whole runs
PRE_HALF = Case("mhc_pre", (17,), 4, 64, "bfloat16", PAPER, phi="bfloat16")  # a simdgroup has 16
MULTIPLIED = Case("mhc_pre", (17,), 4, 64, "bfloat16", PAPER, norm=False)  # three tiles
PRE_PLAIN = Case("mhc_pre", (5,), 4, 64, convention=PAPER, norm=False)
MANY_PLAIN = Case("mhc_pre", (20,), 4, 512, convention=PAPER, norm=False)
MADE_TWICE = Threads("mhc_pre", (5,), 4, 1280, convention=PAPER, threads=96)  # u, not kept
SHARED_U = Case("mhc_pre", (19,), 4, 1280, "bfloat16", PAPER)  # two simdgroups share u
PRE_65 = Case("mhc_pre", (65,), 4, 8, convention=PAPER)  # chunks of 33 and 32 tokens
PRE_12 = Case("mhc_pre", (5,), 12, 33, convention=PAPER)  # threadgroups share a tile
IDENTITY_32 = Case("mhc_pre", (20,), 32, 8, convention=IDENTITY)  # three blocks, two shares
NORM_EPS = Case("mhc_pre", (5,), 4, 64, convention=PAPER, norm_eps=0.5)
RINGED = Case("mhc_pre", (17,), 4, 256, "bfloat16", PAPER, norm=False)  # several runs a slice
RINGED_12 = Case("mhc_pre", (5,), 4, 64, convention=KRONECKER)  # 12 outputs of 16
PRE_EPS = Case("mhc_pre", (5,), 4, 64, convention=replace(EPS, pre_eps=0.1, post_eps=0.2))
FEW = Case("mhc_pre", (5,), 4, 64, convention=replace(PAPER, iters=2))
FEW_5 = Case("mhc_pre", (5,), 5, 31, convention=replace(PAPER, iters=2))
PRE_BANDS = Threads("mhc_pre", (9,), 4, 64, convention=PAPER)  # two bands of eight slices
PRE_SLICE = Slice("mhc_pre", (5,), 4, 64, convention=PAPER)

pre = mistakes("mhc_pre")
read, units = (mistakes("mhc_pre", f"include/{k}.h") for k in ("read_tile", "streams"))
made, alone = (
    mistakes("mhc_pre", "include/coefficients.h"),
    mistakes("mhc_pre", "include/sinkhorn.h"),
)
tiles, runs = mistakes("mhc_pre", "include/phi_product.h"), mistakes("mhc_pre", "include/common.h")
metal, cuda = (
    mistakes("mhc_pre", "include/metal/matrices.h"),
    mistakes("mhc_pre", "include/cuda/matrices.h"),
)
ptx, ring = (
    mistakes("mhc_pre", "include/cuda/ptx.h"),
    mistakes("mhc_pre", "include/cuda/phi_product_ring.h"),
)
SYNC = "simdgroup_sync();"

PRE_FORWARD = [
    # mhc_pre
    pre("no barrier before slices are added", PRE, BARRIER, "", rules=RACE),
    pre("no barrier before the coefficients are used", PRE, BARRIER, "", nth=1, rules=UNWRITTEN),
    pre("a tile past the last token", PRE, "if (i < count && lane", "if (lane", rules=OUTSIDE),
    pre(
        "outputs past the last",
        PRE_RAGGED,
        "lane < LOGITS_AT_ONCE && o < NUM_LOGITS",
        "lane < LOGITS_AT_ONCE",
        rules=OUTSIDE,
    ),
    read("u past the last token", PRE_PLAIN, "q < 2 * count", "q < 2 * (count + 1)", rules=OUTSIDE),
    read(
        "u past the last token, kept",
        PRE,
        "team < TEAMS && i < count",
        "team < TEAMS",
        rules=OUTSIDE,
    ),
    read(
        "u past the last channel",
        SHARED_U,
        "if (in_range && c < C) ST",
        "if (in_range) ST",
        rules=OUTSIDE,
    ),
    read(
        "squares of half of u",
        SHARED_U,
        "k < SHARERS * U_PACKS; ++k)",
        "k < U_PACKS; ++k)",
        parity=WRONG,
    ),
    read("no barrier before squares are added", SHARED_U, BARRIER, "", rules=RACE),
    read("no barrier after squares are added", SHARED_U, BARRIER, "", nth=1, rules=RACE),
    read(
        "h_pre of another token, kept",
        PRE,
        "pre + i * N, C, C - c, al",
        "pre, C, C - c, al",
        parity=WRONG,
    ),
    units("r dropped", PRE, "if (NORM) v *= r;", "", parity=WRONG),
    made("norm forgotten", PRE, "value = scale * product", "value = product", parity=WRONG),
    pre("mean over a stream", PRE, "x_dot_x, K, alpha", "x_dot_x, C, alpha", parity=WRONG),
    made("norm_eps dropped", NORM_EPS, "param::NORM_EPS", "param::PRE_EPS", parity=WRONG),
    pre(
        "the last slice of k left out",
        PRE,
        "w < SLICES; ++w)",
        "w < SLICES - 1; ++w)",
        parity=WRONG,
    ),
    pre(
        "an output for the norm",
        PRE,
        "simd_shuffle(s, ushort(LOGITS_AT_ONCE))",
        "simd_shuffle(s * s, ushort(0))",
        parity=WRONG,
    ),
    pre(
        "every other run of a slice",
        PRE_LONG,
        "32 * SLICES",
        "64 * SLICES",
        parity=WRONG,
        traffic=MORE,
    ),
    pre(
        "no place for sum(x ** 2)",
        PRE,
        "PITCH = LOGITS_AT_ONCE + 1",
        "PITCH = LOGITS_AT_ONCE",
        rules=RACE,
    ),
    pre(
        "sums of one slice",
        PRE,
        "sums[SLICES * TILE_TOKENS * PITCH]",
        "sums[TILE_TOKENS * PITCH]",
        rules=OUTSIDE,
    ),
    tiles("ragged rows loaded whole", PRE_4, "K % 32 == 0", "K % 4 == 0", rules=OUTSIDE),
    tiles(
        "unaligned phi loaded whole",
        PRE_SLICE,
        "8 / PHI_ROWS>()>(phi)",
        "8 / PHI_ROWS>()>(x)",
        rules="misaligned",
    ),
    tiles(
        "tiles of tokens exchanged",
        PRE_HALF,
        "(m * 8 + sum_token",
        "((TILES - 1 - m) * 8 + sum_token",
        parity=WRONG,
    ),
    pre(
        "bands of tokens at one place",
        PRE_BANDS,
        "slice * TILE_TOKENS + first_row",
        "slice * TILE_TOKENS",
        rules=RACE,
    ),
    tiles(
        "tiles of outputs exchanged",
        PRE,
        "b * 8 + sum_logit",
        "(BLOCK - 1 - b) * 8 + sum_logit",
        parity=WRONG,
    ),
    made("alpha of pre alone", PRE, "alpha[part]", "alpha[0]", parity=WRONG),
    runs(
        "post_eps of pre",
        PRE_EPS,
        "part == 0 ? param::PRE_EPS : param::POST_EPS",
        "param::PRE_EPS",
        parity=WRONG,
    ),
    made("bias saved", PRE, "l[o] = value;", "l[o] = z;", parity=WRONG),
    made(
        "the token's norm not saved",
        PRE,
        "l[NUM_LOGITS] = scale",
        "l[NUM_LOGITS] = 1.0f",
        parity=WRONG,
    ),
    made("norms saved with every output", PRE, "SAVE_LOGITS && o == 0", "SAVE_LOGITS", rules=TWO),
    pre("u by every share", PRE_12, "logit_begin == 0 ? count : 0", "count", rules=UNWRITTEN),
    pre(
        "shares rounded down", IDENTITY_32, "+ SPLITS - 1) / SPLITS", ") / SPLITS", rules=UNWRITTEN
    ),
    pre(
        "a share past the last output",
        IDENTITY_32,
        "logit_begin + LOGITS_PER_GROUP < NUM_LOGITS ? logit_begin + LOGITS_PER_GROUP : NUM_LOGITS",
        "logit_begin + LOGITS_PER_GROUP",
        traffic="x",
    ),
    pre(
        "a tile for each of its shares",
        IDENTITY_32,
        "first = threadgroup_position_in_grid.x / SPLITS * TILE_TOKENS",
        "first = threadgroup_position_in_grid.x * TILE_TOKENS",
        rules="nobody writes",
    ),
    made(
        "logits by columns",
        PRE_RAGGED,
        "COLUMNS ? q % N * N + q / N : q",
        "COLUMNS ? q : q % N * N + q / N",
        parity=WRONG,
    ),
    made(
        "h_res by columns",
        PRE,
        "OUT_COLUMNS ? p[q % N][q / N] : p[q / N][q % N]",
        "p[q / N][q % N]",
        parity=WRONG,
    ),
    alone(
        "h_res by columns, a line per lane",
        PRE_5,
        "OUT_COLUMNS ? uint(j * N) + lane : lane * uint(N) + uint(j)",
        "lane * uint(N) + uint(j)",
        parity=WRONG,
    ),
    pre(
        "an iteration too few",
        FEW,
        "OUT_COLUMNS, ITERS, SIMDS",
        "OUT_COLUMNS, ITERS - 1, SIMDS",
        parity=WRONG,
    ),
    made(
        "an iteration too few, a line per lane",
        FEW_5,
        "OUT_COLUMNS, ITERS>(z",
        "OUT_COLUMNS, ITERS - 1>(z",
        parity=WRONG,
    ),
    made(
        "matrices past the last",
        PRE,
        "m < TILE_TOKENS && t < tokens",
        "m < TILE_TOKENS",
        rules=UNWRITTEN,
    ),
    made(
        "matrices past the tile",
        PRE_MANY,
        "m < TILE_TOKENS && t < tokens",
        "t < tokens",
        rules=OUTSIDE,
    ),
    pre(
        "tokens past the tile",
        PRE_MANY,
        "tokens - first < uint(TILE_TOKENS) ? int(tokens - first) : TILE_TOKENS",
        "int(tokens - first)",
        rules=OUTSIDE,
    ),
    alone("idle lanes write", PRE_5, "in_range && lane < uint(N)", "in_range", rules=TWO),
    read(
        "h_pre of another token",
        MADE_TWICE,
        "pre + i * N, C, C - c0",
        "pre, C, C - c0",
        nth=2,
        parity=WRONG,
    ),
    read("wrong width of a step", PRE_PLAIN, "c0 += 2 * STEP", "c0 += 32", rules=TWO),
    read("the first piece of u twice", MULTIPLIED, "q % 2 * STEP", "0 * STEP", rules=TWO),
    read(
        "u not divided by its norm",
        MADE_TWICE,
        "(o[k], r, weight",
        "(o[k], 1.0f, weight",
        parity=WRONG,
    ),
    read(
        "a lane's second pack its first",
        PRE_RUNS,
        "(j0 + j) * C + k * 32 * VEC",
        "(j0 + j) * C",
        rules=DIFFER,
    ),
    read("packs past the last", PRE, " && k * 32 * VEC < remaining", "", rules=OUTSIDE),
    read(
        "the readers' tokens", MANY_PLAIN, "q += READERS", "q += READERS + 1", rules="nobody writes"
    ),
    units(
        "a square of each pack",
        MADE_TWICE,
        "sum += v[e] * v[e]",
        "sum += v[0] * v[0]",
        parity=WRONG,
    ),
    alone("eps dropped, a lane alone", PRE_EPS, "float d = eps;", "float d = 0.0f;", parity=WRONG),
    alone(
        "lines for columns, a lane alone",
        PRE,
        "k % 2 == 0 ? p[a][b] : p[b][a]",
        "p[a][b]",
        parity=WRONG,
    ),
    alone(
        "half a step too few, a lane alone",
        FEW,
        "k < 2 * iters",
        "k < 2 * iters - 1",
        parity=WRONG,
    ),
    # tiles of mhc_pre
    tiles("tokens past the last", PRE_LONG, "t < tokens ? t : 0u", "t", rules=OUTSIDE),
    tiles("phi past the last output", PRE_RAGGED, "|| o < NUM_LOGITS", "|| true", rules=OUTSIDE),
    tiles("a slice without a run", PRE_65, "if (runs.first < runs.K)", "if (true)", rules=OUTSIDE),
    runs("k past the row", PRE_RAGGED, "if (e < remaining)", "if (true)", rules=OUTSIDE),
    runs(
        "k past the row not zero",
        PRE_RAGGED,
        "r.p[e / VEC].v[e % VEC] = static_cast<T>(0.0f);",
        "",
        parity=WRONG,
    ),
    tiles(
        "a run too many",
        PRE_LONG,
        "k < runs.K; k += runs.step",
        "k <= runs.K; k += runs.step",
        rules=OUTSIDE,
    ),
    tiles("x stands still", PRE_LONG, "pointers.x[m] += step", "pointers.x[m]", parity=WRONG),
    tiles(
        "phi stands still",
        PRE_LONG,
        "pointers.phi[b][q] += step",
        "pointers.phi[b][q]",
        parity=WRONG,
        traffic=MORE,
    ),
    tiles(
        "x from the first run",
        PRE,
        "size_t(k + x_k(lane))",
        "size_t(x_k(lane))",
        parity=WRONG,
    ),
    tiles("phi's first 8 outputs", PRE, "logit + b * 8 +", "logit +", parity=WRONG, traffic=MORE),
    tiles(
        "the first 8 tokens",
        PRE_HALF,
        "uint(m * 8 + x_row(lane))",
        "uint(x_row(lane))",
        parity=WRONG,
    ),
    tiles(
        "half a simdgroup at a product",
        PRE,
        "multiply_add(sum",
        "if (lane < 16) multiply_add(sum",
        rules="simd operations",
    ),
    tiles(
        "runs of k skipped",
        PRE_LONG,
        "k += runs.step",
        "k += 2 * runs.step",
        parity=WRONG,
        traffic=MORE,
    ),
    metal(
        "sums transposed",
        PRE,
        "sum_token(int lane) { return matrix_row",
        "sum_token(int lane) { return matrix_column",
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
    metal("a product short", PRE, "s < 4; ++s) multiply", "s < 3; ++s) multiply", parity=WRONG),
    metal("a sum from nothing", PRE, "md.thread_elements()[e] = d[e];", "", parity="finite"),
    metal("x for phi", PRE, "x[m].v[s], phi.v[s]", "phi.v[s], x[m].v[s]", parity=WRONG),
    metal("all products of 8 tokens", PRE_HALF, "sum[m][b]", "sum[0][b]", parity=WRONG),
    metal(
        "a float for a matrix",
        PRE,
        "(md, ma, mb, md)",
        "(md, ma, mb, d[0])",
        dialect="no matching function",
        rules="does not compile",
    ),
    metal(
        "a tile in no address space",
        PRE,
        "to_tile(thread XTile",
        "to_tile(XTile",
        dialect="address space",
    ),
    metal("half of the squares", PRE, "e < 8; ++e) run", "e < 4; ++e) run", parity=WRONG),
    metal("squares of other lanes", PRE, "ushort(8)", "ushort(16)", parity=WRONG),
    ptx("a longer instruction", PRE, "m16n8k8", "m16n8k16", nvrtc="mma"),
    ptx("an integer in a float's register", PRE, '"r"(b0)', '"f"(b0)', nvrtc="constraint"),
    cuda("the last bits of phi", PRE, "phi, PHI)", "phi, 0)", parity=WRONG),
    cuda("the first 8 tokens alone", RINGED, "y ? y->w[p][e] : 0u", "0u", parity=WRONG),
    cuda("an element for two", RINGED, "= w << 16", "= w & 0xffff0000u", parity=WRONG),
    ring("a run before it is there", RINGED, "<SLOTS - 1>", "<SLOTS>", rules=UNWRITTEN),
    ring("a run that other lanes fetch", RINGED, SYNC, "", rules=UNWRITTEN),
    ring("fetched while other lanes read", RINGED, SYNC, "", nth=1, rules=RACE),
    ring("a ring for all simdgroups", RINGED, "runs.simd * SLOTS", "0 * SLOTS", rules=RACE),
    ring("odd rows as even ones", PRE, "(lane / 4 & 1)", "0", rules=DIFFER),
    ring(
        "the ring: tokens past the last", RINGED, "t < runs.tokens ? t", "true ? t", rules=OUTSIDE
    ),
    ring(
        "the ring: outputs past the last",
        RINGED_12,
        "int(o) < NUM_LOGITS",
        "int(o) < 99",
        rules=OUTSIDE,
    ),
    ring("runs past the row", RINGED, "if (next_k < runs.K)", "if (true)", rules=OUTSIDE),
    ring("the ring: x stands still", RINGED, "x += runs.step;", "", rules=DIFFER),
    ring("the first stage alone", RINGED, "slot + 1 ==", "1 ==", rules=RACE),
]

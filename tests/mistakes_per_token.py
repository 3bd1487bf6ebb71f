"""Mistakes to plant in the bodies of ops whose coefficients each token makes for itself."""

from dataclasses import dataclass, replace

import mlx.core as mx
from cases import Case
from mistakes import (
    BARRIER,
    BOUNDS,
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

from mhc_mlx import DEEPSEEK_V4, PAPER
from mhc_mlx.conventions import IDENTITY, KRONECKER, MHC_LITE


@dataclass(frozen=True)
class Threads(Case):
    """A call with so many threads a threadgroup."""

    threads: int = 512


READ = Case("stream_aggregate", (5,), 4, 64)
READ_EACH = Case("stream_aggregate", (5,), 3, 129, per_token=(True, False))
PRE = Case("mhc_pre", (5,), 4, 64, convention=PAPER)
PRE_RAGGED = Case("mhc_pre", (5,), 3, 129, convention=DEEPSEEK_V4)
PRE_5 = Case("mhc_pre", (5,), 5, 31, convention=PAPER)
PRE_MANY = Case("mhc_pre", (70,), 4, 64, convention=PAPER)
LITE = Case("mhc_pre", (5,), 3, 31, convention=MHC_LITE)
FACTORS = Case("mhc_pre", (5,), 4, 31, convention=KRONECKER)
PRE_LONG = Case("mhc_pre", (5,), 4, 160, convention=PAPER)  # several runs of k a simdgroup
PRE_RUNS = Case("mhc_pre", (5,), 4, 256, convention=PAPER)  # two packs of u a lane
PRE_4 = Case("mhc_pre", (5,), 4, 31, convention=PAPER)  # aligned, but no whole runs
PRE_HALF = Case("mhc_pre", (17,), 4, 64, "bfloat16", PAPER, phi="bfloat16")  # a simdgroup has 16
MULTIPLIED = Case("mhc_pre", (17,), 4, 64, "bfloat16", PAPER, norm=False)  # three tiles
NORMED = Case("mhc_pre", (17,), 4, 64, "bfloat16", PAPER)  # dread
TEAM = Threads("mhc_pre", (19,), 4, 512, "bfloat16", PAPER, threads=64)  # share a token
TWICE = Threads("mhc_pre", (19,), 4, 1000, "bfloat16", PAPER, threads=64)  # and read it twice
PRE_PLAIN = Case("mhc_pre", (5,), 4, 64, convention=PAPER, norm=False)
MANY_PLAIN = Case("mhc_pre", (20,), 4, 512, convention=PAPER, norm=False)
MADE_TWICE = Threads("mhc_pre", (5,), 4, 1280, convention=PAPER, threads=96)  # u, not kept
SHARED_U = Case("mhc_pre", (19,), 4, 1280, "bfloat16", PAPER)  # two simdgroups share u
DOTTED = Case("mhc_pre", (3,), 4, 512, "bfloat16", PAPER, norm=False)  # two packs a lane
CHUNKS = Case("mhc_pre", (130,), 4, 64, "bfloat16", PAPER, norm=False)  # of 65 tokens
STAGES = Case("mhc_pre", (70,), 4, 64, "bfloat16", PAPER, norm=False)  # of 64 tokens
MULTIPLIED_RAGGED = Case("mhc_pre", (5,), 3, 31, "bfloat16", DEEPSEEK_V4, norm=False)
PRE_65 = Case("mhc_pre", (65,), 4, 8, convention=PAPER)  # chunks of 33 and 32 tokens
PRE_12 = Case("mhc_pre", (5,), 12, 33, convention=PAPER)  # threadgroups share a tile
IDENTITY_32 = Case("mhc_pre", (20,), 32, 8, convention=IDENTITY)  # three blocks, two shares
NORM_EPS = Case("mhc_pre", (5,), 4, 64, convention=PAPER, norm_eps=0.5)
RINGED = Case("mhc_pre", (17,), 4, 256, "bfloat16", PAPER, norm=False)  # several runs a slice
RINGED_12 = Case("mhc_pre", (5,), 4, 64, convention=KRONECKER)  # 12 outputs of 16
PRE_EPS = Case("mhc_pre", (5,), 4, 64, convention=replace(EPS, pre_eps=0.1, post_eps=0.2))
FEW = Case("mhc_pre", (5,), 4, 64, convention=replace(PAPER, iters=2))
FEW_5 = Case("mhc_pre", (5,), 5, 31, convention=replace(PAPER, iters=2))
COEFFICIENTS = Case("mhc_coefficients", (5,), 4, 64, convention=PAPER)


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
SPARE = Threads("mhc_pre", (5,), 3, 31, "bfloat16", DEEPSEEK_V4, norm=False, threads=128)
PRE_BANDS = Threads("mhc_pre", (9,), 4, 64, convention=PAPER)  # two bands of eight slices
PRE_SLICE = Slice("mhc_pre", (5,), 4, 64, convention=PAPER)

token, dots = mistakes("mhc_token_backward"), mistakes("mhc_token_backward", "streams.h")
made_back = mistakes("mhc_token_backward", "coefficients.h")
pre, pre_back = mistakes("mhc_pre"), mistakes("mhc_pre_backward")
outer, alone = mistakes("mhc_phi_gradient"), mistakes("mhc_pre", "sinkhorn.h")
made, runs = mistakes("mhc_pre", "coefficients.h"), mistakes("mhc_pre", "common.h")
tiles, metal = mistakes("mhc_pre", "tiles.h"), mistakes("mhc_pre", "tiles_metal.h")
cuda, ring = mistakes("mhc_pre", "tiles_cuda.h"), mistakes("mhc_pre", "ring_cuda.h")
ptx, ptx_products = mistakes("mhc_pre", "ptx.h"), mistakes("mhc_projection_backward", "ptx.h")
SYNC = "simdgroup_sync();"
streams = mistakes("mhc_pre", "streams.h")
read, read_back = mistakes("stream_aggregate"), mistakes("stream_aggregate_backward")
exact, exact_back = mistakes("mixing_matrix"), mistakes("mixing_matrix_backward")

product = mistakes("mhc_projection_backward")
products, metal_products, cuda_products = (
    mistakes("mhc_projection_backward", f"products{k}.h") for k in ("", "_metal", "_cuda")
)

PER_TOKEN = [
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
    pre("no barrier before slices are added", PRE, BARRIER, "", rules=RACE),
    pre("no barrier before the coefficients are used", PRE, BARRIER, "", nth=1, rules=UNWRITTEN),
    pre("a tile past the last token", PRE, "if (t < tokens && lane", "if (lane", rules=OUTSIDE),
    pre(
        "outputs past the last", PRE_RAGGED, "lane < WIDE && o < OUTS", "lane < WIDE", rules=OUTSIDE
    ),
    pre(
        "u past the last token",
        PRE_PLAIN,
        " && first + uint(q / PIECES) < tokens",
        "",
        rules=OUTSIDE,
    ),
    pre("u past the last token, kept", PRE, " && t < tokens && begin", " && begin", rules=OUTSIDE),
    pre(
        "u past the last channel",
        SHARED_U,
        "k * 32 * VEC;\n        if (live && c < C)",
        "k * 32 * VEC;\n        if (live)",
        rules=OUTSIDE,
    ),
    pre("squares of half of u", SHARED_U, "k < TEAM * KEPT; ++k)", "k < KEPT; ++k)", parity=WRONG),
    pre("no barrier before squares are added", SHARED_U, BARRIER, "", nth=2, rules=RACE),
    pre("no barrier after squares are added", SHARED_U, BARRIER, "", nth=3, rules=RACE),
    pre(
        "h_pre of another token, kept",
        PRE,
        "pre + i * N, C, C - c, w",
        "pre, C, C - c, w",
        parity=WRONG,
    ),
    pre("r dropped", PRE, "[e] * r * w[e]", "[e] * w[e]", parity=WRONG),
    pre("norm forgotten", PRE, "unit = scale * s", "unit = s", parity=WRONG),
    pre("mean over a stream", PRE, "static_cast<float>(K)", "static_cast<float>(C)", parity=WRONG),
    pre("norm_eps dropped", NORM_EPS, "params[3]", "params[0]", parity=WRONG),
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
        "simd_shuffle(s, ushort(WIDE))",
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
    made("post_eps of pre", PRE_EPS, "part == 0 ? 0 : 2", "0", parity=WRONG),
    pre("bias saved", PRE, "+ o] = unit;", "+ o] = z;", parity=WRONG),
    pre("the token's norm not saved", PRE, "+ OUTS] = scale", "+ OUTS] = 1.0f", parity=WRONG),
    pre("norms saved with every output", PRE, "SAVE && o == 0", "SAVE", rules=TWO),
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
        "first = threadgroup_position_in_grid.x / SPLITS * TILE",
        "first = threadgroup_position_in_grid.x * TILE",
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
    pre("an iteration too few", FEW, "ITERS, static", "ITERS - 1, static", parity=WRONG),
    made(
        "an iteration too few, a line per lane",
        FEW_5,
        "live, iters",
        "live, iters - 1",
        parity=WRONG,
    ),
    pre("matrices past the last", PRE, "m < TILE && t < tokens", "m < TILE", rules=UNWRITTEN),
    pre("matrices past the tile", PRE_MANY, "m < TILE && t < tokens", "t < tokens", rules=OUTSIDE),
    alone("idle lanes write", PRE_5, "live && lane < uint(N)", "live", rules=TWO),
    pre(
        "h_pre of another token",
        MADE_TWICE,
        "pre + i * N, C, C - c0",
        "pre, C, C - c0",
        rules=DIFFER,
    ),
    pre(
        "wrong width of a step",
        PRE_PLAIN,
        "c0 += PIECES * CHUNKS * 32 * VEC",
        "c0 += 32",
        rules=TWO,
    ),
    pre("the first piece of u twice", MULTIPLIED, "(q % PIECES * CHUNKS", "(0 * CHUNKS", rules=TWO),
    pre(
        "u not divided by its norm",
        MADE_TWICE,
        "o[k][e] * r * w[e]",
        "o[k][e] * w[e]",
        parity=WRONG,
    ),
    streams(
        "a lane's second pack its first",
        PRE_RUNS,
        "(j0 + j) * C + k * 32 * VEC",
        "(j0 + j) * C",
        rules=DIFFER,  # from an array that is not aligned
    ),
    streams("packs past the last", PRE, " && k * 32 * VEC < left", "", rules=OUTSIDE),
    pre("the readers' tokens", MANY_PLAIN, "q += READERS", "q += SIMDS", rules="nobody writes"),
    pre(
        "a square of each pack",
        MADE_TWICE,
        "some += o[k][e] * o[k][e]",
        "some += o[k][0] * o[k][0]",
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
        nth=1,
        parity=WRONG,
    ),
    # tiles of mhc_pre
    tiles("tokens past the last", PRE_LONG, "t < tokens ? t : 0u", "t", rules=OUTSIDE),
    tiles("phi past the last output", PRE_RAGGED, "|| o < OUTS", "|| true", rules=OUTSIDE),
    tiles("a slice without a run", PRE_65, "if (c.first < c.K)", "if (true)", rules=OUTSIDE),
    runs("k past the row", PRE_RAGGED, "if (e < left)", "if (true)", rules=OUTSIDE),
    runs(
        "k past the row not zero",
        PRE_RAGGED,
        "r.p[e / VEC].v[e % VEC] = static_cast<T>(0.0f);",
        "",
        parity=WRONG,
    ),
    tiles(
        "a run too many", PRE_LONG, "k < c.K; k += c.step", "k <= c.K; k += c.step", rules=OUTSIDE
    ),
    tiles("x stands still", PRE_LONG, "at.x[m] += step", "at.x[m]", parity=WRONG),
    tiles(
        "phi stands still",
        PRE_LONG,
        "at.phi[b][q] += step",
        "at.phi[b][q]",
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
    tiles("phi's first 8 outputs", PRE, "output + b * 8 +", "output +", parity=WRONG, traffic=MORE),
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
        "runs of k skipped", PRE_LONG, "k += c.step", "k += 2 * c.step", parity=WRONG, traffic=MORE
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
    metal("a product short", PRE, "s < 4; ++s) simdgroup", "s < 3; ++s) simdgroup", parity=WRONG),
    metal("a sum from nothing", PRE, "d = simdgroup_float8x8(0.0f)", "d", parity="finite"),
    metal("x for phi", PRE, "x[m].m[s], phi.m[s], d", "phi.m[s], x[m].m[s], d", parity=WRONG),
    metal("all products of 8 tokens", PRE_HALF, "sum[m][b]", "sum[0][b]", parity=WRONG),
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
    metal("half of the squares", PRE, "e < 8; ++e) run", "e < 4; ++e) run", parity=WRONG),
    metal("squares of other lanes", PRE, "ushort(8)", "ushort(16)", parity=WRONG),
    ptx("a longer instruction", PRE, "m16n8k8", "m16n8k16", nvrtc="mma"),
    ptx("an integer in a float's register", PRE, '"r"(b0)', '"f"(b0)', nvrtc="constraint"),
    cuda("the last bits of phi", PRE, "phi, PHI)", "phi, 0)", parity=WRONG),
    cuda("the first 8 tokens alone", RINGED, "y ? y->w[p][e] : 0u", "0u", parity=WRONG),
    cuda("an element for two", RINGED, "= w << 16", "= w & 0xffff0000u", parity=WRONG),
    ring("a run before it is there", RINGED, "<STAGES - 1>", "<STAGES>", rules=UNWRITTEN),
    ring("a run that other lanes fetch", RINGED, SYNC, "", rules=UNWRITTEN),
    ring("fetched while other lanes read", RINGED, SYNC, "", nth=1, rules=RACE),
    ring("a ring for all simdgroups", RINGED, "c.simd * STAGES", "0 * STAGES", rules=RACE),
    ring("odd rows as even ones", PRE, "(lane / 4 & 1)", "0", rules=DIFFER),
    ring("tokens past the last", RINGED, "t < c.tokens ? t", "true ? t", rules=OUTSIDE),
    ring("outputs past the last", RINGED_12, "int(o) < OUTS", "int(o) < 99", rules=OUTSIDE),
    ring("runs past the row", RINGED, "if (wanted < c.K)", "if (true)", rules=OUTSIDE),
    ring("x stands still", RINGED, "x += c.step;", "", rules=DIFFER),
    ring("the first stage alone", RINGED, "stage + 1 ==", "1 ==", rules=RACE),
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
    # mhc_token_backward
    token("du' of the first token", NORMED, "(dread + t * size_t(C)", "(dread", rules=TWO),
    token("h_pre of the first token", MULTIPLIED, "side[t * (N + 1) + l", "side[l", rules=TWO),
    token("dp past the last output", MULTIPLIED, "if (lane < OUTS) dp", "dp", rules=TWO),
    token("tokens past the last", MULTIPLIED, " && first + uint(i) < tokens", "", rules=OUTSIDE),
    token(
        "matrices past the last",
        MULTIPLIED,
        "own < tokens && lane / W < BATCH ? ",
        "true ? ",
        rules=OUTSIDE,
    ),
    token(
        "the first token's matrix", MULTIPLIED, "ushort(i % BATCH * W + line)", "line", parity=WRONG
    ),
    token("another line's entry", MULTIPLIED, "place == j ? v", "line == j ? v", parity=WRONG),
    token("divisors of another lane", MULTIPLIED, "divisors + tid", "divisors", rules=RACE),
    token("sigmoid's slope dropped", MULTIPLIED, "d = s * (1.0f - s)", "d = s", parity=WRONG),
    token("alpha dropped", MULTIPLIED, "d *= a * scale", "d *= scale", parity=WRONG),
    token("dalpha without l", MULTIPLIED, "sum_l += d * unit", "sum_l += d", parity=WRONG),
    token("pull without its mean", MULTIPLIED, "/ static_cast<float>(K);", ";", parity=WRONG),
    token("a batch again", MULTIPLIED, "(SIMDS / TEAM) * OWN) {", "(SIMDS / TEAM)) {", rules=TWO),
    token("slope dropped", NORMED, "(through - slope * normal)", "through", parity=WRONG),
    token("slope without r", NORMED, "slope = r * r *", "slope = r *", parity=WRONG),
    token("dweight without r", NORMED, "g * u[e] * r;", "g * u[e];", parity=WRONG),
    token("u of h_pre's first", NORMED, "+= dots.pre[j] * s", "+= dots.pre[0] * s", parity=WRONG),
    token("from nothing", TWICE, "i > 0 || first != self * OWN", "true", rules=UNWRITTEN),
    token("no barrier before shares are added", TEAM, BARRIER, "", rules=UNWRITTEN),
    token("the next token's shares in their place", TEAM, "turn ^= 1;", ";", rules=RACE),
    token(
        "a simdgroup's share left out", TEAM, "k < TEAM; ++k)", "k < TEAM - 1; ++k)", parity=WRONG
    ),
    token("all by the first simdgroup", TEAM, "(i / BATCH == simd)", "(simd == 0)", parity=WRONG),
    token("no barrier before the ends are added", TEAM, BARRIER, "", nth=1, rules=UNWRITTEN),
    token("the ends of one simdgroup", TEAM, "k < TEAM && lane", "k < 1 && lane", parity=WRONG),
    token(
        "dweight of the last token",
        TWICE,
        "i > 0 || first != self * OWN",
        "false",
        parity=WRONG,
        traffic="partial",
    ),
    dots("weight dropped", NORMED, "d *= w[e];", ";", parity=WRONG),
    dots("the first pack again", DOTTED, "du + (c + k * 32 * VEC)", "du + c", rules=DIFFER),
    dots(
        "unaligned du loaded whole",
        MULTIPLIED,
        "load<T, VEC>(du + c, whole)",
        "load<T, VEC>(du + c, true)",
        rules="misaligned",
    ),
    made_back(
        "bias dropped",
        MULTIPLIED,
        " + static_cast<float>(bias[i]); }",
        "; }",
        parity=WRONG,
        traffic="bias 128",
    ),
    # mhc_projection_backward
    product("no barrier before dp is staged", STAGES, BARRIER, "", rules=RACE),
    product("no barrier after dp is staged", MULTIPLIED, BARRIER, "", nth=1, rules=UNWRITTEN),
    product("pull forgotten", MULTIPLIED, "v[r][e] += pull[r] * w[e];", ";", parity=WRONG),
    product("another stream's h_pre", MULTIPLIED, "sides[at + j]", "sides[at]", parity=WRONG),
    product(
        "dx_out forgotten", MULTIPLIED, "if (PASS) mhc::run", "if (false) mhc::run", parity=WRONG
    ),
    product("tokens past the last", MULTIPLIED, "if (t < stop) mhc", "mhc", rules=OUTSIDE),
    product(
        "side past the last token", MULTIPLIED, "(N + 1)) < end", "(N + 1)) < ~0u", rules=OUTSIDE
    ),
    product("a simdgroup past the last unit", SPARE, "unit < units", "unit >= 0", rules=OUTSIDE),
    product(
        "the next chunk's tokens too",
        CHUNKS,
        "begin + each < tokens ? begin + each :",
        "",
        rules=TWO,
    ),
    product(
        "sums of all chunks in one row",
        CHUNKS,
        "size_t(id / groups) * OUTS",
        "size_t(0) * OUTS",
        rules=TWO,
    ),
    product(
        "another stream's phi",
        MULTIPLIED,
        "phi + (j * C + c0)",
        "phi + c0",
        parity=WRONG,
        traffic=MORE,
    ),
    products(
        "channels past the last", MULTIPLIED_RAGGED, "if (e < left) to[e]", "to[e]", rules=TWO
    ),
    metal_products(
        "the last tile's sums alone",
        MULTIPLIED,
        "sums.v[s][p][e] +=",
        "sums.v[s][p][e] =",
        parity=WRONG,
    ),
    metal_products(
        "outputs past the last",
        MULTIPLIED_RAGGED,
        "o < OUTS && k < left ? static",
        "k < left ? static",
        rules=OUTSIDE,
    ),
    metal_products(
        "dp past the last token", MULTIPLIED, "t < end && o < OUTS", "o < OUTS", rules=OUTSIDE
    ),
    metal_products(
        "phi's columns as they lie",
        MULTIPLIED,
        "(SPAN / 4) + 2 * p + e;\n        c.m",
        "2 + 8 * p + e;\n        c.m",
        parity=WRONG,
    ),
    ptx_products("a shorter instruction", MULTIPLIED, "m16n8k16", "m16n8k8", nvrtc="mma"),
    ptx_products("two matrices for four", MULTIPLIED, "x2.trans", "x4.trans", nvrtc="ldmatrix"),
    ptx_products(
        "a transpose of bytes",
        MULTIPLIED,
        "m8n8.trans.b16 %0",
        "m8n8.trans.b8 %0",
        nvrtc="movmatrix",
    ),
    cuda_products("rows past the last", MULTIPLIED, "t < end ? t : end - 1", "t", rules=OUTSIDE),
    cuda_products("a tile too late", STAGES, "copies<SLOTS - 1>", "copies<SLOTS>", rules=UNWRITTEN),
    cuda_products("tiles past the last", CHUNKS, "if (first < end) {", "{", traffic=MORE),
    cuda_products(
        "dx_out in du's place",
        MULTIPLIED,
        "at + Place::PASSED, from.dx_out",
        "at + Place::DU, from.dx_out",
        rules=UNWRITTEN,
    ),
    cuda_products("the first part of dp alone", MULTIPLIED, "part = 2;", "part = 0;", parity=WRONG),
    cuda_products(
        "tokens not in pairs", MULTIPLIED, "= transposed(reint", "= (reint", parity=WRONG
    ),
    cuda_products(
        "outputs not in pairs",
        MULTIPLIED,
        "true, true>(b[part]",
        "true, false>(b[part]",
        parity=WRONG,
    ),
    cuda_products(
        "dp's last part not kept",
        MULTIPLIED,
        "part < 3; ++part) {\n        if",
        "part < 2; ++part) {\n        if",
        rules=UNWRITTEN,
    ),
    cuda_products(
        "an output for its neighbour",
        MULTIPLIED,
        "s * 8 + lane % 4 * 2 + e;\n        v[e]",
        "s * 8 + lane % 4 + e;\n        v[e]",
        parity=WRONG,
        traffic=MORE,
    ),
]

"""Mistakes to plant in the gradient of mhc_pre in bfloat16: what the coefficients give, by token,
then dx and dphi by products of matrices."""

from cases import Case

from mhc_mlx import DEEPSEEK_V4, PAPER
from mutation.mistakes import BARRIER, DIFFER, MORE, OUTSIDE, RACE, TWO, UNWRITTEN, WRONG, mistakes
from mutation.mistakes_pre import MULTIPLIED, Threads

NORMED = Case("mhc_pre", (17,), 4, 64, "bfloat16", PAPER)  # dread
TEAM = Threads("mhc_pre", (19,), 4, 512, "bfloat16", PAPER, threads=64)  # share a token
TWICE = Threads("mhc_pre", (19,), 4, 1000, "bfloat16", PAPER, threads=64)  # and read it twice
DOTTED = Case("mhc_pre", (3,), 4, 512, "bfloat16", PAPER, norm=False)  # two packs a lane
CHUNKS = Case("mhc_pre", (130,), 4, 64, "bfloat16", PAPER, norm=False)  # of 65 tokens
STAGES = Case("mhc_pre", (70,), 4, 64, "bfloat16", PAPER, norm=False)  # of 64 tokens
MULTIPLIED_RAGGED = Case("mhc_pre", (5,), 3, 31, "bfloat16", DEEPSEEK_V4, norm=False)
SPARE = Threads("mhc_pre", (5,), 3, 31, "bfloat16", DEEPSEEK_V4, norm=False, threads=128)

token, team = (mistakes(f"mhc_pre_backward_coefficients{k}") for k in ("", "_norm"))
steps, dots, made_back = (
    mistakes("mhc_pre_backward_coefficients", f"include/{k}.h")
    for k in ("coefficient_gradient", "stream_dots", "coefficients")
)
team_dots = mistakes("mhc_pre_backward_coefficients_norm", "include/stream_dots.h")
product = mistakes("mhc_pre_backward_projection")
products, metal_products, cuda_products = (
    mistakes("mhc_pre_backward_projection", f"include/{k}.h")
    for k in ("phi_gradient", "metal/phi_gradient_matrices", "cuda/phi_gradient_matrices")
)
ptx_products = mistakes("mhc_pre_backward_projection", "include/cuda/ptx.h")

TOKEN_BACKWARD = [
    # mhc_pre_backward_coefficients
    token(
        "h_pre of the first token",
        MULTIPLIED,
        "token_factors + t * (N + 1)",
        "token_factors",
        rules=TWO,
    ),
    token(
        "tokens past the last",
        MULTIPLIED,
        "first + uint(BATCH) < tokens ? first + uint(BATCH) : tokens",
        "first + uint(BATCH)",
        rules=OUTSIDE,
    ),
    token(
        "matrices past the last",
        MULTIPLIED,
        "lane_token < end ? lane_token : first",
        "lane_token",
        rules=OUTSIDE,
    ),
    token("the first token's matrix", MULTIPLIED, "i * MATRIX_LANES", "0", parity=WRONG),
    token(
        "divisors of another lane",
        MULTIPLIED,
        "divisors + thread_position_in_threadgroup.x",
        "divisors",
        rules=RACE,
    ),
    token(
        "a batch again",
        MULTIPLIED,
        "threadgroups_per_grid.x * SIMDS * BATCH) {",
        "threadgroups_per_grid.x * SIMDS) {",
        rules=TWO,
    ),
    steps("dp past the last output", MULTIPLIED, "if (lane < NUM_LOGITS) dp", "dp", rules=TWO),
    steps(
        "another line's entry",
        MULTIPLIED,
        "entry_in_line == j ? v",
        "line == j ? v",
        parity=WRONG,
    ),
    steps(
        "sigmoid's slope dropped",
        MULTIPLIED,
        "token.s * sigmoid(-token.z)",
        "token.s",
        parity=WRONG,
    ),
    steps("alpha dropped", MULTIPLIED, "(logit.alpha * token.scale)", "token.scale", parity=WRONG),
    steps("dalpha without l", MULTIPLIED, "dz_l += dz * token.l", "dz_l += dz", parity=WRONG),
    steps("pull without its mean", MULTIPLIED, "/ static_cast<float>(K);", ";", parity=WRONG),
    dots("the first pack again", DOTTED, "du + (c + k * 32 * VEC)", "du + c", rules=DIFFER),
    dots(
        "unaligned du loaded whole",
        MULTIPLIED,
        "load<T, VEC>(du + c, aligned)",
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
    # mhc_pre_backward_coefficients_norm
    team("du' of the first token", NORMED, "(dread + t * size_t(C)", "(dread", rules=TWO),
    team(
        "slope dropped",
        NORMED,
        "(lane_dots.du_dot_x - slope * lane_dots.u_dot_x)",
        "lane_dots.du_dot_x",
        parity=WRONG,
    ),
    team("slope without r", NORMED, "slope = r * r *", "slope = r *", parity=WRONG),
    team("from nothing", TWICE, "i > 0 || first != group_begin", "true", rules=UNWRITTEN),
    team(
        "dweight of the last token",
        TWICE,
        "i > 0 || first != group_begin",
        "false",
        parity=WRONG,
        traffic="partial",
    ),
    team("the next token's shares in their place", TEAM, "parity ^= 1;", ";", rules=RACE),
    team("all by the first simdgroup", TEAM, "(i / BATCH == simd)", "(simd == 0)", parity=WRONG),
    team("no barrier before the ends are added", TEAM, BARRIER, "", rules=UNWRITTEN),
    team(
        "the ends of one simdgroup",
        TEAM,
        "k < SIMDS && lane",
        "k < 1 && lane",
        parity=WRONG,
    ),
    team_dots("weight dropped", NORMED, " * weight[e];\nfloat u", ";\nfloat u", parity=WRONG),
    team_dots("dweight without r", NORMED, "d * u[e] * r;", "d * u[e];", parity=WRONG),
    team_dots(
        "u of h_pre's first", NORMED, "u[e] += pre[j] * s", "u[e] += pre[0] * s", parity=WRONG
    ),
    team_dots("no barrier before shares are added", TEAM, BARRIER, "", rules=UNWRITTEN),
    team_dots(
        "a simdgroup's share left out", TEAM, "k < SIMDS; ++k)", "k < SIMDS - 1; ++k)", parity=WRONG
    ),
    # mhc_projection_backward
    product("no barrier before dp is staged", STAGES, BARRIER, "", rules=RACE),
    product("no barrier after dp is staged", MULTIPLIED, BARRIER, "", nth=1, rules=UNWRITTEN),
    product("pull forgotten", MULTIPLIED, "v[r][e] += pull[r] * w[e];", ";", parity=WRONG),
    product("another stream's h_pre", MULTIPLIED, "factors[at + j]", "factors[at]", parity=WRONG),
    product(
        "dx_out forgotten",
        MULTIPLIED,
        "if (HAS_DX_OUT) mhc::run",
        "if (false) mhc::run",
        parity=WRONG,
    ),
    product("tokens past the last", MULTIPLIED, "if (t < stop) mhc", "mhc", rules=OUTSIDE),
    product(
        "side past the last token", MULTIPLIED, "(N + 1)) < end", "(N + 1)) < ~0u", rules=OUTSIDE
    ),
    product(
        "a simdgroup past the last unit", SPARE, "span < num_spans", "span >= 0", rules=OUTSIDE
    ),
    product(
        "the next chunk's tokens too",
        CHUNKS,
        "begin + tokens_per_chunk < tokens ? begin + tokens_per_chunk :",
        "",
        rules=TWO,
    ),
    product(
        "sums of all chunks in one row",
        CHUNKS,
        "size_t(id / groups_per_chunk) * NUM_LOGITS",
        "size_t(0) * NUM_LOGITS",
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
        "channels past the last", MULTIPLIED_RAGGED, "if (e < remaining) to[e]", "to[e]", rules=TWO
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
        "o < NUM_LOGITS && k < remaining ? static",
        "k < remaining ? static",
        rules=OUTSIDE,
    ),
    metal_products(
        "dp past the last token",
        MULTIPLIED,
        "t < end && o < NUM_LOGITS",
        "o < NUM_LOGITS",
        rules=OUTSIDE,
    ),
    metal_products(
        "phi's columns as they lie",
        MULTIPLIED,
        "(SPAN / 4) + 2 * p + e;\nc.v",
        "2 + 8 * p + e;\nc.v",
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
        "at + TileSlot::PASSED, from.dx_out",
        "at + TileSlot::DU, from.dx_out",
        rules=UNWRITTEN,
    ),
    cuda_products("the first part of dp alone", MULTIPLIED, "term = 2;", "term = 0;", parity=WRONG),
    cuda_products(
        "tokens not in pairs", MULTIPLIED, "= transposed(reint", "= (reint", parity=WRONG
    ),
    cuda_products(
        "outputs not in pairs",
        MULTIPLIED,
        "true, true>(b[term]",
        "true, false>(b[term]",
        parity=WRONG,
    ),
    cuda_products(
        "dp's last part not kept",
        MULTIPLIED,
        "term < 3; ++term) {\nif",
        "term < 2; ++term) {\nif",
        rules=UNWRITTEN,
    ),
    cuda_products(
        "an output for its neighbour",
        MULTIPLIED,
        "s * 8 + lane % 4 * 2 + e;\nv[e]",
        "s * 8 + lane % 4 + e;\nv[e]",
        parity=WRONG,
        traffic=MORE,
    ),
]

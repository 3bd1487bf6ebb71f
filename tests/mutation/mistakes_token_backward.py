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

token, dots = (
    mistakes("mhc_pre_backward_coefficients"),
    mistakes("mhc_pre_backward_coefficients", "include/streams.h"),
)
made_back = mistakes("mhc_pre_backward_coefficients", "include/coefficients.h")
product = mistakes("mhc_pre_backward_projection")
products, metal_products, cuda_products = (
    mistakes("mhc_pre_backward_projection", f"include/{k}.h")
    for k in ("phi_gradient", "metal/phi_gradient_matrices", "cuda/phi_gradient_matrices")
)
ptx_products = mistakes("mhc_pre_backward_projection", "include/cuda/ptx.h")

TOKEN_BACKWARD = [
    # mhc_token_backward
    token("du' of the first token", NORMED, "(dread + t * size_t(C)", "(dread", rules=TWO),
    token(
        "h_pre of the first token",
        MULTIPLIED,
        "token_factors[t * (N + 1) + l",
        "token_factors[l",
        rules=TWO,
    ),
    token("dp past the last output", MULTIPLIED, "if (lane < NUM_LOGITS) dp", "dp", rules=TWO),
    token("tokens past the last", MULTIPLIED, " && first + uint(i) < tokens", "", rules=OUTSIDE),
    token(
        "matrices past the last",
        MULTIPLIED,
        "lane_token < tokens && lane / MATRIX_LANES < BATCH ? ",
        "true ? ",
        rules=OUTSIDE,
    ),
    token(
        "the first token's matrix",
        MULTIPLIED,
        "ushort(i % BATCH * MATRIX_LANES + line)",
        "line",
        parity=WRONG,
    ),
    token(
        "another line's entry", MULTIPLIED, "entry_in_line == j ? v", "line == j ? v", parity=WRONG
    ),
    token("divisors of another lane", MULTIPLIED, "divisors + tid", "divisors", rules=RACE),
    token("sigmoid's slope dropped", MULTIPLIED, "d = s * mhc::sigmoid(-z)", "d = s", parity=WRONG),
    token("alpha dropped", MULTIPLIED, "d *= alpha_o * scale", "d *= scale", parity=WRONG),
    token("dalpha without l", MULTIPLIED, "sum_l += d * logit", "sum_l += d", parity=WRONG),
    token("pull without its mean", MULTIPLIED, "/ static_cast<float>(K);", ";", parity=WRONG),
    token(
        "a batch again",
        MULTIPLIED,
        "(SIMDS / TEAM_SIMDGROUPS) * TOKENS_PER_TURN) {",
        "(SIMDS / TEAM_SIMDGROUPS)) {",
        rules=TWO,
    ),
    token("slope dropped", NORMED, "(du_dot_x - slope * u_dot_x)", "du_dot_x", parity=WRONG),
    token("slope without r", NORMED, "slope = r * r *", "slope = r *", parity=WRONG),
    token("dweight without r", NORMED, "g * u[e] * r;", "g * u[e];", parity=WRONG),
    token("u of h_pre's first", NORMED, "+= dots.pre[j] * s", "+= dots.pre[0] * s", parity=WRONG),
    token(
        "from nothing", TWICE, "i > 0 || first != team * TOKENS_PER_TURN", "true", rules=UNWRITTEN
    ),
    token("no barrier before shares are added", TEAM, BARRIER, "", rules=UNWRITTEN),
    token("the next token's shares in their place", TEAM, "parity ^= 1;", ";", rules=RACE),
    token(
        "a simdgroup's share left out",
        TEAM,
        "k < TEAM_SIMDGROUPS; ++k)",
        "k < TEAM_SIMDGROUPS - 1; ++k)",
        parity=WRONG,
    ),
    token("all by the first simdgroup", TEAM, "(i / BATCH == simd)", "(simd == 0)", parity=WRONG),
    token("no barrier before the ends are added", TEAM, BARRIER, "", nth=1, rules=UNWRITTEN),
    token(
        "the ends of one simdgroup",
        TEAM,
        "k < TEAM_SIMDGROUPS && lane",
        "k < 1 && lane",
        parity=WRONG,
    ),
    token(
        "dweight of the last token",
        TWICE,
        "i > 0 || first != team * TOKENS_PER_TURN",
        "false",
        parity=WRONG,
        traffic="partial",
    ),
    dots("weight dropped", NORMED, "d *= w[e];", ";", parity=WRONG),
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

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

token, dots = mistakes("mhc_token_backward"), mistakes("mhc_token_backward", "streams.h")
made_back = mistakes("mhc_token_backward", "coefficients.h")
product = mistakes("mhc_projection_backward")
products, metal_products, cuda_products = (
    mistakes("mhc_projection_backward", f"products{k}.h") for k in ("", "_metal", "_cuda")
)
ptx_products = mistakes("mhc_projection_backward", "ptx.h")

TOKEN_BACKWARD = [
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
    token("sigmoid's slope dropped", MULTIPLIED, "d = s * mhc::sigmoid(-z)", "d = s", parity=WRONG),
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
        "(SPAN / 4) + 2 * p + e;\n        c.v",
        "2 + 8 * p + e;\n        c.v",
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

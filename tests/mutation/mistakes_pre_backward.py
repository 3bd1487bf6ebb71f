"""Mistakes to plant in the gradient of mhc_pre: dx and dp of all outputs, then dphi."""

from cases import Case

from mhc_mlx import PAPER
from mutation.mistakes import BARRIER, BOUNDS, MORE, OUTSIDE, RACE, TWO, UNWRITTEN, WRONG, mistakes
from mutation.mistakes_pre import PRE, PRE_5, PRE_12, PRE_65, PRE_EPS, PRE_MANY, PRE_RAGGED

COEFFICIENTS = Case("mhc_coefficients", (5,), 4, 64, convention=PAPER)
ONE_CHUNK = Case("mhc_pre", (129,), 4, 8, convention=PAPER)  # several tiles of dp: see run()

pre_back, outer = mistakes("mhc_pre_backward_generic"), mistakes("mhc_pre_backward_phi")

PRE_BACKWARD = [
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
    pre_back(
        "l past the last token",
        PRE,
        "o < NUM_LOGITS && t < tokens",
        "o < NUM_LOGITS",
        rules=OUTSIDE,
    ),
    pre_back("du past the last token", PRE, "HAS_DU && t < tokens", "HAS_DU", rules=OUTSIDE),
    pre_back("dh_pre past the last token", PRE, " && first + uint(i) < tokens", "", rules=OUTSIDE),
    pre_back(
        "unaligned phi loaded whole", PRE, "mhc::is_aligned<VEC>(phi)", "true", rules="misaligned"
    ),
    pre_back("sigmoid's slope dropped", PRE, "g = s * mhc::sigmoid(-z)", "g = s", parity=WRONG),
    pre_back(
        "pre_eps dropped",
        PRE_EPS,
        "h = s + static_cast<float>(params[mhc::param::PRE_EPS])",
        "h = s",
        parity=WRONG,
    ),
    pre_back(
        "post_scale dropped",
        PRE,
        "g *= static_cast<float>(params[mhc::param::POST_SCALE]) *",
        "g *=",
        parity=WRONG,
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
        "g = static_cast<float>(dz_res[t * NUM_RES_LOGITS + (o - NUM_GATE_LOGITS)])",
        "g = 0.0f",
        parity=WRONG,
        traffic="dz_res 0",
    ),
    pre_back("slope dropped", PRE, "(du_x - slope * u_x)", "du_x", parity=WRONG),
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
        "= g * a * static_cast<float>(l[t * (NUM_LOGITS + 1) + NUM_LOGITS])",
        "= g * a",
        parity=WRONG,
        traffic="l 285",
    ),
    pre_back("dalpha without l", PRE, "sum_l += g * ", "sum_l += ", parity=WRONG),
    pre_back(
        "dbias of the last tile alone",
        PRE_MANY,
        "(after_first_tile ? group_partial[o] : 0.0f) + sum;",
        "sum;",
        parity=WRONG,
        traffic="partial",
    ),
    pre_back(
        "a running sum that starts from nothing",
        PRE_MANY,
        "(after_first_tile ? group_partial[o] : 0.0f)",
        "group_partial[o]",
        rules=UNWRITTEN,
    ),
    pre_back("the norm's own gradient dropped", PRE, "pull[i] * v[e]", "0.0f * v[e]", parity=WRONG),
    pre_back(
        "the pull without the token's norm",
        PRE,
        "-s * static_cast<float>(l[t * (NUM_LOGITS + 1) + NUM_LOGITS])",
        "-s",
        parity=WRONG,
        traffic="l 400",
    ),
    pre_back("dx_out dropped", PRE, "from_u + passed[e]", "from_u", parity=WRONG),
    pre_back(
        "slope added", PRE, "* w[e] - u[e] * slopes[i]", "* w[e] + u[e] * slopes[i]", parity=WRONG
    ),
    pre_back("dweight without r", PRE, "u[e] * inverse_rms[i];", "u[e];", parity=WRONG),
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
    pre_back("dp by every share", PRE_12, "if (channel_begin == 0) dp", "dp", rules=TWO),
    pre_back("sums by every share", PRE_12, "if (channel_begin == 0) {", "{", rules=TWO),
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
        "channel_begin + channels_per_group < C ? channel_begin + channels_per_group : C",
        "channel_begin + channels_per_group",
        rules=OUTSIDE,
    ),
    pre_back(
        "a tile for each of its shares",
        PRE_12,
        "tile_group = threadgroup_position_in_grid.x / SPLITS",
        "tile_group = threadgroup_position_in_grid.x",
        rules=OUTSIDE,
    ),
    # mhc_phi_gradient
    outer("no barrier before dp is used", PRE, BARRIER, "", rules=UNWRITTEN),
    outer("no barrier after dp is used", ONE_CHUNK, BARRIER, "", nth=1, rules=RACE),
    outer(
        "outputs past the last",
        PRE_5,
        "if (o0 + o < NUM_LOGITS)",
        "if (o0 + o <= NUM_LOGITS)",
        rules=OUTSIDE,
    ),
    outer(
        "dp past the last output",
        PRE_5,
        "e < LOGITS_PER_THREAD && o < NUM_LOGITS",
        "e < LOGITS_PER_THREAD",
        rules=OUTSIDE,
    ),
    outer(
        "every chunk from the first token",
        PRE_MANY,
        "uint(chunk) * tokens_per_chunk",
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
        "begin + tokens_per_chunk < tokens ? begin + tokens_per_chunk : tokens",
        "begin + tokens_per_chunk",
        rules=OUTSIDE,
    ),
    outer(
        "tokens past the chunk",
        PRE,
        "end - t0 < uint(STAGE) ? int(end - t0) : STAGE",
        "STAGE",
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
        "(LOGITS_PER_THREAD + 3) / 4",
        "LOGITS_PER_THREAD / 4",
        parity=WRONG,
        traffic="dp 320",
    ),
    outer(
        "sums of a pack past the last",
        PRE_5,
        " && o < LOGITS_PER_THREAD; ++o) {",
        "; ++o) {",
        rules=BOUNDS,
    ),
    outer("dp of the pack before", PRE, "g.v[o - 4 * q]", "g.v[0]", parity=WRONG),
]

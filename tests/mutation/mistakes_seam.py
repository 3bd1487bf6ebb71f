"""Mistakes to plant in the bodies of "single pass" models, and of mhc_pre at few tokens."""

from dataclasses import replace

from cases import Case

from mhc_mlx import DEEPSEEK_V4, PAPER
from mhc_mlx.conventions import MHC_LITE
from mutation.mistakes import BARRIER, MORE, OUTSIDE, RACE, TWO, UNWRITTEN, WRONG, mistakes

EACH = {"per_token": (True, True)}
SEAM = Case("mhc_seam", (5,), 4, 64, **EACH)
RAGGED = Case("mhc_seam", (5,), 3, 129, "bfloat16", rounded=True, **EACH)
ROUNDED = Case("mhc_seam", (5,), 4, 64, "bfloat16", rounded=True, **EACH)
READ = Case("mhc_seam", (5,), 4, 64, norm=False, **EACH)
MANY = Case("mhc_seam", (3,), 12, 33, norm=False, **EACH)
LONG = Case("mhc_seam", (3,), 2, 8224, "bfloat16", **EACH)  # u is made twice
TWICE = Case("mhc_seam", (2,), 4, 1280, **EACH)  # backward, a token is read twice
PRE = Case("mhc_pre", (2,), 4, 160, convention=PAPER)
PRE_NORM = Case("mhc_pre", (2,), 4, 1280, convention=PAPER)
PRE_RAGGED = Case("mhc_pre", (2,), 3, 129, convention=DEEPSEEK_V4, norm=False)
MADE = Case("mhc_coefficients", (2,), 4, 64, convention=PAPER)
LITE = Case("mhc_pre", (2,), 3, 31, convention=MHC_LITE)
NORM_EPS = Case("mhc_pre", (2,), 4, 64, convention=PAPER, norm_eps=0.5)
WHOLE = Case("mhc_single_pass", (2,), 4, 160, convention=DEEPSEEK_V4)
FEW = Case("mhc_single_pass", (2,), 4, 64, convention=replace(PAPER, iters=2))

sweep, seam, back = (mistakes(f"mhc_{k}") for k in ("pre_partial_logits", "seam", "seam_backward"))
channel = mistakes("mhc_seam_backward", "include/seam_channel.h")

SEAMS = [
    # mhc_sweep
    sweep("runs past the last", PRE_RAGGED, "run < num_runs && o0", "o0", rules=TWO),
    sweep(
        "tokens past the last",
        PRE,
        "if (sum_t < tokens && o < NUM_LOGITS)",
        "if (o < NUM_LOGITS)",
        rules=OUTSIDE,
    ),
    sweep(
        "outputs past the last",
        PRE_RAGGED,
        "sum_t < tokens && o < NUM_LOGITS",
        "sum_t < tokens",
        rules=TWO,
    ),
    sweep(
        "shares past the last token", PRE, "o0 == 0 && square_t < tokens", "o0 == 0", rules=OUTSIDE
    ),
    sweep(
        "every run the first",
        PRE,
        "{tokens, K, 32 * run",
        "{tokens, K, 0",
        parity=WRONG,
        traffic=MORE,
    ),
    sweep(
        "two runs", PRE, "32 * run, K, lane", "32 * run, K / 2, lane", parity=WRONG, traffic=MORE
    ),
    sweep(
        "one share",
        PRE,
        "mhc::x_k(lane) / 8] = squares[0]",
        "mhc::x_k(lane) / 32] = squares[0]",
        rules=TWO,
    ),
    # mhc_seam
    seam("no barrier before slices are added", PRE, BARRIER, "", rules=UNWRITTEN),
    seam("no barrier before coefficients are used", PRE, BARRIER, "", nth=1, rules=UNWRITTEN),
    seam(
        "no barrier before ready coefficients are used",
        SEAM,
        "if (WRITE_BACK || !FROM_PARTIAL_LOGITS) thr",
        "if (false) thr",
        rules=UNWRITTEN,
    ),
    seam("no barrier before squares are added", PRE_NORM, BARRIER, "", nth=3, rules=UNWRITTEN),
    seam("no barrier between tokens", MANY, "if (BUFFERS == 1) thr", "if (false) thr", rules=RACE),
    seam(
        "a run too few", PRE, "r < num_runs; r", "r < num_runs - 1; r", parity=WRONG, traffic=MORE
    ),
    seam("the first slice", PRE, "w < SLICES; ++w", "w < 1; ++w", parity=WRONG),
    seam("three shares", PRE, " + sums[row + NUM_LOGITS + 3]", "", parity=WRONG),
    seam("norm_eps dropped", NORM_EPS, "param::NORM_EPS", "param::PRE_EPS", parity=WRONG),
    seam(
        "mean over a stream",
        PRE,
        "static_cast<float>(N * C)",
        "static_cast<float>(C)",
        parity=WRONG,
    ),
    seam("alpha of pre alone", PRE, "alpha[part]", "alpha[0]", parity=WRONG),
    seam("bias saved", PRE, "+ o] = logit;", "+ o] = v;", parity=WRONG),
    seam(
        "the token's norm not saved",
        PRE,
        "+ NUM_LOGITS] = scale",
        "+ NUM_LOGITS] = 1.0f",
        parity=WRONG,
    ),
    seam(
        "h_pre of the other token",
        MADE,
        "new_h_pre[size_t(t) * N",
        "new_h_pre[size_t(1 - t) * N",
        parity=WRONG,
    ),
    seam(
        "h_res untransposed", WHOLE, "COLUMNS, !OUT_COLUMNS", "COLUMNS, OUT_COLUMNS", parity=WRONG
    ),
    seam("an iteration too few", FEW, "ITERS>(z, mix", "ITERS - 1>(z, mix", parity=WRONG),
    seam(
        "logits of the first token",
        LITE,
        "logits[size_t(t) * NUM_RES_LOGITS +",
        "logits[",
        rules=TWO,
    ),
    seam(
        "h_res loaded untransposed",
        SEAM,
        "THREADS, true>(h_res",
        "THREADS, false>(h_res",
        parity=WRONG,
    ),
    seam(
        "h_post of the first token",
        SEAM,
        "h_post + size_t(t) * N",
        "h_post",
        parity=WRONG,
        traffic=MORE,
    ),
    seam(
        "eps dropped",
        Case("mhc_seam", (5,), 4, 64, eps=0.5, **EACH),
        "param::EPS",
        "param::PRE_EPS",
        parity=WRONG,
    ),
    seam(
        "every pack the first",
        SEAM,
        "acc[i * VEC + e] = metal",
        "acc[i * VEC] = metal",
        parity=WRONG,
    ),
    seam("out stored twice", LONG, "if (phase == 0 || !NORM) *(", "*(", rules=TWO),
    seam(
        "u kept where it is made twice",
        LONG,
        "|| !NORM || !U_CACHED)",
        "|| !NORM)",
        parity=WRONG,
        traffic="x 1",
    ),
    seam(
        "squares of the first packs",
        PRE_NORM,
        "i < PASSES * THREADS; i",
        "i < THREADS; i",
        parity=WRONG,
    ),
    # mhc_seam_backward
    back("no barrier before coefficients are used", SEAM, BARRIER, "", rules=UNWRITTEN),
    back("the mean forgotten", SEAM, "- u * slope", "", parity=WRONG),
    back("dout forgotten where u is read", READ, "+ pre[i] * da", "", parity=WRONG),
    back("dh_pre of x", SEAM, "g_pre[i] += da * out[i]", "g_pre[i] += da * xs[i]", parity=WRONG),
    back(
        "dh_post of dout alone",
        SEAM,
        "g_post[i] += ds[i] * ys",
        "g_post[i] += static_cast<float>(ov[i].v[e]) * ys",
        parity=WRONG,
    ),
    back("dh_res transposed", SEAM, "g_res[i * N + j]", "g_res[j * N + i]", parity=WRONG),
    back("h_res untransposed", SEAM, "a += mix[j * N + i]", "a += mix[i * N + j]", parity=WRONG),
    back(
        "dweight of unrounded units",
        ROUNDED,
        "(ROUND_U ? static_cast<float>(static_cast<T>(normed)) : normed)",
        "normed",
        parity=WRONG,
    ),
    back(
        "dweight added to what nobody wrote",
        TWICE,
        "t < threadgroups_per_grid.x ? 0.0f : group_partial[c + e]",
        "group_partial[c + e]",
        rules=UNWRITTEN,
    ),
    back("dx of the first token", SEAM, "(dx + size_t(t) * size_t(N * C)", "(dx", rules=TWO),
    back(
        "scratch of one simdgroup", TWICE, "scratch[N * N * SIMDS]", "scratch[N * N]", rules=OUTSIDE
    ),
    channel("out not rounded", RAGGED, "static_cast<float>(static_cast<T>(o))", "o", parity=WRONG),
    channel("y forgotten", SEAM, "o = post[i] * y", "o = 0.0f", parity=WRONG),
]

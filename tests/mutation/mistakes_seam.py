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
coefficients, pack = (
    mistakes("mhc_seam", f"include/{k}.h") for k in ("coefficients", "seam_channel")
)

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
    coefficients(
        "a run too few", PRE, "r < num_runs; r", "r < num_runs - 1; r", parity=WRONG, traffic=MORE
    ),
    coefficients("the first slice", PRE, "w < SLICES; ++w", "w < 1; ++w", parity=WRONG),
    coefficients("three shares", PRE, " + sums[at + 3]", "", parity=WRONG),
    coefficients("norm_eps dropped", NORM_EPS, "param::NORM_EPS", "param::PRE_EPS", parity=WRONG),
    seam("mean over a stream", PRE, "x_dot_x, N * C, alpha", "x_dot_x, C, alpha", parity=WRONG),
    seam(
        "alpha of pre alone",
        PRE,
        "N * C, alpha, bias",
        "N * C, alpha - mhc::part_of<N>(o), bias",
        parity=WRONG,
    ),
    coefficients("bias saved", PRE, "l[o] = value;", "l[o] = z;", parity=WRONG),
    coefficients(
        "the token's norm not saved",
        PRE,
        "l[NUM_LOGITS] = scale",
        "l[NUM_LOGITS] = 1.0f",
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
    pack(
        "every pack the first",
        SEAM,
        "acc[i * VEC + e] = metal",
        "acc[i * VEC] = metal",
        parity=WRONG,
    ),
    seam("out stored twice", LONG, "<WRITE_BACK, !NORM,", "<WRITE_BACK, true,", rules=TWO),
    seam(
        "u kept where it is made twice",
        LONG,
        "if (!NORM || !U_CACHED) mhc",
        "if (!NORM) mhc",
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
    channel("du forgotten where u is read", READ, "+ pre[i] * du", "", parity=WRONG),
    channel(
        "dh_pre of x", SEAM, "dh_pre[i] += du * out[i]", "dh_pre[i] += du * x[i]", parity=WRONG
    ),
    channel(
        "dh_post of dout alone",
        SEAM,
        "dh_post[i] += ds[i] * y",
        "dh_post[i] += dout[i] * y",
        parity=WRONG,
    ),
    channel(
        "dh_res transposed", SEAM, "dh_res[i * N + j] +=", "dh_res[j * N + i] +=", parity=WRONG
    ),
    channel(
        "h_res untransposed", SEAM, "+= mix[j * N + i] * ds", "+= mix[i * N + j] * ds", parity=WRONG
    ),
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

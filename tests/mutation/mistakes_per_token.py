"""Mistakes to plant in the bodies of ops whose coefficients each token makes for itself: those of
mhc_pre, and in reads and mixing matrices."""

from cases import Case

from mhc_mlx.conventions import KRONECKER, MHC_LITE
from mutation.mistakes import BARRIER, MORE, OUTSIDE, UNWRITTEN, WRONG, mistakes
from mutation.mistakes_pre import PRE_FORWARD
from mutation.mistakes_pre_backward import PRE_BACKWARD
from mutation.mistakes_token_backward import TOKEN_BACKWARD

READ = Case("stream_aggregate", (5,), 4, 64)
READ_EACH = Case("stream_aggregate", (5,), 3, 129, per_token=(True, False))
LITE = Case("mhc_pre", (5,), 3, 31, convention=MHC_LITE)
FACTORS = Case("mhc_pre", (5,), 4, 31, convention=KRONECKER)

read, read_back = mistakes("stream_aggregate"), mistakes("stream_aggregate_backward")
exact, exact_back = mistakes("mixing_matrix"), mistakes("mixing_matrix_backward")

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
    *PRE_FORWARD,
    *PRE_BACKWARD,
    # mixing_matrix and its backward
    exact("weights not divided", LITE, "line[c] / sum", "line[c]", parity=WRONG),
    exact("factors in another order", FACTORS, "NUM_LOGITS / 2 - 1 - b", "b", parity=WRONG),
    exact("a row too many", FACTORS, "id < rows", "id <= rows", rules=OUTSIDE),
    exact_back(
        "softmax's sum added", LITE, "shift) - dot / sum", "shift) + dot / sum", parity=WRONG
    ),
    exact_back("sigmoid's slope dropped", FACTORS, " * mhc::sigmoid(-z_b)", "", parity=WRONG),
    *TOKEN_BACKWARD,
]

"""Mutants that no test can catch, and why the mutated program is right: its results, the bytes that
it moves and its refusals are the same, or a picture says the same.

An entry is of all mutants of the file that only make the first words of a line the second.
"""

from mutation.operators import Mutant

CAST = "C++ converts the value to the same without the cast"
SET_LATER = "it is set before it is read"
SLOWER = "single loads give the same as packs"
LEAST = "where both are equal either is the least"
PREFETCHED = "it only prefetches: what is loaded is the same"
UNROLLED = "it is how far a loop is unrolled"
BYTES = "an element has 2 or 4 bytes: 17 // of that is the same"

# fmt: off
EQUIVALENT = {
    "mhc_pre_partial_logits.metal": [
        ("o0 < NUM_LOGITS;", "o0 < NUM_LOGITS - 1;",
         "for n <= 8 the logits are never one more than whole blocks"),
    ],
    "mhc_seam.metal": [
        ("BUFFERS = N <= 8", "BUFFERS = N < 8",
         "one place for coefficients and one barrier more do the same as two places"),
        ("r = 1.0f;", "r = 1.5f;", "without a norm r is not read"),
    ],
    "phi_product.h": [
        ("8 / PHI_ROWS>()", "9 / PHI_ROWS>()", "a pack has at most 16 bytes either way"),
    ],
    "read_tile.h": [
        ("8 ? N : 1;", "8 ? 1 : N;", UNROLLED),
    ],
    "mixing_matrix_backward.metal": [
        ("static_cast<DLOGITS_T>(-", "(-", CAST),
    ],
    "coefficients.h": [
        ("projection_lanes(N, START,", "projection_lanes(START, N,",
         "one lane and a line per lane give the same matrix"),
    ],
    "mhc_fused_backward.metal": [
        ("STREAMS + i]);", "STREAMS - i]);",
         "STAY_PACKED only tells NVRTC to keep registers packed"),
        ("du[CHANNEL_STEP] = {}", "du[CHANNEL_STEP]", SET_LATER),
    ],
    "mhc_fused_backward_wide.metal": [
        ("MIX && N <= 32", "MIX && N < 32",
         "h_res of 32 streams is read from device memory instead"),
        ("SIMDGROUP < 8 ?", "SIMDGROUP < 9 ?", "of 8 lines both branches are 8"),
        ("i0 + q : 0) * PITCH", "i0 + q : 1) * PITCH",
         "a row past the last is any other, R >= 9: what it adds to g_res is not stored"),
    ],
    "mhc_pre.metal": [
        ("PER_GROUP < NUM_LOGITS ?", "PER_GROUP <= NUM_LOGITS ?", LEAST),
        ("LANES + 31", "LANES",
         "a simdgroup that projects makes u of some tokens too: another makes the same"),
    ],
    "mhc_pre_backward_generic.metal": [
        ("C / VEC + SPLITS", "C * VEC + SPLITS",
         "the first threadgroups take more channels: each is still one's"),
        ("+ SPLITS - 1", "+ SPLITS",
         "the last threadgroup has fewer channels: each is still one's"),
        ("8 ? N : 1;", "8 ? N : 2;", UNROLLED),
    ],
    "mhc_pre_backward_projection.metal": [
        ("(!HAS_DU || mhc", "(!HAS_DU && mhc", SLOWER),
        ("(!HAS_DX_OUT || mhc", "(!HAS_DX_OUT && mhc", SLOWER),
        ("RING_BYTES > 0 &&", "RING_BYTES >= 0 &&",
         "without a ring asking for a tile does nothing"),
        ("tokens, C - first", "tokens, C + first", PREFETCHED),
    ],
    "mhc_seam_backward.metal": [
        ("at * N,", "at,", "at is 0: what is CACHED takes one pass"),
    ],
    "cuda/phi_gradient_matrices.h": [
        ("<__nv_bfloat16> = 1;", "<__nv_bfloat16> = 2;",
         "the second part of a bfloat16 is zero: work more, the same sums"),
        ("[SPAN / 8][", "[SPAN * 8][", "elements that no one uses take no registers"),
    ],
    "sinkhorn.h": [
        ("(N) : 32;", "(N) : 33;",
         "places past the 32nd are in no sum: scatter_sum adds halves of 32"),
    ],
    "stream_aggregate_backward.metal": [
        ("8 ? N : 1;", "8 ? N : 2;", UNROLLED),
    ],
    "examples/train_lm/train.py": [
        ("refresh=False", "refresh=True",
         "the bar is drawn more often; it shows the same at its end"),
    ],
    "diagnostics/pictures.py": [
        ("alpha=0.3)", "alpha=0.44999999999999996)", "a grid is as good a little darker"),
        ('"linewidth": 1}', '"linewidth": 2}',
         "its dots, not its width, tell the line from others"),
    ],
    "mlx_lm/exact.py": [
        ("zeros((1, 1)", "zeros((1, 2)", "a dtype does not depend on how many tokens there are"),
    ],
    "mlx_lm/patch.py": [
        ("classes, strict=True)", "classes, strict=False)",
         "the classes are listed one per module, so lengths never differ"),
    ],
    "ops/tiling.py": [
        ("16 // size", "17 // size", BYTES),
        ("16 // dtype.size", "17 // dtype.size", BYTES),
        ("n * vec > 64", "n * vec > 65",
         "vec is a power of two and n at most 64: their product is never 65"),
        ("n * vec > 16", "n * vec > 17",
         "vec is a power of two and n at most 8 here: their product is never 17"),
        ("<= 512 else", "<= 513 else", "threads are a multiple of 32"),
        ("simds + 1)", "simds + 2)", "one more than all simdgroups does not divide them"),
        ("cut(512, 16)", "cut(512, 17)",
         "512 threads are 16 simdgroups, whose number bounds the slices"),
        ("block, 1)", "block, 2)",
         "the last line of the function sets splits, which nothing reads before"),
        ("32 >> (n", "33 >> (n", "of one stream both are more than 8, of others the same"),
        ("lane_packs <= sums", "lane_packs < sums",
         "both sides divided by 8 * simds: 4 * lane_packs is no odd number times one or two tiles"),
    ],
}
# fmt: on


def makes(m: Mutant, was: str, now: str) -> bool:
    """Whether a mutant only makes one place of its line that reads ``was`` read ``now``."""
    parts = m.text.split(was)
    pairs = ((parts[:k], parts[k:]) for k in range(1, len(parts)))
    return any(was.join(a) + now + was.join(b) == m.changed for a, b in pairs)


def why(m: Mutant) -> str | None:
    """Why nothing catches a mutant, if it is known."""
    entries = (rows for file, rows in EQUIVALENT.items() if f"/{m.file}".endswith(f"/{file}"))
    return next((why for rows in entries for was, now, why in rows if makes(m, was, now)), None)

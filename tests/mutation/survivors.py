"""Mutants that no test can catch, and why the mutated program is right: its results, the bytes that
it moves and its refusals are the same, or a picture says the same.

An entry is of all mutants of the file that only make the first words of a line the second; with a
number, counted from 0, only where they do so for that time in lines that read the same.
"""

from mutation.operators import Mutant

CAST = "C++ converts the value to the same without the cast"
SET_LATER = "it is set before it is read"
SLOWER = "single loads give the same as packs"
LEAST = "where both are equal either is the least"
PREFETCHED = "it only prefetches: what is loaded is the same"
UNROLLED = "it is how far a loop is unrolled"
AT_ONCE = "it is how much is loaded before the first is used"
PACKED = "stay_packed only tells a compiler to keep registers packed"
ONE_PASS = "what is CACHED takes one pass, number 0"
OTHERS = "more or fewer simdgroups make u: each makes the same of a token"
COUNTED = "k only counts whole runs"
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
    "metal/packs.h": [
        ("int e = 0; e < VEC; e += 2) stay", "int e = 0 + 1; e < VEC; e += 2) stay",
         "elements 0 and 1 are of one word, and a pack of one stays as it is"),
    ],
    "metal/phi_product_ring.h": [
        ("<true, NUM", "<false, NUM", SLOWER),
    ],
    "phi_gradient.h": [
        ("UNROLL_FOR (int r = 0;", "UNROLL_FOR (int r = 1;", PREFETCHED, 1),
        ("r < LANE_TOKENS;", "r < LANE_TOKENS - 1;", PREFETCHED, 1),
        ("prefetch(from + ", "prefetch(from - ", PREFETCHED),
    ],
    "phi_product.h": [
        ("8 / PHI_ROWS>()", "9 / PHI_ROWS>()", "a pack has at most 16 bytes either way"),
    ],
    "read_tile.h": [
        ("8 ? N : 1;", "8 ? 1 : N;", UNROLLED),
    ],
    "seam_channel.h": [
        ("8 ? N : 4;", "8 ? 4 : N;", UNROLLED),
    ],
    "stream_dots.h": [
        ("VEC < C; c +=", "VEC < C - 1; c +=",
         "what one loop leaves the next adds, in the same order"),
    ],
    "streams.h": [
        ("N <= 8", "N < 8", UNROLLED),
        ("NORM && ROUND_U)", "ROUND_U)", "rounded once or twice it is the same"),
    ],
    "mixing_matrix_backward.metal": [
        ("static_cast<DLOGITS_T>(-", "(-", CAST),
    ],
    "coefficients.h": [
        ("m0 < TILE_TOKENS;", "m0 < TILE_TOKENS - 1;", "m0 is a multiple of 4, as TILE_TOKENS is"),
        ("projection_lanes(N, START,", "projection_lanes(START, N,",
         "one lane and a line per lane give the same matrix"),
        ("by_backend(16, 8)", "by_backend(8, 16)", AT_ONCE),
    ],
    "mhc_fused_backward.metal": [
        ("STREAMS + i], e, zero);", "STREAMS - i], e, zero);", PACKED),
        ("UNROLL_FOR (int j = 0;", "UNROLL_FOR (int j = 1;", PACKED, 0),
        ("du[CHANNEL_STEP] = {}", "du[CHANNEL_STEP]", SET_LATER),
    ],
    "mhc_fused_backward_wide.metal": [
        ("MIX && N <= 32", "MIX && N < 32",
         "h_res of 32 streams is read from device memory instead"),
        ("SIMDGROUP < 8 ?", "SIMDGROUP < 9 ?", "of 8 lines both branches are 8"),
        ("i0 + q : 0) * PITCH", "i0 + q : 1) * PITCH",
         "a row past the last is any other, R >= 9: what it adds to g_res is not stored"),
        ("float w = 0.0f", "float w = 1.0f", SET_LATER),
    ],
    "mhc_pre.metal": [
        ("lane] : 0.0f", "lane] : 1.0f", "no one reads the sums of lanes past PITCH"),
        ("PER_GROUP < NUM_LOGITS ?", "PER_GROUP <= NUM_LOGITS ?", LEAST),
        ("LANES + 31", "LANES", OTHERS),
        ("/ 32 : 0;", "/ 32 : 1;", OTHERS),
    ],
    "mhc_pre_backward_coefficients.metal": [
        ("dh = 0.0f;", "dh;", "lanes that do not set it do not read it"),
        ("N <= 4 ? 2", "N < 4 ? 2", AT_ONCE),
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
        ("at * N,", "at,", ONE_PASS),
        ("[at * N + j], e, static", "[at + j], e, static", ONE_PASS),
        ("k < CACHED_PASSES; ++k) {", "k < CACHED_PASSES; k += 2) {", ONE_PASS),
    ],
    "cuda/phi_gradient_matrices.h": [
        ("<__nv_bfloat16> = 1;", "<__nv_bfloat16> = 2;",
         "the second part of a bfloat16 is zero: work more, the same sums"),
        ("[SPAN / 8][", "[SPAN * 8][", "elements that no one uses take no registers"),
        ("3 ? LOADS_PER_THREAD : 3;", "3 ? 3 : LOADS_PER_THREAD;", AT_ONCE),
    ],
    "cuda/phi_product_ring.h": [
        ("(8 * BLOCK) ==", "(9 * BLOCK) ==",
         "with a ring there are 12, 15 or 24 logits: none is a multiple of nine blocks"),
        ("k = runs.first;", "k = runs.first + 1;", COUNTED),
        ("k < runs.K;", "k < runs.K - 1;", COUNTED),
    ],
    "sinkhorn.h": [
        ("(N) : 32;", "(N) : 33;",
         "places past the 32nd are in no sum: scatter_sum adds halves of 32"),
    ],
    "sinkhorn_backward.h": [
        ("lane < uint(N)", "lane <= uint(N)",
         "a lane beyond the matrix has zeros in p: its g is in no sum, and no one stores it"),
    ],
    "sinkhorn_knopp_backward.metal": [
        ("128 : 0);", "128 : 1);", "up to 32 lines no one uses scratch"),
    ],
    "stream_aggregate.metal": [
        ("N <= 8", "N < 8", UNROLLED),
    ],
    "stream_aggregate_backward.metal": [
        ("8 ? N : 1;", "8 ? 1 : N;", UNROLLED),
        ("N <= 8", "N < 8", UNROLLED),
        ("8 ? N : 1;", "8 ? N : 2;", UNROLLED),
    ],
    "stream_mix_add.metal": [
        ("N <= 4 ? N * N", "N < 4 ? N * N", "each pack of channels loads them either way"),
        ("THREADS, false, true>(h_post, ", "THREADS, false, false>(h_post, ",
         "without gates it does not matter whose they would be"),
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
    "models/family.py": [
        ("zeros((1, 1)", "zeros((1, 2)", "a dtype does not depend on how many tokens there are"),
    ],
    "models/patching.py": [
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


def makes(m: Mutant, was: str, now: str, why: str = "", nth: int | None = None) -> bool:
    """Whether a mutant only makes one place of its line that reads ``was`` read ``now``."""
    parts = m.text.split(was)
    pairs = ((parts[:k], parts[k:]) for k in range(1, len(parts)))
    return nth in (None, m.nth) and any(
        was.join(a) + now + was.join(b) == m.changed for a, b in pairs
    )


def why(m: Mutant) -> str | None:
    """Why nothing catches a mutant, if it is known."""
    entries = (rows for file, rows in EQUIVALENT.items() if f"/{m.file}".endswith(f"/{file}"))
    return next((row[2] for rows in entries for row in rows if makes(m, *row)), None)

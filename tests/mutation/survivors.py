"""Mutants that no test can catch, and why. Known by file, the line's text, operator and new line,
and which of those in the file it is.

An entry says why the mutated program is right: its results, bytes moved and refusals are the same,
and a picture says the same.
"""

EQUIVALENT: dict[tuple[str, str, str, str, int], str] = {
    (
        "kernels/include/sinkhorn.h",
        "constexpr int W = matrix_lanes(N) < 32 ? matrix_lanes(N) : 32;",
        "change_constant",
        "constexpr int W = matrix_lanes(N) < 32 ? matrix_lanes(N) : 33;",
        0,
    ): "places past the 32nd are in no sum: scatter_reduce adds halves of 32",
    (
        "kernels/mhc_fused_backward_wide.metal",
        "constexpr int ROWS_AT_ONCE = ROWS_PER_SIMDGROUP < 8 ? ROWS_PER_SIMDGROUP : 8; "
        "// a simdgroup makes so many rows of dx at once",
        "change_constant",
        "constexpr int ROWS_AT_ONCE = ROWS_PER_SIMDGROUP < 9 ? ROWS_PER_SIMDGROUP : 8; "
        "// a simdgroup makes so many rows of dx at once",
        0,
    ): "of 8 lines both branches are 8",
    (
        "kernels/mhc_fused_backward_wide.metal",
        "ds[q] = dout_tile[(i0 + q < OUT_STREAMS ? i0 + q : 0) * PITCH + c];",
        "change_constant",
        "ds[q] = dout_tile[(i0 + q < OUT_STREAMS ? i0 + q : 1) * PITCH + c];",
        0,
    ): "a row past the last is any other, N >= 9: what it adds to g_res is not stored",
    (
        "kernels/include/cuda/phi_gradient_matrices.h",
        "template <> constexpr int PHI_TERMS<__nv_bfloat16> = 1;",
        "change_constant",
        "template <> constexpr int PHI_TERMS<__nv_bfloat16> = 2;",
        0,
    ): "the second part of a bfloat16 is zero: work more, the same sums",
    (
        "kernels/stream_aggregate_backward.metal",
        "constexpr int STREAM_UNROLL = N <= 8 ? N : 1;",
        "change_constant",
        "constexpr int STREAM_UNROLL = N <= 8 ? N : 2;",
        0,
    ): "it is how far a loop is unrolled",
    (
        "kernels/mhc_pre.metal",
        "constexpr int PROJECTING_SIMDGROUPS = PROJECT ? (TILE_TOKENS * "
        "PROJECTION_LANES + 31) / 32 : 0;",
        "drop_operand",
        "constexpr int PROJECTING_SIMDGROUPS = PROJECT ? (TILE_TOKENS * "
        "PROJECTION_LANES) / 32 : 0;",
        0,
    ): "a simdgroup that projects makes u of some tokens too: another makes the same",
    (
        "kernels/mhc_pre_backward_projection.metal",
        "if (HAS_DX_OUT) mhc::prefetch_tile(from.dx_out + lane_offset, from.K, first "
        "+ mhc::TILE_TOKENS, tokens, C - first_channel, lane);",
        "turn_sum",
        "if (HAS_DX_OUT) mhc::prefetch_tile(from.dx_out + lane_offset, from.K, first "
        "+ mhc::TILE_TOKENS, tokens, C + first_channel, lane);",
        0,
    ): "it only prefetches: what is loaded is the same",
    (
        "kernels/mhc_pre_backward_generic.metal",
        "const int channels_per_group = (C / VEC + SPLITS - 1) / SPLITS * VEC;",
        "drop_operand",
        "const int channels_per_group = (C / VEC + SPLITS) / SPLITS * VEC;",
        0,
    ): "the last threadgroup has fewer channels: each is still one's",
    (
        "kernels/mhc_seam_backward.metal",
        "mhc::load_streams<N>(xv + at * N, row, C, c, aligned);",
        "drop_operand",
        "mhc::load_streams<N>(xv + at, row, C, c, aligned);",
        1,
    ): "at is 0: what is CACHED takes one pass",
    (
        "kernels/include/cuda/phi_gradient_matrices.h",
        "template <typename PHI_T, int NUM_LOGITS, int SPAN> struct PhiColumns { "
        "uint w[PHI_TERMS<PHI_T>][SPAN / 8][logit_tiles(NUM_LOGITS)]; };",
        "turn_product",
        "template <typename PHI_T, int NUM_LOGITS, int SPAN> struct PhiColumns { "
        "uint w[PHI_TERMS<PHI_T>][SPAN * 8][logit_tiles(NUM_LOGITS)]; };",
        0,
    ): "elements that no one uses take no registers",
    (
        "kernels/mhc_pre_backward_generic.metal",
        "constexpr int STREAM_UNROLL = N <= 8 ? N : 1;",
        "change_constant",
        "constexpr int STREAM_UNROLL = N <= 8 ? N : 2;",
        0,
    ): "it is how far a loop is unrolled",
    (
        "kernels/mhc_seam_backward.metal",
        "mhc::load_streams<N>(xv + at * N, row, C, c, aligned);",
        "drop_operand",
        "mhc::load_streams<N>(xv + at, row, C, c, aligned);",
        0,
    ): "at is 0: what is CACHED takes one pass",
    (
        "kernels/mhc_pre_backward_projection.metal",
        "mhc::prefetch_tile(from.x + lane_offset, from.K, first + mhc::TILE_TOKENS, "
        "tokens, C - first_channel, lane);",
        "turn_sum",
        "mhc::prefetch_tile(from.x + lane_offset, from.K, first + mhc::TILE_TOKENS, "
        "tokens, C + first_channel, lane);",
        0,
    ): "it only prefetches: what is loaded is the same",
    (
        "kernels/mhc_pre_backward_projection.metal",
        "if (HAS_DU) mhc::prefetch_tile(from.du + lane_offset, from.C, first + "
        "mhc::TILE_TOKENS, tokens, C - first_channel, lane);",
        "turn_sum",
        "if (HAS_DU) mhc::prefetch_tile(from.du + lane_offset, from.C, first + "
        "mhc::TILE_TOKENS, tokens, C + first_channel, lane);",
        0,
    ): "it only prefetches: what is loaded is the same",
    (
        "mhc_mlx/ops/tiling.py",
        "vec = math.gcd(C, 16 // size)",
        "change_constant",
        "vec = math.gcd(C, 17 // size)",
        0,
    ): "an element has 2 or 4 bytes: 17 // of that is the same",
    (
        "mhc_mlx/ops/tiling.py",
        "vec = math.gcd(C, 16 // size)",
        "change_constant",
        "vec = math.gcd(C, 17 // size)",
        1,
    ): "an element has 2 or 4 bytes: 17 // of that is the same",
    (
        "mhc_mlx/ops/tiling.py",
        "vec = math.gcd(C, 16 // dtype.size)",
        "change_constant",
        "vec = math.gcd(C, 17 // dtype.size)",
        0,
    ): "an element has 2 or 4 bytes: 17 // of that is the same",
    (
        "mhc_mlx/ops/tiling.py",
        "while n * vec > 64:",
        "change_constant",
        "while n * vec > 65:",
        0,
    ): "vec is a power of two and n at most 64: their product is never 65",
    (
        "mhc_mlx/ops/tiling.py",
        "while n * vec > 16:",
        "change_constant",
        "while n * vec > 17:",
        0,
    ): "vec is a power of two and n at most 8 here: their product is never 17",
    (
        "mhc_mlx/ops/tiling.py",
        "most = 2 if threads <= 512 else 1 # or registers spill",
        "change_constant",
        "most = 2 if threads <= 513 else 1 # or registers spill",
        0,
    ): "threads are a multiple of 32",
    (
        "mhc_mlx/ops/tiling.py",
        "counts = range(min(most_slices, simds), simds + 1)",
        "change_constant",
        "counts = range(min(most_slices, simds), simds + 2)",
        0,
    ): "one more than all simdgroups does not divide them",
    (
        "mhc_mlx/ops/tiling.py",
        "long = cut(512, 16)",
        "change_constant",
        "long = cut(512, 17)",
        0,
    ): "512 threads are 16 simdgroups, whose number bounds the slices",
    (
        "mhc_mlx/ops/tiling.py",
        "return LogitsTiling(vec, threads, slices, tiles, block, 1)",
        "change_constant",
        "return LogitsTiling(vec, threads, slices, tiles, block, 2)",
        0,
    ): "the last line of the function sets splits, which nothing reads before",
    (
        "mhc_mlx/ops/tiling.py",
        "batch = min(8, 32 >> (n - 1).bit_length()) # a lane per line of each matrix",
        "change_constant",
        "batch = min(8, 33 >> (n - 1).bit_length()) # a lane per line of each matrix",
        0,
    ): "of one stream both are more than 8, of others the same",
    (
        "mhc_mlx/ops/tiling.py",
        "fits = sharing == 1 or simds % sharing == 0 and 32 * simds * lane_packs <= sums",
        "turn_comparison",
        "fits = sharing == 1 or simds % sharing == 0 and 32 * simds * lane_packs < sums",
        0,
    ): "both sides divided by 8 * simds: 4 * held is no odd number times one or two tiles",
    (
        "examples/train_lm.py",
        "refresh=False,",
        "change_constant",
        "refresh=True,",
        0,
    ): "the bar is drawn more often; it shows the same at its end",
    (
        "mhc_mlx/diagnostics/pictures.py",
        "axes.grid(alpha=0.3)",
        "change_constant",
        "axes.grid(alpha=0.44999999999999996)",
        0,
    ): "a grid is as good a little darker",
    (
        "mhc_mlx/diagnostics/pictures.py",
        "axes.grid(alpha=0.3)",
        "change_constant",
        "axes.grid(alpha=0.44999999999999996)",
        1,
    ): "a grid is as good a little darker",
    (
        "mhc_mlx/diagnostics/pictures.py",
        'dotted = {"linestyle": ":", "linewidth": 1}',
        "change_constant",
        'dotted = {"linestyle": ":", "linewidth": 2}',
        0,
    ): "its dots, not its width, tell the line from others",
    (
        "mhc_mlx/mlx_lm/exact.py",
        "return text.embed_tokens(mx.zeros((1, 1), mx.int32)).dtype",
        "change_constant",
        "return text.embed_tokens(mx.zeros((1, 2), mx.int32)).dtype",
        0,
    ): "a dtype does not depend on how many tokens there are",
    (
        "mhc_mlx/mlx_lm/patch.py",
        "for module, kind in zip(modules, classes, strict=True):",
        "change_constant",
        "for module, kind in zip(modules, classes, strict=False):",
        0,
    ): "the classes are listed one per module, so lengths never differ",
}

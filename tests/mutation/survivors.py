"""Mutants that no test can catch, and why. Known by file, the line's text, operator and new line,
and which of those in the file it is.

An entry says why the mutated program is right: its results, bytes moved and refusals are the same.
"""

EQUIVALENT: dict[tuple[str, str, str, str, int], str] = {
    (
        "kernels/sinkhorn.h",
        "constexpr int W = lanes(N) < 32 ? lanes(N) : 32;",
        "change_constant",
        "constexpr int W = lanes(N) < 32 ? lanes(N) : 33;",
        0,
    ): "places past the 32nd are in no sum: scatter_sum adds halves of 32",
    (
        "kernels/mhc_backward_tiled.metal",
        "constexpr int ROWS = LINES < 8 ? LINES : 8; // rows of dx that a simdgroup makes at once",
        "change_constant",
        "constexpr int ROWS = LINES < 9 ? LINES : 8; // rows of dx that a simdgroup makes at once",
        0,
    ): "of 8 lines both branches are 8",
    (
        "kernels/mhc_backward_tiled.metal",
        "ds[q] = dt[(i0 + q < R ? i0 + q : 0) * PITCH + c];",
        "change_constant",
        "ds[q] = dt[(i0 + q < R ? i0 + q : 1) * PITCH + c];",
        0,
    ): "a row past the last is any other, R >= 9: what it adds to g_res is not stored",
    (
        "kernels/products_cuda.h",
        "template <> constexpr int PHI_PARTS<__nv_bfloat16> = 1;",
        "change_constant",
        "template <> constexpr int PHI_PARTS<__nv_bfloat16> = 2;",
        0,
    ): "the second part of a bfloat16 is zero: work more, the same sums",
    (
        "mhc_mlx/ops/geometry.py",
        "vec = math.gcd(C, 16 // size)",
        "change_constant",
        "vec = math.gcd(C, 17 // size)",
        0,
    ): "an element has 2 or 4 bytes: 17 // of that is the same",
    (
        "mhc_mlx/ops/geometry.py",
        "vec = math.gcd(C, 16 // size)",
        "change_constant",
        "vec = math.gcd(C, 17 // size)",
        1,
    ): "an element has 2 or 4 bytes: 17 // of that is the same",
    (
        "mhc_mlx/ops/geometry.py",
        "vec = math.gcd(C, 16 // dtype.size)",
        "change_constant",
        "vec = math.gcd(C, 17 // dtype.size)",
        0,
    ): "an element has 2 or 4 bytes: 17 // of that is the same",
    (
        "mhc_mlx/ops/geometry.py",
        "while n * vec > 64:",
        "change_constant",
        "while n * vec > 65:",
        0,
    ): "vec is a power of two and n at most 64: their product is never 65",
    (
        "mhc_mlx/ops/geometry.py",
        "while n * vec > 16:",
        "change_constant",
        "while n * vec > 17:",
        0,
    ): "vec is a power of two and n at most 8 here: their product is never 17",
    (
        "mhc_mlx/ops/geometry.py",
        "most = 2 if threads <= 512 else 1 # or registers spill",
        "change_constant",
        "most = 2 if threads <= 513 else 1 # or registers spill",
        0,
    ): "threads are a multiple of 32",
    (
        "mhc_mlx/ops/geometry.py",
        "counts = range(min(most_slices, simds), simds + 1)",
        "change_constant",
        "counts = range(min(most_slices, simds), simds + 2)",
        0,
    ): "one more than all simdgroups does not divide them",
    (
        "mhc_mlx/ops/geometry.py",
        "long = cut(512, 16)",
        "change_constant",
        "long = cut(512, 17)",
        0,
    ): "512 threads are 16 simdgroups, whose number bounds the slices",
    (
        "mhc_mlx/ops/geometry.py",
        "return Projection(vec, threads, slices, tiles, block, 1)",
        "change_constant",
        "return Projection(vec, threads, slices, tiles, block, 2)",
        0,
    ): "the last line of the function sets splits, which nothing reads before",
    (
        "mhc_mlx/ops/geometry.py",
        "batch = min(8, 32 >> (n - 1).bit_length()) # a lane per line of each matrix",
        "change_constant",
        "batch = min(8, 33 >> (n - 1).bit_length()) # a lane per line of each matrix",
        0,
    ): "of one stream both are more than 8, of others the same",
    (
        "mhc_mlx/ops/geometry.py",
        "fits = team == 1 or simds % team == 0 and 32 * simds * held <= room",
        "turn_comparison",
        "fits = team == 1 or simds % team == 0 and 32 * simds * held < room",
        0,
    ): "both sides divided by 8 * simds: 4 * held is no odd number times one or two tiles",
}

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
}

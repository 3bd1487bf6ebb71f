// Products of matrices by a simdgroup on Metal: tiles of 8 tokens x 32 k and of 8 logits x 32 k. cuda/matrices.h
// defines the same words for CUDA.
#include "common.h"

namespace mhc {

enum { PHI_ROWS = 2 };  // a lane loads 4 neighbours of two logits

// A lane holds elements as in MLX's own kernels: row, column and column + 1 of an 8 x 8 matrix. Four products cover 32
// k; the s-th takes those with k % 4 == s, so that a lane's elements of a row of x are 8 neighbours.
METAL_FUNC int matrix_row(int lane) { return lane / 16 * 4 + lane / 2 % 4; }
METAL_FUNC int matrix_column(int lane) { return lane / 8 % 2 * 4 + lane % 2 * 2; }
METAL_FUNC int x_row(int lane) { return matrix_row(lane); }
METAL_FUNC int x_k(int lane) { return matrix_column(lane) * 4; }
METAL_FUNC int phi_row(int lane) { return matrix_column(lane); }
METAL_FUNC int phi_k(int lane) { return matrix_row(lane) * 4; }
METAL_FUNC int sum_token(int lane) { return matrix_row(lane); }
METAL_FUNC int sum_logit(int lane, int e) { return matrix_column(lane) + e; }

// A lane's two elements of four matrices.
template <typename T> struct XTile { float v[4][2]; };
template <typename PHI_T> struct PhiTile { float v[4][2]; };

template <typename T> METAL_FUNC void to_tile(thread XTile<T>& t, const thread Run<T, 8>& r) {
  UNROLL_FOR (int s = 0; s < 4; ++s) {
    t.v[s][0] = run_float(r, s);
    t.v[s][1] = run_float(r, s + 4);
  }
}
template <typename PHI_T> METAL_FUNC void to_tile(thread PhiTile<PHI_T>& t, const thread Run<PHI_T, 4> (&r)[PHI_ROWS]) {
  UNROLL_FOR (int s = 0; s < 4; ++s) {
    UNROLL_FOR (int e = 0; e < 2; ++e) t.v[s][e] = run_float(r[e], s);
  }
}

// s += sum(x ** 2) over a lane's elements of its token, the x_k(lane) / 8-th of four shares. sum_squares adds the
// shares, in all lanes of a token.
template <typename T> METAL_FUNC void add_squares(thread float& s, const thread XTile<T>&, const thread Run<T, 8>& r) {
  float run = 0.0f;
  UNROLL_FOR (int e = 0; e < 8; ++e) run += run_float(r, e) * run_float(r, e);
  s += run;
}
METAL_FUNC float sum_squares(float s) {
  const float v = s + simd_shuffle_xor(s, ushort(1));
  return v + simd_shuffle_xor(v, ushort(8));
}

// d += a b, where each argument is a lane's two elements. As in MLX's own kernels, matrices are local here and nowhere
// else: before MSL 4.1 (macOS 27) their constructors need objects in one address space, and a struct cannot hold one.
METAL_FUNC void multiply(thread float (&d)[2], thread const float (&a)[2], thread const float (&b)[2]) {
  simdgroup_float8x8 md, ma, mb;
  UNROLL_FOR (int e = 0; e < 2; ++e) {
    md.thread_elements()[e] = d[e];
    ma.thread_elements()[e] = a[e];
    mb.thread_elements()[e] = b[e];
  }
  simdgroup_multiply_accumulate(md, ma, mb, md);
  UNROLL_FOR (int e = 0; e < 2; ++e) d[e] = md.thread_elements()[e];
}

// sum[.][b] += x phi^T
template <typename T, typename PHI_T, int TILES, int BLOCK>
METAL_FUNC void multiply_add(thread float (&sum)[TILES][BLOCK][2], int b, const thread XTile<T> (&x)[TILES],
                             const thread PhiTile<PHI_T>& phi) {
  UNROLL_FOR (int m = 0; m < TILES; ++m) {
    float d[2] = {};
    UNROLL_FOR (int s = 0; s < 4; ++s) multiply(d, x[m].v[s], phi.v[s]);
    UNROLL_FOR (int e = 0; e < 2; ++e) sum[m][b][e] += d[e];
  }
}

}  // namespace mhc

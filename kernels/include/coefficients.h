// The coefficients that a token makes of its own logits, for mhc_pre, mhc_seam and mhc_pre_backward_coefficients.
#include "sinkhorn.h"

namespace mhc {

// A token's logits alpha l + bias, which are read like an array.
template <typename L, typename B> struct Logits {
  L l;
  B bias;
  float alpha;
  inline float operator[](uint i) const thread { return alpha * static_cast<float>(l[i]) + static_cast<float>(bias[i]); }
};
template <typename L, typename B> inline Logits<L, B> logits_of(L l, B bias, float alpha) { return {l, bias, alpha}; }

// Lanes that project a token's N x N logits, N <= 8: one lane holds four lines if it need not return to the logits.
constexpr int projection_lanes(int n, int start, int iters) { return n <= 4 && return_period(n, start, iters) == 0 ? 1 : matrix_lanes(n); }

// h_res = sinkhorn_knopp of the logits at z, written by lanes in_range. COLUMNS: lines are columns of the logits, and
// OUT_COLUMNS: line i becomes column i of h_res.
template <int N, int START, bool COLUMNS, bool OUT_COLUMNS, int ITERS, typename S, typename O>
inline void project_token(S z, O h_res, bool in_range, float eps, int simd_lane) {
  if constexpr (N == 1 || projection_lanes(N, START, ITERS) == 1) {
    float p[N][N];
    UNROLL for (int q = 0; q < N * N; ++q) p[q / N][q % N] = z[COLUMNS ? q % N * N + q / N : q];
    sinkhorn_one_lane<N, START>(p, ITERS, eps);
    if (in_range) {
      UNROLL for (int q = 0; q < N * N; ++q) h_res[q] = OUT_COLUMNS ? p[q % N][q / N] : p[q / N][q % N];
    }
  } else {
    project_lanes<N, START, COLUMNS, OUT_COLUMNS, ITERS>(z, h_res, in_range, eps, uint(simd_lane));
  }
}

}  // namespace mhc

// The coefficients that a token makes for itself of its logits, for mhc_pre, mhc_seam and mhc_token_backward.
#include "sinkhorn.h"

namespace mhc {

template <int N> inline int part_of(int o) { return o < N ? 0 : o < 2 * N ? 1 : 2; }  // pre, post, res

// h_pre = sigmoid(z) + pre_eps and h_post = post_scale * sigmoid(z) + post_eps; params holds the three numbers
template <typename Q> inline float gate(float z, int part, Q params) {
  const float scale = part == 0 ? 1.0f : static_cast<float>(params[1]);
  return scale * sigmoid(z) + static_cast<float>(params[part == 0 ? 0 : 2]);
}

// A token's logits alpha l + bias, to be read like an array of them
template <typename L, typename B> struct Logits {
  L l;
  B bias;
  float alpha;
  inline float operator[](uint i) const thread { return alpha * static_cast<float>(l[i]) + static_cast<float>(bias[i]); }
};
template <typename L, typename B> inline Logits<L, B> logits_of(L l, B bias, float alpha) { return {l, bias, alpha}; }

// Lanes that project a token's N x N logits, N <= 8: four lines fit in one lane, which keeps no logits to return to.
constexpr int projecting(int n, int start, int iters) { return n <= 4 && returning(n, start, iters) == 0 ? 1 : lanes(n); }

// to = sinkhorn_knopp of the logits at z, if live; COLUMNS as in sinkhorn_knopp.metal
template <int N, int START, bool COLUMNS, bool OUT_COLUMNS, int ITERS, typename S, typename O>
inline void project_token(S z, O to, bool live, float eps, int simd_lane) {
  if constexpr (N == 1 || projecting(N, START, ITERS) == 1) {
    float p[N][N];
    UNROLL for (int q = 0; q < N * N; ++q) p[q / N][q % N] = z[COLUMNS ? q % N * N + q / N : q];
    sinkhorn_alone<N, START>(p, ITERS, eps);
    if (live) {
      UNROLL for (int q = 0; q < N * N; ++q) to[q] = OUT_COLUMNS ? p[q % N][q / N] : p[q / N][q % N];
    }
  } else {
    project<N, START, COLUMNS, OUT_COLUMNS, ITERS>(z, to, live, eps, uint(simd_lane));
  }
}

}  // namespace mhc

// The exact gradient of the truncated Sinkhorn-Knopp iteration, W lanes a matrix as in sinkhorn.h.
#include "sinkhorn.h"

namespace mhc {

// g, a line of dh_res, becomes that line of dlogits. Runs the iteration again and keeps only its divisors d (one float per line
// or column and half-step), then walks back:
//   p_before = p * d;   dp = (dp - (dp * p).sum()) / d      along or across the lines, as the half-step did.
// divisors has room for KEPT of the lane's, STRIDE apart. Where those of all half-steps are more, it goes segment by segment, last
// first, and runs the iteration anew for each. Lanes beyond the matrix have zeros in g.
template <int N, int START, bool COLUMNS, int ITERS, int KEPT, int STRIDE, typename P, typename D, typename S>
inline void sinkhorn_gradient(thread float (&g)[N], P logits, D divisors, float bound, uint lane, uint simd_lane, S scratch) {
  constexpr int FIRST = steps_of(START);
  const bool live = lane < uint(N);
  float p[N], all[N], dots[N];
  for (int end = 2 * ITERS; end > FIRST; end -= KEPT) {
    const int begin = end - KEPT > FIRST ? end - KEPT : FIRST;
    load_line<N, COLUMNS>(p, logits, lane);
    sinkhorn_start<N, START>(p, bound, lane, simd_lane, scratch);
    for (int k = FIRST; k < end; ++k) {
      const float d = half_step(p, k, bound, lane, simd_lane, scratch);
      if (k >= begin) divisors[(k - begin) * STRIDE] = d;
    }
    for (int k = end - 1; k >= begin; --k) {
      const float d = divisors[(k - begin) * STRIDE];
      if (k % 2 == 0) {
        const float r = RECIPROCAL(d);
        float dot = 0.0f;
        UNROLL for (int j = 0; j < N; ++j) dot += g[j] * p[j];
        UNROLL for (int j = 0; j < N; ++j) {
          g[j] = live ? (g[j] - dot) * r : 0.0f;
          p[j] *= d;
        }
      } else {
        UNROLL for (int j = 0; j < N; ++j) all[j] = g[j] * p[j];
        const float dot = across<N, false>(all, lane, scratch);
        gather<N>(dots, dot, lane, simd_lane, scratch);
        gather<N>(all, d, lane, simd_lane, scratch);
        UNROLL for (int j = 0; j < N; ++j) {
          g[j] = live ? (g[j] - dots[j]) * RECIPROCAL(all[j]) : 0.0f;
          p[j] *= all[j];
        }
      }
    }
  }

  if (START == START_EXP) {
    // the second log-domain step: dl = g p - p (g p).sum(across);  p is its result
    load_line<N, COLUMNS>(p, logits, lane);
    sinkhorn_start<N, START>(p, bound, lane, simd_lane, scratch);
    UNROLL for (int j = 0; j < N; ++j) g[j] *= p[j];
    gather<N>(dots, across<N, false>(g, lane, scratch), lane, simd_lane, scratch);
    UNROLL for (int j = 0; j < N; ++j) g[j] -= p[j] * dots[j];
  }
  if (START != START_ADDITIVE) {
    // a softmax along the line: dl = s g - s (s g).sum(), where the log-domain step already holds s g
    load_line<N, COLUMNS>(p, logits, lane);
    softmax_line(p);
    float dot = 0.0f;
    UNROLL for (int j = 0; j < N; ++j) {
      if (START == START_SOFTMAX) g[j] *= p[j];
      dot += g[j];
    }
    UNROLL for (int j = 0; j < N; ++j) g[j] -= p[j] * dot;
  }
}

}  // namespace mhc

// The exact gradient of the truncated Sinkhorn-Knopp iteration, W lanes a matrix as in sinkhorn.h.
#include "sinkhorn.h"

namespace mhc {

// g = p (g - shift), the gradient of log p, where p is the result of a step across. Any shift of a column is right, if that step
// then subtracts shift eps / d from its sum of g. With the g of an element near 1 as its shift, no digits of it cancel.
template <int N, typename S>
inline void shift_columns(thread float (&g)[N], thread const float (&p)[N], uint lane, uint simd_lane, S scratch, thread float& shift) {
  float all[N];
  UNROLL for (int j = 0; j < N; ++j) all[j] = p[j] > 0.5f ? g[j] : 0.0f;
  shift = across<N, false>(all, lane, scratch);
  share<N>(shift, lane, scratch);
  shared_now<N>();
  UNROLL for (int j = 0; j < N; ++j) g[j] = p[j] * (g[j] - shared<N>(shift, j, simd_lane, scratch));
  shared_now<N>();
}

// q = q - p dot;   p = p d, with the dot and the divisor of each column in its lane
template <int N, typename S>
inline void step_back_across(thread float (&q)[N], thread float (&p)[N], float dot, float d, uint lane, uint simd_lane, S scratch) {
  share<N>(dot, lane, scratch);
  share<N>(d, lane, scratch, 64);
  shared_now<N>();
  UNROLL for (int j = 0; j < N; ++j) {
    q[j] -= p[j] * shared<N>(dot, j, simd_lane, scratch);
    p[j] *= shared<N>(d, j, simd_lane, scratch, 64);
  }
  shared_now<N>();
}

// g, a line of dh_res, becomes that line of dlogits. Runs the iteration again and keeps only its divisors d (one float per line
// or column and half-step), then walks back along or across the lines, as the half-step did:
//   q = p dp, the gradient of log p:   q = q - p q.sum();   p = p d
//   ADDITIVE, whose p may be 0:        dp = (dp - (dp * p).sum()) / d;   p = p d
// divisors has room for KEPT of the lane's, STRIDE apart. Where those of all half-steps are more, it goes segment by segment, last
// first, and runs the iteration anew for each. A segment ends after a step across, so a step across and one along take turns.
// Lanes beyond the matrix have zeros in g.
template <int N, int START, bool COLUMNS, int ITERS, int KEPT, int STRIDE, typename P, typename D, typename S>
inline void sinkhorn_gradient(thread float (&g)[N], P logits, D divisors, float bound, uint lane, uint simd_lane, S scratch) {
  constexpr int FIRST = steps_of(START), LAST = 2 * ITERS, RETURN = returning(N, START, ITERS), SEGMENT = KEPT / 2 * 2;
  constexpr bool LOGS = START != START_ADDITIVE;
  const bool live = lane < uint(N);
  float p[N], left = 0.0f;
  Divided by;
  for (int end = LAST; end > FIRST; end -= SEGMENT) {
    const int begin = end - SEGMENT > FIRST ? end - SEGMENT : FIRST;
    load_line<N, COLUMNS>(p, logits, lane);
    sinkhorn_start<N, START>(p, by, bound, lane, simd_lane, scratch);
    for (int k = FIRST; k < end; ++k) {
      const float d = half_step(p, k, bound, lane, simd_lane, scratch);
      if (k >= begin) divisors[(k - begin) * STRIDE] = d;
      if constexpr (RETURN > 0) {
        divide(by, k, d);
        if ((k + 1 - FIRST) % RETURN == 0 || k + 1 == end) return_small<N, START, COLUMNS>(p, logits, by, bound, lane, simd_lane, scratch);
      }
    }
    if (LOGS && end == LAST) {
      shift_columns<N>(g, p, lane, simd_lane, scratch, left);
      left *= bound * RECIPROCAL(divisors[(LAST - 1 - begin) * STRIDE]);
    }
    for (int k = end - 1; k >= begin; k -= 2) {
      float d = divisors[(k - begin) * STRIDE];
      if constexpr (LOGS) {
        step_back_across<N>(g, p, across<N, false>(g, lane, scratch) - left, d, lane, simd_lane, scratch);
        left = 0.0f;
      } else {
        float all[N], dots[N];
        UNROLL for (int j = 0; j < N; ++j) all[j] = g[j] * p[j];
        const float dot = across<N, false>(all, lane, scratch);
        gather<N>(dots, dot, lane, simd_lane, scratch);
        gather<N>(all, d, lane, simd_lane, scratch);
        UNROLL for (int j = 0; j < N; ++j) {
          g[j] = live ? (g[j] - dots[j]) * RECIPROCAL(all[j]) : 0.0f;
          p[j] *= all[j];
        }
      }
      if constexpr (RETURN > 0) divide(by, k, RECIPROCAL(d));
      if (k == begin) break;  // a softmax was the step along

      d = divisors[(k - 1 - begin) * STRIDE];
      if constexpr (LOGS) {
        const float dot = line_sum(g);
        UNROLL for (int j = 0; j < N; ++j) {
          g[j] -= p[j] * dot;
          p[j] *= d;
        }
      } else {
        const float r = RECIPROCAL(d);
        float dot = 0.0f;
        UNROLL for (int j = 0; j < N; ++j) dot += g[j] * p[j];
        UNROLL for (int j = 0; j < N; ++j) {
          g[j] = live ? (g[j] - dot) * r : 0.0f;
          p[j] *= d;
        }
      }
      if constexpr (RETURN > 0) {
        divide(by, k - 1, RECIPROCAL(d));
        if ((end - k + 1) % (RETURN / 2 * 2) == 0 && k - 1 > begin) return_small<N, START, COLUMNS>(p, logits, by, bound, lane, simd_lane, scratch);
      }
    }
  }

  if constexpr (START == START_EXP) {
    // the second log-domain step is one across, too;  p is its result
    load_line<N, COLUMNS>(p, logits, lane);
    sinkhorn_start<N, START>(p, by, bound, lane, simd_lane, scratch);
    if (LAST == FIRST) shift_columns<N>(g, p, lane, simd_lane, scratch, left);
    step_back_across<N>(g, p, across<N, false>(g, lane, scratch), 1.0f, lane, simd_lane, scratch);
  }
  if constexpr (LOGS) {
    // a softmax s along the line: q = q - s q.sum(), where START_SOFTMAX has q = s / (s + eps) times the gradient of log(s + eps)
    // for s near 1, where 1 - s is the sum of all others:  q = q (1 - s) - s (q.sum() of all others)
    load_line<N, COLUMNS>(p, logits, lane);
    softmax_line(p, by.top, by.sum);
    float small_p = 0.0f, small_g = 0.0f, large_g = 0.0f;
    UNROLL for (int j = 0; j < N; ++j) {
      if (START == START_SOFTMAX) g[j] *= p[j] / (p[j] + bound);
      const bool large = p[j] > 0.5f;
      small_p += large ? 0.0f : p[j];
      small_g += large ? 0.0f : g[j];
      large_g += large ? g[j] : 0.0f;
    }
    UNROLL for (int j = 0; j < N; ++j) g[j] = p[j] > 0.5f ? g[j] * small_p - p[j] * small_g : g[j] - p[j] * (small_g + large_g);
  }
}

}  // namespace mhc

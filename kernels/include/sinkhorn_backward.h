// The exact gradient of the truncated Sinkhorn-Knopp iteration, and of the clamp before it; matrix_lanes(N) lanes hold
// a matrix, lane i its line i.
#include "sinkhorn.h"

namespace mhc {

// g = p (g - shift), the gradient of log p, where p is the result of a step across. Any shift of a column is right, if
// that step then subtracts shift eps / d from its sum of g. With the g of an element near 1 as its shift, no digits of
// it cancel.
template <int N, typename S>
METAL_FUNC void shift_columns(thread float (&g)[N], thread const float (&p)[N], uint lane, uint simd_lane, S scratch,
                              thread float& shift) {
  float all[N];
  UNROLL_16_FOR (int j = 0; j < N; ++j) all[j] = p[j] > 0.5f ? g[j] : 0.0f;
  shift = column_reduce<N, false>(all, lane, scratch);
  publish<N>(shift, lane, scratch);
  publish_barrier<N>();
  UNROLL_16_FOR (int j = 0; j < N; ++j) g[j] = p[j] * (g[j] - published<N>(shift, j, simd_lane, scratch));
  publish_barrier<N>();
}

// q = q - p dot;   p = p d, where lane c holds the dot and the divisor of column c.
template <int N, typename S>
METAL_FUNC void step_back_across(thread float (&q)[N], thread float (&p)[N], float dot, float d, uint lane,
                                 uint simd_lane, S scratch) {
  publish<N>(dot, lane, scratch);
  publish<N>(d, lane, scratch, 64);
  publish_barrier<N>();
  UNROLL_16_FOR (int j = 0; j < N; ++j) {
    q[j] -= p[j] * published<N>(dot, j, simd_lane, scratch);
    p[j] *= published<N>(d, j, simd_lane, scratch, 64);
  }
  publish_barrier<N>();
}

// g, a line of dh_res, becomes that line of dlogits. This runs the iteration again and keeps only its divisors d (one
// float for each line or column and half-step), then walks back along or across the lines, as the half-step did:
//   q = p dp, the gradient of log p:              q = q - p q.sum();   p = p d
//   START_ADDITIVE, where p may be 0:             dp = (dp - (dp * p).sum()) / d;   p = p d
// divisors holds STORED_STEPS of the lane's, STRIDE apart. If there are more half-steps, this goes segment by segment,
// the last first, and runs the iteration anew for each. A segment ends after a step across, so steps across and along
// alternate. Lanes beyond the matrix have zeros in g.
template <int N, int START, bool COLUMNS, int ITERS, int STORED_STEPS, int STRIDE, bool CLAMP, typename P, typename D,
          typename S>
METAL_FUNC void sinkhorn_gradient(thread float (&g)[N], P given, D divisors, ProjectionNumbers<CLAMP> numbers,
                                  uint lane, uint simd_lane, S scratch) {
  constexpr int FIRST = start_half_steps(START), LAST = 2 * ITERS, RETURN = return_period(N, START, ITERS),
                SEGMENT = STORED_STEPS / 2 * 2;
  constexpr bool LOGS = START != START_ADDITIVE;
  const bool in_range = lane < uint(N);
  const float eps = numbers.eps;
  const auto logits = clipped(given, numbers);
  float p[N], shift_eps = 0.0f;
  LogDivisors log_divisors;
  for (int end = LAST; end > FIRST; end -= SEGMENT) {
    const int begin = end - SEGMENT > FIRST ? end - SEGMENT : FIRST;
    load_line<N, COLUMNS>(p, logits, lane);
    sinkhorn_start<N, START>(p, log_divisors, eps, lane, simd_lane, scratch);
    for (int k = FIRST; k < end; ++k) {
      const float d = half_step(p, k, eps, lane, simd_lane, scratch);
      if (k >= begin) divisors[(k - begin) * STRIDE] = d;
      if constexpr (RETURN > 0) {
        record_divisor(log_divisors, k, d);
        if ((k + 1 - FIRST) % RETURN == 0 || k + 1 == end)
          return_small<N, START, COLUMNS>(p, logits, log_divisors, eps, lane, simd_lane, scratch);
      }
    }
    if (LOGS && end == LAST) {
      shift_columns<N>(g, p, lane, simd_lane, scratch, shift_eps);
      shift_eps *= eps * RECIPROCAL(divisors[(LAST - 1 - begin) * STRIDE]);
    }
    for (int k = end - 1; k >= begin; k -= 2) {
      float d = divisors[(k - begin) * STRIDE];
      if constexpr (LOGS) {
        step_back_across<N>(g, p, column_reduce<N, false>(g, lane, scratch) - shift_eps, d, lane, simd_lane, scratch);
        shift_eps = 0.0f;
      } else {
        float all[N], dots[N];
        UNROLL_16_FOR (int j = 0; j < N; ++j) all[j] = g[j] * p[j];
        const float dot = column_reduce<N, false>(all, lane, scratch);
        broadcast_columns<N>(dots, dot, lane, simd_lane, scratch);
        broadcast_columns<N>(all, d, lane, simd_lane, scratch);
        UNROLL_16_FOR (int j = 0; j < N; ++j) {
          g[j] = in_range ? (g[j] - dots[j]) * RECIPROCAL(all[j]) : 0.0f;
          p[j] *= all[j];
        }
      }
      if constexpr (RETURN > 0) record_divisor(log_divisors, k, RECIPROCAL(d));
      if (k == begin) break;  // the step along was that of the start

      d = divisors[(k - 1 - begin) * STRIDE];
      if constexpr (LOGS) {
        const float dot = line_sum(g);
        UNROLL_16_FOR (int j = 0; j < N; ++j) {
          g[j] -= p[j] * dot;
          p[j] *= d;
        }
      } else {
        const float r = RECIPROCAL(d);
        float dot = 0.0f;
        UNROLL_16_FOR (int j = 0; j < N; ++j) dot += g[j] * p[j];
        UNROLL_16_FOR (int j = 0; j < N; ++j) {
          g[j] = in_range ? (g[j] - dot) * r : 0.0f;
          p[j] *= d;
        }
      }
      if constexpr (RETURN > 0) {
        record_divisor(log_divisors, k - 1, RECIPROCAL(d));
        if ((end - k + 1) % (RETURN / 2 * 2) == 0 && k - 1 > begin)
          return_small<N, START, COLUMNS>(p, logits, log_divisors, eps, lane, simd_lane, scratch);
      }
    }
  }

  if constexpr (START == START_EXP) {
    // The second log-domain step is one across, too;   p is its result.
    load_line<N, COLUMNS>(p, logits, lane);
    sinkhorn_start<N, START>(p, log_divisors, eps, lane, simd_lane, scratch);
    if (LAST == FIRST) shift_columns<N>(g, p, lane, simd_lane, scratch, shift_eps);
    step_back_across<N>(g, p, column_reduce<N, false>(g, lane, scratch), 1.0f, lane, simd_lane, scratch);
  }
  if constexpr (START == START_EXP_PLAIN) {
    // q = q - p q.sum() of p = exp(l - max(l)) / (sum + eps);   the largest l, of equal ones the first, takes what
    // makes the sum of the line 0, since a shift of the line changes nothing.
    load_line<N, COLUMNS>(p, logits, lane);
    int largest = 0;
    float top = p[0];
    UNROLL_16_FOR (int j = 1; j < N; ++j) {
      largest = p[j] > top ? j : largest;
      top = metal::max(top, p[j]);
    }
    softmax_line<START>(p, log_divisors.top, log_divisors.sum, eps);
    const float dot = line_sum(g);
    float others = 0.0f;
    UNROLL_16_FOR (int j = 0; j < N; ++j) {
      g[j] -= p[j] * dot;
      others += j == largest ? 0.0f : g[j];
    }
    UNROLL_16_FOR (int j = 0; j < N; ++j) g[j] = j == largest ? -others : g[j];
  } else if constexpr (LOGS) {
    // The gradient of a softmax s along the line: q = q - s q.sum(). START_SOFTMAX: q is s / (s + eps) times the
    // gradient of log(s + eps). Where s is near 1, 1 - s is the sum of all others:   q = q (1 - s) - s (q.sum() of all
    // others).
    load_line<N, COLUMNS>(p, logits, lane);
    softmax_line<START>(p, log_divisors.top, log_divisors.sum, eps);
    float small_p = 0.0f, small_g = 0.0f, large_g = 0.0f;
    UNROLL_16_FOR (int j = 0; j < N; ++j) {
      if (START == START_SOFTMAX) g[j] *= p[j] / (p[j] + eps);
      const bool large = p[j] > 0.5f;
      small_p += large ? 0.0f : p[j];
      small_g += large ? 0.0f : g[j];
      large_g += large ? g[j] : 0.0f;
    }
    UNROLL_16_FOR (int j = 0; j < N; ++j)
      g[j] = p[j] > 0.5f ? g[j] * small_p - p[j] * small_g : g[j] - p[j] * (small_g + large_g);
  }
  if constexpr (CLAMP) {
    load_line<N, COLUMNS>(p, given, lane);
    UNROLL_16_FOR (int j = 0; j < N; ++j) g[j] = p[j] > numbers.low && p[j] < numbers.high ? g[j] : 0.0f;
  }
}

// g = a line of dlogits, the gradient of the projection of these logits for dh_res; zeros in lanes beyond the matrix.
template <int N, int START, bool COLUMNS, bool OUT_COLUMNS, int ITERS, int STORED_STEPS, int STRIDE, typename H,
          typename P, typename D, typename S, bool CLAMP>
METAL_FUNC void walk_back_projection(thread float (&g)[N], H dh_res, P logits, D divisors,
                                     ProjectionNumbers<CLAMP> numbers, uint lane, uint simd_lane, S scratch) {
  load_line<N, OUT_COLUMNS>(g, dh_res, lane);
  UNROLL_16_FOR (int j = 0; j < N; ++j) g[j] = lane < uint(N) ? g[j] : 0.0f;
  sinkhorn_gradient<N, START, COLUMNS, ITERS, STORED_STEPS, STRIDE>(g, logits, divisors, numbers, lane, simd_lane,
                                                                    scratch);
}

}  // namespace mhc

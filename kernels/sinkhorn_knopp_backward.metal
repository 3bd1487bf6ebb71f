// sinkhorn_knopp_backward: the exact gradient of the truncated iteration.
//
// Runs the iteration again and keeps only its divisors d (one float per line or column and half-step), then walks back:
//   p_before = p * d;   dp = (dp - (dp * p).sum()) / d      along or across the lines, as the half-step did.
// Where the divisors of all half-steps do not fit in threadgroup memory, it goes segment by segment (KEPT half-steps
// each, last first) and runs the iteration anew for each.
//
// in   logits [M, N, N], dh_res [M, N, N] any float, eps [1]     out  dlogits [M, N, N] of D
// own, grid as sinkhorn_knopp     template  N, ITERS, START, COLUMNS, OUT_COLUMNS, THREADS, KEPT, D (dtype of dlogits)
#include "sinkhorn.h"
constexpr int W = mhc::lanes(N);
constexpr int FIRST = mhc::steps_of(START);
threadgroup float scratch[N > 32 ? 2 * THREADS : 1];
threadgroup float divisors[KEPT * THREADS];
const uint tid = thread_position_in_threadgroup.x;
const uint lane = tid % W;
const uint simd_lane = thread_index_in_simdgroup;
const uint slot = tid / W;
const uint exchange = slot * (N > 32 ? 128 : 0);
const size_t count = logits_shape[0];
const bool live = lane < N;
const float bound = static_cast<float>(eps[0]);

for (size_t first = threadgroup_position_in_grid.x * (THREADS / W); first < count;
     first += threadgroups_per_grid.x * (THREADS / W)) {
  const size_t m = first + slot;
  const size_t base = (m < count ? m : first) * (N * N);
  float p[N], g[N], all[N], dots[N];
  mhc::load_line<N, OUT_COLUMNS>(g, dh_res + base, lane);
  UNROLL for (int j = 0; j < N; ++j) g[j] = live ? g[j] : 0.0f;

  for (int end = 2 * ITERS; end > FIRST; end -= KEPT) {
    const int begin = end - KEPT > FIRST ? end - KEPT : FIRST;
    mhc::load_line<N, COLUMNS>(p, logits + base, lane);
    mhc::sinkhorn_start<N, START>(p, bound, lane, simd_lane, scratch + exchange);
    for (int k = FIRST; k < end; ++k) {
      const float d = mhc::half_step(p, k, bound, lane, simd_lane, scratch + exchange);
      if (k >= begin) divisors[(k - begin) * THREADS + tid] = d;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = end - 1; k >= begin; --k) {
      const int at = (k - begin) * THREADS + int(tid);
      if (k % 2 == 0) {
        const float d = divisors[at], r = RECIPROCAL(d);
        float dot = 0.0f;
        UNROLL for (int j = 0; j < N; ++j) dot += g[j] * p[j];
        UNROLL for (int j = 0; j < N; ++j) {
          g[j] = live ? (g[j] - dot) * r : 0.0f;
          p[j] *= d;
        }
      } else {
        UNROLL for (int j = 0; j < N; ++j) all[j] = g[j] * p[j];
        const float dot = mhc::across<N, false>(all, lane, scratch + exchange);
        mhc::gather<N>(dots, dot, lane, simd_lane, scratch + exchange);
        UNROLL for (int j = 0; j < N; ++j) {
          const float d = divisors[at - int(lane) + j];
          g[j] = live ? (g[j] - dots[j]) * RECIPROCAL(d) : 0.0f;
          p[j] *= d;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  if (START == mhc::START_EXP) {
    // the second log-domain step: dl = g p - p (g p).sum(across);  p is its result
    mhc::load_line<N, COLUMNS>(p, logits + base, lane);
    mhc::sinkhorn_start<N, START>(p, bound, lane, simd_lane, scratch + exchange);
    UNROLL for (int j = 0; j < N; ++j) g[j] *= p[j];
    mhc::gather<N>(dots, mhc::across<N, false>(g, lane, scratch + exchange), lane, simd_lane, scratch + exchange);
    UNROLL for (int j = 0; j < N; ++j) g[j] -= p[j] * dots[j];
  }
  if (START != mhc::START_ADDITIVE) {
    // a softmax along the line: dl = s g - s (s g).sum(), where the log-domain step already holds s g
    mhc::load_line<N, COLUMNS>(p, logits + base, lane);
    mhc::softmax_line(p);
    float dot = 0.0f;
    UNROLL for (int j = 0; j < N; ++j) {
      if (START == mhc::START_SOFTMAX) g[j] *= p[j];
      dot += g[j];
    }
    UNROLL for (int j = 0; j < N; ++j) g[j] -= p[j] * dot;
  }
  if (m < count && live) {
    UNROLL for (int j = 0; j < N; ++j) dlogits[base + (COLUMNS ? j * N + lane : lane * N + j)] = static_cast<D>(g[j]);
  }
}

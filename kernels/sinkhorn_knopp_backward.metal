// sinkhorn_knopp_backward: the exact gradient of the truncated iteration (sinkhorn_backward.h).
//
// in   logits [M, N, N], dh_res [M, N, N] any float, eps [1]     out  dlogits [M, N, N] of D
// own, grid as sinkhorn_knopp     template  N, ITERS, START, COLUMNS, OUT_COLUMNS, THREADS, KEPT, D (dtype of dlogits)
#include "sinkhorn_backward.h"
constexpr int W = mhc::lanes(N);
threadgroup float scratch[N > 32 ? 2 * THREADS : 1];
threadgroup float divisors[KEPT * THREADS];
const uint tid = thread_position_in_threadgroup.x;
const uint lane = tid % W;
const uint slot = tid / W;
const uint exchange = slot * (N > 32 ? 128 : 0);
const size_t count = logits_shape[0];
const bool live = lane < N;

for (size_t first = threadgroup_position_in_grid.x * (THREADS / W); first < count;
     first += threadgroups_per_grid.x * (THREADS / W)) {
  const size_t m = first + slot;
  const size_t base = (m < count ? m : first) * (N * N);
  float g[N];
  mhc::load_line<N, OUT_COLUMNS>(g, dh_res + base, lane);
  UNROLL for (int j = 0; j < N; ++j) g[j] = live ? g[j] : 0.0f;
  mhc::sinkhorn_gradient<N, START, COLUMNS, ITERS, KEPT, THREADS>(
      g, logits + base, divisors + tid, static_cast<float>(eps[0]), lane, thread_index_in_simdgroup, scratch + exchange);
  if (m < count && live) {
    UNROLL for (int j = 0; j < N; ++j) dlogits[base + (COLUMNS ? j * N + lane : lane * N + j)] = static_cast<D>(g[j]);
  }
}

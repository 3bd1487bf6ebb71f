// sinkhorn_knopp: the truncated projection of M matrices, 2 * ITERS half-steps p = p / (p.sum() + eps).
//
// in   logits [M, N, N] any float, eps [1] float     out  h_res [M, N, N] float
// own  lanes(N) neighbouring threads hold a matrix, a line each: rows, or columns where COLUMNS;
//      OUT_COLUMNS says whether line i is column i of h_res
// template  N, ITERS, START (sinkhorn.h), COLUMNS, OUT_COLUMNS, THREADS     grid  any number of threadgroups
#include "sinkhorn.h"
constexpr int W = mhc::lanes(N);
threadgroup float scratch[N > 32 ? 2 * THREADS : 1];
const uint lane = thread_position_in_threadgroup.x % W;
const uint slot = thread_position_in_threadgroup.x / W;
const size_t count = logits_shape[0];

for (size_t first = threadgroup_position_in_grid.x * (THREADS / W); first < count;
     first += threadgroups_per_grid.x * (THREADS / W)) {
  const size_t m = first + slot;
  const size_t base = (m < count ? m : first) * (N * N);
  float p[N];
  mhc::sinkhorn<N, START, COLUMNS, ITERS>(p, logits + base, eps[0], lane, thread_index_in_simdgroup, scratch + slot * (N > 32 ? 128 : 0));
  if (m < count && lane < N) {
    UNROLL for (int j = 0; j < N; ++j) h_res[base + (OUT_COLUMNS ? j * N + lane : lane * N + j)] = p[j];
  }
}

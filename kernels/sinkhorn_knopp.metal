// sinkhorn_knopp: the truncated Sinkhorn-Knopp projection of M matrices of logits l.
//
//   START_EXP       p = exp(l); the first two half-steps are made on l itself, without eps
//   START_SOFTMAX   p = softmax(l) along the line + eps; this is the first half-step
//   START_EXP_PLAIN p = exp(l - max(l)) / (its sum + eps) along the line; this is the first half-step
//   START_ADDITIVE  p = I + l
//   half-step k: p = p / (p.sum() + eps), along the lines for even k and across them for odd k; 2 * ITERS with those of
//   the start
//
// in   logits [M, N, N] any float, params [6 or 8] float, by mhc::param: PROJECTION_EPS (eps in the formula),
//      with CLAMP also CLAMP_LOW, CLAMP_HIGH
// out  h_res [M, N, N] float
// CLAMP: l is clipped to [CLAMP_LOW, CLAMP_HIGH] before all else.
// COLUMNS: lines are columns, without COLUMNS rows. OUT_COLUMNS: line i becomes column i of h_res, without OUT_COLUMNS
//      row i.
// owners  matrix_lanes(N) neighbouring threads hold a matrix, a line each. A threadgroup takes as many matrices in turn
//      as fit.
// template  N, ITERS, START, COLUMNS, OUT_COLUMNS, CLAMP, THREADS
// grid  any number of threadgroups
#include "sinkhorn.h"
constexpr int MATRIX_LANES = mhc::matrix_lanes(N);
threadgroup float scratch[N > 32 ? 2 * THREADS : 1];
const uint lane = thread_position_in_threadgroup.x % MATRIX_LANES;
const uint slot = thread_position_in_threadgroup.x / MATRIX_LANES;
const size_t count = logits_shape[0];

for (size_t first = threadgroup_position_in_grid.x * (THREADS / MATRIX_LANES); first < count;
     first += threadgroups_per_grid.x * (THREADS / MATRIX_LANES)) {
  const size_t m = first + slot;
  const size_t base = (m < count ? m : first) * (N * N);
  float p[N];
  mhc::sinkhorn<N, START, COLUMNS, ITERS>(p, logits + base, mhc::projection_numbers<CLAMP>(params),
                                          lane, thread_index_in_simdgroup, scratch + slot * (N > 32 ? 128 : 0));
  if (m < count && lane < N) {
    UNROLL_16_FOR (int j = 0; j < N; ++j) h_res[base + (OUT_COLUMNS ? j * N + lane : lane * N + j)] = p[j];
  }
}

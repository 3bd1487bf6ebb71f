// sinkhorn_knopp_backward: the exact gradient of sinkhorn_knopp, the truncated projection of M matrices of logits l.
//
//   START_EXP       p = exp(l); the first two half-steps are made on l itself, without eps
//   START_SOFTMAX   p = softmax(l) along the line + eps; this is the first half-step
//   START_EXP_PLAIN p = exp(l - max(l)) / (its sum + eps) along the line; this is the first half-step
//   START_ADDITIVE  p = I + l
//   half-step k: p = p / (p.sum() + eps), along the lines for even k and across them for odd k; 2 * ITERS with those of
//   the start
//   dlogits = the derivative of sum(p * dh_res) by l through all of these half-steps
//
// in   logits [M, N, N], dh_res [M, N, N] any float, params [6 or 8] float, by mhc::param: PROJECTION_EPS (eps in the
//      formula), with CLAMP also CLAMP_LOW, CLAMP_HIGH
// out  dlogits [M, N, N] DLOGITS_T
// CLAMP: l is clipped to [CLAMP_LOW, CLAMP_HIGH] before all else; dlogits is 0 where l is not strictly between them.
// COLUMNS: lines are columns, without COLUMNS rows. OUT_COLUMNS: line i becomes column i of h_res, without OUT_COLUMNS
//      row i.
// owners  matrix_lanes(N) neighbouring threads hold a matrix, a line each. A threadgroup takes as many matrices in turn
//      as fit. The divisors of STORED_STEPS half-steps stay in threadgroup memory; if there are more, the iteration is
//      run again.
// template  N, ITERS, START, COLUMNS, OUT_COLUMNS, CLAMP, THREADS, STORED_STEPS, DLOGITS_T
// grid  any number of threadgroups
#include "sinkhorn_backward.h"
constexpr int MATRIX_LANES = mhc::matrix_lanes(N);
threadgroup float scratch[N > 32 ? 2 * THREADS : 1];
threadgroup float divisors[STORED_STEPS * THREADS];
const uint tid = thread_position_in_threadgroup.x;
const uint lane = tid % MATRIX_LANES;
const uint slot = tid / MATRIX_LANES;
const uint scratch_at = slot * (N > 32 ? 128 : 0);
const size_t count = logits_shape[0];

for (size_t first = threadgroup_position_in_grid.x * (THREADS / MATRIX_LANES); first < count;
     first += threadgroups_per_grid.x * (THREADS / MATRIX_LANES)) {
  const size_t m = first + slot;
  const size_t base = (m < count ? m : first) * (N * N);
  float g[N];
  mhc::walk_back_projection<N, START, COLUMNS, OUT_COLUMNS, ITERS, STORED_STEPS, THREADS>(
      g, dh_res + base, logits + base, divisors + tid, mhc::projection_numbers<CLAMP>(params), lane,
      thread_index_in_simdgroup, scratch + scratch_at);
  if (m < count && lane < N) {
    UNROLL_16_FOR (int j = 0; j < N; ++j)
      dlogits[base + (COLUMNS ? j * N + lane : lane * N + j)] = static_cast<DLOGITS_T>(g[j]);
  }
}

// mhc_pre_partial_logits: the phi products of single runs of 32 k, for few tokens, where many threadgroups share a
// token.
//
//   partial_logits[t, r, o] = sum over the k of run r of phi[o, k] vec(x[t])[k];
//   behind them four shares of sum(vec(x[t])**2)
//
// mhc_seam adds the runs in the order in which mhc_pre adds them, so a token gets the same bits from either.
// in   x [tokens, N, C] T; phi [NUM_LOGITS, N * C] PHI_T
// out  partial_logits [tokens, ceil(N * C / 32), NUM_LOGITS + 4] float
// owners  A simdgroup takes a run of 8 tokens.
// template  T, PHI_T, N, NUM_LOGITS, BLOCK, THREADS
// grid  ceil(runs / (THREADS / 32)) threadgroups for each 8 tokens
#include "phi_product.h"
constexpr int SIMDS = THREADS / 32;
constexpr int PITCH = NUM_LOGITS + 4;
const int lane = int(thread_index_in_simdgroup);
const int K = N * x_shape[2];
const int num_runs = (K + 31) / 32;
const int groups_per_tile = (num_runs + SIMDS - 1) / SIMDS;
const int run = int(threadgroup_position_in_grid.x) % groups_per_tile * SIMDS + int(simdgroup_index_in_threadgroup);
const uint first = threadgroup_position_in_grid.x / uint(groups_per_tile) * 8;
const uint tokens = x_shape[0];
const bool x_and_phi_aligned = mhc::runs_aligned<T, PHI_T>(x, phi, K);

const mhc::Runs runs = {tokens, K, 32 * run, K, lane, 0};
for (int o0 = 0; run < num_runs && o0 < NUM_LOGITS; o0 += 8 * BLOCK) {
  float sum[1][BLOCK][2] = {}, squares[1] = {};
  if (x_and_phi_aligned) mhc::accumulate_runs<true, NUM_LOGITS, T, PHI_T>(sum, squares, x, phi, runs, first, o0);
  else mhc::accumulate_runs<false, NUM_LOGITS, T, PHI_T>(sum, squares, x, phi, runs, first, o0);
  const size_t sum_t = first + uint(mhc::sum_token(lane)), square_t = first + uint(mhc::x_row(lane));
  UNROLL_FOR (int b = 0; b < BLOCK; ++b) {
    UNROLL_FOR (int e = 0; e < 2; ++e) {
      const int o = o0 + b * 8 + mhc::sum_logit(lane, e);
      if (sum_t < tokens && o < NUM_LOGITS)
        partial_logits[(sum_t * size_t(num_runs) + size_t(run)) * PITCH + o] = sum[0][b][e];
    }
  }
  if (o0 == 0 && square_t < tokens)
    partial_logits[(square_t * size_t(num_runs) + size_t(run)) * PITCH + NUM_LOGITS + mhc::x_k(lane) / 8] = squares[0];
}

// mhc_sweep: the products of mhc_pre's projection, run by run of 32 k, for few tokens: many threadgroups share a token.
//
//   runs[t, r, o] = sum over the k of run r of phi[o, k] x[t, k];   behind them four shares of sum(x**2)
//
// mhc_seam adds the runs in the order in which mhc_pre does, so that a token has the same bits with either.
// in   x [tokens, N, C] T; phi [OUTS, N * C] P     out  runs [tokens, ceil(N * C / 32), OUTS + 4] float
// own  a simdgroup takes a run of 8 tokens
// template  T, P, N, OUTS, BLOCK, THREADS     grid  ceil(runs / (THREADS / 32)) threadgroups for each 8 tokens
#include "tiles.h"
constexpr int SIMDS = THREADS / 32;
constexpr int PITCH = OUTS + 4;
const int lane = int(thread_index_in_simdgroup);
const int K = N * x_shape[2];
const int count = (K + 31) / 32;
const int spans = (count + SIMDS - 1) / SIMDS;
const int run = int(threadgroup_position_in_grid.x) % spans * SIMDS + int(simdgroup_index_in_threadgroup);
const uint first = threadgroup_position_in_grid.x / uint(spans) * 8;
const uint tokens = x_shape[0];
const bool all_whole = K % 32 == 0 && mhc::aligned<mhc::run_vec<T, 8>()>(x) && mhc::aligned<mhc::run_vec<P, 8 / mhc::PHI_ROWS>()>(phi);

const mhc::Course course = {tokens, K, 32 * run, K, lane, 0};
for (int o0 = 0; run < count && o0 < OUTS; o0 += 8 * BLOCK) {
  float sum[1][BLOCK][2] = {}, squares[1] = {};
  if (all_whole) mhc::sweep<true, OUTS, T, P>(sum, squares, x, phi, course, first, o0);
  else mhc::sweep<false, OUTS, T, P>(sum, squares, x, phi, course, first, o0);
  const size_t made = first + uint(mhc::sum_token(lane)), squared = first + uint(mhc::x_row(lane));
  UNROLL for (int b = 0; b < BLOCK; ++b) {
    UNROLL for (int e = 0; e < 2; ++e) {
      const int o = o0 + b * 8 + mhc::sum_output(lane, e);
      if (made < tokens && o < OUTS) runs[(made * size_t(count) + size_t(run)) * PITCH + o] = sum[0][b][e];
    }
  }
  if (o0 == 0 && squared < tokens)
    runs[(squared * size_t(count) + size_t(run)) * PITCH + OUTS + mhc::x_k(lane) / 8] = squares[0];
}

// sum_partials: the second stage of the sums over tokens, out[p] = sum_g partial[g, p], in a fixed order.
//
// in   partial [G, P] float, H_pre [N], H_post [N] any float, params as in mhc_fused     out  out [P] float
// GATES: columns 0..N-1 are dh_pre and the next N dh_post; they become the gradients of the logits H_pre and H_post.
// own  a threadgroup of 256 takes 256 / LINES columns, LINES threads a column: each takes every LINES-th row
// template  N, GATES, LINES
#include "common.h"
constexpr uint COLUMNS = 256 / LINES;
threadgroup float sums[256];
const uint tid = thread_position_in_threadgroup.x;
const uint rows = partial_shape[0];
const uint columns = partial_shape[1];
const uint p = threadgroup_position_in_grid.x * COLUMNS + tid % COLUMNS;

float s = 0.0f;
if (p < columns) {
#pragma unroll 8
  for (uint g = tid / COLUMNS; g < rows; g += LINES) s += partial[size_t(g) * columns + p];
}
sums[tid] = s;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (tid < COLUMNS && p < columns) {
  UNROLL for (uint k = 1; k < LINES; ++k) s += sums[k * COLUMNS + tid];
  if (GATES && p < 2 * N) {
    const float z = p < N ? static_cast<float>(H_pre[p]) : static_cast<float>(H_post[p - N]);
    s *= (p < N ? 1.0f : static_cast<float>(params[2])) * mhc::sigmoid(z) * mhc::sigmoid(-z);
  }
  out[p] = s;
}

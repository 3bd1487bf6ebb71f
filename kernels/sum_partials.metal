// sum_partials: the second stage of the sums over tokens, out[p] = sum_g partial[g, p], in a fixed order.
//
// in   partial [G, P] float; with GATES H_pre [N], H_post [N] any float, params [6 or 8] float, by mhc::param:
//      POST_SCALE
// out  out [P] float
// GATES: the first N columns are dh_pre and the next N dh_post, and become the gradients of the logits H_pre and
//      H_post: dH_pre = dh_pre s sigmoid(-H_pre), s = sigmoid(H_pre);   dH_post = dh_post post_scale s
//      sigmoid(-H_post), s = sigmoid(H_post)
// owners  A threadgroup of 256 takes 256 / THREADS_PER_COLUMN columns. Of THREADS_PER_COLUMN threads a column, each
//      adds every THREADS_PER_COLUMN-th row.
// template  T, N, GATES, THREADS_PER_COLUMN
// grid  ceil(P * THREADS_PER_COLUMN / 256) threadgroups
#include "common.h"
constexpr uint COLUMNS_PER_GROUP = 256 / THREADS_PER_COLUMN;
threadgroup float sums[256];
const uint tid = thread_position_in_threadgroup.x;
const uint rows = partial_shape[0];
const uint columns = partial_shape[1];
const uint p = threadgroup_position_in_grid.x * COLUMNS_PER_GROUP + tid % COLUMNS_PER_GROUP;

float s = 0.0f;
if (p < columns) {
#pragma unroll 8
  for (uint g = tid / COLUMNS_PER_GROUP; g < rows; g += THREADS_PER_COLUMN) s += partial[size_t(g) * columns + p];
}
sums[tid] = s;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (tid < COLUMNS_PER_GROUP && p < columns) {
  UNROLL_FOR (uint k = 1; k < THREADS_PER_COLUMN; ++k) s += sums[k * COLUMNS_PER_GROUP + tid];
  if (GATES && p < 2 * N) {
    const float z = p < N ? static_cast<float>(H_pre[p]) : static_cast<float>(H_post[p - N]);
    s *= (p < N ? 1.0f : static_cast<float>(params[mhc::param::POST_SCALE])) * mhc::sigmoid(z) * mhc::sigmoid(-z);
  }
  out[p] = s;
}

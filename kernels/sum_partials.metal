// sum_partials: the second stage of the sums over tokens, out[p] = sum_g partial[g, p], in a fixed order.
//
// in   partial [G, P] float, H_pre [N], H_post [N] any float, params as in mhc_fused     out  out [P] float
// GATES: columns 0..N-1 are dh_pre and the next N dh_post; they become the gradients of the logits H_pre and H_post.
// own  a threadgroup of 256 takes 32 columns: 8 simdgroups take every eighth row each     template  N, GATES
threadgroup float sums[256];
const uint lane = thread_index_in_simdgroup;
const uint part = simdgroup_index_in_threadgroup;
const uint rows = partial_shape[0];
const uint columns = partial_shape[1];
const uint p = threadgroup_position_in_grid.x * 32 + lane;

float s = 0.0f;
if (p < columns) {
#pragma unroll 8
  for (uint g = part; g < rows; g += 8) s += partial[size_t(g) * columns + p];
}
sums[part * 32 + lane] = s;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (part == 0 && p < columns) {
#pragma unroll
  for (uint k = 1; k < 8; ++k) s += sums[k * 32 + lane];
  if (GATES && p < 2 * N) {
    const float h = mhc::sigmoid(static_cast<float>(p < N ? H_pre[p] : H_post[p - N]));
    s *= (p < N ? 1.0f : static_cast<float>(params[2])) * h * (1.0f - h);
  }
  out[p] = s;
}

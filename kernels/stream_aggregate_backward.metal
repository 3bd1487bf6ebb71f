// stream_aggregate_backward: dx[j] = h_pre[j] du;   dh_pre[j] = sum_c du x[j]
//
// in   x [tokens, N, C] T, h_pre [N] or [tokens, N] any float, du [tokens, C] T
// out  dx [tokens, N, C] T; dh_pre [tokens, N] float, or partial [threadgroups, N] float where h_pre is shared
// own  as stream_aggregate     template  T, N, VEC, THREADS, PER_TOKEN
#include "common.h"
constexpr int AHEAD = N <= 8 ? N : 1;
threadgroup float pre[N];
threadgroup float scratch[N * THREADS / 32];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];
const uint tokens = x_shape[0];
const bool whole = mhc::aligned<VEC>(x);
const bool d_whole = mhc::aligned<VEC>(du);
if constexpr (!PER_TOKEN) mhc::load_gates<N, THREADS, false, false>(h_pre, pre, h_pre, tid);
threadgroup_barrier(mem_flags::mem_threadgroup);

float g_pre[N] = {};
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const auto row = x + size_t(t) * size_t(N * C);
  if (PER_TOKEN) {  // no one reads the last token's any more: group_sum ended with a barrier
    mhc::load_gates<N, THREADS, false, false>(h_pre + size_t(t) * N, pre, h_pre, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int c = int(tid) * VEC; c < C; c += THREADS * VEC) {
    float d[VEC];
    mhc::load_floats<VEC>(d, du + size_t(t) * size_t(C) + c, d_whole);
#pragma unroll AHEAD
    for (int j = 0; j < N; ++j) {
      mhc::Pack<T, VEC> v = mhc::load<T, VEC>(row + j * C + c, whole);
      UNROLL for (int e = 0; e < VEC; ++e) {
        g_pre[j] += d[e] * static_cast<float>(v.v[e]);
        v.v[e] = static_cast<T>(pre[j] * d[e]);
      }
      *(device mhc::Pack<T, VEC>*)(dx + size_t(t) * size_t(N * C) + j * C + c) = v;
    }
  }
  if (PER_TOKEN) {
    mhc::group_sum<N, THREADS>(g_pre, scratch, dh_pre + size_t(t) * N, tid);
    for (int j = 0; j < N; ++j) g_pre[j] = 0.0f;
  }
}
if (!PER_TOKEN) mhc::group_sum<N, THREADS>(g_pre, scratch, partial + size_t(threadgroup_position_in_grid.x) * N, tid);

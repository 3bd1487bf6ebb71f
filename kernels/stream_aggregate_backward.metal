// stream_aggregate_backward: the gradient of u = sum_j h_pre[j] x[j], dx[j] = h_pre[j] du and dh_pre[j] = sum_c du
// x[j].
//
// in   x [tokens, N, C] T; h_pre [tokens, N] any float (PER_TOKEN) or [N]; du [tokens, C] T
// out  dx [tokens, N, C] T; dh_pre [tokens, N] float (PER_TOKEN) or partial [threadgroups, N] float: dh_pre's sum over
//      this threadgroup's tokens
// owners  A threadgroup takes tokens in turn. A thread takes VEC neighbours of all streams, so each element is read
//      once.
// template  T, N, VEC, THREADS, PER_TOKEN
// grid  any number of threadgroups
#include "common.h"
constexpr int STREAM_UNROLL = N <= 8 ? N : 1;
threadgroup float pre[N];
threadgroup float scratch[N * THREADS / 32];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];
const uint tokens = x_shape[0];
const bool x_aligned = mhc::is_aligned<VEC>(x);
const bool du_aligned = mhc::is_aligned<VEC>(du);
if constexpr (!PER_TOKEN) mhc::load_gates<N, THREADS, false, false>(h_pre, pre, h_pre, tid);
threadgroup_barrier(mem_flags::mem_threadgroup);

float g_pre[N] = {};
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const auto row = x + size_t(t) * size_t(N * C);
  if (PER_TOKEN) {  // group_sum ended with a barrier: the last token's h_pre is no longer read
    mhc::load_gates<N, THREADS, false, false>(h_pre + size_t(t) * N, pre, h_pre, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int c = int(tid) * VEC; c < C; c += THREADS * VEC) {
    float d[VEC];
    mhc::load_floats<VEC>(d, du + size_t(t) * size_t(C) + c, du_aligned);
#pragma unroll(STREAM_UNROLL)
    for (int j = 0; j < N; ++j) {
      mhc::Pack<T, VEC> v = mhc::load<T, VEC>(row + j * C + c, x_aligned);
      UNROLL_FOR (int e = 0; e < VEC; ++e) {
        g_pre[j] += d[e] * mhc::float_of(v, e);
        mhc::set_element(v, e, static_cast<T>(pre[j] * d[e]));
      }
      mhc::store(dx + size_t(t) * size_t(N * C) + j * C + c, v);
    }
  }
  if (PER_TOKEN) {
    mhc::group_sum<N, THREADS>(g_pre, scratch, dh_pre + size_t(t) * N, tid);
    for (int j = 0; j < N; ++j) g_pre[j] = 0.0f;
  }
}
if (!PER_TOKEN) mhc::group_sum<N, THREADS>(g_pre, scratch, partial + size_t(threadgroup_position_in_grid.x) * N, tid);

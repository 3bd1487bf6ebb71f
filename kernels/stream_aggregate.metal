// stream_aggregate: what a sublayer reads, u = sum_j h_pre[j] x[j].
//
// in   x [tokens, N, C] T; h_pre [tokens, N] any float (PER_TOKEN) or [N]
// out  u [tokens, C] T
// owners  A threadgroup takes tokens in turn. A thread takes VEC neighbours of all streams, so each element is read
//      once.
// template  T, N, VEC, THREADS, PER_TOKEN
// grid  any number of threadgroups
#include "common.h"
constexpr int STREAM_UNROLL = N <= 8 ? N : 4;  // streams that are loaded before the first is used
threadgroup float pre[PER_TOKEN ? 1 : N];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];
const uint tokens = x_shape[0];
const bool x_aligned = mhc::is_aligned<VEC>(x);
if constexpr (!PER_TOKEN) mhc::load_gates<N, THREADS, false, false>(h_pre, pre, h_pre, tid);
threadgroup_barrier(mem_flags::mem_threadgroup);

for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const auto row = x + size_t(t) * size_t(N * C);
  for (int c = int(tid) * VEC; c < C; c += THREADS * VEC) {
    float acc[VEC] = {};
#pragma unroll(STREAM_UNROLL)
    for (int j = 0; j < N; ++j) {
      const float h = PER_TOKEN ? static_cast<float>(h_pre[size_t(t) * N + j]) : pre[PER_TOKEN ? 0 : j];
      const mhc::Pack<T, VEC> v = mhc::load<T, VEC>(row + j * C + c, x_aligned);
      UNROLL_FOR (int e = 0; e < VEC; ++e) acc[e] += h * mhc::float_of(v, e);
    }
    mhc::Pack<T, VEC> o = {};
    UNROLL_FOR (int e = 0; e < VEC; ++e) mhc::set_element(o, e, static_cast<T>(acc[e]));
    mhc::store(u + size_t(t) * size_t(C) + c, o);
  }
}

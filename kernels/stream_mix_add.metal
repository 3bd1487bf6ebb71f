// stream_mix_add: the write back of a sublayer, out[i] = sum_j h_res[i, j] x[j] + h_post[i] y.
//
// in   x [tokens, N, C] T, y [tokens, C] T, h_post [N] or [tokens, N], h_res [N, N] or [tokens, N, N] any float
// out  out [tokens, N, C] T
// own  a threadgroup takes tokens in turn, a thread VEC neighbours of all streams: each element is read once
// template  T, N, VEC, THREADS, POST_PER_TOKEN, RES_PER_TOKEN
#include "common.h"
constexpr int AHEAD = N <= 8 ? N : 4;  // streams loaded ahead
constexpr int POSTS = POST_PER_TOKEN && N <= 8 ? N : 0, MIXES = RES_PER_TOKEN && N <= 4 ? N * N : 0;  // a token's, in registers
threadgroup float mix[RES_PER_TOKEN ? 1 : N * N];  // transposed: mix[j * N + i]
threadgroup float post[POST_PER_TOKEN ? 1 : N];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];
if constexpr (!RES_PER_TOKEN) mhc::load_mix<N, THREADS, true>(h_res, mix, tid);
if constexpr (!POST_PER_TOKEN) mhc::load_gates<N, THREADS, false, true>(h_post, post, h_post, tid);
threadgroup_barrier(mem_flags::mem_threadgroup);

const bool whole = mhc::aligned<VEC>(x);
const bool y_whole = mhc::aligned<VEC>(y);
const uint tokens = x_shape[0];
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const size_t base = size_t(t) * size_t(N * C);
  for (int c = int(tid) * VEC; c < C; c += THREADS * VEC) {
    const mhc::Pack<T, VEC> yv = mhc::load<T, VEC>(y + size_t(t) * size_t(C) + c, y_whole);
    float acc[N * VEC], own_post[POSTS + 1], own_mix[MIXES + 1];
    mhc::load_all<POSTS>(own_post, h_post + size_t(t) * POSTS);
    mhc::load_all<MIXES>(own_mix, h_res + size_t(t) * MIXES);
    UNROLL for (int i = 0; i < N; ++i) {
      const float q = POSTS > 0 ? own_post[POSTS > 0 ? i : 0] : POST_PER_TOKEN ? static_cast<float>(h_post[size_t(t) * N + i]) : post[i];
      UNROLL for (int e = 0; e < VEC; ++e) acc[i * VEC + e] = q * static_cast<float>(yv.v[e]);
    }
#pragma unroll AHEAD
    for (int j = 0; j < N; ++j) {
      const mhc::Pack<T, VEC> v = mhc::load<T, VEC>(x + base + j * C + c, whole);
      UNROLL for (int i = 0; i < N; ++i) {
        const float m = MIXES > 0 ? own_mix[MIXES > 0 ? i * N + j : 0] : RES_PER_TOKEN ? static_cast<float>(h_res[(size_t(t) * N + i) * N + j]) : mix[j * N + i];
        UNROLL for (int e = 0; e < VEC; ++e) acc[i * VEC + e] = metal::fma(m, static_cast<float>(v.v[e]), acc[i * VEC + e]);
      }
    }
    UNROLL for (int i = 0; i < N; ++i) {
      mhc::Pack<T, VEC> o;
      UNROLL for (int e = 0; e < VEC; ++e) o.v[e] = static_cast<T>(acc[i * VEC + e]);
      *(device mhc::Pack<T, VEC>*)(out + base + i * C + c) = o;
    }
  }
}

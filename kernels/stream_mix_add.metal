// stream_mix_add: the write back of a sublayer, out[i] = sum_j h_res[i, j] x[j] + h_post[i] y.
//
// in   x [tokens, N, C] T, y [tokens, C] T, h_post [tokens, N] (POST_PER_TOKEN) or [N], h_res [tokens, N, N]
//      (RES_PER_TOKEN) or [N, N] any float
// out  out [tokens, N, C] T
// owners  A threadgroup takes tokens in turn. A thread takes VEC neighbours of all streams, so each element is read
//      once.
// template  T, N, VEC, THREADS, POST_PER_TOKEN, RES_PER_TOKEN
// grid  any number of threadgroups
#include "common.h"
constexpr int STREAM_UNROLL = N <= 8 ? N : 4;  // streams that are loaded before the first is used
constexpr int TOKEN_POSTS = POST_PER_TOKEN && N <= 8 ? N : 0,
              TOKEN_MIXES = RES_PER_TOKEN && N <= 4 ? N * N : 0;  // a token's coefficients that registers hold
threadgroup float mix[RES_PER_TOKEN ? 1 : N * N];  // mix[j * N + i] = h_res[i, j]
threadgroup float post[POST_PER_TOKEN ? 1 : N];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];
if constexpr (!RES_PER_TOKEN) mhc::load_mix<N, THREADS, true>(h_res, mix, tid);
if constexpr (!POST_PER_TOKEN) mhc::load_gates<N, THREADS, false, true>(h_post, post, h_post, tid);
threadgroup_barrier(mem_flags::mem_threadgroup);

const bool x_aligned = mhc::is_aligned<VEC>(x);
const bool y_aligned = mhc::is_aligned<VEC>(y);
const uint tokens = x_shape[0];
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const size_t base = size_t(t) * size_t(N * C);
  for (int c = int(tid) * VEC; c < C; c += THREADS * VEC) {
    const mhc::Pack<T, VEC> yv = mhc::load<T, VEC>(y + size_t(t) * size_t(C) + c, y_aligned);
    float acc[N * VEC], token_post[TOKEN_POSTS + 1], token_mix[TOKEN_MIXES + 1];
    mhc::load_all<TOKEN_POSTS>(token_post, h_post + size_t(t) * TOKEN_POSTS);
    mhc::load_all<TOKEN_MIXES>(token_mix, h_res + size_t(t) * TOKEN_MIXES);
    UNROLL_FOR (int i = 0; i < N; ++i) {
      const float q = TOKEN_POSTS > 0  ? token_post[TOKEN_POSTS > 0 ? i : 0]
                      : POST_PER_TOKEN ? static_cast<float>(h_post[size_t(t) * N + i])
                                       : post[i];
      UNROLL_FOR (int e = 0; e < VEC; ++e) acc[i * VEC + e] = q * mhc::float_of(yv, e);
    }
#pragma unroll(STREAM_UNROLL)
    for (int j = 0; j < N; ++j) {
      const mhc::Pack<T, VEC> v = mhc::load<T, VEC>(x + base + j * C + c, x_aligned);
      UNROLL_FOR (int i = 0; i < N; ++i) {
        const float m = TOKEN_MIXES > 0 ? token_mix[TOKEN_MIXES > 0 ? i * N + j : 0]
                        : RES_PER_TOKEN ? static_cast<float>(h_res[(size_t(t) * N + i) * N + j])
                                        : mix[j * N + i];
        UNROLL_FOR (int e = 0; e < VEC; ++e) acc[i * VEC + e] = metal::fma(m, mhc::float_of(v, e), acc[i * VEC + e]);
      }
    }
    UNROLL_FOR (int i = 0; i < N; ++i) {
      mhc::Pack<T, VEC> o = {};
      UNROLL_FOR (int e = 0; e < VEC; ++e) mhc::set_element(o, e, static_cast<T>(acc[i * VEC + e]));
      mhc::store(out + base + i * C + c, o);
    }
  }
}

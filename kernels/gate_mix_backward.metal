// gate_mix_backward: the gradient of u = mean_j sigmoid(l[j]) s[j], where l are gate_logits: ds[j] = sigmoid(l[j]) du / N
// and dl[j] = sigmoid(l[j]) sigmoid(-l[j]) s[j] du / N.
//
// in   gate_logits [tokens, N, C] T; s [tokens, N, C] T; du [tokens, C] T
// out  dgate_logits [tokens, N, C] T; ds [tokens, N, C] T
// owners  Threadgroups share a token, THREADS packs each, and take tokens in turn. A thread takes VEC neighbours of all
//      streams, so each element is read once.
// template  T, N, VEC, THREADS
// grid  as many threadgroups as share a token, C / VEC / THREADS rounded up, or a multiple of that
#include "common.h"
#include "sigmoids.h"
constexpr int TOGETHER = N % 4 == 0 ? 4 : N <= 8 ? N : 1;  // streams that are loaded before the first is used
const int C = s_shape[2];
const uint tokens = s_shape[0];
const uint parts = (C / VEC + THREADS - 1) / THREADS;  // of a token, each a threadgroup's
const uint group = threadgroup_position_in_grid.x;
const int c = int(group % parts * THREADS + thread_position_in_threadgroup.x) * VEC;
const bool aligned = mhc::is_aligned<VEC>(gate_logits) && mhc::is_aligned<VEC>(s);
const bool du_aligned = mhc::is_aligned<VEC>(du);

for (uint t = group / parts; t < tokens && c < C; t += threadgroups_per_grid.x / parts) {
  const size_t row = size_t(t) * size_t(N * C) + c;
  float d[VEC];
  mhc::load_floats<VEC>(d, du + size_t(t) * size_t(C) + c, du_aligned);
  UNROLL_FOR (int e = 0; e < VEC; ++e) d[e] /= float(N);
#pragma unroll(1)
  for (int j = 0; j < N; j += TOGETHER) {
    mhc::Pack<T, VEC> l[TOGETHER], v[TOGETHER];
    mhc::load_streams<TOGETHER>(l, gate_logits + row, C, j * C, aligned);
    mhc::load_streams<TOGETHER>(v, s + row, C, j * C, aligned);
    UNROLL_FOR (int i = 0; i < TOGETHER; ++i) {
      UNROLL_FOR (int e = 0; e < VEC; ++e) {
        const float z = mhc::float_of(l[i], e);
        float high, low;
        mhc::sigmoids(z, high, low);
        const float dl = high * low * (mhc::float_of(v[i], e) * d[e]);
        mhc::set_element(l[i], e, static_cast<T>(dl));
        mhc::set_element(v[i], e, static_cast<T>((z < 0.0f ? low : high) * d[e]));
      }
      mhc::store(mhc::at(dgate_logits + row, (j + i) * C), l[i]);
      mhc::store(mhc::at(ds + row, (j + i) * C), v[i]);
    }
  }
}

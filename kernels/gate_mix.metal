// gate_mix: what Qwen's gated residual reads, u = mean_j sigmoid(gate_logits[j]) s[j].
//
// in   gate_logits [tokens, N, C] T; s [tokens, N, C] T
// out  u [tokens, C] T
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

for (uint t = group / parts; t < tokens && c < C; t += threadgroups_per_grid.x / parts) {
  const size_t row = size_t(t) * size_t(N * C) + c;
  float acc[VEC] = {};
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
        acc[e] += (z < 0.0f ? low : high) * mhc::float_of(v[i], e);
      }
    }
  }
  mhc::Pack<T, VEC> o = {};
  UNROLL_FOR (int e = 0; e < VEC; ++e) mhc::set_element(o, e, static_cast<T>(acc[e] / float(N)));
  mhc::store(u + size_t(t) * size_t(C) + c, o);
}

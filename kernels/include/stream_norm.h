// What stream_norm and its gradient share: the write-back before the norm, and products with rows of inject.
#include "common.h"

namespace mhc {

// Returns token q of a tile, or the last token: what is made of it then is not stored.
METAL_FUNC uint token_of_tile(uint t0, int q, uint tokens) { return t0 + uint(q) < tokens ? t0 + uint(q) : tokens - 1; }

// to[j] = channels c.. of stream j of COUNT, with WRITE_BACK plus post[j] times those of y, rounded to T.
template <bool WRITE_BACK, int COUNT, int VEC, typename T, typename P, typename Y, typename H>
METAL_FUNC void load_written(thread Pack<T, VEC>* to, P row, Y y, H post, int C, int c, bool aligned, bool y_aligned) {
  if constexpr (!WRITE_BACK) {
    load_streams<COUNT>(to, row, C, c, aligned);
  } else {
    Pack<T, VEC> pack;
    load_streams_and<COUNT>(pack, at(y, c), y_aligned, to, row, C, c, aligned);
    UNROLL_FOR (int j = 0; j < COUNT; ++j) {
      const float h = static_cast<float>(post[j]);
      UNROLL_FOR (int e = 0; e < VEC; ++e)
        set_element(to[j], e, static_cast<T>(metal::fma(h, float_of(pack, e), float_of(to[j], e))));
    }
  }
}

// g[j] = (ds[j] + sum_i gates[i] inject[i, j]) * (1 + weight[j]), of VEC columns from column k + j C of K = N C, for
// COUNT streams j.
template <int N, bool INJECT, int COUNT, int VEC, typename D, typename S, typename P, typename W>
METAL_FUNC void load_g(thread float (*g)[VEC], D ds, bool aligned, S gates, P inject, bool inject_aligned, W weight,
                       bool weight_aligned, int k, int C) {
  UNROLL_FOR (int j = 0; j < COUNT; ++j) load_floats<VEC>(g[j], at(ds, k + j * C), aligned);
  if constexpr (INJECT) {
#pragma unroll(1)  // all rows of inject at once would fill the registers
    for (int i = 0; i < N; ++i) {
      const float gate = gates[i];
      const auto row = inject + size_t(i) * size_t(N * C);
      UNROLL_FOR (int j = 0; j < COUNT; ++j) {
        float w[VEC];
        load_floats<VEC>(w, at(row, k + j * C), inject_aligned);
        UNROLL_FOR (int e = 0; e < VEC; ++e) g[j][e] = metal::fma(gate, w[e], g[j][e]);
      }
    }
  }
  UNROLL_FOR (int j = 0; j < COUNT; ++j) {
    float w[VEC];
    load_floats<VEC>(w, at(weight, k + j * C), weight_aligned);
    UNROLL_FOR (int e = 0; e < VEC; ++e) g[j][e] *= 1.0f + w[e];
  }
}

// Returns sum_g sums[g * N + i]: what the simdgroups have of sum i.
template <int N, int THREADS, typename S> METAL_FUNC float sum_of_simdgroups(S sums, int i) {
  float sum = 0.0f;
  for (int g = 0; g < THREADS / 32; ++g) sum += sums[g * N + i];
  return sum;
}

}  // namespace mhc

// What a sublayer reads of a token's streams.
#include "common.h"

namespace mhc {

// o[k] += sum_j pre[j] x[j] of a lane's VEC channels of CHUNKS runs of 32 * VEC; all streams are under way at once if
// N <= 8, otherwise one. LAST: no one reads x again soon.
template <bool LAST, int N, typename T, int CHUNKS, int VEC, typename X, typename S>
inline void read_streams(thread float (&o)[CHUNKS][VEC], X x, S pre, int C) {
  constexpr int AT_ONCE = N <= 8 ? N : 1;
#pragma unroll 1
  for (int j0 = 0; j0 < N; j0 += AT_ONCE) {
    Pack<T, VEC> v[CHUNKS][AT_ONCE];
    UNROLL for (int k = 0; k < CHUNKS; ++k) {
      UNROLL for (int j = 0; j < AT_ONCE; ++j) {
        const auto from = packs<VEC>(x + ((j0 + j) * C + k * 32 * VEC));
        v[k][j] = LAST ? LOAD_STREAMING(from) : *from;
      }
    }
    UNROLL for (int k = 0; k < CHUNKS; ++k) {
      UNROLL for (int j = 0; j < AT_ONCE; ++j) {
        UNROLL for (int e = 0; e < VEC; ++e) o[k][e] += pre[j0 + j] * static_cast<float>(v[k][j].v[e]);
      }
    }
  }
}

// the same, as far as `left` channels reach, and of any alignment
template <int N, typename T, int CHUNKS, int VEC, typename X, typename S>
inline void read_ragged(thread float (&o)[CHUNKS][VEC], X x, S pre, int C, int left, bool whole) {
  constexpr int AT_ONCE = N <= 8 ? N : 1;
  UNROLL for (int k = 0; k < CHUNKS; ++k) {
#pragma unroll AT_ONCE
    for (int j = 0; j < N && k * 32 * VEC < left; ++j) {
      float v[VEC];
      load_floats<VEC>(v, x + (j * C + k * 32 * VEC), whole);
      UNROLL for (int e = 0; e < VEC; ++e) o[k][e] += pre[j] * v[e];
    }
  }
}

}  // namespace mhc

// What a sublayer reads of a token's streams.
#include "common.h"

namespace mhc {

// o[k] += sum_j pre[j] x[j] of a lane's VEC channels of CHUNKS runs of 32 * VEC; all streams are under
// way at once if N <= 8, otherwise one
template <int N, typename T, int CHUNKS, int VEC, typename X, typename S>
inline void read_streams(thread float (&o)[CHUNKS][VEC], X x, S pre, int C) {
  constexpr int HELD = N <= 8 ? N : 1;
#pragma unroll 1
  for (int j0 = 0; j0 < N; j0 += HELD) {
    Pack<T, VEC> v[CHUNKS][HELD];
    UNROLL for (int k = 0; k < CHUNKS; ++k) {
      UNROLL for (int j = 0; j < HELD; ++j) v[k][j] = LOAD_LAST(packs<VEC>(x + ((j0 + j) * C + k * 32 * VEC)));
    }
    UNROLL for (int k = 0; k < CHUNKS; ++k) {
      UNROLL for (int j = 0; j < HELD; ++j) {
        UNROLL for (int e = 0; e < VEC; ++e) o[k][e] += pre[j0 + j] * static_cast<float>(v[k][j].v[e]);
      }
    }
  }
}

// the same, as far as `left` channels reach, and of any alignment
template <int N, typename T, int CHUNKS, int VEC, typename X, typename S>
inline void read_ragged(thread float (&o)[CHUNKS][VEC], X x, S pre, int C, int left, bool whole) {
  constexpr int AHEAD = N <= 8 ? N : 1;
  UNROLL for (int k = 0; k < CHUNKS; ++k) {
#pragma unroll AHEAD
    for (int j = 0; j < N && k * 32 * VEC < left; ++j) {
      float v[VEC];
      load_floats<VEC>(v, x + (j * C + k * 32 * VEC), whole);
      UNROLL for (int e = 0; e < VEC; ++e) o[k][e] += pre[j] * v[e];
    }
  }
}

}  // namespace mhc

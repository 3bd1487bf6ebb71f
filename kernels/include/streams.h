// What a sublayer reads of a token's streams.
#include "common.h"

namespace mhc {

// o[k] += sum_j pre[j] x[j], of a lane's VEC channels of PACKS_AT_ONCE packs that lie 32 * VEC channels apart. With N
// <= 8 all streams are loaded before the first is used, otherwise one by one. LAST: x is not read again soon.
template <bool LAST, int N, typename T, int PACKS_AT_ONCE, int VEC, typename X, typename S>
inline void read_streams(thread float (&o)[PACKS_AT_ONCE][VEC], X x, S pre, int C) {
  constexpr int STREAMS_AT_ONCE = N <= 8 ? N : 1;
#pragma unroll 1
  for (int j0 = 0; j0 < N; j0 += STREAMS_AT_ONCE) {
    Pack<T, VEC> v[PACKS_AT_ONCE][STREAMS_AT_ONCE];
    UNROLL for (int k = 0; k < PACKS_AT_ONCE; ++k) {
      UNROLL for (int j = 0; j < STREAMS_AT_ONCE; ++j) {
        const auto from = packs<VEC>(x + ((j0 + j) * C + k * 32 * VEC));
        v[k][j] = LAST ? LOAD_STREAMING(from) : *from;
      }
    }
    UNROLL for (int k = 0; k < PACKS_AT_ONCE; ++k) {
      UNROLL for (int j = 0; j < STREAMS_AT_ONCE; ++j) {
        UNROLL for (int e = 0; e < VEC; ++e) o[k][e] += pre[j0 + j] * static_cast<float>(v[k][j].v[e]);
      }
    }
  }
}

// o[k] += sum_j pre[j] x[j] as read_streams computes it, for the first `remaining` channels, at any alignment.
template <int N, typename T, int PACKS_AT_ONCE, int VEC, typename X, typename S>
inline void read_ragged(thread float (&o)[PACKS_AT_ONCE][VEC], X x, S pre, int C, int remaining, bool aligned) {
  constexpr int STREAMS_AT_ONCE = N <= 8 ? N : 1;
  UNROLL for (int k = 0; k < PACKS_AT_ONCE; ++k) {
#pragma unroll STREAMS_AT_ONCE
    for (int j = 0; j < N && k * 32 * VEC < remaining; ++j) {
      float v[VEC];
      load_floats<VEC>(v, x + (j * C + k * 32 * VEC), aligned);
      UNROLL for (int e = 0; e < VEC; ++e) o[k][e] += pre[j] * v[e];
    }
  }
}

}  // namespace mhc

// What a sublayer reads of a token's streams, and the gradients of how much.
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

// Shares of a lane: sums over channels of d x[j], and with a norm of u x[j], u ** 2 and d u; d is du or with a norm du weight,
// u = sum_j pre[j] x[j]
template <int N> struct Dots { float pre[N], x[N], u[N], squared, both; };
template <bool NORM, typename T, int VEC, int N, typename W>
inline void add_dots(thread Dots<N>& to, thread const Pack<T, VEC> (&v)[N], thread const Pack<T, VEC>& dv, W weight, bool w_whole) {
  float w[VEC];
  if (NORM) load_floats<VEC>(w, weight, w_whole);
  UNROLL for (int e = 0; e < VEC; ++e) {
    float d = static_cast<float>(dv.v[e]), u = 0.0f;
    if constexpr (NORM) {
      UNROLL for (int j = 0; j < N; ++j) u += to.pre[j] * static_cast<float>(v[j].v[e]);
      d *= w[e];
      to.squared += u * u;
      to.both += d * u;
    }
    UNROLL for (int j = 0; j < N; ++j) {
      to.x[j] += d * static_cast<float>(v[j].v[e]);
      if (NORM) to.u[j] += u * static_cast<float>(v[j].v[e]);
    }
  }
}

// sums of du x[j] of a token, CHUNKS packs of each stream under way at once
template <int CHUNKS, typename T, int VEC, int N, typename X, typename D>
inline void dot_streams(thread Dots<N>& to, X x, D du, int C, int lane, bool whole) {
  int c = lane * VEC;
  for (; whole && c + (CHUNKS - 1) * 32 * VEC < C; c += CHUNKS * 32 * VEC) {
    Pack<T, VEC> v[CHUNKS][N], d[CHUNKS];
    UNROLL for (int k = 0; k < CHUNKS; ++k) {
      UNROLL for (int j = 0; j < N; ++j) v[k][j] = *packs<VEC>(x + (j * C + c + k * 32 * VEC));
      d[k] = *packs<VEC>(du + (c + k * 32 * VEC));
    }
    UNROLL for (int k = 0; k < CHUNKS; ++k) add_dots<false>(to, v[k], d[k], du, false);
  }
  for (; c < C; c += 32 * VEC) {
    Pack<T, VEC> v[N], d = load<T, VEC>(du + c, whole);
    load_streams<N>(v, x, C, c, whole);
    add_dots<false>(to, v, d, du, false);
  }
}

}  // namespace mhc

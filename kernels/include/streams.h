// What a sublayer reads of a token's streams, and the sums for the gradient of its coefficients.
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

// A lane's sums over its channels, with u = sum_j pre[j] x[j] and du multiplied by the weight of a norm if there is
// one; only with a norm are those with u needed.
template <int N> struct Dots { float pre[N], du_dot_x[N], u_dot_x[N], u_dot_u, du_dot_u; };
template <bool NORM, typename T, int VEC, int N, typename W>
inline void add_dots(thread Dots<N>& dots, thread const Pack<T, VEC> (&v)[N], thread const Pack<T, VEC>& dv, W weight, bool weight_aligned) {
  float w[VEC];
  if (NORM) load_floats<VEC>(w, weight, weight_aligned);
  UNROLL for (int e = 0; e < VEC; ++e) {
    float d = static_cast<float>(dv.v[e]), u = 0.0f;
    if constexpr (NORM) {
      UNROLL for (int j = 0; j < N; ++j) u += dots.pre[j] * static_cast<float>(v[j].v[e]);
      d *= w[e];
      dots.u_dot_u += u * u;
      dots.du_dot_u += d * u;
    }
    UNROLL for (int j = 0; j < N; ++j) {
      dots.du_dot_x[j] += d * static_cast<float>(v[j].v[e]);
      if (NORM) dots.u_dot_x[j] += u * static_cast<float>(v[j].v[e]);
    }
  }
}

// The sums of du x[j] of a token; PACKS_AT_ONCE packs of each stream are loaded before the first is used.
template <int PACKS_AT_ONCE, typename T, int VEC, int N, typename X, typename D>
inline void dot_streams(thread Dots<N>& dots, X x, D du, int C, int lane, bool aligned) {
  int c = lane * VEC;
  for (; aligned && c + (PACKS_AT_ONCE - 1) * 32 * VEC < C; c += PACKS_AT_ONCE * 32 * VEC) {
    Pack<T, VEC> v[PACKS_AT_ONCE][N], d[PACKS_AT_ONCE];
    UNROLL for (int k = 0; k < PACKS_AT_ONCE; ++k) {
      UNROLL for (int j = 0; j < N; ++j) v[k][j] = *packs<VEC>(x + (j * C + c + k * 32 * VEC));
      d[k] = *packs<VEC>(du + (c + k * 32 * VEC));
    }
    UNROLL for (int k = 0; k < PACKS_AT_ONCE; ++k) add_dots<false>(dots, v[k], d[k], du, false);
  }
  for (; c < C; c += 32 * VEC) {
    Pack<T, VEC> v[N], d = load<T, VEC>(du + c, aligned);
    load_streams<N>(v, x, C, c, aligned);
    add_dots<false>(dots, v, d, du, false);
  }
}

}  // namespace mhc

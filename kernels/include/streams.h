// A sublayer reads u = sum_j pre[j] x[j] of a token's streams, with or without a norm.
#include "common.h"

namespace mhc {

// u[e] = sum_j pre[j] x[j] for a pack of channels.
template <int N, typename T, int VEC, typename X, typename S>
METAL_FUNC void read_pack(thread float (&u)[VEC], X x, S pre, int C, bool aligned) {
  constexpr int STREAM_UNROLL = N <= 8 ? N : 4;  // streams that are loaded before the first is used
  UNROLL_FOR (int e = 0; e < VEC; ++e) u[e] = 0.0f;
#pragma unroll(STREAM_UNROLL)
  for (int j = 0; j < N; ++j) {
    const Pack<T, VEC> v = load<T, VEC>(x + j * C, aligned);
    UNROLL_FOR (int e = 0; e < VEC; ++e) u[e] = metal::fma(pre[j], float_of(v, e), u[e]);
  }
}

template <int VEC> METAL_FUNC float sum_of_squares(thread const float (&v)[VEC]) {
  float sum = 0.0f;
  UNROLL_FOR (int e = 0; e < VEC; ++e) sum = metal::fma(v[e], v[e], sum);
  return sum;
}

// Returns u, with NORM u r weight, in T. ROUND_U: u r is rounded to T before it meets the weight.
template <bool NORM, bool ROUND_U, typename T, int VEC, typename W>
METAL_FUNC Pack<T, VEC> finish_u(thread const float (&u)[VEC], float r, W weight, bool weight_aligned) {
  float w[VEC];
  if (NORM) load_floats<VEC>(w, weight, weight_aligned);
  Pack<T, VEC> packed = {};
  UNROLL_FOR (int e = 0; e < VEC; ++e) {
    float v = u[e];
    if (NORM) v *= r;
    if (NORM && ROUND_U) v = static_cast<float>(static_cast<T>(v));
    set_element(packed, e, static_cast<T>(NORM ? v * w[e] : v));
  }
  return packed;
}

}  // namespace mhc

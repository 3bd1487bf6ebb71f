// The gradient of a token's h_pre is made of these sums over its channels.
#include "common.h"

namespace mhc {

// sums[j] += du x[j] over a pack.
template <typename T, int VEC, int N>
METAL_FUNC void add_dots(thread float (&sums)[N], thread const Pack<T, VEC> (&x)[N], thread const Pack<T, VEC>& du) {
  UNROLL_FOR (int e = 0; e < VEC; ++e) {
    const float d = float_of(du, e);
    UNROLL_FOR (int j = 0; j < N; ++j) sums[j] += d * float_of(x[j], e);
  }
}

// sums[j] += du x[j] over a lane's channels of a token; PACKS_AT_ONCE packs of each stream are loaded before the first
// is used.
template <int PACKS_AT_ONCE, typename T, int VEC, int N, typename X, typename D>
METAL_FUNC void dot_streams(thread float (&sums)[N], X x, D du, int C, int lane, bool aligned) {
  int c = lane * VEC;
  for (; aligned && c + (PACKS_AT_ONCE - 1) * 32 * VEC < C; c += PACKS_AT_ONCE * 32 * VEC) {
    Pack<T, VEC> v[PACKS_AT_ONCE][N], d[PACKS_AT_ONCE];
    UNROLL_FOR (int k = 0; k < PACKS_AT_ONCE; ++k) {
      UNROLL_FOR (int j = 0; j < N; ++j) v[k][j] = load_aligned<VEC>(x + (j * C + c + k * 32 * VEC));
      d[k] = load_aligned<VEC>(du + (c + k * 32 * VEC));
    }
    UNROLL_FOR (int k = 0; k < PACKS_AT_ONCE; ++k) add_dots(sums, v[k], d[k]);
  }
  for (; c < C; c += 32 * VEC) {
    Pack<T, VEC> v[N], d = load<T, VEC>(du + c, aligned);
    load_streams<N>(v, x, C, c, aligned);
    add_dots(sums, v, d);
  }
}

// Returns, in lane j, v[j] summed over the simdgroup.
template <int N> METAL_FUNC float sum_to_lane(thread const float (&v)[N], int lane) {
  float found = 0.0f;
  UNROLL_FOR (int j = 0; j < N; ++j) {
    const float sum = simd_sum(v[j]);
    found = lane == j ? sum : found;
  }
  return found;
}

// NormDots are a lane's sums over its channels of a token whose u = sum_j pre[j] x[j] has a norm; du is multiplied by
// the norm's weight. add_norm_dots adds a pack of channels.
template <int N> struct NormDots { float du_dot_x[N], u_dot_x[N], u_dot_u, du_dot_u; };
template <typename T, int VEC, int N>
METAL_FUNC void add_norm_dots(thread NormDots<N>& dots, thread const float (&pre)[N], thread const Pack<T, VEC> (&x)[N],
                              thread const Pack<T, VEC>& du, thread const float (&weight)[VEC]) {
  UNROLL_FOR (int e = 0; e < VEC; ++e) {
    const float d = float_of(du, e) * weight[e];
    float u = 0.0f;
    UNROLL_FOR (int j = 0; j < N; ++j) u += pre[j] * float_of(x[j], e);
    dots.u_dot_u += u * u;
    dots.du_dot_u += d * u;
    UNROLL_FOR (int j = 0; j < N; ++j) {
      dots.du_dot_x[j] += d * float_of(x[j], e);
      dots.u_dot_x[j] += u * float_of(x[j], e);
    }
  }
}

// Returns their sums over the threadgroup; lane j gets those of stream j. scratch holds 2 SIMDS (2 N + 2) floats. If
// parity goes 0, 1, 0, ... from call to call, one barrier a call is enough.
struct LaneDots { float du_dot_x, u_dot_x, u_dot_u, du_dot_u; };
template <int SIMDS, int N, typename S>
METAL_FUNC LaneDots sum_norm_dots(const thread NormDots<N>& dots, S scratch, int parity, int simd, int lane) {
  LaneDots sums = {sum_to_lane(dots.du_dot_x, lane), sum_to_lane(dots.u_dot_x, lane), simd_sum(dots.u_dot_u),
                   simd_sum(dots.du_dot_u)};
  if constexpr (SIMDS > 1) {
    constexpr int PITCH = 2 * N + 2;
    const int at = (parity * SIMDS + simd) * PITCH;
    if (lane < N) {
      scratch[at + lane] = sums.du_dot_x;
      scratch[at + N + lane] = sums.u_dot_x;
    }
    if (lane == 0) {
      scratch[at + 2 * N] = sums.u_dot_u;
      scratch[at + 2 * N + 1] = sums.du_dot_u;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sums = {0.0f, 0.0f, 0.0f, 0.0f};
    UNROLL_FOR (int k = 0; k < SIMDS; ++k) {
      const int from = (parity * SIMDS + k) * PITCH;
      sums.du_dot_x += lane < N ? scratch[from + lane] : 0.0f;
      sums.u_dot_x += lane < N ? scratch[from + N + lane] : 0.0f;
      sums.u_dot_u += scratch[from + 2 * N];
      sums.du_dot_u += scratch[from + 2 * N + 1];
    }
  }
  return sums;
}

// du = r (du weight - u slope), rounded to T;   dweight += du u r
template <typename T, int VEC, int N>
METAL_FUNC void norm_gradient(thread Pack<T, VEC>& du, thread float (&dweight)[VEC], thread const float (&pre)[N],
                              thread Pack<T, VEC> (&x)[N], thread const float (&weight)[VEC], float r, float slope,
                              uint zero) {
  float u[VEC] = {};
  UNROLL_FOR (int j = 0; j < N; ++j) {
    stay_packed(x[j], zero);
    UNROLL_FOR (int e = 0; e < VEC; ++e) u[e] += pre[j] * float_of(x[j], e);
  }
  UNROLL_FOR (int e = 0; e < VEC; ++e) {
    const float d = float_of(du, e);
    set_element(du, e, static_cast<T>(r * (d * weight[e] - u[e] * slope)));
    dweight[e] += d * u[e] * r;
  }
}

}  // namespace mhc

// The write back of a sublayer and the next read, which mhc_seam makes pack by pack and its gradient channel by
// channel.
#include "streams.h"

namespace mhc {

// Makes u of the pack at channel c of token t. With WRITE_BACK out[i] = sum_j h_res[i, j] x[j] + h_post[i] y, rounded
// to T, which WRITE_OUT stores, and u = sum_i h_pre[i] out[i]; without WRITE_BACK out is x. ROUND: u is rounded to T.
// mix[j * N + i] = h_res[i, j].
template <bool WRITE_BACK, bool WRITE_OUT, bool ROUND, int N, typename T, int VEC, typename X, typename Y, typename O,
          typename S>
METAL_FUNC void seam_pack(thread float (&u)[VEC], X x, Y y, O out, uint t, int c, S pre, S post, S mix, int C,
                          bool x_aligned, bool y_aligned) {
  const size_t base = size_t(t) * size_t(N * C);
  if constexpr (WRITE_BACK) {
    constexpr int STREAM_UNROLL = N <= 8 ? N : 4;  // streams that are loaded before the first is used
    constexpr int AHEAD = loads_together<T, VEC>() && N <= 8 ? N : 0;  // streams that are loaded with y
    float acc[N * VEC];
    Pack<T, VEC> yv, ahead[AHEAD + 1];
    load_streams_and<AHEAD>(yv, at(y + size_t(t) * size_t(C), c), y_aligned, ahead, x + base, C, c, x_aligned);
    UNROLL_FOR (int i = 0; i < N; ++i) {
      UNROLL_FOR (int e = 0; e < VEC; ++e) acc[i * VEC + e] = post[i] * float_of(yv, e);
    }
#pragma unroll(STREAM_UNROLL)
    for (int j = 0; j < N; ++j) {
      Pack<T, VEC> v;
      if constexpr (AHEAD > 0) v = ahead[j];
      else v = load<T, VEC>(at(x + base, j * C + c), x_aligned);
      UNROLL_FOR (int i = 0; i < N; ++i) {
        const float m = mix[j * N + i];
        UNROLL_FOR (int e = 0; e < VEC; ++e) acc[i * VEC + e] = metal::fma(m, float_of(v, e), acc[i * VEC + e]);
      }
    }
    UNROLL_FOR (int e = 0; e < VEC; ++e) u[e] = 0.0f;
    UNROLL_FOR (int i = 0; i < N; ++i) {
      Pack<T, VEC> o = {};
      UNROLL_FOR (int e = 0; e < VEC; ++e) {
        set_element(o, e, static_cast<T>(acc[i * VEC + e]));
        u[e] = metal::fma(pre[i], float_of(o, e), u[e]);
      }
      if (WRITE_OUT) store(at(out + base, i * C + c), o);
    }
  } else {
    read_pack<N, T>(u, x + base + c, pre, C, x_aligned);
  }
  if (ROUND)
    UNROLL_FOR (int e = 0; e < VEC; ++e) u[e] = static_cast<float>(static_cast<T>(u[e]));
}

// One channel of it in registers: out, and the u that is returned. The products are added in the steps and the order of
// seam_pack, so that both round ties alike.
template <int N, typename T, typename S>
METAL_FUNC float seam_channel(thread float (&out)[N], thread const float (&x)[N], float y, S pre, S post, S mix) {
  float u = 0.0f;
  UNROLL_FOR (int i = 0; i < N; ++i) {
    float o = post[i] * y;
    UNROLL_FOR (int j = 0; j < N; ++j) o = metal::fma(mix[j * N + i], x[j], o);
    out[i] = static_cast<float>(static_cast<T>(o));
    u = metal::fma(pre[i], out[i], u);
  }
  return u;
}

// SeamSums are the gradients of a token's coefficients, sums over its channels.
template <int N> struct SeamSums { float dh_pre[N], dh_post[N], dh_res[N * N]; };

// The gradient of seam_channel, where du is that of u:   ds[i] = dout[i] + h_pre[i] du;
// dx[j] = sum_i h_res[i, j] ds[i];   returns dy = sum_i h_post[i] ds[i];
// dh_pre[i] += du out[i];   dh_post[i] += ds[i] y;   dh_res[i, j] += ds[i] x[j]
template <int N, typename S>
METAL_FUNC float seam_channel_gradient(thread float (&dx)[N], thread SeamSums<N>& sums, thread const float (&x)[N],
                                       float y, thread const float (&out)[N], thread const float (&dout)[N], float du,
                                       S pre, S post, S mix) {
  float ds[N], dy = 0.0f;
  UNROLL_FOR (int i = 0; i < N; ++i) {
    ds[i] = dout[i] + pre[i] * du;
    dy += post[i] * ds[i];
    sums.dh_pre[i] += du * out[i];
    sums.dh_post[i] += ds[i] * y;
  }
  UNROLL_FOR (int j = 0; j < N; ++j) {
    dx[j] = 0.0f;
    UNROLL_FOR (int i = 0; i < N; ++i) {
      dx[j] += mix[j * N + i] * ds[i];
      sums.dh_res[i * N + j] += ds[i] * x[j];
    }
  }
  return dy;
}

}  // namespace mhc

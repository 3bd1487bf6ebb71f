// One channel of mhc_seam, for its backward.
#include "common.h"

namespace mhc {

// out[i] = sum_j h_res[i, j] x[j] + h_post[i] y, rounded to T; returns sum_i h_pre[i] out[i]. mix[j * N + i] = h_res[i,
// j]. The products are added in the steps and the order of mhc_seam, so that both round ties alike.
template <int N, typename T, typename S>
inline float seam_channel(thread float (&out)[N], thread const float (&x)[N], float y, S pre, S post, S mix) {
  float u = 0.0f;
  UNROLL for (int i = 0; i < N; ++i) {
    float o = post[i] * y;
    UNROLL for (int j = 0; j < N; ++j) o = metal::fma(mix[j * N + i], x[j], o);
    out[i] = static_cast<float>(static_cast<T>(o));
    u = metal::fma(pre[i], out[i], u);
  }
  return u;
}

}  // namespace mhc

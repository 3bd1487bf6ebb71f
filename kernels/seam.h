// One channel of mhc_seam, for its backward.
#include "common.h"

namespace mhc {

// out[i] = sum_j h_res[i, j] x[j] + h_post[i] y, rounded to T; returns sum_i h_pre[i] out[i]
template <int N, typename T, typename S>
inline float seam_channel(thread float (&out)[N], thread const float (&x)[N], float y, S pre, S post, S mix) {
  float u = 0.0f;
  UNROLL for (int i = 0; i < N; ++i) {
    float o = post[i] * y;
    UNROLL for (int j = 0; j < N; ++j) o += mix[j * N + i] * x[j];
    out[i] = static_cast<float>(static_cast<T>(o));
    u += pre[i] * out[i];
  }
  return u;
}

}  // namespace mhc

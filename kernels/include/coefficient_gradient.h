// Steps of the gradient of a token's coefficients, which lead from the cotangents of h_pre, h_post and h_res to dp;
// that is what mhc_pre_backward_projection takes. A lane of the token's simdgroup takes a logit.
#include "coefficients.h"
#include "sinkhorn_backward.h"

namespace mhc {

// lane_logit says which logit a lane takes. Lanes past the last take logit 0, and nothing that they make is stored. A
// logit of h_res is an entry in a line of the projection.
struct LaneLogit {
  int o, part, entry, line, entry_in_line;
  float alpha, bias;
};
template <int N, int NUM_LOGITS, int NUM_GATE_LOGITS, bool COLUMNS, typename A, typename B>
METAL_FUNC LaneLogit lane_logit(A alpha, B bias, int lane) {
  const int o = lane < NUM_LOGITS ? lane : 0, part = part_of<N>(o), entry = part == 2 ? o - NUM_GATE_LOGITS : 0;
  return {o,
          part,
          entry,
          COLUMNS ? entry % N : entry / N,
          COLUMNS ? entry / N : entry % N,
          static_cast<float>(alpha[part]),
          static_cast<float>(bias[o])};
}

// token_logit says what that logit is in a token, for which l holds what mhc_pre saved: l, then scale.
// z = alpha l + bias;   s = sigmoid(z);   h_pre = s + pre_eps
struct TokenLogit { float l, scale, z, s, h_pre; };
template <int NUM_LOGITS, typename L, typename Q>
METAL_FUNC TokenLogit token_logit(const thread LaneLogit& logit, L l, Q params) {
  const float value = static_cast<float>(l[logit.o]), z = logit.alpha * value + logit.bias, s = sigmoid(z);
  return {value, static_cast<float>(l[NUM_LOGITS]), z, s, s + static_cast<float>(params[param::PRE_EPS])};
}

// Returns the cotangent of s, dh_pre (the argument) or post_scale dh_post, or for a logit of h_res that of z, dz_res.
// PROJECT: the lanes from first_lane on hold the lines of dz_res in g_res.
template <int N, int NUM_RES_LOGITS, bool HEAD, bool PROJECT, typename H, typename Z, typename Q>
METAL_FUNC float logit_cotangent(const thread LaneLogit& logit, float dh_pre, H dh_post, Z dz_res,
                                 thread const float (&g_res)[N], int first_lane, Q params) {
  float cotangent = dh_pre;
  UNROLL_FOR (int j = 0; j < N && PROJECT; ++j) {
    const float v = simd_shuffle(g_res[j], ushort(first_lane + logit.line));
    cotangent = logit.part == 2 && logit.entry_in_line == j ? v : cotangent;
  }
  if (!HEAD && logit.part == 1)
    cotangent = static_cast<float>(params[param::POST_SCALE]) * static_cast<float>(dh_post[logit.o - N]);
  if (!PROJECT && NUM_RES_LOGITS > 0 && logit.part == 2) cotangent = static_cast<float>(dz_res[logit.entry]);
  return cotangent;
}

// LogitSums are a lane's sums of dz and of dz l over its simdgroup's tokens.
struct LogitSums { float dz, dz_l; };

// dz = cotangent s sigmoid(-z), for a logit of h_res dz = cotangent;   dp = alpha scale dz;
// pull = -scale sum(dp l) / K;   factors = h_pre, pull
template <int N, int NUM_LOGITS, typename O, typename F>
METAL_FUNC void finish_token(thread LogitSums& sums, const thread LaneLogit& logit, const thread TokenLogit& token,
                             float cotangent, int K, O dp, F factors, int lane) {
  const float slope = logit.part == 2 ? 1.0f : token.s * sigmoid(-token.z);
  const float dz = lane < NUM_LOGITS ? slope * cotangent : 0.0f;
  sums.dz += dz;
  sums.dz_l += dz * token.l;
  const float d = dz * (logit.alpha * token.scale);
  const float pull = -simd_sum(d * token.l) * token.scale / static_cast<float>(K);
  if (lane < NUM_LOGITS) dp[lane] = d;
  if (lane < N) factors[lane] = token.h_pre;
  if (lane == 0) factors[N] = pull;
}

template <int NUM_LOGITS, typename O> METAL_FUNC void store_logit_sums(const thread LogitSums& sums, O to, int lane) {
  if (lane < NUM_LOGITS) {
    to[lane] = sums.dz;
    to[NUM_LOGITS + lane] = sums.dz_l;
  }
}

}  // namespace mhc

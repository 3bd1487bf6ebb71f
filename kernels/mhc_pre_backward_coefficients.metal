// mhc_pre_backward_coefficients: dp, token_factors, dbias and dalpha of mhc_pre without a norm, of mhc_coefficients,
// mhc_head and mhc_single_pass; mhc_pre_backward_projection makes dx and dphi of them. NUM_LOGITS <= 32.
//
//   l, scale = rsqrt(mean(x**2) + norm_eps) as mhc_pre saved them;   z = alpha l + bias, s = sigmoid(z);
//   h_pre = s + pre_eps
//   dz_pre = dh_pre s sigmoid(-z), where with HAS_DU dh_pre[j] = sum du x[j]
//   dz_post = dh_post post_scale s sigmoid(-z)
//   dz_res is given, or with PROJECT the gradient of sinkhorn_knopp(z_res) for dh_res
//   dl = alpha dz;   dp = scale dl;   pull = -scale**2 sum(dl l) / (N C), the factor of x in dx
//   dbias[o] = sum_t dz[o];   dalpha of a part = the sum of dz l over its logits and tokens
//
// in   x [tokens, N, C] T (read with HAS_DU); bias [NUM_LOGITS], alpha [parts] any float, NUM_LOGITS = 2 N + R, or N (HEAD), where pre
//      is the only part; l [tokens, NUM_LOGITS + 1] float: l, scale;
//      params [6 or 8] float, by mhc::param: PRE_EPS; without HEAD POST_SCALE; with PROJECT PROJECTION_EPS,
//      with CLAMP also CLAMP_LOW, CLAMP_HIGH;
//      du [tokens, C] T (HAS_DU) or dh_pre [tokens, N] float; dh_post [tokens, N] float (without HEAD);
//      dh_res [tokens, N, N] float (PROJECT) or dz_res [tokens, R] float
// out  token_factors [tokens, N + 1] float: h_pre, pull; dp [tokens, NUM_LOGITS] float;
//      partial [simdgroups, 2 NUM_LOGITS] float: the sums of dz, then of dz l, over this simdgroup's tokens
// owners  A simdgroup takes BATCH tokens in turn. First it walks back through their projections at once,
//      matrix_lanes(N) lanes a matrix; STORED_STEPS divisors of a line stay in threadgroup memory. Then it goes token
//      by token: a lane takes VEC channels of all streams, then a logit.
// template  T, N, NUM_LOGITS, HAS_DU, PROJECT, ITERS, START, COLUMNS, OUT_COLUMNS, CLAMP, VEC, THREADS, BATCH,
//      STORED_STEPS
// grid  any number of threadgroups
#include "coefficient_gradient.h"
#include "stream_dots.h"
constexpr int SIMDS = THREADS / 32;
constexpr bool HEAD = NUM_LOGITS == N;
constexpr int NUM_GATE_LOGITS = HEAD ? N : 2 * N;
constexpr int NUM_RES_LOGITS = NUM_LOGITS - NUM_GATE_LOGITS;
constexpr int MATRIX_LANES = mhc::matrix_lanes(N);
constexpr int PACKS_AT_ONCE = N <= 4 ? 2 : 1;  // packs of each stream that are loaded before the first is used
static_assert(NUM_LOGITS <= 32 && (!PROJECT || BATCH * MATRIX_LANES <= 32),
              "a lane takes a logit, and a line of a matrix");
threadgroup float divisors[PROJECT ? STORED_STEPS * THREADS : 1];
const int lane = int(thread_index_in_simdgroup);
const uint simdgroup = threadgroup_position_in_grid.x * SIMDS + simdgroup_index_in_threadgroup;
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const bool aligned = HAS_DU && mhc::is_aligned<VEC>(x) && mhc::is_aligned<VEC>(du);
const mhc::LaneLogit logit = mhc::lane_logit<N, NUM_LOGITS, NUM_GATE_LOGITS, COLUMNS>(alpha, bias, lane);
mhc::LogitSums sums = {0.0f, 0.0f};

for (uint first = simdgroup * BATCH; first < tokens; first += threadgroups_per_grid.x * SIMDS * BATCH) {
  const uint end = first + uint(BATCH) < tokens ? first + uint(BATCH) : tokens;
  float g_res[N] = {};
  if constexpr (PROJECT) {
    const uint lane_token = first + uint(lane / MATRIX_LANES);
    const size_t t = lane_token < end ? lane_token : first;
    const auto z = mhc::logits_of(l + (t * (NUM_LOGITS + 1) + NUM_GATE_LOGITS), bias + NUM_GATE_LOGITS,
                                  static_cast<float>(alpha[2]));
    mhc::walk_back_projection<N, START, COLUMNS, OUT_COLUMNS, ITERS, STORED_STEPS, THREADS>(
        g_res, dh_res + t * (N * N), z, divisors + thread_position_in_threadgroup.x,
        mhc::projection_numbers<CLAMP>(params), uint(lane % MATRIX_LANES), uint(lane), divisors);
  }
  for (int i = 0; i < int(end - first); ++i) {
    const size_t t = first + uint(i);
    const mhc::TokenLogit token = mhc::token_logit<NUM_LOGITS>(logit, l + t * (NUM_LOGITS + 1), params);
    float dh = 0.0f;  // dh_pre of the lane's stream
    if constexpr (HAS_DU) {
      float du_dot_x[N] = {};
      mhc::dot_streams<PACKS_AT_ONCE, T, VEC>(du_dot_x, x + t * size_t(K), du + t * size_t(C), C, lane, aligned);
      dh = mhc::sum_to_lane(du_dot_x, lane);
    } else if (logit.part == 0) {
      dh = static_cast<float>(dh_pre[t * N + logit.o]);
    }
    const float cotangent = mhc::logit_cotangent<N, NUM_RES_LOGITS, HEAD, PROJECT>(
        logit, dh, dh_post + t * N, dz_res + t * NUM_RES_LOGITS, g_res, i * MATRIX_LANES, params);
    mhc::finish_token<N, NUM_LOGITS>(sums, logit, token, cotangent, K, dp + t * NUM_LOGITS, token_factors + t * (N + 1),
                                     lane);
  }
}
mhc::store_logit_sums<NUM_LOGITS>(sums, partial + size_t(simdgroup) * (2 * NUM_LOGITS), lane);

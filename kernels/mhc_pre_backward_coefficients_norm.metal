// mhc_pre_backward_coefficients_norm: of the gradient of mhc_pre with a norm all but dx and dphi;
// mhc_pre_backward_projection makes these two of what this body writes. NUM_LOGITS <= 32.
//
//   l, scale = rsqrt(mean(x**2) + norm_eps) as mhc_pre saved them;   z = alpha l + bias, s = sigmoid(z);
//   h_pre = s + pre_eps
//   u = sum_j h_pre[j] x[j];   r = rsqrt(mean(u**2) + eps);   slope = r**2 mean(du weight u)
//   du' = r (du weight - u slope);   dweight = sum_t du u r
//   dh_pre[j] = sum du' x[j] = r (sum du weight x[j] - slope sum u x[j])
//   dz_pre = dh_pre s sigmoid(-z);   dz_post = dh_post post_scale s sigmoid(-z)
//   dz_res is given, or with PROJECT the gradient of sinkhorn_knopp(z_res) for dh_res
//   dl = alpha dz;   dp = scale dl;   pull = -scale**2 sum(dl l) / (N C), the factor of x in dx
//   dbias[o] = sum_t dz[o];   dalpha of a part = the sum of dz l over its logits and tokens
//
// in   x [tokens, N, C] T; bias [NUM_LOGITS], alpha [3], weight [C] any float, NUM_LOGITS = 2 N + R;
//      l [tokens, NUM_LOGITS + 1] float: l, scale;
//      params [6 or 8] float, by mhc::param: PRE_EPS, POST_SCALE, EPS; with PROJECT PROJECTION_EPS, with CLAMP
//      also CLAMP_LOW, CLAMP_HIGH;
//      du [tokens, C] T; dh_post [tokens, N] float; dh_res [tokens, N, N] float (PROJECT) or dz_res [tokens, R] float
// out  token_factors [tokens, N + 1] float: h_pre, pull; dread [tokens, C] DREAD_T: du'; dp [tokens, NUM_LOGITS] float;
//      partial [threadgroups, 2 NUM_LOGITS + C] float: the sums of dz, of dz l, dweight, over this threadgroup's tokens
// CACHED: x of a token stays in registers between the sums and du', and a thread's dweight until the end; without
//      CACHED x is read twice, and the running sum of dweight lies in partial.
// owners  A threadgroup takes BATCH tokens for each of its simdgroups in turn. First each simdgroup walks back through
//      the projections of its own at once, matrix_lanes(N) lanes a matrix; STORED_STEPS divisors of a line stay in
//      threadgroup memory. Then all go token by token: a thread takes VEC channels of all streams, PASSES times, and a
//      lane of the simdgroup to which the token belongs takes a logit.
// template  T, N, NUM_LOGITS, PROJECT, ITERS, START, COLUMNS, OUT_COLUMNS, CLAMP, VEC, THREADS, PASSES, CACHED,
//      BATCH, STORED_STEPS, DREAD_T
// grid  any number of threadgroups
#include "coefficient_gradient.h"
#include "stream_dots.h"
constexpr int SIMDS = THREADS / 32;
constexpr int NUM_RES_LOGITS = NUM_LOGITS - 2 * N;
constexpr int MATRIX_LANES = mhc::matrix_lanes(N);
constexpr int CACHED_PASSES = CACHED ? PASSES : 1;
constexpr bool PARTIAL_ALIGNED = 2 * NUM_LOGITS % VEC == 0;  // whether packs of dweight's sums in partial are aligned
static_assert(NUM_LOGITS <= 32 && (!PROJECT || BATCH * MATRIX_LANES <= 32),
              "a lane takes a logit, and a line of a matrix");
threadgroup float divisors[PROJECT ? STORED_STEPS * THREADS : 1];
threadgroup float token_sums[SIMDS > 1 ? 2 * SIMDS * (2 * N + 2) : 1];
threadgroup float logit_sums[SIMDS > 1 ? SIMDS * 2 * NUM_LOGITS : 1];
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const uint group_begin = threadgroup_position_in_grid.x * (BATCH * SIMDS);
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const uint zero = tokens >> 31;  // the compiler does not know that it is 0
const bool aligned = mhc::is_aligned<VEC>(x) && mhc::is_aligned<VEC>(du);
const bool weight_aligned = mhc::is_aligned<VEC>(weight);
const mhc::LaneLogit logit = mhc::lane_logit<N, NUM_LOGITS, 2 * N, COLUMNS>(alpha, bias, lane);
const auto group_partial = partial + size_t(threadgroup_position_in_grid.x) * size_t(2 * NUM_LOGITS + C);
const auto dweight_sums = group_partial + 2 * NUM_LOGITS;
mhc::LogitSums sums = {0.0f, 0.0f};
float dweight[CACHED_PASSES][VEC] = {};
mhc::Pack<T, VEC> xv[CACHED_PASSES][N];
int parity = 0;

for (uint first = group_begin; first < tokens; first += threadgroups_per_grid.x * (BATCH * SIMDS)) {
  const int turn_lane = mhc::each_turn(lane, first >> 31), turn_tid = mhc::each_turn(tid, first >> 31);
  float g_res[N] = {};
  if constexpr (PROJECT) {
    const uint lane_token = first + uint(simd * BATCH + turn_lane / MATRIX_LANES);
    const size_t t = lane_token < tokens && turn_lane / MATRIX_LANES < BATCH ? lane_token : first;
    const auto z = mhc::logits_of(l + (t * (NUM_LOGITS + 1) + 2 * N), bias + 2 * N, static_cast<float>(alpha[2]));
    mhc::walk_back_projection<N, START, COLUMNS, OUT_COLUMNS, ITERS, STORED_STEPS, THREADS>(
        g_res, dh_res + t * (N * N), z, divisors + turn_tid, mhc::projection_numbers<CLAMP>(params),
        uint(turn_lane % MATRIX_LANES), uint(turn_lane), divisors);
  }
  for (int i = 0; i < BATCH * SIMDS && first + uint(i) < tokens; ++i) {
    const size_t t = first + uint(i);
    const auto row = x + t * size_t(K);
    const auto du_row = du + t * size_t(C);
    const mhc::TokenLogit token = mhc::token_logit<NUM_LOGITS>(logit, l + t * (NUM_LOGITS + 1), params);
    float pre[N];
    UNROLL_FOR (int j = 0; j < N; ++j) pre[j] = simd_shuffle(token.h_pre, ushort(j));

    mhc::NormDots<N> dots = {};
#pragma unroll(CACHED_PASSES)
    for (int k = 0; k < PASSES; ++k) {
      const int c = mhc::each_turn((k * THREADS + turn_tid) * VEC, (uint(t) + uint(k)) >> 31), at = CACHED ? k : 0;
      if (c < C) {
        float w[VEC];
        mhc::load_streams<N>(xv[at], row, C, c, aligned);
        const mhc::Pack<T, VEC> d = mhc::load<T, VEC>(mhc::at(du_row, c), aligned);
        mhc::load_floats<VEC>(w, mhc::at(weight, c), weight_aligned);
        mhc::add_norm_dots(dots, pre, xv[at], d, w);
      }
    }
    const mhc::LaneDots lane_dots = mhc::sum_norm_dots<SIMDS>(dots, token_sums, parity, simd, turn_lane);
    parity ^= 1;
    const float r =
        metal::precise::rsqrt(lane_dots.u_dot_u / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));
    const float slope = r * r * (lane_dots.du_dot_u / static_cast<float>(C));

#pragma unroll(CACHED_PASSES)
    for (int k = 0; k < PASSES; ++k) {
      const int c = mhc::each_turn((k * THREADS + turn_tid) * VEC, (uint(t) + uint(k)) >> 31), at = CACHED ? k : 0;
      if (c < C) {
        float w[VEC];
        mhc::Pack<DREAD_T, VEC> g;
        const mhc::Pack<T, VEC> d = mhc::load<T, VEC>(mhc::at(du_row, c), aligned);
        if (!CACHED) {
          mhc::load_streams<N>(xv[at], row, C, c, aligned);
          if (i > 0 || first != group_begin)
            mhc::load_floats<VEC>(dweight[at], mhc::at(dweight_sums, c), PARTIAL_ALIGNED);
          else
            UNROLL_FOR (int e = 0; e < VEC; ++e) dweight[at][e] = 0.0f;
        }
        mhc::load_floats<VEC>(w, mhc::at(weight, c), weight_aligned);
        mhc::norm_gradient(g, dweight[at], d, pre, xv[at], w, r, slope, zero);
        mhc::store(mhc::at(dread + t * size_t(C), c), g);
        if (!CACHED) mhc::store_floats<VEC>(mhc::at(dweight_sums, c), dweight[at], PARTIAL_ALIGNED);
      }
    }

    if (i / BATCH == simd) {
      const float dh = r * (lane_dots.du_dot_x - slope * lane_dots.u_dot_x);  // dh_pre of the turn_lane's stream
      const float cotangent = mhc::logit_cotangent<N, NUM_RES_LOGITS, false, PROJECT>(
          logit, dh, dh_post + t * N, dz_res + t * NUM_RES_LOGITS, g_res, i % BATCH * MATRIX_LANES, params);
      mhc::finish_token<N, NUM_LOGITS>(sums, logit, token, cotangent, K, dp + t * NUM_LOGITS,
                                       token_factors + t * (N + 1), turn_lane);
    }
  }
}

if constexpr (SIMDS > 1) {
  mhc::store_logit_sums<NUM_LOGITS>(sums, logit_sums + simd * (2 * NUM_LOGITS), lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sums = {0.0f, 0.0f};
  UNROLL_FOR (int k = 0; k < SIMDS && lane < NUM_LOGITS; ++k) {
    sums.dz += logit_sums[k * 2 * NUM_LOGITS + lane];
    sums.dz_l += logit_sums[k * 2 * NUM_LOGITS + NUM_LOGITS + lane];
  }
}
if (simd == 0) mhc::store_logit_sums<NUM_LOGITS>(sums, group_partial, lane);
UNROLL_FOR (int k = 0; k < CACHED_PASSES && CACHED; ++k) {
  const int c = (k * THREADS + tid) * VEC;
  if (c < C) mhc::store_floats<VEC>(mhc::at(dweight_sums, c), dweight[k], PARTIAL_ALIGNED);
}

// mhc_pre_backward_coefficients: of the gradient of mhc_pre all but dx and dphi; mhc_pre_backward_projection makes
// these two of what this body writes. NUM_LOGITS <= 32.
//
//   l, scale = rsqrt(mean(x**2) + norm_eps) as mhc_pre saved them;   z = alpha l + bias, s = sigmoid(z);
//   h_pre = s + pre_eps
//   dz_post = dh_post post_scale s sigmoid(-z)
//   dz_res is given, or with PROJECT the gradient of sinkhorn_knopp(z_res) for dh_res
//   dz_pre[j] = dh_pre[j] s sigmoid(-z), where dh_pre[j] = sum du x[j] with HAS_DU, and with HAS_DU and NORM
//   dh_pre[j] = r (sum du weight x[j] - slope sum u x[j]), u = sum_j h_pre[j] x[j], r = rsqrt(mean(u**2) + eps),
//   slope = r**2 mean(du weight u)
//   dl = alpha dz;   dp = scale dl;   pull = -scale**2 sum(dl l) / (N C), the factor of x in dx
//   NORM: du' = r (du weight - u slope);   dweight = sum_t du u r
//   dbias[o] = sum_t dz[o];   dalpha of a part = the sum of dz l over its logits and tokens
//
// in   x [tokens, N, C] T; bias [NUM_LOGITS], alpha [parts], weight [C] any float; l [tokens, NUM_LOGITS + 1] float: l,
//      scale; params [6] float, by mhc::param: PRE_EPS; without HEAD POST_SCALE; with PROJECT PROJECTION_EPS; with NORM
//      EPS;
//      du [tokens, C] T (HAS_DU) or dh_pre [tokens, N] float; dh_post [tokens, N] float (without HEAD);
//      dh_res [tokens, N, N] float (PROJECT) or dz_res [tokens, R] float
// out  token_factors [tokens, N + 1] float: h_pre, pull; dread [tokens, C] T (NORM): du'; dp [tokens, NUM_LOGITS]
//      float; partial [teams, P] float: sums of dz, of dz l, and with NORM dweight, in this order, over this team's
//      tokens
// CACHED: x of a token stays in registers between the sums and du'; without CACHED it is read twice.
// owners  A team is a simdgroup, with NORM a threadgroup. It takes BATCH tokens for each of its simdgroups in turn.
//      First it walks back through their projections at once, matrix_lanes(N) lanes a matrix; STORED_STEPS divisors of
//      a line stay in threadgroup memory. Then it goes token by token: a thread takes VEC channels of all streams, with
//      NORM PASSES times, and a lane of the simdgroup to which the token belongs takes a logit.
// template  T, N, NUM_LOGITS, HEAD, HAS_DU, NORM, PROJECT, ITERS, START, COLUMNS, OUT_COLUMNS, VEC, THREADS, PASSES,
//      CACHED, BATCH, STORED_STEPS
// grid  any number of threadgroups
#include "coefficients.h"
#include "sinkhorn_backward.h"
#include "streams.h"
constexpr int SIMDS = THREADS / 32;
constexpr int TEAM_SIMDGROUPS = NORM ? SIMDS : 1;
constexpr int TOKENS_PER_TURN = BATCH * TEAM_SIMDGROUPS;
constexpr int NUM_GATE_LOGITS = HEAD ? N : 2 * N;
constexpr int NUM_RES_LOGITS = NUM_LOGITS - NUM_GATE_LOGITS;
constexpr int MATRIX_LANES = mhc::matrix_lanes(N);
constexpr int PACKS_AT_ONCE = N <= 4 ? 2 : 1;  // packs of each stream that are loaded before the first is used
constexpr int CACHED_PASSES = CACHED ? PASSES : 1;
constexpr int SUMS_PER_TOKEN = 2 * N + 2;
constexpr bool PARTIAL_ALIGNED = 2 * NUM_LOGITS % VEC == 0;  // packs of dweight's sums in partial
static_assert(NUM_LOGITS <= 32 && (!PROJECT || BATCH * MATRIX_LANES <= 32), "a lane takes a logit, and a line of a matrix");
threadgroup float divisors[PROJECT ? STORED_STEPS * THREADS : 1];
threadgroup float token_sums[TEAM_SIMDGROUPS > 1 ? 2 * TEAM_SIMDGROUPS * SUMS_PER_TOKEN : 1];
threadgroup float team_sums[TEAM_SIMDGROUPS > 1 ? TEAM_SIMDGROUPS * 2 * NUM_LOGITS : 1];
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup) % TEAM_SIMDGROUPS;  // its number in the team
const uint team = (threadgroup_position_in_grid.x * SIMDS + simdgroup_index_in_threadgroup) / TEAM_SIMDGROUPS;
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const bool aligned = mhc::is_aligned<VEC>(x) && (!HAS_DU || mhc::is_aligned<VEC>(du));
const bool weight_aligned = NORM && mhc::is_aligned<VEC>(weight);
const int o = lane < NUM_LOGITS ? lane : 0, part = mhc::part_of<N>(o), entry = part == 2 ? o - NUM_GATE_LOGITS : 0;
const int line = COLUMNS ? entry % N : entry / N, entry_in_line = COLUMNS ? entry / N : entry % N;  // PROJECT: the lane's element of dz_res is this entry of this line
const float alpha_o = static_cast<float>(alpha[part]), bias_o = static_cast<float>(bias[o]);
const auto team_partial = partial + size_t(team) * size_t(2 * NUM_LOGITS + (NORM ? C : 0));
float sum = 0.0f, sum_l = 0.0f, g_weight[NORM ? CACHED_PASSES : 1][VEC] = {};
mhc::Pack<T, VEC> xv[CACHED_PASSES][N];
int parity = 0;

for (uint first = team * TOKENS_PER_TURN; first < tokens; first += threadgroups_per_grid.x * (SIMDS / TEAM_SIMDGROUPS) * TOKENS_PER_TURN) {
  float g_res[N] = {};
  if constexpr (PROJECT) {
    const uint lane_token = first + uint(simd * BATCH + lane / MATRIX_LANES);
    const uint t = lane_token < tokens && lane / MATRIX_LANES < BATCH ? lane_token : first;
    mhc::load_line<N, OUT_COLUMNS>(g_res, dh_res + size_t(t) * (N * N), uint(lane % MATRIX_LANES));
    UNROLL for (int j = 0; j < N; ++j) g_res[j] = lane % MATRIX_LANES < N ? g_res[j] : 0.0f;
    const auto z = mhc::logits_of(l + (size_t(t) * (NUM_LOGITS + 1) + NUM_GATE_LOGITS), bias + NUM_GATE_LOGITS, static_cast<float>(alpha[2]));
    mhc::sinkhorn_gradient<N, START, COLUMNS, ITERS, STORED_STEPS, THREADS>(
        g_res, z, divisors + tid, static_cast<float>(params[mhc::param::PROJECTION_EPS]), uint(lane % MATRIX_LANES), uint(lane), divisors);
  }

  for (int i = 0; i < TOKENS_PER_TURN && first + uint(i) < tokens; ++i) {
    const size_t t = first + uint(i);
    const auto row = x + t * size_t(K);
    const auto du_row = du + t * size_t(C);
    const float logit = static_cast<float>(l[t * (NUM_LOGITS + 1) + o]), scale = static_cast<float>(l[t * (NUM_LOGITS + 1) + NUM_LOGITS]);
    const float z = alpha_o * logit + bias_o, s = mhc::sigmoid(z), h = s + static_cast<float>(params[mhc::param::PRE_EPS]);
    mhc::Dots<N> dots = {};
    if constexpr (NORM) {
      UNROLL for (int j = 0; j < N; ++j) dots.pre[j] = simd_shuffle(h, ushort(j));
#pragma unroll CACHED_PASSES
      for (int k = 0; k < PASSES; ++k) {
        const int c = (k * THREADS + tid) * VEC, at = CACHED ? k : 0;
        if (c < C) {
          mhc::load_streams<N>(xv[at], row, C, c, aligned);
          const mhc::Pack<T, VEC> d = mhc::load<T, VEC>(du_row + c, aligned);
          mhc::add_dots<true>(dots, xv[at], d, weight + c, weight_aligned);
        }
      }
    } else if constexpr (HAS_DU) {
      mhc::dot_streams<PACKS_AT_ONCE, T, VEC>(dots, row, du_row, C, lane, aligned);
    }

    // The team's sums: lane j has those of stream j, and every lane has those of the norm.
    float du_dot_x = 0.0f, u_dot_x = 0.0f, u_dot_u = NORM ? simd_sum(dots.u_dot_u) : 0.0f, du_dot_u = NORM ? simd_sum(dots.du_dot_u) : 0.0f;
    UNROLL for (int j = 0; j < N && HAS_DU; ++j) {
      const float v = simd_sum(dots.du_dot_x[j]), w = NORM ? simd_sum(dots.u_dot_x[j]) : 0.0f;
      du_dot_x = lane == j ? v : du_dot_x;
      u_dot_x = lane == j ? w : u_dot_x;
    }
    if constexpr (TEAM_SIMDGROUPS > 1) {
      const int at = (parity * TEAM_SIMDGROUPS + simd) * SUMS_PER_TOKEN;
      if (lane < N) {
        token_sums[at + lane] = du_dot_x;
        token_sums[at + N + lane] = u_dot_x;
      }
      if (lane == 0) {
        token_sums[at + 2 * N] = u_dot_u;
        token_sums[at + 2 * N + 1] = du_dot_u;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // one is enough, since the next token's sums lie elsewhere
      du_dot_x = u_dot_x = u_dot_u = du_dot_u = 0.0f;
      UNROLL for (int k = 0; k < TEAM_SIMDGROUPS; ++k) {
        const int from = (parity * TEAM_SIMDGROUPS + k) * SUMS_PER_TOKEN;
        du_dot_x += lane < N ? token_sums[from + lane] : 0.0f;
        u_dot_x += lane < N ? token_sums[from + N + lane] : 0.0f;
        u_dot_u += token_sums[from + 2 * N];
        du_dot_u += token_sums[from + 2 * N + 1];
      }
    }
    float r = 1.0f, slope = 0.0f;
    if constexpr (NORM) {
      r = metal::precise::rsqrt(u_dot_u / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));
      slope = r * r * (du_dot_u / static_cast<float>(C));
#pragma unroll CACHED_PASSES
      for (int k = 0; k < PASSES; ++k) {
        const int c = (k * THREADS + tid) * VEC, at = CACHED ? k : 0;
        if (c < C) {
          float u[VEC] = {}, w[VEC];
          mhc::Pack<T, VEC> d = mhc::load<T, VEC>(du_row + c, aligned);
          if (!CACHED) {
            mhc::load_streams<N>(xv[at], row, C, c, aligned);
            if (i > 0 || first != team * TOKENS_PER_TURN) mhc::load_floats<VEC>(g_weight[at], team_partial + (2 * NUM_LOGITS + c), PARTIAL_ALIGNED);
            else UNROLL for (int e = 0; e < VEC; ++e) g_weight[at][e] = 0.0f;
          }
          mhc::load_floats<VEC>(w, weight + c, weight_aligned);
          UNROLL for (int j = 0; j < N; ++j) {
            STAY_PACKED(xv[at][j]);
            UNROLL for (int e = 0; e < VEC; ++e) u[e] += dots.pre[j] * static_cast<float>(xv[at][j].v[e]);
          }
          UNROLL for (int e = 0; e < VEC; ++e) {
            const float g = static_cast<float>(d.v[e]);
            d.v[e] = static_cast<T>(r * (g * w[e] - u[e] * slope));
            g_weight[at][e] += g * u[e] * r;
          }
          *(device mhc::Pack<T, VEC>*)(dread + t * size_t(C) + c) = d;
          if (!CACHED) mhc::store_floats<VEC>(team_partial + (2 * NUM_LOGITS + c), g_weight[at], PARTIAL_ALIGNED);
        }
      }
    }

    if (i / BATCH == simd) {  // this simdgroup takes the token's logits
      float d = s * mhc::sigmoid(-z), cotangent = 0.0f;
      if (HAS_DU && part == 0) cotangent = r * (du_dot_x - slope * u_dot_x);
      UNROLL for (int j = 0; j < N && PROJECT; ++j) {
        const float v = simd_shuffle(g_res[j], ushort(i % BATCH * MATRIX_LANES + line));
        cotangent = part == 2 && entry_in_line == j ? v : cotangent;
      }
      if (!HAS_DU && part == 0) cotangent = static_cast<float>(dh_pre[t * N + o]);
      if (!HEAD && part == 1) cotangent = static_cast<float>(params[mhc::param::POST_SCALE]) * static_cast<float>(dh_post[t * N + (o - N)]);
      if (part == 2) {
        d = 1.0f;
        if (!PROJECT && NUM_RES_LOGITS > 0) cotangent = static_cast<float>(dz_res[t * NUM_RES_LOGITS + entry]);
      }
      d = lane < NUM_LOGITS ? d * cotangent : 0.0f;
      sum += d;
      sum_l += d * logit;
      d *= alpha_o * scale;
      const float pull = -simd_sum(d * logit) * scale / static_cast<float>(K);
      if (lane < NUM_LOGITS) dp[t * NUM_LOGITS + lane] = d;
      if (lane < N) token_factors[t * (N + 1) + lane] = h;
      if (lane == 0) token_factors[t * (N + 1) + N] = pull;
    }
    parity ^= 1;
  }
}

if constexpr (TEAM_SIMDGROUPS > 1) {
  if (lane < NUM_LOGITS) {
    team_sums[simd * 2 * NUM_LOGITS + lane] = sum;
    team_sums[simd * 2 * NUM_LOGITS + NUM_LOGITS + lane] = sum_l;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = sum_l = 0.0f;
  UNROLL for (int k = 0; k < TEAM_SIMDGROUPS && lane < NUM_LOGITS; ++k) {
    sum += team_sums[k * 2 * NUM_LOGITS + lane];
    sum_l += team_sums[k * 2 * NUM_LOGITS + NUM_LOGITS + lane];
  }
}
if (simd == 0 && lane < NUM_LOGITS) {
  team_partial[lane] = sum;
  team_partial[NUM_LOGITS + lane] = sum_l;
}
UNROLL for (int k = 0; k < CACHED_PASSES && NORM && CACHED; ++k) {
  const int c = (k * THREADS + tid) * VEC;
  if (c < C) mhc::store_floats<VEC>(team_partial + (2 * NUM_LOGITS + c), g_weight[NORM ? k : 0], PARTIAL_ALIGNED);
}

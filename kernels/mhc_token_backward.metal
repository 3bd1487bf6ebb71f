// mhc_token_backward: the gradient of mhc_pre but for dx and dphi, of which it makes all that mhc_projection_backward needs.
//
//   z = alpha l + bias, s = sigmoid(z);   dz_post = dh_post post_scale s sigmoid(-z)
//   dz_res is given, or with PROJECT the gradient of sinkhorn_knopp(z_res) for dh_res
//   dz_pre[j] = dh_pre[j] s sigmoid(-z), where READ makes dh_pre from du: sum du x[j], or with NORM
//   r (sum du weight x[j] - slope sum u x[j]), r = rsqrt(mean(u**2) + eps), slope = r**2 mean(du weight u)
//   dl = alpha dz;   dp = scale dl, scale = rsqrt(mean(x**2) + norm_eps);   pull = -scale**2 sum(dl l) / (N C)
//   NORM: du' = r * (du weight - u slope), u = sum_j h_pre[j] x[j];   dweight = sum_t du u r
//   dbias[o] = sum_t dz[o];   dalpha of a part = its sum of dz l
//
// in   x [tokens, N, C] T; bias [OUTS], alpha [parts], weight [C] any float, params as in mhc_pre; l [tokens, OUTS + 1] float;
//      du [tokens, C] T, or without READ dh_pre [tokens, N] float; dh_post [tokens, N] float; dh_res [tokens, N, N] float
//      (PROJECT) or dz_res [tokens, R] float
// out  side [tokens, N + 1] float: h_pre, then pull; NORM: dread [tokens, C] T: du'; dp [tokens, OUTS] float;
//      partial [teams, P] float: sums of dz, of dz l, and with NORM dweight, in this order
// own  a team, a simdgroup or with NORM a threadgroup, takes BATCH tokens of each of its simdgroups in turn: their matrices at
//      once, lanes(N) lanes each; then token by token, a thread VEC channels of all streams, with NORM PASSES times, a lane of
//      the token's own simdgroup an output. OUTS <= 32
//      CACHED: x of a token stays in registers between the sums and du'; otherwise it is read twice
// template  T, N, OUTS, VEC, THREADS, PASSES, CACHED, BATCH, HEAD, READ, NORM, PROJECT, ITERS, START, COLUMNS, OUT_COLUMNS, KEPT
//      (half-steps whose divisors stay in threadgroup memory)
#include "coefficients.h"
#include "sinkhorn_backward.h"
#include "streams.h"
constexpr int SIMDS = THREADS / 32;
constexpr int TEAM = NORM ? SIMDS : 1;  // simdgroups
constexpr int OWN = BATCH * TEAM;       // tokens of a turn
constexpr int GATED = HEAD ? N : 2 * N;
constexpr int R = OUTS - GATED;
constexpr int W = mhc::lanes(N);
constexpr int CHUNKS = N <= 4 ? 2 : 1;  // packs under way at once
constexpr int HELD = CACHED ? PASSES : 1;
constexpr int SHARES = 2 * N + 2;
constexpr bool PACKED = 2 * OUTS % VEC == 0;  // dweight's sums
static_assert(OUTS <= 32 && (!PROJECT || BATCH * W <= 32), "a lane for each output, and for each line");
threadgroup float divisors[PROJECT ? KEPT * THREADS : 1];
threadgroup float shares[TEAM > 1 ? 2 * TEAM * SHARES : 1];
threadgroup float ends[TEAM > 1 ? TEAM * 2 * OUTS : 1];
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup) % TEAM;  // of the team's
const uint self = (threadgroup_position_in_grid.x * SIMDS + simdgroup_index_in_threadgroup) / TEAM;
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const bool whole = mhc::aligned<VEC>(x) && (!READ || mhc::aligned<VEC>(du));
const bool w_whole = NORM && mhc::aligned<VEC>(weight);
const int o = lane < OUTS ? lane : 0, part = mhc::part_of<N>(o), entry = part == 2 ? o - GATED : 0;
const int line = COLUMNS ? entry % N : entry / N, place = COLUMNS ? entry / N : entry % N;  // of dz_res in PROJECT
const float a = static_cast<float>(alpha[part]), b = static_cast<float>(bias[o]);
const auto mine = partial + size_t(self) * size_t(2 * OUTS + (NORM ? C : 0));
float sum = 0.0f, sum_l = 0.0f, g_weight[NORM ? HELD : 1][VEC] = {};
mhc::Pack<T, VEC> xv[HELD][N];
int turn = 0;

for (uint first = self * OWN; first < tokens; first += threadgroups_per_grid.x * (SIMDS / TEAM) * OWN) {
  float g_res[N] = {};
  if constexpr (PROJECT) {
    const uint own = first + uint(simd * BATCH + lane / W);
    const uint t = own < tokens && lane / W < BATCH ? own : first;
    mhc::load_line<N, OUT_COLUMNS>(g_res, dh_res + size_t(t) * (N * N), uint(lane % W));
    UNROLL for (int j = 0; j < N; ++j) g_res[j] = lane % W < N ? g_res[j] : 0.0f;
    const auto z = mhc::logits_of(l + (size_t(t) * (OUTS + 1) + GATED), bias + GATED, static_cast<float>(alpha[2]));
    mhc::sinkhorn_gradient<N, START, COLUMNS, ITERS, KEPT, THREADS>(
        g_res, z, divisors + tid, static_cast<float>(params[5]), uint(lane % W), uint(lane), divisors);
  }

  for (int i = 0; i < OWN && first + uint(i) < tokens; ++i) {
    const size_t t = first + uint(i);
    const auto row = x + t * size_t(K);
    const auto drow = du + t * size_t(C);
    const float unit = static_cast<float>(l[t * (OUTS + 1) + o]), scale = static_cast<float>(l[t * (OUTS + 1) + OUTS]);
    const float z = a * unit + b, s = mhc::sigmoid(z), h = s + static_cast<float>(params[0]);
    mhc::Dots<N> dots = {};
    if constexpr (NORM) {
      UNROLL for (int j = 0; j < N; ++j) dots.pre[j] = simd_shuffle(h, ushort(j));
#pragma unroll HELD
      for (int k = 0; k < PASSES; ++k) {
        const int c = (k * THREADS + tid) * VEC, at = CACHED ? k : 0;
        if (c < C) {
          mhc::load_streams<N>(xv[at], row, C, c, whole);
          const mhc::Pack<T, VEC> d = mhc::load<T, VEC>(drow + c, whole);
          mhc::add_dots<true>(dots, xv[at], d, weight + c, w_whole);
        }
      }
    } else if constexpr (READ) {
      mhc::dot_streams<CHUNKS, T, VEC>(dots, row, drow, C, lane, whole);
    }

    // the team's sums: a lane's of its stream, and in all lanes what a norm needs
    float through = 0.0f, normal = 0.0f, squared = NORM ? simd_sum(dots.squared) : 0.0f, both = NORM ? simd_sum(dots.both) : 0.0f;
    UNROLL for (int j = 0; j < N && READ; ++j) {
      const float v = simd_sum(dots.x[j]), w = NORM ? simd_sum(dots.u[j]) : 0.0f;
      through = lane == j ? v : through;
      normal = lane == j ? w : normal;
    }
    if constexpr (TEAM > 1) {
      const int at = (turn * TEAM + simd) * SHARES;
      if (lane < N) {
        shares[at + lane] = through;
        shares[at + N + lane] = normal;
      }
      if (lane == 0) {
        shares[at + 2 * N] = squared;
        shares[at + 2 * N + 1] = both;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // one is enough: the next token's lie elsewhere
      through = normal = squared = both = 0.0f;
      UNROLL for (int k = 0; k < TEAM; ++k) {
        const int from = (turn * TEAM + k) * SHARES;
        through += lane < N ? shares[from + lane] : 0.0f;
        normal += lane < N ? shares[from + N + lane] : 0.0f;
        squared += shares[from + 2 * N];
        both += shares[from + 2 * N + 1];
      }
    }
    float r = 1.0f, slope = 0.0f;
    if constexpr (NORM) {
      r = metal::precise::rsqrt(squared / static_cast<float>(C) + static_cast<float>(params[4]));
      slope = r * r * (both / static_cast<float>(C));
#pragma unroll HELD
      for (int k = 0; k < PASSES; ++k) {
        const int c = (k * THREADS + tid) * VEC, at = CACHED ? k : 0;
        if (c < C) {
          float u[VEC] = {}, w[VEC];
          mhc::Pack<T, VEC> d = mhc::load<T, VEC>(drow + c, whole);
          if (!CACHED) {
            mhc::load_streams<N>(xv[at], row, C, c, whole);
            if (i > 0 || first != self * OWN) mhc::load_floats<VEC>(g_weight[at], mine + (2 * OUTS + c), PACKED);
            else UNROLL for (int e = 0; e < VEC; ++e) g_weight[at][e] = 0.0f;
          }
          mhc::load_floats<VEC>(w, weight + c, w_whole);
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
          if (!CACHED) mhc::store_floats<VEC>(mine + (2 * OUTS + c), g_weight[at], PACKED);
        }
      }
    }

    if (i / BATCH == simd) {  // the token's own simdgroup
      float d = s * mhc::sigmoid(-z), given = 0.0f;
      if (READ && part == 0) given = r * (through - slope * normal);
      UNROLL for (int j = 0; j < N && PROJECT; ++j) {
        const float v = simd_shuffle(g_res[j], ushort(i % BATCH * W + line));
        given = part == 2 && place == j ? v : given;
      }
      if (!READ && part == 0) given = static_cast<float>(dh_pre[t * N + o]);
      if (!HEAD && part == 1) given = static_cast<float>(params[1]) * static_cast<float>(dh_post[t * N + (o - N)]);
      if (part == 2) {
        d = 1.0f;
        if (!PROJECT && R > 0) given = static_cast<float>(dz_res[t * R + entry]);
      }
      d = lane < OUTS ? d * given : 0.0f;
      sum += d;
      sum_l += d * unit;
      d *= a * scale;
      const float pull = -simd_sum(d * unit) * scale / static_cast<float>(K);
      if (lane < OUTS) dp[t * OUTS + lane] = d;
      if (lane < N) side[t * (N + 1) + lane] = h;
      if (lane == 0) side[t * (N + 1) + N] = pull;
    }
    turn ^= 1;
  }
}

if constexpr (TEAM > 1) {
  if (lane < OUTS) {
    ends[simd * 2 * OUTS + lane] = sum;
    ends[simd * 2 * OUTS + OUTS + lane] = sum_l;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = sum_l = 0.0f;
  UNROLL for (int k = 0; k < TEAM && lane < OUTS; ++k) {
    sum += ends[k * 2 * OUTS + lane];
    sum_l += ends[k * 2 * OUTS + OUTS + lane];
  }
}
if (simd == 0 && lane < OUTS) {
  mine[lane] = sum;
  mine[OUTS + lane] = sum_l;
}
UNROLL for (int k = 0; k < HELD && NORM && CACHED; ++k) {
  const int c = (k * THREADS + tid) * VEC;
  if (c < C) mhc::store_floats<VEC>(mine + (2 * OUTS + c), g_weight[NORM ? k : 0], PACKED);
}

// mhc_pre_backward_generic: of the gradient of mhc_pre all but dphi, from what it saved and the gradient of the logits
// of h_res, for any dtype and NUM_LOGITS.
//
//   l, scale = rsqrt(mean(x**2) + norm_eps) as mhc_pre saved them;   z = alpha l + bias, s = sigmoid(z);
//   h_pre = s + pre_eps
//   dz_post = dh_post post_scale s sigmoid(-z);   dz_res is given
//   dz_pre[j] = dh_pre[j] s sigmoid(-z), where dh_pre[j] = sum du x[j] with HAS_DU, and with HAS_DU and NORM
//   dh_pre[j] = r (sum du weight x[j] - slope sum u x[j]), u = sum_j h_pre[j] x[j], r = rsqrt(mean(u**2) + eps),
//   slope = r**2 mean(du weight u)
//   dl = alpha dz;   dp = scale dl;   pull = -scale**2 sum(dl l) / (N C)
//   du' = du, with NORM r (du weight - u slope);   dweight = sum_t du u r
//   dx[j] = sum_o phi[o, j] dp[o] + pull x[j] + h_pre[j] du' (+ dx_out[j])
//   dbias[o] = sum_t dz[o];   dalpha of a part = the sum of dz l over its logits and tokens
//
// in   x [tokens, N, C] T; phi [NUM_LOGITS, N * C], bias [NUM_LOGITS], alpha [parts], weight [C] any float,
//      NUM_LOGITS = 2 N + R, or N (HEAD), where pre is the only part;
//      params [6 or 8] float, by mhc::param: PRE_EPS; without HEAD POST_SCALE; with NORM EPS;
//      l [tokens, NUM_LOGITS + 1] float: l, scale; dz_res [tokens, R] float; du [tokens, C] T (HAS_DU) or dh_pre
//      [tokens, N] float; dh_post [tokens, N] float (without HEAD); dx_out [tokens, N, C] T (HAS_DX_OUT): the cotangent
//      of the x that was passed through, or the dx that mhc_seam_backward made
// out  dx [tokens, N, C] T; dp [tokens, NUM_LOGITS] float; partial [threadgroups / SPLITS, P] float: sums of dz, of dz
//      l, and with NORM dweight, in this order, over these threadgroups' tokens
// owners  A threadgroup takes tiles of TILE tokens in turn, and a thread takes VEC neighbours of all streams: phi is
//      read once a tile. For dh_pre a simdgroup takes a token. SPLITS threadgroups share a tile, each a range of
//      channels of dx; that is for N > 8, where phi is most of the bytes, and each of them makes dh_pre and dp anew.
// template  T, N, NUM_LOGITS, HAS_DU, NORM, VEC, THREADS, TILE, SPLITS, HAS_DX_OUT
// grid  any multiple of SPLITS threadgroups
#include "common.h"
constexpr int SIMDS = THREADS / 32;
constexpr bool HEAD = NUM_LOGITS == N;
constexpr int NUM_GATE_LOGITS = HEAD ? N : 2 * N;
constexpr int NUM_RES_LOGITS = NUM_LOGITS - NUM_GATE_LOGITS;
constexpr int STREAM_UNROLL = N <= 8 ? N : 1;
threadgroup mhc::Floats<TILE> dps[NUM_LOGITS];  // dps[o].v[i] = dz, then dp, of logit o and token i
threadgroup float pre[TILE * N];
threadgroup float inverse_rms[TILE];  // inverse_rms[i] = r of token i
threadgroup float slopes[TILE];
threadgroup float pull[TILE];
const int simd = int(simdgroup_index_in_threadgroup);
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const uint tiles = (tokens + TILE - 1) / TILE;
const bool x_aligned = mhc::is_aligned<VEC>(x);
const bool phi_aligned = mhc::is_aligned<VEC>(phi);
const uint tile_group = threadgroup_position_in_grid.x / SPLITS;
const auto group_partial = partial + size_t(tile_group) * size_t(2 * NUM_LOGITS + (NORM ? C : 0));
const int channels_per_group = (C / VEC + SPLITS - 1) / SPLITS * VEC;
const int channel_begin = int(threadgroup_position_in_grid.x % SPLITS) * channels_per_group;
const int channel_end = channel_begin + channels_per_group < C ? channel_begin + channels_per_group : C;

bool after_first_tile = false;
for (uint tile = tile_group; tile < tiles; tile += threadgroups_per_grid.x / SPLITS) {
  const uint first = tile * TILE;
  const int tid = mhc::each_turn(int(thread_position_in_threadgroup.x), first >> 31);
  const int lane = mhc::each_turn(int(thread_index_in_simdgroup), first >> 31);
  for (int q = tid; q < TILE * NUM_LOGITS; q += THREADS) {
    const int i = q / NUM_LOGITS, o = q % NUM_LOGITS;
    const size_t t = first + uint(i);
    float g = 0.0f, h = 0.0f;
    if (t < tokens) {
      if (o < NUM_GATE_LOGITS) {
        const float z = static_cast<float>(alpha[o < N ? 0 : 1]) * static_cast<float>(l[t * (NUM_LOGITS + 1) + o]) +
                        static_cast<float>(bias[o]);
        const float s = mhc::sigmoid(z);
        g = s * mhc::sigmoid(-z);
        h = s + static_cast<float>(params[mhc::param::PRE_EPS]);
        if (!HEAD && o >= N)
          g *= static_cast<float>(params[mhc::param::POST_SCALE]) * static_cast<float>(dh_post[t * N + (o - N)]);
        else if (!HAS_DU) g *= static_cast<float>(dh_pre[t * N + o]);
      } else if (NUM_RES_LOGITS > 0) {
        g = static_cast<float>(dz_res[t * NUM_RES_LOGITS + (o - NUM_GATE_LOGITS)]);
      }
    }
    dps[o].v[i] = g;
    if (o < N) pre[i * N + o] = h;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // dh_pre[j] = r (sum du weight x[j] - slope sum u x[j])
  for (int i = simd; HAS_DU && i < TILE && first + uint(i) < tokens; i += SIMDS) {
    const size_t t = first + uint(i);
    const auto row = x + t * size_t(K);
    float u_dot_u = 0.0f, du_dot_u = 0.0f, du_dot_x[N] = {}, u_dot_x[N] = {};
    for (int c = lane * VEC; c < C; c += 32 * VEC) {
      float d[VEC], u[VEC] = {}, v[VEC];
      mhc::load_floats<VEC>(d, du + t * size_t(C) + c, mhc::is_aligned<VEC>(du));
      if (NORM) {
        float w[VEC];
        mhc::load_floats<VEC>(w, weight + c, mhc::is_aligned<VEC>(weight));
#pragma unroll(STREAM_UNROLL)
        for (int j = 0; j < N; ++j) {
          mhc::load_floats<VEC>(v, row + j * C + c, x_aligned);
          UNROLL_FOR (int e = 0; e < VEC; ++e) u[e] += pre[i * N + j] * v[e];
        }
        UNROLL_FOR (int e = 0; e < VEC; ++e) {
          d[e] *= w[e];
          u_dot_u += u[e] * u[e];
          du_dot_u += d[e] * u[e];
        }
      }
#pragma unroll(STREAM_UNROLL)
      for (int j = 0; j < N; ++j) {
        mhc::load_floats<VEC>(v, row + j * C + c, x_aligned);
        UNROLL_FOR (int e = 0; e < VEC; ++e) {
          du_dot_x[j] += d[e] * v[e];
          if (NORM) u_dot_x[j] += u[e] * v[e];
        }
      }
    }
    float r = 1.0f, slope = 0.0f;
    if (NORM) {
      r = metal::precise::rsqrt(simd_sum(u_dot_u) / static_cast<float>(C) +
                                static_cast<float>(params[mhc::param::EPS]));
      slope = r * r * (simd_sum(du_dot_u) / static_cast<float>(C));
    }
#pragma unroll(STREAM_UNROLL)
    for (int j = 0; j < N; ++j) {
      const float du_x = simd_sum(du_dot_x[j]), u_x = NORM ? simd_sum(u_dot_x[j]) : 0.0f;
      if (lane == 0) dps[j].v[i] *= r * (du_x - slope * u_x);
    }
    if (lane == 0) {
      inverse_rms[i] = r;
      slopes[i] = slope;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int o = tid; o < NUM_LOGITS; o += THREADS) {
    const float a = static_cast<float>(alpha[o < N ? 0 : o < 2 * N ? 1 : 2]);
    float sum = 0.0f, sum_l = 0.0f;
    UNROLL_FOR (int i = 0; i < TILE; ++i) {
      const size_t t = first + uint(i);
      if (t < tokens) {
        const float g = dps[o].v[i];
        sum += g;
        sum_l += g * static_cast<float>(l[t * (NUM_LOGITS + 1) + o]);
        dps[o].v[i] = g * a * static_cast<float>(l[t * (NUM_LOGITS + 1) + NUM_LOGITS]);
        if (channel_begin == 0) dp[t * NUM_LOGITS + o] = dps[o].v[i];
      }
    }
    if (channel_begin == 0) {
      group_partial[o] = (after_first_tile ? group_partial[o] : 0.0f) + sum;
      group_partial[NUM_LOGITS + o] = (after_first_tile ? group_partial[NUM_LOGITS + o] : 0.0f) + sum_l;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = simd; i < TILE; i += SIMDS) {
    const size_t t = first + uint(i);
    float s = 0.0f;
    for (int o = lane; o < NUM_LOGITS && t < tokens; o += 32)
      s += dps[o].v[i] * static_cast<float>(l[t * (NUM_LOGITS + 1) + o]);
    s = simd_sum(s);
    if (lane == 0)
      pull[i] =
          t < tokens ? -s * static_cast<float>(l[t * (NUM_LOGITS + 1) + NUM_LOGITS]) / static_cast<float>(K) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int c = channel_begin + tid * VEC; c < channel_end; c += THREADS * VEC) {
    float d[TILE * VEC] = {}, w[VEC], g_weight[VEC] = {}, v[VEC];
    if (NORM) mhc::load_floats<VEC>(w, weight + c, mhc::is_aligned<VEC>(weight));
    UNROLL_FOR (int i = 0; i < TILE; ++i) {
      const size_t t = first + uint(i);
      if (HAS_DU && t < tokens) {
        mhc::load_floats<VEC>(v, du + t * size_t(C) + c, mhc::is_aligned<VEC>(du));
        UNROLL_FOR (int e = 0; e < VEC; ++e) d[i * VEC + e] = v[e];
        if (NORM) {
          float u[VEC] = {};
#pragma unroll(STREAM_UNROLL)
          for (int j = 0; j < N; ++j) {
            mhc::load_floats<VEC>(v, x + t * size_t(K) + (j * C + c), x_aligned);
            UNROLL_FOR (int e = 0; e < VEC; ++e) u[e] += pre[i * N + j] * v[e];
          }
          UNROLL_FOR (int e = 0; e < VEC; ++e) {
            g_weight[e] += d[i * VEC + e] * u[e] * inverse_rms[i];
            d[i * VEC + e] = inverse_rms[i] * (d[i * VEC + e] * w[e] - u[e] * slopes[i]);
          }
        }
      }
    }
    if (NORM) {
      UNROLL_FOR (int e = 0; e < VEC; ++e)
        group_partial[2 * NUM_LOGITS + c + e] =
            (after_first_tile ? group_partial[2 * NUM_LOGITS + c + e] : 0.0f) + g_weight[e];
    }
    for (int j = 0; j < N; ++j) {
      float acc[TILE * VEC] = {}, p[VEC];
      auto column = phi + (j * C + c);
#pragma unroll 2
      for (int o = 0; o < NUM_LOGITS; ++o, column += K) {
        mhc::load_floats<VEC>(p, column, phi_aligned);
        const mhc::Floats<TILE> g = dps[o];
        UNROLL_FOR (int i = 0; i < TILE; ++i) {
          UNROLL_FOR (int e = 0; e < VEC; ++e) acc[i * VEC + e] += g.v[i] * p[e];
        }
      }
      UNROLL_FOR (int i = 0; i < TILE; ++i) {
        const size_t t = first + uint(i);
        if (t < tokens) {
          const size_t at = t * size_t(K) + size_t(j * C + c);
          mhc::load_floats<VEC>(v, x + at, x_aligned);
          float passed[VEC] = {};
          if (HAS_DX_OUT) mhc::load_floats<VEC>(passed, dx_out + at, mhc::is_aligned<VEC>(dx_out));
          mhc::Pack<T, VEC> packed = {};
          UNROLL_FOR (int e = 0; e < VEC; ++e) {
            const float from_u = HAS_DU ? pre[i * N + j] * d[i * VEC + e] : 0.0f;
            mhc::set_element(packed, e, static_cast<T>(acc[i * VEC + e] + pull[i] * v[e] + from_u + passed[e]));
          }
          mhc::store(dx + at, packed);
        }
      }
    }
  }
  after_first_tile = true;
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

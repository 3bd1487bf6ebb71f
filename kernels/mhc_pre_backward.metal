// mhc_pre_backward: the gradient of mhc_pre but for phi's, from what it saved and the gradient of the logits of h_res.
//
//   dz, dp, pull, dweight, dbias, dalpha and with NORM du' as in mhc_token_backward; dz_res is given; without NORM du' = du
//   dx[j] = sum_o phi[o, j] dp[o] + pull x[j] + h_pre[j] du' (+ dx_out[j], the cotangent of the x passed through)
//
// in   x, phi, bias, alpha, weight, params as in mhc_pre; l [tokens, OUTS + 1], dz_res [tokens, R] float; du [tokens, C] T,
//      or without READ dh_pre [tokens, N] float; dh_post [tokens, N] float; dx_out [tokens, N, C] T
// out  dx [tokens, N, C] T; dp [tokens, OUTS] float; partial [threadgroups / SPLITS, P] float: sums of dz, of dz l, and with
//      NORM dweight, in this order
// own  a threadgroup takes tiles of TILE tokens in turn, a thread VEC neighbours of all streams: phi is read once a tile.
//      dh_pre: a simdgroup takes a token. SPLITS threadgroups share a tile, each a range of channels of dx; for n > 8,
//      where phi is most of the bytes, so that each may make dh_pre and dp anew.
// template  T, N, OUTS, VEC, THREADS, TILE, SPLITS, HEAD, READ, NORM, PASS (dx_out is given)
#include "common.h"
constexpr int SIMDS = THREADS / 32;
constexpr int GATED = HEAD ? N : 2 * N;
constexpr int R = OUTS - GATED;
constexpr int AHEAD = N <= 8 ? N : 1;
threadgroup mhc::Pack<float, TILE> dps[OUTS];  // of an output, for each token: dz, then dp
threadgroup float pre[TILE * N];
threadgroup float inverse[TILE];  // r
threadgroup float slopes[TILE];
threadgroup float pull[TILE];
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const uint tiles = (tokens + TILE - 1) / TILE;
const bool whole = mhc::aligned<VEC>(x);
const bool p_whole = mhc::aligned<VEC>(phi);
const uint owner = threadgroup_position_in_grid.x / SPLITS;
const auto mine = partial + size_t(owner) * size_t(2 * OUTS + (NORM ? C : 0));
const int share = (C / VEC + SPLITS - 1) / SPLITS * VEC;
const int begin = int(threadgroup_position_in_grid.x % SPLITS) * share;
const int end = begin + share < C ? begin + share : C;

bool again = false;
for (uint tile = owner; tile < tiles; tile += threadgroups_per_grid.x / SPLITS) {
  const uint first = tile * TILE;
  for (int q = tid; q < TILE * OUTS; q += THREADS) {
    const int i = q / OUTS, o = q % OUTS;
    const size_t t = first + uint(i);
    float g = 0.0f, h = 0.0f;
    if (t < tokens) {
      if (o < GATED) {
        const float z = static_cast<float>(alpha[o < N ? 0 : 1]) * static_cast<float>(l[t * (OUTS + 1) + o]) + static_cast<float>(bias[o]);
        const float s = mhc::sigmoid(z);
        g = s * mhc::sigmoid(-z);
        h = s + static_cast<float>(params[0]);
        if (!HEAD && o >= N) g *= static_cast<float>(params[1]) * static_cast<float>(dh_post[t * N + (o - N)]);
        else if (!READ) g *= static_cast<float>(dh_pre[t * N + o]);
      } else if (R > 0) {
        g = static_cast<float>(dz_res[t * R + (o - GATED)]);
      }
    }
    dps[o].v[i] = g;
    if (o < N) pre[i * N + o] = h;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int i = simd; READ && i < TILE && first + uint(i) < tokens; i += SIMDS) {
    const size_t t = first + uint(i);
    const auto row = x + t * size_t(K);
    float squared = 0.0f, both = 0.0f, g_pre[N] = {}, g_norm[N] = {};
    for (int c = lane * VEC; c < C; c += 32 * VEC) {
      float d[VEC], u[VEC] = {}, v[VEC];
      mhc::load_floats<VEC>(d, du + t * size_t(C) + c, mhc::aligned<VEC>(du));
      if (NORM) {
        float w[VEC];
        mhc::load_floats<VEC>(w, weight + c, mhc::aligned<VEC>(weight));
#pragma unroll AHEAD
        for (int j = 0; j < N; ++j) {
          mhc::load_floats<VEC>(v, row + j * C + c, whole);
          UNROLL for (int e = 0; e < VEC; ++e) u[e] += pre[i * N + j] * v[e];
        }
        UNROLL for (int e = 0; e < VEC; ++e) {
          d[e] *= w[e];
          squared += u[e] * u[e];
          both += d[e] * u[e];
        }
      }
#pragma unroll AHEAD
      for (int j = 0; j < N; ++j) {
        mhc::load_floats<VEC>(v, row + j * C + c, whole);
        UNROLL for (int e = 0; e < VEC; ++e) {
          g_pre[j] += d[e] * v[e];
          if (NORM) g_norm[j] += u[e] * v[e];
        }
      }
    }
    float r = 1.0f, slope = 0.0f;
    if (NORM) {
      r = metal::precise::rsqrt(simd_sum(squared) / static_cast<float>(C) + static_cast<float>(params[4]));
      slope = r * r * (simd_sum(both) / static_cast<float>(C));
    }
#pragma unroll AHEAD
    for (int j = 0; j < N; ++j) {
      const float through = simd_sum(g_pre[j]), norm = NORM ? simd_sum(g_norm[j]) : 0.0f;
      if (lane == 0) dps[j].v[i] *= r * (through - slope * norm);
    }
    if (lane == 0) {
      inverse[i] = r;
      slopes[i] = slope;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int o = tid; o < OUTS; o += THREADS) {
    const float a = static_cast<float>(alpha[o < N ? 0 : o < 2 * N ? 1 : 2]);
    float sum = 0.0f, sum_l = 0.0f;
    UNROLL for (int i = 0; i < TILE; ++i) {
      const size_t t = first + uint(i);
      if (t < tokens) {
        const float g = dps[o].v[i];
        sum += g;
        sum_l += g * static_cast<float>(l[t * (OUTS + 1) + o]);
        dps[o].v[i] = g * a * static_cast<float>(l[t * (OUTS + 1) + OUTS]);
        if (begin == 0) dp[t * OUTS + o] = dps[o].v[i];
      }
    }
    if (begin == 0) {
      mine[o] = (again ? mine[o] : 0.0f) + sum;
      mine[OUTS + o] = (again ? mine[OUTS + o] : 0.0f) + sum_l;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = simd; i < TILE; i += SIMDS) {
    const size_t t = first + uint(i);
    float s = 0.0f;
    for (int o = lane; o < OUTS && t < tokens; o += 32) s += dps[o].v[i] * static_cast<float>(l[t * (OUTS + 1) + o]);
    s = simd_sum(s);
    if (lane == 0) pull[i] = t < tokens ? -s * static_cast<float>(l[t * (OUTS + 1) + OUTS]) / static_cast<float>(K) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int c = begin + tid * VEC; c < end; c += THREADS * VEC) {
    float d[TILE * VEC] = {}, w[VEC], g_weight[VEC] = {}, v[VEC];
    if (NORM) mhc::load_floats<VEC>(w, weight + c, mhc::aligned<VEC>(weight));
    UNROLL for (int i = 0; i < TILE; ++i) {
      const size_t t = first + uint(i);
      if (READ && t < tokens) {
        mhc::load_floats<VEC>(v, du + t * size_t(C) + c, mhc::aligned<VEC>(du));
        UNROLL for (int e = 0; e < VEC; ++e) d[i * VEC + e] = v[e];
        if (NORM) {
          float u[VEC] = {};
#pragma unroll AHEAD
          for (int j = 0; j < N; ++j) {
            mhc::load_floats<VEC>(v, x + t * size_t(K) + (j * C + c), whole);
            UNROLL for (int e = 0; e < VEC; ++e) u[e] += pre[i * N + j] * v[e];
          }
          UNROLL for (int e = 0; e < VEC; ++e) {
            g_weight[e] += d[i * VEC + e] * u[e] * inverse[i];
            d[i * VEC + e] = inverse[i] * (d[i * VEC + e] * w[e] - u[e] * slopes[i]);
          }
        }
      }
    }
    if (NORM) {
      UNROLL for (int e = 0; e < VEC; ++e) mine[2 * OUTS + c + e] = (again ? mine[2 * OUTS + c + e] : 0.0f) + g_weight[e];
    }
    for (int j = 0; j < N; ++j) {
      float acc[TILE * VEC] = {}, p[VEC];
      auto column = phi + (j * C + c);
#pragma unroll 2
      for (int o = 0; o < OUTS; ++o, column += K) {
        mhc::load_floats<VEC>(p, column, p_whole);
        const mhc::Pack<float, TILE> g = dps[o];
        UNROLL for (int i = 0; i < TILE; ++i) {
          UNROLL for (int e = 0; e < VEC; ++e) acc[i * VEC + e] += g.v[i] * p[e];
        }
      }
      UNROLL for (int i = 0; i < TILE; ++i) {
        const size_t t = first + uint(i);
        if (t < tokens) {
          const size_t at = t * size_t(K) + size_t(j * C + c);
          mhc::load_floats<VEC>(v, x + at, whole);
          float more[VEC] = {};
          if (PASS) mhc::load_floats<VEC>(more, dx_out + at, mhc::aligned<VEC>(dx_out));
          mhc::Pack<T, VEC> packed;
          UNROLL for (int e = 0; e < VEC; ++e) {
            const float read = READ ? pre[i * N + j] * d[i * VEC + e] : 0.0f;
            packed.v[e] = static_cast<T>(acc[i * VEC + e] + pull[i] * v[e] + read + more[e]);
          }
          *(device mhc::Pack<T, VEC>*)(dx + at) = packed;
        }
      }
    }
  }
  again = true;
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

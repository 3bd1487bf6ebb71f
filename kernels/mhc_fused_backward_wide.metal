// mhc_fused_backward_wide: the gradient of mhc_fused (NORM) and of stream_mix_add (without NORM, where y is given), for
// N > 8, whose N * N sums no thread can hold. x and dout are read twice: for the sums of the norm, and tile by tile.
//
//   u = sum_j h_pre[j] x[j];   r = rsqrt(mean(u**2) + eps);   y = u * r * weight, or y itself without NORM
//   dy = sum_i h_post[i] dout[i]   (dy = dout without MIX)
//   du = r * (dy * weight - u * r**2 * mean(dy * weight * u));   dweight = sum_t dy * u * r
//   dx[j] = sum_i h_res[i, j] dout[i] + h_pre[j] du
//   dh_pre[j] = sum du x[j];   dh_post[i] = sum dout[i] y;   dh_res[i, j] = sum dout[i] x[j]
//
// in   x [tokens, N, C] T, dout [tokens, N, C] T, without MIX [tokens, C] T;
//      H_pre [N] (with NORM), H_post [N] or [tokens, N], H_res [N, N] or [tokens, N, N] (both with MIX), weight [C]
//      (with NORM) any float; H_res is always h_res, never logits; y [tokens, C] T (without NORM);
//      params [6 or 8] float, by mhc::param: EPS; with GATES PRE_EPS, POST_SCALE, POST_EPS
// out  dx [tokens, N, C] T, dy [tokens, C] T (without NORM),
//      partial [threadgroups, P] float: the sums of dh_pre, dh_post, dh_res, dweight over this threadgroup's tokens, in
//      this order; a coefficient that is given per token has no column there, but its gradient is dh_post [tokens, N]
//      float or dh_res [tokens, N, N] float
// GATES: H_pre and H_post are logits, h_pre = sigmoid(H_pre) + pre_eps and h_post = post_scale * sigmoid(H_post) +
//      post_eps; the sums are of dh_pre and dh_post nevertheless, and sum_partials makes the logits' gradients of them.
// owners  A threadgroup takes tokens in turn and, of each, TILE_CHANNELS channels of all streams at a time in
//      threadgroup memory. A simdgroup makes rows of dx; a thread sums 4 x 4 blocks of dh_res, over every
//      CHANNEL_SPLITS-th channel where there are fewer blocks than threads.
// template  T, N, THREADS, MIX, NORM, GATES, POST_PER_TOKEN, RES_PER_TOKEN
// grid  any number of threadgroups
#include "common.h"
constexpr int SIMDS = THREADS / 32;
constexpr int TILE_CHANNELS = 32, PITCH = TILE_CHANNELS + 1;
constexpr int OUT_STREAMS = MIX ? N : 1;
constexpr int POST_AT = NORM ? N : 0;
constexpr int RES_AT = POST_AT + (POST_PER_TOKEN || !MIX ? 0 : N);
constexpr int WEIGHT_AT = RES_AT + (RES_PER_TOKEN || !MIX ? 0 : N * N);
constexpr int EDGE = (N + 3) / 4, BLOCKS = EDGE * EDGE;
constexpr int CHANNEL_SPLITS = THREADS < BLOCKS || N > 48         ? 1
                               : THREADS / BLOCKS < TILE_CHANNELS ? THREADS / BLOCKS
                                                                  : TILE_CHANNELS;
constexpr int BLOCKS_PER_THREAD = (BLOCKS + THREADS - 1) / THREADS;
constexpr int ROWS_PER_SIMDGROUP =
    (N + SIMDS - 1) / SIMDS;  // a simdgroup sums so many elements of dh_pre and of dh_post
constexpr int ROWS_AT_ONCE =
    ROWS_PER_SIMDGROUP < 8 ? ROWS_PER_SIMDGROUP : 8;  // a simdgroup makes so many rows of dx at once
constexpr bool H_RES_IN_THREADGROUP = MIX && N <= 32;
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float x_tile[N * PITCH];
threadgroup float dout_tile[OUT_STREAMS * PITCH];
threadgroup float y_tile[TILE_CHANNELS];
threadgroup float du_tile[TILE_CHANNELS];
threadgroup float sums[2 * SIMDS];
threadgroup float split_sums[CHANNEL_SPLITS > 1 ? N * N : 1];
threadgroup float mix[H_RES_IN_THREADGROUP ? N * N : 1];  // mix[i * N + j] = h_res[i, j]
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int C = x_shape[2];
const uint tokens = x_shape[0];
const auto group_partial = partial + size_t(threadgroup_position_in_grid.x) * size_t(WEIGHT_AT + (NORM ? C : 0));
float g_res[BLOCKS_PER_THREAD * 16] = {}, g_pre[ROWS_PER_SIMDGROUP] = {}, g_post[ROWS_PER_SIMDGROUP] = {};

if constexpr (NORM) mhc::load_gates<N, THREADS, GATES, false>(H_pre, pre, params, tid);
if constexpr (MIX && !POST_PER_TOKEN) mhc::load_gates<N, THREADS, GATES, true>(H_post, post, params, tid);
if constexpr (H_RES_IN_THREADGROUP && !RES_PER_TOKEN) mhc::load_mix<N, THREADS, false>(H_res, mix, tid);
threadgroup_barrier(mem_flags::mem_threadgroup);

bool is_first_token = true;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const auto row = x + size_t(t) * size_t(N * C);
  const auto dout_row = dout + size_t(t) * size_t(OUT_STREAMS * C);
  const auto m = H_res + (RES_PER_TOKEN ? size_t(t) * (N * N) : 0);
  if (POST_PER_TOKEN || (RES_PER_TOKEN && H_RES_IN_THREADGROUP)) {
    if (POST_PER_TOKEN) mhc::load_gates<N, THREADS, false, true>(H_post + size_t(t) * N, post, params, tid);
    if (RES_PER_TOKEN && H_RES_IN_THREADGROUP) mhc::load_mix<N, THREADS, false>(m, mix, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // dots = sum(u ** 2), sum(dy * weight * u)
  float r = 0.0f, slope = 0.0f;
  if (NORM) {
    float dots[2] = {};
    for (int c = tid; c < C; c += THREADS) {
      float u = 0.0f, d = 0.0f;
#pragma unroll 4
      for (int j = 0; j < N; ++j) u += pre[j] * static_cast<float>(row[j * C + c]);
#pragma unroll 4
      for (int i = 0; i < OUT_STREAMS; ++i) d += (MIX ? post[i] : 1.0f) * static_cast<float>(dout_row[i * C + c]);
      dots[0] += u * u;
      dots[1] += d * u * static_cast<float>(weight[c]);
    }
    mhc::sum_everywhere<SIMDS>(dots, sums, 0, uint(simd), uint(lane));
    r = metal::precise::rsqrt(dots[0] / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));
    slope = r * r * (dots[1] / static_cast<float>(C));
  }

  for (int c0 = 0; c0 < C; c0 += TILE_CHANNELS) {
    float w = 0.0f, g_weight = 0.0f;
    if (NORM && tid < TILE_CHANNELS && c0 + tid < C) {
      w = static_cast<float>(weight[c0 + tid]);
      if (!is_first_token) g_weight = group_partial[WEIGHT_AT + c0 + tid];
    }
    for (int k = tid; k < N * TILE_CHANNELS; k += THREADS) {
      const int j = k / TILE_CHANNELS, c = k % TILE_CHANNELS;
      x_tile[j * PITCH + c] = c0 + c < C ? static_cast<float>(row[j * C + c0 + c]) : 0.0f;
      if (j < OUT_STREAMS) dout_tile[j * PITCH + c] = c0 + c < C ? static_cast<float>(dout_row[j * C + c0 + c]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid < TILE_CHANNELS) {
      const int c = c0 + tid;
      float u = 0.0f, d = 0.0f, out = 0.0f, du = 0.0f;
      for (int i = 0; i < OUT_STREAMS; ++i) d += (MIX ? post[i] : 1.0f) * dout_tile[i * PITCH + tid];
      if (c < C) {
        if (NORM) {
          for (int j = 0; j < N; ++j) u += pre[j] * x_tile[j * PITCH + tid];
          group_partial[WEIGHT_AT + c] = g_weight + d * (u * r);
          du = r * (d * w - u * slope);
          out = u * r * w;
        } else {
          out = static_cast<float>(y[size_t(t) * size_t(C) + c]);
          dy[size_t(t) * size_t(C) + c] = static_cast<T>(d);
        }
      }
      y_tile[tid] = out;
      du_tile[tid] = du;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // dx[j] = sum_i h_res[i, j] dout[i] + h_pre[j] du
    for (int j0 = simd * ROWS_AT_ONCE; j0 < N; j0 += SIMDS * ROWS_AT_ONCE) {
      float a[ROWS_AT_ONCE];
      UNROLL_FOR (int q = 0; q < ROWS_AT_ONCE; ++q)
        a[q] = NORM && j0 + q < N ? pre[j0 + q < N ? j0 + q : 0] * du_tile[lane] : 0.0f;
      if (MIX) {
#pragma unroll 4
        for (int i = 0; i < OUT_STREAMS; ++i) {
          const float d = dout_tile[i * PITCH + lane];
          UNROLL_FOR (int q = 0; q < ROWS_AT_ONCE; ++q) {
            const int at = i * N + (j0 + q < N ? j0 + q : 0);
            a[q] += (H_RES_IN_THREADGROUP ? mix[H_RES_IN_THREADGROUP ? at : 0] : static_cast<float>(m[at])) * d;
          }
        }
      }
      UNROLL_FOR (int q = 0; q < ROWS_AT_ONCE; ++q) {
        if (j0 + q < N && c0 + lane < C)
          dx[size_t(t) * size_t(N * C) + (j0 + q) * C + c0 + lane] = static_cast<T>(a[q]);
      }
    }

    // dh_res[i, j] += dout[i] x[j];   dh_pre[j] += du x[j];   dh_post[i] += dout[i] y
    if (MIX) {
      UNROLL_FOR (int b = 0; b < BLOCKS_PER_THREAD; ++b) {
        const int id = tid + b * THREADS;
        const int i0 = (id % BLOCKS) / EDGE * 4, j0 = id % EDGE * 4;
        if (id < BLOCKS * CHANNEL_SPLITS) {
          for (int c = id / BLOCKS; c < TILE_CHANNELS; c += CHANNEL_SPLITS) {
            float ds[4], xs[4];
            UNROLL_FOR (int q = 0; q < 4; ++q) {
              ds[q] = dout_tile[(i0 + q < OUT_STREAMS ? i0 + q : 0) * PITCH + c];
              xs[q] = x_tile[(j0 + q < N ? j0 + q : 0) * PITCH + c];
            }
            UNROLL_FOR (int q = 0; q < 16; ++q) g_res[b * 16 + q] += ds[q / 4] * xs[q % 4];
          }
        }
      }
    }
    UNROLL_FOR (int b = 0; b < ROWS_PER_SIMDGROUP; ++b) {
      const int k = simd + b * SIMDS;
      if (k < N) {
        if (NORM) g_pre[b] += du_tile[lane] * x_tile[k * PITCH + lane];
        if (MIX) g_post[b] += y_tile[lane] * dout_tile[(MIX ? k : 0) * PITCH + lane];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  is_first_token = false;

  const bool last = t + threadgroups_per_grid.x >= tokens;
  UNROLL_FOR (int b = 0; b < ROWS_PER_SIMDGROUP; ++b) {
    const int k = simd + b * SIMDS;
    if (NORM && last) {
      const float sum = simd_sum(g_pre[b]);
      if (lane == 0 && k < N) group_partial[k] = sum;
    }
    if (MIX && (POST_PER_TOKEN || last)) {
      const float sum = simd_sum(g_post[b]);
      if (lane == 0 && k < N) {
        if (POST_PER_TOKEN) dh_post[size_t(t) * N + k] = sum;
        else group_partial[POST_AT + k] = sum;
      }
      g_post[b] = 0.0f;
    }
  }
  if (MIX && (RES_PER_TOKEN || last)) {
    const auto out = RES_PER_TOKEN ? dh_res + size_t(t) * (N * N) : group_partial + RES_AT;
    for (int s = 0; s < CHANNEL_SPLITS; ++s) {  // the splits are added one after the other, in a fixed order
      UNROLL_FOR (int b = 0; b < BLOCKS_PER_THREAD; ++b) {
        const int id = tid + b * THREADS;
        const int i0 = (id % BLOCKS) / EDGE * 4, j0 = id % EDGE * 4;
        if (id / BLOCKS == s) {
          UNROLL_FOR (int q = 0; q < 16; ++q) {
            const int i = i0 + q / 4, j = j0 + q % 4;
            if (i < N && j < N) {
              const float sum = g_res[b * 16 + q] + (s == 0 ? 0.0f : split_sums[i * N + j]);
              if (s == CHANNEL_SPLITS - 1) out[i * N + j] = sum;
              else split_sums[i * N + j] = sum;
            }
            g_res[b * 16 + q] = 0.0f;
          }
        }
      }
      if (CHANNEL_SPLITS > 1) threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}

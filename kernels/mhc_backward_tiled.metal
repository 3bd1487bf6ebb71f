// mhc_backward_tiled: mhc_backward for N > 8, whose N * N sums no thread can hold; x and dout are read twice,
// once for the sums of the RMSNorm and once tile by tile.
//
// in, out  as mhc_backward; H_res is never logits here
// own  a tile is TILE channels of all streams in threadgroup memory: a simdgroup takes rows of dx, a thread takes
//      4 x 4 blocks of dh_res, for every SLICES-th channel where blocks are few
// template  T, N, THREADS, MIX, NORM, GATES, POST_PER_TOKEN, RES_PER_TOKEN
#include "common.h"
constexpr int SIMDS = THREADS / 32;
constexpr int TILE = 32, PITCH = TILE + 1;
constexpr int R = MIX ? N : 1;
constexpr int POST_AT = NORM ? N : 0;
constexpr int RES_AT = POST_AT + (POST_PER_TOKEN || !MIX ? 0 : N);
constexpr int WEIGHT_AT = RES_AT + (RES_PER_TOKEN || !MIX ? 0 : N * N);
constexpr int EDGE = (N + 3) / 4, BLOCKS = EDGE * EDGE;
constexpr int SLICES = THREADS < BLOCKS || N > 48 ? 1 : THREADS / BLOCKS < TILE ? THREADS / BLOCKS : TILE;
constexpr int MINE = (BLOCKS + THREADS - 1) / THREADS;  // blocks of one thread
constexpr int LINES = (N + SIMDS - 1) / SIMDS;          // rows of dh_pre and of dh_post of one simdgroup
constexpr int ROWS = LINES < 8 ? LINES : 8;             // rows of dx that a simdgroup makes at once
constexpr bool NEAR = MIX && N <= 32;                   // whether h_res fits in threadgroup memory
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float xt[N * PITCH];
threadgroup float dt[R * PITCH];
threadgroup float yt[TILE];
threadgroup float dut[TILE];
threadgroup float sums[2 * SIMDS];
threadgroup float slices[SLICES > 1 ? N * N : 1];
threadgroup float mix[NEAR ? N * N : 1];  // h_res
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int C = x_shape[2];
const uint tokens = x_shape[0];
const auto mine = partial + size_t(threadgroup_position_in_grid.x) * size_t(WEIGHT_AT + (NORM ? C : 0));
float g_res[MINE * 16] = {}, g_pre[LINES] = {}, g_post[LINES] = {};

if constexpr (NORM) mhc::load_gates<N, THREADS, GATES, false>(H_pre, pre, params, tid);
if constexpr (MIX && !POST_PER_TOKEN) mhc::load_gates<N, THREADS, GATES, true>(H_post, post, params, tid);
if constexpr (NEAR && !RES_PER_TOKEN) mhc::load_mix<N, THREADS, false>(H_res, mix, tid);
threadgroup_barrier(mem_flags::mem_threadgroup);

bool first = true;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const auto row = x + size_t(t) * size_t(N * C);
  const auto drow = dout + size_t(t) * size_t(R * C);
  const auto m = H_res + (RES_PER_TOKEN ? size_t(t) * (N * N) : 0);
  if (POST_PER_TOKEN || (RES_PER_TOKEN && NEAR)) {
    if (POST_PER_TOKEN) mhc::load_gates<N, THREADS, false, true>(H_post + size_t(t) * N, post, params, tid);
    if (RES_PER_TOKEN && NEAR) mhc::load_mix<N, THREADS, false>(m, mix, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // both = sum(u ** 2), sum(dy * weight * u)
  float r = 0.0f, slope = 0.0f;
  if (NORM) {
    float both[2] = {};
    for (int c = tid; c < C; c += THREADS) {
      float u = 0.0f, d = 0.0f;
#pragma unroll 4
      for (int j = 0; j < N; ++j) u += pre[j] * static_cast<float>(row[j * C + c]);
#pragma unroll 4
      for (int i = 0; i < R; ++i) d += (MIX ? post[i] : 1.0f) * static_cast<float>(drow[i * C + c]);
      both[0] += u * u;
      both[1] += d * u * static_cast<float>(weight[c]);
    }
    mhc::sum_everywhere<SIMDS>(both, sums, 0, uint(simd), uint(lane));
    r = metal::precise::rsqrt(both[0] / static_cast<float>(C) + static_cast<float>(params[0]));
    slope = r * r * (both[1] / static_cast<float>(C));
  }

  for (int c0 = 0; c0 < C; c0 += TILE) {
    float w = 0.0f, g_weight = 0.0f;
    if (NORM && tid < TILE && c0 + tid < C) {
      w = static_cast<float>(weight[c0 + tid]);
      if (!first) g_weight = mine[WEIGHT_AT + c0 + tid];
    }
    for (int k = tid; k < N * TILE; k += THREADS) {
      const int j = k / TILE, c = k % TILE;
      xt[j * PITCH + c] = c0 + c < C ? static_cast<float>(row[j * C + c0 + c]) : 0.0f;
      if (j < R) dt[j * PITCH + c] = c0 + c < C ? static_cast<float>(drow[j * C + c0 + c]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid < TILE) {
      const int c = c0 + tid;
      float u = 0.0f, d = 0.0f, out = 0.0f, du = 0.0f;
      for (int i = 0; i < R; ++i) d += (MIX ? post[i] : 1.0f) * dt[i * PITCH + tid];
      if (c < C) {
        if (NORM) {
          for (int j = 0; j < N; ++j) u += pre[j] * xt[j * PITCH + tid];
          mine[WEIGHT_AT + c] = g_weight + d * (u * r);
          du = r * (d * w - u * slope);
          out = u * r * w;
        } else {
          out = static_cast<float>(y[size_t(t) * size_t(C) + c]);
          dy[size_t(t) * size_t(C) + c] = static_cast<T>(d);
        }
      }
      yt[tid] = out;
      dut[tid] = du;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // dx[j] = sum_i h_res[i, j] dout[i] + h_pre[j] du
    for (int j0 = simd * ROWS; j0 < N; j0 += SIMDS * ROWS) {
      float a[ROWS];
      UNROLL for (int q = 0; q < ROWS; ++q) a[q] = NORM && j0 + q < N ? pre[j0 + q < N ? j0 + q : 0] * dut[lane] : 0.0f;
      if (MIX) {
#pragma unroll 4
        for (int i = 0; i < R; ++i) {
          const float d = dt[i * PITCH + lane];
          UNROLL for (int q = 0; q < ROWS; ++q) {
            const int at = i * N + (j0 + q < N ? j0 + q : 0);
            a[q] += (NEAR ? mix[NEAR ? at : 0] : static_cast<float>(m[at])) * d;
          }
        }
      }
      UNROLL for (int q = 0; q < ROWS; ++q) {
        if (j0 + q < N && c0 + lane < C)
          dx[size_t(t) * size_t(N * C) + (j0 + q) * C + c0 + lane] = static_cast<T>(a[q]);
      }
    }

    // dh_res[i, j] += dout[i] x[j];   dh_pre[j] += du x[j];   dh_post[i] += dout[i] y
    if (MIX) {
      UNROLL for (int b = 0; b < MINE; ++b) {
        const int id = tid + b * THREADS;
        const int i0 = (id % BLOCKS) / EDGE * 4, j0 = id % EDGE * 4;
        if (id < BLOCKS * SLICES) {
          for (int c = id / BLOCKS; c < TILE; c += SLICES) {
            float ds[4], xs[4];
            UNROLL for (int q = 0; q < 4; ++q) {
              ds[q] = dt[(i0 + q < R ? i0 + q : 0) * PITCH + c];
              xs[q] = xt[(j0 + q < N ? j0 + q : 0) * PITCH + c];
            }
            UNROLL for (int q = 0; q < 16; ++q) g_res[b * 16 + q] += ds[q / 4] * xs[q % 4];
          }
        }
      }
    }
    UNROLL for (int b = 0; b < LINES; ++b) {
      const int k = simd + b * SIMDS;
      if (k < N) {
        if (NORM) g_pre[b] += dut[lane] * xt[k * PITCH + lane];
        if (MIX) g_post[b] += yt[lane] * dt[(MIX ? k : 0) * PITCH + lane];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  first = false;

  const bool last = t + threadgroups_per_grid.x >= tokens;
  UNROLL for (int b = 0; b < LINES; ++b) {
    const int k = simd + b * SIMDS;
    if (NORM && last) {
      const float sum = simd_sum(g_pre[b]);
      if (lane == 0 && k < N) mine[k] = sum;
    }
    if (MIX && (POST_PER_TOKEN || last)) {
      const float sum = simd_sum(g_post[b]);
      if (lane == 0 && k < N) {
        if (POST_PER_TOKEN) dh_post[size_t(t) * N + k] = sum;
        else mine[POST_AT + k] = sum;
      }
      g_post[b] = 0.0f;
    }
  }
  if (MIX && (RES_PER_TOKEN || last)) {
    const auto out = RES_PER_TOKEN ? dh_res + size_t(t) * (N * N) : mine + RES_AT;
    for (int s = 0; s < SLICES; ++s) {  // one slice after the other, so the order of the sum is fixed
      UNROLL for (int b = 0; b < MINE; ++b) {
        const int id = tid + b * THREADS;
        const int i0 = (id % BLOCKS) / EDGE * 4, j0 = id % EDGE * 4;
        if (id / BLOCKS == s) {
          UNROLL for (int q = 0; q < 16; ++q) {
            const int i = i0 + q / 4, j = j0 + q % 4;
            if (i < N && j < N) {
              const float sum = g_res[b * 16 + q] + (s == 0 ? 0.0f : slices[i * N + j]);
              if (s == SLICES - 1) out[i * N + j] = sum;
              else slices[i * N + j] = sum;
            }
            g_res[b * 16 + q] = 0.0f;
          }
        }
      }
      if (SLICES > 1) threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}

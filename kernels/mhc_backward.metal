// mhc_backward: the gradient of mhc_fused (NORM) and of stream_mix_add (y given), for N <= 8.
//
//   dy = sum_i h_post[i] dout[i]  (dout itself unless MIX);   r = rsqrt(mean(u**2) + eps)
//   du = r * (dy * weight - u * r**2 * mean(dy * weight * u));   dweight = sum_t dy * u * r
//   dx[j] = sum_i h_res[i, j] dout[i] + h_pre[j] du
//   dh_pre[j] = sum du x[j];   dh_post[i] = sum dout[i] y;   dh_res[i, j] = sum dout[i] x[j]
//
// in   x [tokens, N, C] T, y [tokens, C] T, dout [tokens, N, C] T ([tokens, C] unless MIX),
//      H_pre, H_post, H_res, weight, params as in mhc_fused; with NORM y is not read, without it H_pre and weight are not
// out  dx [tokens, N, C] T, dy [tokens, C] T (without NORM),
//      partial [threadgroups, P] float: this threadgroup's sums of dh_pre, dh_post, dh_res, dweight, in this order;
//      a coefficient given per token has no column there but dh_post [tokens, N], dh_res [tokens, N, N] float
// own  as mhc_fused
// CACHED: a token stays in registers between the sums and dx; otherwise it is read twice
// template  T, N, VEC, THREADS, PASSES, CACHED, MIX, NORM, GATES, SINKHORN, ITERS, START, COLUMNS, OUT_COLUMNS,
//      POST_PER_TOKEN, RES_PER_TOKEN
#include "sinkhorn.h"
constexpr int SIMDS = THREADS / 32;
constexpr int R = MIX ? N : 1;
constexpr int KEPT = CACHED ? PASSES : 1;
constexpr int STEP = VEC == 1 || (N > 4 && NORM) ? 1 : 2;  // channels worked on at once: chosen by registers
constexpr bool FAR = CACHED && N > 4 && PASSES * VEC * THREADS <= 4096;  // dweight in threadgroup memory
constexpr int POST_AT = NORM ? N : 0;
constexpr int RES_AT = POST_AT + (POST_PER_TOKEN || !MIX ? 0 : N);
constexpr int WEIGHT_AT = RES_AT + (RES_PER_TOKEN || !MIX ? 0 : N * N);
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float mix[N * N];  // h_res
threadgroup float sums[4 * SIMDS];
threadgroup float scratch[N * N * SIMDS];
threadgroup float far_weight[FAR ? PASSES * VEC * THREADS : 1];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];
const uint tokens = x_shape[0];

if constexpr (NORM) mhc::load_gates<N, THREADS, GATES, false>(H_pre, pre, params, tid);
if constexpr (MIX && !POST_PER_TOKEN) mhc::load_gates<N, THREADS, GATES, true>(H_post, post, params, tid);
if constexpr (SINKHORN) {
  if (simdgroup_index_in_threadgroup == 0)
    mhc::project<N, START, COLUMNS, OUT_COLUMNS, ITERS>(H_res, mix, thread_index_in_simdgroup < mhc::lanes(N), params[4], thread_index_in_simdgroup);
} else if constexpr (MIX && !RES_PER_TOKEN) {
  mhc::load_mix<N, THREADS, false>(H_res, mix, tid);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const bool whole = mhc::aligned<VEC>(x) && mhc::aligned<VEC>(dout);
const bool w_whole = NORM && mhc::aligned<STEP>(weight);
const bool y_whole = !NORM && mhc::aligned<VEC>(y);
const auto mine = partial + size_t(threadgroup_position_in_grid.x) * size_t(WEIGHT_AT + (NORM ? C : 0));
float g_pre[N] = {}, g_post[N] = {}, g_res[N * N] = {}, g_weight[FAR ? 1 : KEPT * VEC] = {};
for (int k = 0; k < PASSES * VEC && FAR; ++k) far_weight[k * THREADS + int(tid)] = 0.0f;
mhc::Pack<T, VEC> xv[KEPT * N], dv[KEPT * R];

int turn = 0;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const auto row = x + size_t(t) * size_t(N * C);
  const auto drow = dout + size_t(t) * size_t(R * C);
  if (POST_PER_TOKEN || RES_PER_TOKEN) {  // no one reads the last token's any more: group_sum ended with a barrier
    if (POST_PER_TOKEN) mhc::load_gates<N, THREADS, false, true>(H_post + size_t(t) * N, post, params, tid);
    if (RES_PER_TOKEN) mhc::load_mix<N, THREADS, false>(H_res + size_t(t) * (N * N), mix, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // both = sum(u ** 2), sum(dy * weight * u)
  float r = 0.0f, slope = 0.0f;
  if (NORM) {
    float both[2] = {};
#pragma unroll KEPT
    for (int k = 0; k < PASSES; ++k) {
      const int c = (k * THREADS + int(tid)) * VEC, at = CACHED ? k : 0;
      if (c < C) {
        float u[VEC] = {}, d[VEC] = {}, w[STEP];
        mhc::load_streams<N>(xv + at * N, row, C, c, whole);
        mhc::load_streams<R>(dv + at * R, drow, C, c, whole);
        UNROLL for (int e = 0; e < VEC; ++e) {
          if (e % STEP == 0) mhc::load_floats<STEP>(w, weight + c + e, w_whole);
          UNROLL for (int j = 0; j < N; ++j) u[e] += pre[j] * static_cast<float>(xv[at * N + j].v[e]);
          UNROLL for (int i = 0; i < R; ++i) d[e] += (MIX ? post[i] : 1.0f) * static_cast<float>(dv[at * R + i].v[e]);
          both[0] += u[e] * u[e];
          both[1] += d[e] * u[e] * w[e % STEP];
        }
      }
    }
    mhc::sum_everywhere<SIMDS>(both, sums, turn, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    turn ^= 1;
    r = metal::precise::rsqrt(both[0] / static_cast<float>(C) + static_cast<float>(params[0]));
    slope = r * r * (both[1] / static_cast<float>(C));
  }

#pragma unroll KEPT
  for (int k = 0; k < PASSES; ++k) {
    const int c = (k * THREADS + int(tid)) * VEC, at = CACHED ? k : 0;
    if (c < C) {
      mhc::Pack<T, VEC> yv;  // y in, dy out
      if (!NORM) yv = mhc::load<T, VEC>(y + size_t(t) * size_t(C) + c, y_whole);
      if (!NORM || !CACHED) {
        mhc::load_streams<N>(xv + at * N, row, C, c, whole);
        mhc::load_streams<R>(dv + at * R, drow, C, c, whole);
      }
      UNROLL for (int e = 0; e < VEC; e += STEP) {
        if (NORM) {
          UNROLL for (int j = 0; j < N; ++j) { STAY_PACKED(xv[at * N + j]); }
          UNROLL for (int i = 0; i < R; ++i) { STAY_PACKED(dv[at * R + i]); }
        }
        float ds[R * STEP], u[STEP] = {}, d[STEP] = {}, du[STEP] = {}, out[STEP], w[STEP];
        if (NORM) mhc::load_floats<STEP>(w, weight + c + e, w_whole);
        UNROLL for (int q = 0; q < STEP; ++q) {
          UNROLL for (int i = 0; i < R; ++i) {
            ds[i * STEP + q] = static_cast<float>(dv[at * R + i].v[e + q]);
            d[q] += (MIX ? post[i] : 1.0f) * ds[i * STEP + q];
          }
          if (NORM) {
            UNROLL for (int j = 0; j < N; ++j) u[q] += pre[j] * static_cast<float>(xv[at * N + j].v[e + q]);
            out[q] = u[q] * r;
            const int own = WEIGHT_AT + c + e + q;  // dweight sums here where the token is read twice
            if (FAR) far_weight[(at * VEC + e + q) * THREADS + int(tid)] += d[q] * out[q];
            else if (CACHED) g_weight[FAR ? 0 : at * VEC + e + q] += d[q] * out[q];
            else mine[own] = (t < threadgroups_per_grid.x ? 0.0f : mine[own]) + d[q] * out[q];
            du[q] = r * (d[q] * w[q] - u[q] * slope);
            out[q] *= w[q];
          } else {
            out[q] = static_cast<float>(yv.v[e + q]);
            yv.v[e + q] = static_cast<T>(d[q]);
          }
        }
        if (MIX) {
          UNROLL for (int i = 0; i < R; ++i) {
            UNROLL for (int q = 0; q < STEP; ++q) g_post[i] += ds[i * STEP + q] * out[q];
          }
        }
        UNROLL for (int j = 0; j < N; ++j) {
          float xs[STEP], a[STEP];
          UNROLL for (int q = 0; q < STEP; ++q) {
            xs[q] = static_cast<float>(xv[at * N + j].v[e + q]);
            a[q] = NORM ? pre[j] * du[q] : 0.0f;
            if (NORM) g_pre[j] += du[q] * xs[q];
          }
          if (MIX) {
            UNROLL for (int i = 0; i < R; ++i) {
              const float m = mix[i * N + j];
              UNROLL for (int q = 0; q < STEP; ++q) {
                a[q] += m * ds[i * STEP + q];
                g_res[i * N + j] += ds[i * STEP + q] * xs[q];
              }
            }
          }
          UNROLL for (int q = 0; q < STEP; ++q) xv[at * N + j].v[e + q] = static_cast<T>(a[q]);
        }
      }
      UNROLL for (int j = 0; j < N; ++j)
        *(device mhc::Pack<T, VEC>*)(dx + size_t(t) * size_t(N * C) + j * C + c) = xv[at * N + j];
      if (!NORM) *(device mhc::Pack<T, VEC>*)(dy + size_t(t) * size_t(C) + c) = yv;
    }
  }
  if (POST_PER_TOKEN) {
    mhc::group_sum<N, THREADS>(g_post, scratch, dh_post + size_t(t) * N, tid);
    UNROLL for (int i = 0; i < N; ++i) g_post[i] = 0.0f;
  }
  if (RES_PER_TOKEN) {
    mhc::group_sum<N * N, THREADS>(g_res, scratch, dh_res + size_t(t) * (N * N), tid);
    UNROLL for (int i = 0; i < N * N; ++i) g_res[i] = 0.0f;
  }
}

if (NORM) mhc::group_sum<N, THREADS>(g_pre, scratch, mine, tid);
if (MIX && !POST_PER_TOKEN) mhc::group_sum<N, THREADS>(g_post, scratch, mine + POST_AT, tid);
if (MIX && !RES_PER_TOKEN) mhc::group_sum<N * N, THREADS>(g_res, scratch, mine + RES_AT, tid);
if (NORM && CACHED) {
  UNROLL for (int k = 0; k < KEPT; ++k) {
    const int c = (k * THREADS + int(tid)) * VEC;
    if (c < C) {
      UNROLL for (int e = 0; e < VEC; ++e) 
        mine[WEIGHT_AT + c + e] = FAR ? far_weight[(k * VEC + e) * THREADS + int(tid)] : g_weight[FAR ? 0 : k * VEC + e];
    }
  }
}

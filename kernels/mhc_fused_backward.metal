// mhc_fused_backward: the gradient of mhc_fused (NORM) and of stream_mix_add (without NORM), for N <= 8.
//
//   u = sum_j h_pre[j] x[j];   r = rsqrt(mean(u**2) + eps);   y = u * r * weight, or y itself without NORM
//   dy = sum_i h_post[i] dout[i]   (dy = dout without MIX)
//   du = r * (dy * weight - u * r**2 * mean(dy * weight * u));   dweight = sum_t dy * u * r
//   dx[j] = sum_i h_res[i, j] dout[i] + h_pre[j] du
//   dh_pre[j] = sum du x[j];   dh_post[i] = sum dout[i] y;   dh_res[i, j] = sum dout[i] x[j]
//
// in   x [tokens, N, C] T, dout [tokens, N, C] T, without MIX [tokens, C] T;
//      H_pre [N] (with NORM), H_post [N] or [tokens, N], H_res [N, N] or [tokens, N, N] (both with MIX), weight [C]
//      (with NORM) any float; y [tokens, C] T (without NORM);
//      params [6 or 8] float, by mhc::param: EPS; with GATES PRE_EPS, POST_SCALE, POST_EPS; with SINKHORN
//      PROJECTION_EPS, with CLAMP also CLAMP_LOW, CLAMP_HIGH
// out  dx [tokens, N, C] T, dy [tokens, C] T (without NORM),
//      partial [threadgroups, P] float: the sums of dh_pre, dh_post, dh_res, dweight over this threadgroup's tokens, in
//      this order; a coefficient that is given per token has no column there, but its gradient is dh_post [tokens, N]
//      float or dh_res [tokens, N, N] float
// GATES: H_pre and H_post are logits, h_pre = sigmoid(H_pre) + pre_eps and h_post = post_scale * sigmoid(H_post) +
//      post_eps; the sums are of dh_pre and dh_post nevertheless, and sum_partials makes the logits' gradients of them.
// SINKHORN: H_res holds logits, and every threadgroup projects them itself; dh_res is the gradient of the projected
//      matrix.
// CACHED: x and dout of a token stay in registers between the sums of the norm and dx; without CACHED they are read
//      twice.
// owners  A threadgroup takes tokens in turn. A thread takes VEC neighbours of all streams, PASSES times.
// template  T, N, THREADS, MIX, NORM, GATES, POST_PER_TOKEN, RES_PER_TOKEN, VEC, PASSES, CACHED, SINKHORN, ITERS,
//      START, COLUMNS, OUT_COLUMNS, CLAMP
// grid  any number of threadgroups
#include "sinkhorn.h"
constexpr int SIMDS = THREADS / 32;
constexpr int OUT_STREAMS = MIX ? N : 1;
constexpr int CACHED_PASSES = CACHED ? PASSES : 1;
constexpr int CHANNEL_STEP =
    VEC == 1 || (N > 4 && NORM) ? 1 : 2;  // a thread takes so many channels at once, as registers allow
constexpr bool DWEIGHT_IN_THREADGROUP = CACHED && N > mhc::by_backend(3, 4) && PASSES * VEC * THREADS <= 4096;
constexpr int POST_AT = NORM ? N : 0;
constexpr int RES_AT = POST_AT + (POST_PER_TOKEN || !MIX ? 0 : N);
constexpr int WEIGHT_AT = RES_AT + (RES_PER_TOKEN || !MIX ? 0 : N * N);
constexpr bool DWEIGHT_ALIGNED = WEIGHT_AT % VEC == 0;  // whether packs of dweight's sums in partial are aligned
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float mix[N * N];  // mix[i * N + j] = h_res[i, j]
threadgroup float sums[4 * SIMDS];
threadgroup float scratch[N * N * SIMDS];
threadgroup float dweight_sums[DWEIGHT_IN_THREADGROUP ? PASSES * VEC * THREADS : 1];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];
const uint tokens = x_shape[0];
const uint zero = tokens >> 31;  // the compiler does not know that it is 0

if constexpr (NORM) mhc::load_gates<N, THREADS, GATES, false>(H_pre, pre, params, tid);
if constexpr (MIX && !POST_PER_TOKEN) mhc::load_gates<N, THREADS, GATES, true>(H_post, post, params, tid);
if constexpr (SINKHORN) {
  if (simdgroup_index_in_threadgroup == 0)
    mhc::project_lanes<N, START, COLUMNS, OUT_COLUMNS, ITERS>(
        H_res, mix, thread_index_in_simdgroup < mhc::matrix_lanes(N),
        mhc::projection_numbers<CLAMP>(params), thread_index_in_simdgroup);
} else if constexpr (MIX && !RES_PER_TOKEN) {
  mhc::load_mix<N, THREADS, false>(H_res, mix, tid);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const bool aligned = mhc::is_aligned<VEC>(x) && mhc::is_aligned<VEC>(dout);
const bool weight_aligned = NORM && mhc::is_aligned<CHANNEL_STEP>(weight);
const bool y_aligned = !NORM && mhc::is_aligned<VEC>(y);
const auto group_partial = partial + size_t(threadgroup_position_in_grid.x) * size_t(WEIGHT_AT + (NORM ? C : 0));
const auto dweight = group_partial + WEIGHT_AT;
float g_pre[N] = {}, g_post[N] = {}, g_res[N * N] = {}, g_weight[DWEIGHT_IN_THREADGROUP ? 1 : CACHED_PASSES][VEC] = {};
for (int k = 0; k < PASSES * VEC && DWEIGHT_IN_THREADGROUP; ++k) dweight_sums[k * THREADS + int(tid)] = 0.0f;
mhc::Pack<T, VEC> xv[CACHED_PASSES * N], dv[CACHED_PASSES * OUT_STREAMS];

int parity = 0;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const int lane_tid = mhc::each_turn(int(tid), t >> 31);
  const auto row = x + size_t(t) * size_t(N * C);
  const auto dout_row = dout + size_t(t) * size_t(OUT_STREAMS * C);
  const auto dx_row = dx + size_t(t) * size_t(N * C);
  if (POST_PER_TOKEN || RES_PER_TOKEN) {  // group_sum ended with a barrier: the last token's are no longer read
    if (POST_PER_TOKEN) mhc::load_gates<N, THREADS, false, true>(H_post + size_t(t) * N, post, params, uint(lane_tid));
    if (RES_PER_TOKEN) mhc::load_mix<N, THREADS, false>(H_res + size_t(t) * (N * N), mix, uint(lane_tid));
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // dots = sum(u ** 2), sum(dy * weight * u)
  float r = 0.0f, slope = 0.0f;
  if (NORM) {
    float dots[2] = {};
#pragma unroll(CACHED_PASSES)
    for (int k = 0; k < PASSES; ++k) {
      const int c = mhc::each_turn((k * THREADS + lane_tid) * VEC, (t + uint(k)) >> 31), at = CACHED ? k : 0;
      if (c < C) {
        float u[VEC] = {}, d[VEC] = {}, w[CHANNEL_STEP];
        mhc::load_streams<N>(xv + at * N, row, C, c, aligned);
        mhc::load_streams<OUT_STREAMS>(dv + at * OUT_STREAMS, dout_row, C, c, aligned);
        UNROLL_FOR (int e = 0; e < VEC; ++e) {
          if (e % CHANNEL_STEP == 0) mhc::load_floats<CHANNEL_STEP>(w, mhc::at(weight, c + e), weight_aligned);
          UNROLL_FOR (int j = 0; j < N; ++j) u[e] += pre[j] * mhc::float_of(xv[at * N + j], e);
          UNROLL_FOR (int i = 0; i < OUT_STREAMS; ++i)
            d[e] += (MIX ? post[i] : 1.0f) * mhc::float_of(dv[at * OUT_STREAMS + i], e);
          dots[0] += u[e] * u[e];
          dots[1] += d[e] * u[e] * w[e % CHANNEL_STEP];
        }
      }
    }
    mhc::sum_everywhere<SIMDS>(dots, sums, parity, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    parity ^= 1;
    r = metal::precise::rsqrt(dots[0] / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));
    slope = r * r * (dots[1] / static_cast<float>(C));
  }

#pragma unroll(CACHED_PASSES)
  for (int k = 0; k < PASSES; ++k) {
    const int c = mhc::each_turn((k * THREADS + lane_tid) * VEC, (t + uint(k)) >> 31), at = CACHED ? k : 0;
    if (c < C) {
      mhc::Pack<T, VEC> yv;  // it holds y, then dy
      if (!NORM) yv = mhc::load<T, VEC>(mhc::at(y + size_t(t) * size_t(C), c), y_aligned);
      if (!NORM || !CACHED) {
        mhc::load_streams<N>(xv + at * N, row, C, c, aligned);
        mhc::load_streams<OUT_STREAMS>(dv + at * OUT_STREAMS, dout_row, C, c, aligned);
      }
      if (NORM && !CACHED) {  // the columns of partial are the running sums
        UNROLL_FOR (int e = 0; e < VEC; ++e) g_weight[0][e] = 0.0f;
        if (t >= threadgroups_per_grid.x) mhc::load_floats<VEC>(g_weight[0], mhc::at(dweight, c), DWEIGHT_ALIGNED);
      }
      UNROLL_FOR (int e = 0; e < VEC; e += CHANNEL_STEP) {
        if (NORM) {
          UNROLL_FOR (int j = 0; j < N; ++j) {
            mhc::stay_packed(xv[at * N + j], e, zero);
          }
          UNROLL_FOR (int i = 0; i < OUT_STREAMS; ++i) {
            mhc::stay_packed(dv[at * OUT_STREAMS + i], e, zero);
          }
        }
        float ds[OUT_STREAMS * CHANNEL_STEP], u[CHANNEL_STEP] = {}, d[CHANNEL_STEP] = {}, du[CHANNEL_STEP] = {},
                                              out[CHANNEL_STEP], w[CHANNEL_STEP];
        if (NORM) mhc::load_floats<CHANNEL_STEP>(w, mhc::at(weight, c + e), weight_aligned);
        UNROLL_FOR (int q = 0; q < CHANNEL_STEP; ++q) {
          UNROLL_FOR (int i = 0; i < OUT_STREAMS; ++i) {
            ds[i * CHANNEL_STEP + q] = mhc::float_of(dv[at * OUT_STREAMS + i], e + q);
            d[q] += (MIX ? post[i] : 1.0f) * ds[i * CHANNEL_STEP + q];
          }
          if (NORM) {
            UNROLL_FOR (int j = 0; j < N; ++j) u[q] += pre[j] * mhc::float_of(xv[at * N + j], e + q);
            out[q] = u[q] * r;
            if (DWEIGHT_IN_THREADGROUP) dweight_sums[(at * VEC + e + q) * THREADS + lane_tid] += d[q] * out[q];
            else g_weight[DWEIGHT_IN_THREADGROUP ? 0 : at][e + q] += d[q] * out[q];
            du[q] = r * (d[q] * w[q] - u[q] * slope);
            out[q] *= w[q];
          } else {
            out[q] = mhc::float_of(yv, e + q);
            mhc::set_element(yv, e + q, static_cast<T>(d[q]));
          }
        }
        if (MIX) {
          UNROLL_FOR (int i = 0; i < OUT_STREAMS; ++i) {
            UNROLL_FOR (int q = 0; q < CHANNEL_STEP; ++q) g_post[i] += ds[i * CHANNEL_STEP + q] * out[q];
          }
        }
        UNROLL_FOR (int j = 0; j < N; ++j) {
          float xs[CHANNEL_STEP], a[CHANNEL_STEP];
          UNROLL_FOR (int q = 0; q < CHANNEL_STEP; ++q) {
            xs[q] = mhc::float_of(xv[at * N + j], e + q);
            a[q] = NORM ? pre[j] * du[q] : 0.0f;
            if (NORM) g_pre[j] += du[q] * xs[q];
          }
          if (MIX) {
            UNROLL_FOR (int i = 0; i < OUT_STREAMS; ++i) {
              const float m = mix[i * N + j];
              UNROLL_FOR (int q = 0; q < CHANNEL_STEP; ++q) {
                a[q] += m * ds[i * CHANNEL_STEP + q];
                g_res[i * N + j] += ds[i * CHANNEL_STEP + q] * xs[q];
              }
            }
          }
          UNROLL_FOR (int q = 0; q < CHANNEL_STEP; ++q) mhc::set_element(xv[at * N + j], e + q, static_cast<T>(a[q]));
        }
      }
      if (NORM && !CACHED) mhc::store_floats<VEC>(mhc::at(dweight, c), g_weight[0], DWEIGHT_ALIGNED);
      UNROLL_FOR (int j = 0; j < N; ++j) mhc::store(mhc::at(dx_row, j * C + c), xv[at * N + j]);
      if (!NORM) mhc::store(mhc::at((device T*)dy + size_t(t) * size_t(C), c), yv);  // an absent dy is one of floats
    }
  }
  if (POST_PER_TOKEN) {
    mhc::group_sum<N, THREADS>(g_post, scratch, dh_post + size_t(t) * N, uint(lane_tid));
    UNROLL_FOR (int i = 0; i < N; ++i) g_post[i] = 0.0f;
  }
  if (RES_PER_TOKEN) {
    mhc::group_sum<N * N, THREADS>(g_res, scratch, dh_res + size_t(t) * (N * N), uint(lane_tid));
    UNROLL_FOR (int i = 0; i < N * N; ++i) g_res[i] = 0.0f;
  }
}

if (NORM) mhc::group_sum<N, THREADS>(g_pre, scratch, group_partial, tid);
if (MIX && !POST_PER_TOKEN) mhc::group_sum<N, THREADS>(g_post, scratch, group_partial + POST_AT, tid);
if (MIX && !RES_PER_TOKEN) mhc::group_sum<N * N, THREADS>(g_res, scratch, group_partial + RES_AT, tid);
if (NORM && CACHED) {
  UNROLL_FOR (int k = 0; k < CACHED_PASSES; ++k) {
    const int c = (k * THREADS + int(tid)) * VEC;
    if (c < C) {
      UNROLL_FOR (int e = 0; e < VEC; ++e)
        dweight[c + e] = DWEIGHT_IN_THREADGROUP ? dweight_sums[(k * VEC + e) * THREADS + int(tid)]
                                                : g_weight[DWEIGHT_IN_THREADGROUP ? 0 : k][e];
    }
  }
}

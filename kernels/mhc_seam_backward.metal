// mhc_seam_backward: the gradient of mhc_seam with ready coefficients, N <= 8.
//
//   out[i] = sum_j h_res[i, j] x[j] + h_post[i] y, rounded to T;   u = sum_i h_pre[i] out[i];
//   r = rsqrt(mean(u**2) + eps)
//   ROUND_U: u is rounded to T, and so is u * r in dweight.
//   da = r (du weight - u r**2 mean(du weight u)), without NORM du;   ds[i] = dout[i] + h_pre[i] da
//   dx[j] = sum_i h_res[i, j] ds[i];   dy = sum_i h_post[i] ds[i];   dweight = sum_t du u r
//   dh_pre[i] = sum da out[i];   dh_post[i] = sum ds[i] y;   dh_res[i, j] = sum ds[i] x[j]
//
// in   x, dout [tokens, N, C] T, y, du [tokens, C] T, h_pre, h_post [tokens, N], h_res [tokens, N, N], weight [C]
//      (NORM) any float; params [6] float, by mhc::param: EPS
// out  dx [tokens, N, C] T, dy [tokens, C] T; dh_pre, dh_post [tokens, N], dh_res [tokens, N, N] float;
//      partial [threadgroups, C] float (NORM): the sum of dweight over this threadgroup's tokens
// CACHED: x, y and du of a token stay in registers between the sums of the norm and dx; without CACHED they are read
//      twice.
// owners  A threadgroup takes tokens in turn. A thread takes VEC neighbours of all streams, PASSES times.
// template  T, N, VEC, THREADS, PASSES, CACHED, NORM, ROUND_U
// grid  any number of threadgroups
#include "seam_channel.h"
constexpr int SIMDS = THREADS / 32;
constexpr int CACHED_PASSES = CACHED ? PASSES : 1;
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float mix[N * N];  // mix[j * N + i] = h_res[i, j]
threadgroup float sums[4 * SIMDS];
threadgroup float scratch[N * N * SIMDS];
const int C = x_shape[2];
const uint tokens = x_shape[0];
const uint zero = tokens >> 31;  // the compiler does not know that it is 0
const bool aligned =
    mhc::is_aligned<VEC>(x) && mhc::is_aligned<VEC>(y) && mhc::is_aligned<VEC>(dout) && mhc::is_aligned<VEC>(du);
const auto group_partial = partial + size_t(threadgroup_position_in_grid.x) * size_t(C);
float g_weight[CACHED_PASSES][VEC] = {};
mhc::Pack<T, VEC> xv[CACHED_PASSES * N], yv[CACHED_PASSES], dv[CACHED_PASSES];

int parity = 0;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const uint tid = uint(mhc::each_turn(int(thread_position_in_threadgroup.x), t >> 31));
  const auto row = x + size_t(t) * size_t(N * C);
  const auto dout_row = dout + size_t(t) * size_t(N * C);
  const auto y_row = y + size_t(t) * size_t(C);
  const auto du_row = du + size_t(t) * size_t(C);
  const auto dx_row = dx + size_t(t) * size_t(N * C);
  const auto dy_row = dy + size_t(t) * size_t(C);
  // group_sum ended with a barrier: the last token's coefficients are no longer read
  mhc::load_gates<N, THREADS, false, false>(h_pre + size_t(t) * N, pre, params, tid);
  mhc::load_gates<N, THREADS, false, true>(h_post + size_t(t) * N, post, params, tid);
  mhc::load_mix<N, THREADS, true>(h_res + size_t(t) * (N * N), mix, tid);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // dots = sum(u ** 2), sum(du * weight * u)
  float r = 1.0f, slope = 0.0f;
  mhc::SeamSums<N> gradients = {};
  if (NORM) {
    float dots[2] = {};
#pragma unroll(CACHED_PASSES)
    for (int k = 0; k < PASSES; ++k) {
      const int c = mhc::each_turn((k * THREADS + int(tid)) * VEC, (t + uint(k)) >> 31), at = CACHED ? k : 0;
      if (c < C) {
        mhc::load_streams<N>(xv + at * N, row, C, c, aligned);
        yv[at] = mhc::load<T, VEC>(mhc::at(y_row, c), aligned);
        dv[at] = mhc::load<T, VEC>(mhc::at(du_row, c), aligned);
        UNROLL_FOR (int e = 0; e < VEC; ++e) {
          float xs[N], out[N];
          UNROLL_FOR (int j = 0; j < N; ++j) xs[j] = mhc::float_of(xv[at * N + j], e);
          float u = mhc::seam_channel<N, T>(out, xs, mhc::float_of(yv[at], e), pre, post, mix);
          if (ROUND_U) u = static_cast<float>(static_cast<T>(u));
          dots[0] += u * u;
          dots[1] += mhc::float_of(dv[at], e) * u * static_cast<float>(*mhc::at(weight, c + e));
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
    const int c = mhc::each_turn((k * THREADS + int(tid)) * VEC, (t + uint(k)) >> 31), at = CACHED ? k : 0;
    if (c < C) {
      mhc::Pack<T, VEC> ov[N];
      mhc::load_streams<N>(ov, dout_row, C, c, aligned);
      if (!NORM || !CACHED) {
        mhc::load_streams<N>(xv + at * N, row, C, c, aligned);
        yv[at] = mhc::load<T, VEC>(mhc::at(y_row, c), aligned);
        dv[at] = mhc::load<T, VEC>(mhc::at(du_row, c), aligned);
      }
      UNROLL_FOR (int e = 0; e < VEC; ++e) {
        if (NORM) {
          UNROLL_FOR (int j = 0; j < N; ++j) {
            mhc::stay_packed(xv[at * N + j], e, zero);
          }
        }
        float xs[N], out[N], douts[N], dxs[N];
        const float ys = mhc::float_of(yv[at], e);
        UNROLL_FOR (int j = 0; j < N; ++j) {
          xs[j] = mhc::float_of(xv[at * N + j], e);
          douts[j] = mhc::float_of(ov[j], e);
        }
        float u = mhc::seam_channel<N, T>(out, xs, ys, pre, post, mix), da = mhc::float_of(dv[at], e);
        if (NORM) {
          if (ROUND_U) u = static_cast<float>(static_cast<T>(u));
          const float normed = u * r, d = da * (ROUND_U ? static_cast<float>(static_cast<T>(normed)) : normed);
          g_weight[at][e] += d;
          da = r * (da * static_cast<float>(*mhc::at(weight, c + e)) - u * slope);
        }
        const float dys = mhc::seam_channel_gradient(dxs, gradients, xs, ys, out, douts, da, pre, post, mix);
        mhc::set_element(yv[at], e, static_cast<T>(dys));
        UNROLL_FOR (int j = 0; j < N; ++j) mhc::set_element(xv[at * N + j], e, static_cast<T>(dxs[j]));
      }
      if (NORM && !CACHED) {  // the columns of partial are the running sums
        float last[VEC] = {};
        if (t >= threadgroups_per_grid.x) mhc::load_floats<VEC>(last, mhc::at(group_partial, c), true);
        UNROLL_FOR (int e = 0; e < VEC; ++e) {
          last[e] += g_weight[at][e];
          g_weight[at][e] = 0.0f;
        }
        mhc::store_floats<VEC>(mhc::at(group_partial, c), last, true);
      }
      UNROLL_FOR (int j = 0; j < N; ++j) mhc::store(mhc::at(dx_row, j * C + c), xv[at * N + j]);
      mhc::store(mhc::at(dy_row, c), yv[at]);
    }
  }
  mhc::group_sum<N, THREADS>(gradients.dh_pre, scratch, dh_pre + size_t(t) * N, tid);
  mhc::group_sum<N, THREADS>(gradients.dh_post, scratch, dh_post + size_t(t) * N, tid);
  mhc::group_sum<N * N, THREADS>(gradients.dh_res, scratch, dh_res + size_t(t) * (N * N), tid);
}

if (NORM && CACHED) {
  const uint tid = thread_position_in_threadgroup.x;
  UNROLL_FOR (int k = 0; k < CACHED_PASSES; ++k) {
    const int c = (k * THREADS + int(tid)) * VEC;
    if (c < C) mhc::store_floats<VEC>(group_partial + c, g_weight[k], true);
  }
}

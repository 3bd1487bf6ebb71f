// mhc_fused: the whole static sublayer; x is read once and out is written once.
//
//   u = sum_j h_pre[j] x[j];   y = u * rsqrt(mean(u**2) + eps) * weight
//   out[i] = sum_j h_res[i, j] x[j] + h_post[i] y          (out = y without MIX)
//
// in   x [tokens, N, C] T, H_pre [N], H_post [N], H_res [N, N], weight [C] any float,
//      params [6 or 8] float, by mhc::param: EPS; with GATES PRE_EPS, POST_SCALE, POST_EPS; with SINKHORN
//      PROJECTION_EPS, with CLAMP also CLAMP_LOW, CLAMP_HIGH
// out  out [tokens, N, C] T, without MIX [tokens, C] T
// GATES: H_pre and H_post are logits, h_pre = sigmoid(H_pre) + pre_eps and h_post = post_scale * sigmoid(H_post) +
//      post_eps; without GATES they are h_pre and h_post.
// SINKHORN: H_res holds logits, N <= 8, and every threadgroup projects them itself; without SINKHORN H_res is h_res.
// CACHED: x of a token stays in registers between the sum of squares and the output; without CACHED it is read twice.
// owners  A threadgroup takes tokens in turn. A thread takes VEC neighbours of all streams, PASSES times.
// template  T, N, VEC, THREADS, PASSES, CACHED, MIX, SINKHORN, GATES, ITERS, START, COLUMNS, OUT_COLUMNS, CLAMP
// grid  any number of threadgroups
#include "sinkhorn.h"
constexpr int SIMDS = THREADS / 32;
constexpr int STREAM_UNROLL = N <= 8 ? N : 4;  // streams that are loaded before the first is used
constexpr int CACHED_PASSES = CACHED ? PASSES : 1;
constexpr int OUT_STREAMS = MIX ? N : 1;
constexpr int CHANNEL_STEP =
    CACHED && N <= 4 && VEC > 1 ? 2 : VEC;  // a thread holds the sums of so many channels at once
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float mix[N * N];  // mix[j * N + i] = h_res[i, j]
threadgroup float scratch[2 * SIMDS];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];

mhc::load_gates<N, THREADS, GATES, false>(H_pre, pre, params, tid);
if constexpr (MIX) mhc::load_gates<N, THREADS, GATES, true>(H_post, post, params, tid);
if constexpr (SINKHORN) {
  if (simdgroup_index_in_threadgroup == 0)
    mhc::project_lanes<N, START, COLUMNS, !OUT_COLUMNS, ITERS>(
        H_res, mix, thread_index_in_simdgroup < mhc::matrix_lanes(N),
        mhc::projection_numbers<CLAMP>(params), thread_index_in_simdgroup);
} else if constexpr (MIX) {
  mhc::load_mix<N, THREADS, true>(H_res, mix, tid);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const bool x_aligned = mhc::is_aligned<VEC>(x);
const uint tokens = x_shape[0];
const bool weight_aligned = mhc::is_aligned<VEC>(weight);
mhc::Pack<T, VEC> xv[CACHED_PASSES * (CACHED ? N : 1)];

int parity = 0;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const auto row = x + size_t(t) * size_t(N * C);
  const auto out_row = out + size_t(t) * size_t(OUT_STREAMS * C);

  // squares = sum(u ** 2)
  float squares[1] = {};
#pragma unroll(CACHED_PASSES)
  for (int k = 0; k < PASSES; ++k) {
    const int c = mhc::each_turn((k * THREADS + int(tid)) * VEC, (t + uint(k)) >> 31);
    if (c < C) {
      float u[VEC] = {};
#pragma unroll(STREAM_UNROLL)
      for (int j = 0; j < N; ++j) {
        const mhc::Pack<T, VEC> v = mhc::load<T, VEC>(mhc::at(row, j * C + c), x_aligned);
        if (CACHED) xv[k * N + j] = v;
        UNROLL_FOR (int e = 0; e < VEC; ++e) u[e] += pre[j] * mhc::float_of(v, e);
      }
      UNROLL_FOR (int e = 0; e < VEC; ++e) squares[0] += u[e] * u[e];
    }
  }
  mhc::sum_everywhere<SIMDS>(squares, scratch, parity, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
  parity ^= 1;
  const float r =
      metal::precise::rsqrt(squares[0] / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));

#pragma unroll(CACHED_PASSES)
  for (int k = 0; k < PASSES; ++k) {
    const int c = mhc::each_turn((k * THREADS + int(tid)) * VEC, (t + uint(k)) >> 31);
    if (c < C) {
      float w[VEC];
      mhc::Pack<T, VEC> o[CACHED ? OUT_STREAMS : 1] = {};
      mhc::load_floats<VEC>(w, mhc::at(weight, c), weight_aligned);
      UNROLL_FOR (int e = 0; e < VEC; e += CHANNEL_STEP) {
        float acc[OUT_STREAMS * CHANNEL_STEP] = {}, u[CHANNEL_STEP] = {};
#pragma unroll(STREAM_UNROLL)
        for (int j = 0; j < N; ++j) {
          mhc::Pack<T, VEC> v;
          if (CACHED) v = xv[k * N + j];
          else v = mhc::load<T, VEC>(mhc::at(row, j * C + c), x_aligned);
          UNROLL_FOR (int q = 0; q < CHANNEL_STEP; ++q) {
            const float f = mhc::float_of(v, e + q);
            u[q] += pre[j] * f;
            if (MIX)
              UNROLL_FOR (int i = 0; i < N; ++i) acc[i * CHANNEL_STEP + q] += mix[j * N + i] * f;
          }
        }
        UNROLL_FOR (int q = 0; q < CHANNEL_STEP; ++q) u[q] *= r * w[e + q];
        UNROLL_FOR (int i = 0; i < OUT_STREAMS; ++i) {
          UNROLL_FOR (int q = 0; q < CHANNEL_STEP; ++q)
            mhc::set_element(o[CACHED ? i : 0], e + q,
                             static_cast<T>(MIX ? acc[i * CHANNEL_STEP + q] + post[i] * u[q] : u[q]));
          if (!CACHED) mhc::store(mhc::at(out_row, i * C + c), o[0]);
        }
      }
      UNROLL_FOR (int i = 0; i < OUT_STREAMS; ++i)
        if (CACHED) mhc::store(mhc::at(out_row, i * C + c), o[i]);
    }
  }
}

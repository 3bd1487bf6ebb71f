// mhc_fused: the whole static sublayer, x read once and out written once.
//
//   u = sum_j h_pre[j] x[j];   y = u * rsqrt(mean(u**2) + eps) * weight
//   out[i] = sum_j h_res[i, j] x[j] + h_post[i] y          (out = y unless MIX)
//
// in   x [tokens, N, C] T, H_pre [N], H_post [N], H_res [N, N], weight [C] any float,
//      params [5] float: eps, pre_eps, post_scale, post_eps, the projection's eps
// out  out [tokens, N, C] ([tokens, C] unless MIX) T
// GATES: H_pre and H_post are logits, h_pre = sigmoid + pre_eps, h_post = post_scale * sigmoid + post_eps.
// SINKHORN: H_res holds logits too and every threadgroup projects them itself (N <= 8).
// own  a threadgroup takes tokens in turn; a thread takes VEC neighbours of all streams, PASSES times
// CACHED: a token stays in registers between the sum and the output; otherwise x is read twice.
// template  T, N, VEC, THREADS, PASSES, CACHED, MIX, GATES, SINKHORN, ITERS, START, COLUMNS, OUT_COLUMNS
#include "sinkhorn.h"
constexpr int SIMDS = THREADS / 32;
constexpr int AHEAD = N <= 8 ? N : 4;  // streams loaded ahead
constexpr int KEPT = CACHED ? PASSES : 1;
constexpr int R = MIX ? N : 1;
constexpr int STEP = CACHED && N <= 4 && VEC > 1 ? 2 : VEC;  // channels worked on at once
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float mix[N * N];  // h_res transposed: mix[j * N + i] goes from stream j to stream i
threadgroup float partial[2 * SIMDS];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];

mhc::load_gates<N, THREADS, GATES, false>(H_pre, pre, params, tid);
if constexpr (MIX) mhc::load_gates<N, THREADS, GATES, true>(H_post, post, params, tid);
if constexpr (SINKHORN) {
  if (simdgroup_index_in_threadgroup == 0)
    mhc::project<N, START, COLUMNS, !OUT_COLUMNS, ITERS>(H_res, mix, thread_index_in_simdgroup < mhc::lanes(N), params[4], thread_index_in_simdgroup);
} else if constexpr (MIX) {
  mhc::load_mix<N, THREADS, true>(H_res, mix, tid);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const bool whole = mhc::aligned<VEC>(x);
const uint tokens = x_shape[0];
const bool w_whole = mhc::aligned<VEC>(weight);
mhc::Pack<T, VEC> xv[KEPT * (CACHED ? N : 1)];

int turn = 0;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const auto row = x + size_t(t) * size_t(N * C);
  const auto orow = out + size_t(t) * size_t(R * C);

  // ss = sum(u ** 2)
  float ss[1] = {};
#pragma unroll KEPT
  for (int k = 0; k < PASSES; ++k) {
    const int c = (k * THREADS + int(tid)) * VEC;
    if (c < C) {
      float u[VEC] = {};
#pragma unroll AHEAD
      for (int j = 0; j < N; ++j) {
        const mhc::Pack<T, VEC> v = mhc::load<T, VEC>(row + j * C + c, whole);
        if (CACHED) xv[k * N + j] = v;
        UNROLL for (int e = 0; e < VEC; ++e) u[e] += pre[j] * static_cast<float>(v.v[e]);
      }
      UNROLL for (int e = 0; e < VEC; ++e) ss[0] += u[e] * u[e];
    }
  }
  mhc::sum_everywhere<SIMDS>(ss, partial, turn, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
  turn ^= 1;
  const float r = metal::precise::rsqrt(ss[0] / static_cast<float>(C) + params[0]);

#pragma unroll KEPT
  for (int k = 0; k < PASSES; ++k) {
    const int c = (k * THREADS + int(tid)) * VEC;
    if (c < C) {
      float w[VEC];
      mhc::Pack<T, VEC> o[CACHED ? R : 1];
      mhc::load_floats<VEC>(w, weight + c, w_whole);
      UNROLL for (int e = 0; e < VEC; e += STEP) {
        float acc[R * STEP] = {}, u[STEP] = {};
#pragma unroll AHEAD
        for (int j = 0; j < N; ++j) {
          const mhc::Pack<T, VEC> v = CACHED ? xv[k * N + j] : mhc::load<T, VEC>(row + j * C + c, whole);
          UNROLL for (int q = 0; q < STEP; ++q) {
            const float f = static_cast<float>(v.v[e + q]);
            u[q] += pre[j] * f;
            if (MIX) UNROLL for (int i = 0; i < N; ++i) acc[i * STEP + q] += mix[j * N + i] * f;
          }
        }
        UNROLL for (int q = 0; q < STEP; ++q) u[q] *= r * w[e + q];
        UNROLL for (int i = 0; i < R; ++i) {
          UNROLL for (int q = 0; q < STEP; ++q)
            o[CACHED ? i : 0].v[e + q] = static_cast<T>(MIX ? acc[i * STEP + q] + post[i] * u[q] : u[q]);
          if (!CACHED) *(device mhc::Pack<T, VEC>*)(orow + i * C + c) = o[0];
        }
      }
      UNROLL for (int i = 0; i < R; ++i) if (CACHED) *(device mhc::Pack<T, VEC>*)(orow + i * C + c) = o[i];
    }
  }
}

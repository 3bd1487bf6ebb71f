// mhc_seam: the write back of a sublayer and what the next one reads; x is read once (twice with NORM
// where u does not stay in registers, never where only coefficients are made), out and u are written once.
//
//   out[i] = sum_j h_res[i, j] x[j] + h_post[i] y, rounded to T   (without WRITE_BACK out is x, which is not written)
//   u = sum_i h_pre[i] out[i], with NORM u * rsqrt(mean(u**2) + eps) * weight
//   ROUND_U: u is rounded to T before its norm, and u * rsqrt(...) is rounded to T before the weight.
//   FROM_PARTIAL_LOGITS: the phi products of single runs of x are added here, and make the coefficients:
//   l = rsqrt(mean(x**2) + norm_eps) * (phi @ vec(x));   z = alpha * l + bias, in the parts pre [N], post [N], res [R]
//   h_pre = sigmoid(z_pre) + pre_eps;   h_post = post_scale * sigmoid(z_post) + post_eps
//   h_res = sinkhorn_knopp(z_res) with PROJECT;   logits = z_res without PROJECT
//
// in   x [tokens, N, C] T, y [tokens, C] T (WRITE_BACK), weight [C] any float (NORM);
//      h_pre [tokens, N], h_post [tokens, N], h_res [tokens, N, N] any float, or with FROM_PARTIAL_LOGITS, N <= 8,
//      partial_logits [tokens, ceil(N * C / 32), NUM_LOGITS + 4] float: of each run its phi products, four shares of
//      sum(x**2); bias [NUM_LOGITS], alpha [parts] any float, NUM_LOGITS = 2 N + R, or N (HEAD), where pre is the only
//      part; params [6 or 8] float, by mhc::param: with NORM EPS, with PROJECT PROJECTION_EPS, with CLAMP also
//      CLAMP_LOW, CLAMP_HIGH, with FROM_PARTIAL_LOGITS PRE_EPS, POST_SCALE, POST_EPS, NORM_EPS
// out  out [tokens, N, C] T (WRITE_BACK), u [tokens, C] T (WRITE_U);
//      FROM_PARTIAL_LOGITS: new_h_pre [tokens, N] float (WRITE_H_PRE); without WRITE_BACK new_h_post [tokens, N] float
//      (without HEAD), new_h_res [tokens, N, N] float (PROJECT); logits [tokens, R] float (without PROJECT, which
//      WRITE_BACK needs here);
//      l [tokens, NUM_LOGITS + 1] float (SAVE_LOGITS): l, then the token's rsqrt(mean(x**2) + norm_eps)
// owners  A threadgroup takes tokens in turn. A thread takes VEC neighbours of all streams, PASSES times. Run r of
//      the phi products is added in slice r % SLICES, as mhc_pre does, so a token gets the same bits from either.
// template  T, N, VEC, THREADS, PASSES, WRITE_BACK, WRITE_U, NORM, ROUND_U, FROM_PARTIAL_LOGITS, SAVE_LOGITS, PROJECT,
//      WRITE_H_PRE, NUM_LOGITS, SLICES, ITERS, START, COLUMNS, OUT_COLUMNS, CLAMP
// grid  any number of threadgroups
#include "coefficients.h"
#include "seam_channel.h"
constexpr bool HEAD = NUM_LOGITS == N;
constexpr int NUM_RES_LOGITS = HEAD ? 0 : NUM_LOGITS - 2 * N;
constexpr int SIMDS = THREADS / 32;
constexpr bool U_CACHED = PASSES * VEC <= 32;  // u stays in registers; without U_CACHED it is made twice
constexpr int CACHED_PASSES = U_CACHED ? PASSES : 1;
constexpr int BUFFERS = N <= 8 ? 2 : 1;
constexpr int PITCH = NUM_LOGITS + 4;
static_assert(PROJECT || !FROM_PARTIAL_LOGITS || !WRITE_BACK, "the write back needs h_res");
constexpr bool SUMS_LIKE_MHC_PRE =
    FROM_PARTIAL_LOGITS && NORM && !WRITE_BACK;  // sum(u ** 2) is added in the order of mhc_pre
threadgroup float pre[BUFFERS * N];
threadgroup float post[BUFFERS * N];
threadgroup float mix[BUFFERS * N * N];  // mix[j * N + i] = h_res[i, j]
threadgroup float scratch[2 * SIMDS];
threadgroup float sums[FROM_PARTIAL_LOGITS ? SLICES * PITCH : 1];
threadgroup float z[PROJECT ? N * N : 1];
threadgroup float pack_squares[SUMS_LIKE_MHC_PRE ? PASSES * THREADS : 1];
const int tid = int(thread_position_in_threadgroup.x);
const int simd = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int C = x_shape[2];
const uint tokens = x_shape[0];
const bool x_aligned = mhc::is_aligned<VEC>(x);
const bool y_aligned = WRITE_BACK && mhc::is_aligned<VEC>(y);
const bool weight_aligned = NORM && mhc::is_aligned<VEC>(weight);

int parity = 0;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const int at = BUFFERS == 2 ? parity * N : 0;
  if constexpr (FROM_PARTIAL_LOGITS) {
    // h_pre, h_post = gates(alpha * l + bias)
    const int num_runs = (N * C + 31) / 32;
    mhc::add_runs<PITCH, SLICES, THREADS>(sums, partial_logits + size_t(t) * size_t(num_runs * PITCH), num_runs, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int o = tid; o < NUM_LOGITS; o += THREADS) {
      const mhc::SliceSums s = mhc::add_slices<NUM_LOGITS, SLICES>(sums, o);
      const float h = mhc::finish_logit<N, NUM_LOGITS, SAVE_LOGITS>(o, s.product, s.x_dot_x, N * C, alpha, bias, params,
                                                                    l + size_t(t) * (NUM_LOGITS + 1));
      if (o < N) {
        pre[at + o] = h;
        if (WRITE_H_PRE) new_h_pre[size_t(t) * N + o] = h;
      } else if (!HEAD && o < 2 * N) {
        if (WRITE_BACK) post[at + o - N] = h;
        else new_h_post[size_t(t) * N + (o - N)] = h;
      } else if (PROJECT) {
        z[o - 2 * N] = h;
      } else if (NUM_RES_LOGITS > 0) {
        logits[size_t(t) * NUM_RES_LOGITS + (o - 2 * N)] = h;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // h_res = sinkhorn_knopp(z_res)
    if constexpr (PROJECT) {
      const bool in_range = lane < mhc::projection_lanes(N, START, ITERS);
      if (simd == SIMDS - 1) {
        const auto numbers = mhc::projection_numbers<CLAMP>(params);
        if constexpr (WRITE_BACK)
          mhc::project_token<N, START, COLUMNS, !OUT_COLUMNS, ITERS>(z, mix + at * N, in_range, numbers, lane);
        else
          mhc::project_token<N, START, COLUMNS, OUT_COLUMNS, ITERS>(z, new_h_res + size_t(t) * (N * N), in_range,
                                                                    numbers, lane);
      }
    }
  } else {
    mhc::load_gates<N, THREADS, false, false>(h_pre + size_t(t) * N, pre + at, params, uint(tid));
    if (WRITE_BACK) mhc::load_gates<N, THREADS, false, true>(h_post + size_t(t) * N, post + at, params, uint(tid));
    if (WRITE_BACK) mhc::load_mix<N, THREADS, true>(h_res + size_t(t) * (N * N), mix + at * N, uint(tid));
  }
  if (WRITE_BACK || !FROM_PARTIAL_LOGITS) threadgroup_barrier(mem_flags::mem_threadgroup);

  if constexpr (WRITE_U) {
    float u_of[CACHED_PASSES][VEC], squares[1] = {}, r = 1.0f;
    // out[i] = sum_j h_res[i, j] x[j] + h_post[i] y;   squares = sum(u ** 2)
    if constexpr (NORM) {
#pragma unroll(CACHED_PASSES)
      for (int k = 0; k < PASSES; ++k) {
        const int c = mhc::each_turn((k * THREADS + tid) * VEC, (t + uint(k)) >> 31), pass = U_CACHED ? k : 0;
        float pack_square = 0.0f;
        if (c < C) {
          mhc::seam_pack<WRITE_BACK, true, ROUND_U, N, T>(u_of[pass], x, y, out, t, c, pre + at, post + at,
                                                          mix + at * N, C, x_aligned, y_aligned);
          pack_square = mhc::sum_of_squares(u_of[pass]);
          if (!SUMS_LIKE_MHC_PRE) squares[0] += pack_square;
        }
        if (SUMS_LIKE_MHC_PRE) pack_squares[k * THREADS + tid] = pack_square;
      }
      if constexpr (SUMS_LIKE_MHC_PRE) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = lane; i < PASSES * THREADS; i += 32) squares[0] += pack_squares[i];
        squares[0] = simd_sum(squares[0]);
      } else {
        mhc::sum_everywhere<SIMDS>(squares, scratch, parity, uint(simd), uint(lane));
      }
      r = metal::precise::rsqrt(squares[0] / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));
    }
    // u * r * weight
#pragma unroll(CACHED_PASSES)
    for (int k = 0; k < PASSES; ++k) {
      const int c = mhc::each_turn((k * THREADS + tid) * VEC, (t + uint(k)) >> 31), pass = U_CACHED ? k : 0;
      if (c < C) {
        if (!NORM || !U_CACHED)
          mhc::seam_pack<WRITE_BACK, !NORM, NORM && ROUND_U, N, T>(u_of[pass], x, y, out, t, c, pre + at, post + at,
                                                                   mix + at * N, C, x_aligned, y_aligned);
        mhc::store(mhc::at((device T*)u + size_t(t) * size_t(C), c),  // an absent u is one of floats
                   mhc::finish_u<NORM, ROUND_U, T>(u_of[pass], r, mhc::at(weight, c), weight_aligned));
      }
    }
  }
  parity ^= 1;
  if (BUFFERS == 1) threadgroup_barrier(mem_flags::mem_threadgroup);
}

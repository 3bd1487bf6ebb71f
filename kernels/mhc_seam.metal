// mhc_seam: the write back of a sublayer and what the next one reads; x is read once, out and u are written once.
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
//      sum(x**2); bias [NUM_LOGITS], alpha [parts] any float, NUM_LOGITS = 2 N + R, with HEAD N, whose only part is
//      pre; params [6] float, by mhc::param: with NORM EPS, with PROJECT PROJECTION_EPS, with FROM_PARTIAL_LOGITS
//      PRE_EPS, POST_SCALE, POST_EPS, NORM_EPS
// out  out [tokens, N, C] T (WRITE_BACK), u [tokens, C] T (WRITE_U);
//      FROM_PARTIAL_LOGITS: new_h_pre [tokens, N] float (WRITE_H_PRE); without WRITE_BACK new_h_post [tokens, N] float
//      (without HEAD), new_h_res [tokens, N, N] float (PROJECT); logits [tokens, R] float (without PROJECT);
//      l [tokens, NUM_LOGITS + 1] float (SAVE_LOGITS): l, then the token's rsqrt(mean(x**2) + norm_eps)
// owners  A threadgroup takes tokens in turn. A thread takes VEC neighbours of all streams, PASSES times. SLICES sums
//      of runs are those that the simdgroups of mhc_pre have, so a token gets the same bits from either.
// template  T, N, VEC, THREADS, PASSES, WRITE_BACK, WRITE_U, NORM, ROUND_U, FROM_PARTIAL_LOGITS, HEAD, SAVE_LOGITS,
//      PROJECT, WRITE_H_PRE, NUM_LOGITS, SLICES, ITERS, START, COLUMNS, OUT_COLUMNS
// grid  any number of threadgroups
#include "coefficients.h"
constexpr int SIMDS = THREADS / 32;
constexpr int STREAM_UNROLL = N <= 8 ? N : 4;  // streams that are loaded before the first is used
constexpr bool U_CACHED = PASSES * VEC <= 32;  // u stays in registers; without U_CACHED it is made twice
constexpr int PASS_UNROLL = U_CACHED ? PASSES : 1;
constexpr int BUFFERS = N <= 8 ? 2 : 1;
constexpr int PITCH = NUM_LOGITS + 4;
constexpr int NUM_RES_LOGITS = HEAD ? 0 : NUM_LOGITS - 2 * N;
constexpr bool SUMS_LIKE_MHC_PRE = FROM_PARTIAL_LOGITS && NORM && !WRITE_BACK;  // the order of sum(u ** 2)
threadgroup float pre[BUFFERS * N];
threadgroup float post[BUFFERS * N];
threadgroup float mix[BUFFERS * N * N];  // mix[j * N + i] = h_res[i, j]
threadgroup float scratch[2 * SIMDS];
threadgroup float sums[FROM_PARTIAL_LOGITS ? SLICES * PITCH : 1];
threadgroup float z[FROM_PARTIAL_LOGITS ? NUM_LOGITS : 1];
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
    // sums[w] = the sum of the runs w, w + SLICES, ..., which simdgroup w of mhc_pre has
    const int num_runs = (N * C + 31) / 32;
    const auto token_runs = partial_logits + size_t(t) * size_t(num_runs * PITCH);
    for (int q = tid; q < SLICES * PITCH; q += THREADS) {
      float s = 0.0f;
#pragma unroll 8
      for (int r = q / PITCH; r < num_runs; r += SLICES) s += static_cast<float>(token_runs[r * PITCH + q % PITCH]);
      sums[q] = s;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int o = tid; o < NUM_LOGITS; o += THREADS) {
      float s = 0.0f, squares = 0.0f;
      UNROLL for (int w = 0; w < SLICES; ++w) {
        const int row = w * PITCH;
        s += sums[row + o];
        squares += (sums[row + NUM_LOGITS] + sums[row + NUM_LOGITS + 1]) + (sums[row + NUM_LOGITS + 2] + sums[row + NUM_LOGITS + 3]);
      }
      const int part = mhc::part_of<N>(o);
      const float scale = metal::precise::rsqrt(squares / static_cast<float>(N * C) + static_cast<float>(params[mhc::param::NORM_EPS]));
      const float logit = scale * s;
      const float v = static_cast<float>(alpha[part]) * logit + static_cast<float>(bias[o]);
      if (SAVE_LOGITS) l[size_t(t) * (NUM_LOGITS + 1) + o] = logit;
      if (SAVE_LOGITS && o == 0) l[size_t(t) * (NUM_LOGITS + 1) + NUM_LOGITS] = scale;
      if (part == 0) {
        pre[at + o] = mhc::gate(v, part, params);
        if (WRITE_H_PRE) new_h_pre[size_t(t) * N + o] = pre[at + o];
      } else if (!HEAD && part == 1) {
        const float h = mhc::gate(v, part, params);
        if (WRITE_BACK) post[at + o - N] = h;
        else new_h_post[size_t(t) * N + (o - N)] = h;
      } else if (PROJECT) {
        z[o - 2 * N] = v;
      } else if (NUM_RES_LOGITS > 0) {
        logits[size_t(t) * NUM_RES_LOGITS + (o - 2 * N)] = v;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if constexpr (PROJECT) {
      const bool in_range = lane < mhc::projection_lanes(N, START, ITERS);
      if (simd == SIMDS - 1) {
        const float eps = static_cast<float>(params[mhc::param::PROJECTION_EPS]);
        if constexpr (WRITE_BACK) mhc::project_token<N, START, COLUMNS, !OUT_COLUMNS, ITERS>(z, mix + at * N, in_range, eps, lane);
        else mhc::project_token<N, START, COLUMNS, OUT_COLUMNS, ITERS>(z, new_h_res + size_t(t) * (N * N), in_range, eps, lane);
      }
    }
  } else {
    mhc::load_gates<N, THREADS, false, false>(h_pre + size_t(t) * N, pre + at, params, uint(tid));
    if (WRITE_BACK) mhc::load_gates<N, THREADS, false, true>(h_post + size_t(t) * N, post + at, params, uint(tid));
    if (WRITE_BACK) mhc::load_mix<N, THREADS, true>(h_res + size_t(t) * (N * N), mix + at * N, uint(tid));
  }
  if (WRITE_BACK || !FROM_PARTIAL_LOGITS) threadgroup_barrier(mem_flags::mem_threadgroup);

  const size_t base = size_t(t) * size_t(N * C);
  float squares[1] = {}, u_of[U_CACHED ? PASSES * VEC : VEC], r = 1.0f;
  UNROLL for (int phase = NORM ? 0 : 1; WRITE_U && phase < 2; ++phase) {
#pragma unroll PASS_UNROLL
    for (int k = 0; k < PASSES; ++k) {
      const int c = (k * THREADS + tid) * VEC, u_at = U_CACHED ? k * VEC : 0;
      if (c < C) {
        if (phase == 0 || !NORM || !U_CACHED) {
          float acc[WRITE_BACK ? N * VEC : 1];
          if constexpr (WRITE_BACK) {
            const mhc::Pack<T, VEC> yv = mhc::load<T, VEC>(y + size_t(t) * size_t(C) + c, y_aligned);
            UNROLL for (int i = 0; i < N; ++i) {
              UNROLL for (int e = 0; e < VEC; ++e) acc[i * VEC + e] = post[at + i] * static_cast<float>(yv.v[e]);
            }
          }
          UNROLL for (int e = 0; e < VEC; ++e) u_of[u_at + e] = 0.0f;
#pragma unroll STREAM_UNROLL
          for (int j = 0; j < N; ++j) {
            const mhc::Pack<T, VEC> v = mhc::load<T, VEC>(x + base + j * C + c, x_aligned);
            if constexpr (WRITE_BACK) {
              UNROLL for (int i = 0; i < N; ++i) {
                const float m = mix[(at + j) * N + i];
                UNROLL for (int e = 0; e < VEC; ++e) acc[i * VEC + e] = metal::fma(m, static_cast<float>(v.v[e]), acc[i * VEC + e]);
              }
            } else {
              UNROLL for (int e = 0; e < VEC; ++e) u_of[u_at + e] += pre[at + j] * static_cast<float>(v.v[e]);
            }
          }
          if constexpr (WRITE_BACK) {
            UNROLL for (int i = 0; i < N; ++i) {
              mhc::Pack<T, VEC> o;
              UNROLL for (int e = 0; e < VEC; ++e) {
                o.v[e] = static_cast<T>(acc[i * VEC + e]);
                u_of[u_at + e] = metal::fma(pre[at + i], static_cast<float>(o.v[e]), u_of[u_at + e]);
              }
              if (phase == 0 || !NORM) *(device mhc::Pack<T, VEC>*)(out + base + i * C + c) = o;
            }
          }
          if (ROUND_U && NORM) {
            UNROLL for (int e = 0; e < VEC; ++e) u_of[u_at + e] = static_cast<float>(static_cast<T>(u_of[u_at + e]));
          }
        }
        if (phase == 0) {
          float pack_square = 0.0f;
          UNROLL for (int e = 0; e < VEC; ++e) pack_square += u_of[u_at + e] * u_of[u_at + e];
          if (SUMS_LIKE_MHC_PRE) pack_squares[k * THREADS + tid] = pack_square;
          else squares[0] += pack_square;
        } else {
          float w[VEC];
          mhc::Pack<T, VEC> o;
          if (NORM) mhc::load_floats<VEC>(w, weight + c, weight_aligned);
          UNROLL for (int e = 0; e < VEC; ++e) {
            float v = u_of[u_at + e];
            if (NORM) v *= r;
            if (NORM && ROUND_U) v = static_cast<float>(static_cast<T>(v));
            o.v[e] = static_cast<T>(NORM ? v * w[e] : v);
          }
          *(device mhc::Pack<T, VEC>*)(u + size_t(t) * size_t(C) + c) = o;
        }
      } else if (SUMS_LIKE_MHC_PRE && phase == 0) {
        pack_squares[k * THREADS + tid] = 0.0f;
      }
    }
    if (phase == 0) {
      if constexpr (SUMS_LIKE_MHC_PRE) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = lane; i < PASSES * THREADS; i += 32) squares[0] += pack_squares[i];
        squares[0] = simd_sum(squares[0]);
      } else {
        mhc::sum_everywhere<SIMDS>(squares, scratch, parity, uint(simd), uint(lane));
      }
      r = metal::precise::rsqrt(squares[0] / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));
    }
  }
  parity ^= 1;
  if (BUFFERS == 1) threadgroup_barrier(mem_flags::mem_threadgroup);
}

// mhc_seam: the write-back of a sublayer and what the next one reads; x is read once, both are written once.
//
//   out[i] = sum_j h_res[i, j] x[j] + h_post[i] y, rounded to T   (without BACK out is x)
//   u = sum_i h_pre[i] out[i];   with NORM u = u * rsqrt(mean(u**2) + eps) * weight
//   ROUND: u is rounded to T before its norm, and u * rsqrt before the weight
//   SWEPT: the coefficients are made here, as in mhc_pre, of the runs that mhc_sweep made of x
//
// in   x [tokens, N, C] T, y [tokens, C] T, weight [C] any float;
//      h_pre, h_post [tokens, N], h_res [tokens, N, N] any float; or SWEPT, N <= 8:
//      runs [tokens, ceil(N * C / 32), OUTS + 4] float, bias [OUTS], alpha [parts] any float
//      params [6] float: pre_eps, post_scale, post_eps, norm_eps, eps, the projection's eps
// out  out [tokens, N, C] T, u [tokens, C] T; SWEPT, as far as they are asked for, float: made_pre, made_post
//      [tokens, N], made_res [tokens, N, N], logits [tokens, R], l [tokens, OUTS + 1]
// own  a threadgroup takes tokens in turn, a thread VEC neighbours of all streams, PASSES times
// template  T, N, VEC, THREADS, PASSES, BACK, READ (u is made; with BACK always), NORM, ROUND, SWEPT; of mhc_pre for SWEPT: OUTS, SLICES,
//      HEAD, SAVE, PROJECT, WRITE_PRE, ITERS, START, COLUMNS, OUT_COLUMNS
#include "coefficients.h"
constexpr int SIMDS = THREADS / 32;
constexpr int AHEAD = N <= 8 ? N : 4;  // streams loaded ahead
constexpr bool KEPT = PASSES * VEC <= 32;  // u stays in registers; otherwise it is made twice
constexpr int UNROLLED = KEPT ? PASSES : 1;
constexpr int TURNS = N <= 8 ? 2 : 1;
constexpr int PITCH = OUTS + 4;
constexpr int R = HEAD ? 0 : OUTS - 2 * N;
constexpr bool CHAIN = SWEPT && NORM && !BACK;  // sum(u ** 2) in the order of mhc_pre
threadgroup float pre[TURNS * N];
threadgroup float post[TURNS * N];
threadgroup float mix[TURNS * N * N];  // h_res transposed: mix[j * N + i] goes from stream j to stream i
threadgroup float partial[2 * SIMDS];
threadgroup float sums[SWEPT ? SLICES * PITCH : 1];
threadgroup float z[SWEPT ? OUTS : 1];
threadgroup float some[CHAIN ? PASSES * THREADS : 1];
const int tid = int(thread_position_in_threadgroup.x);
const int simd = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int C = x_shape[2];
const uint tokens = x_shape[0];
const bool whole = mhc::aligned<VEC>(x);
const bool y_whole = BACK && mhc::aligned<VEC>(y);
const bool w_whole = NORM && mhc::aligned<VEC>(weight);

int turn = 0;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const int at = TURNS == 2 ? turn * N : 0;
  if constexpr (SWEPT) {
    // sums[w] = sum of the runs w, w + SLICES, ...: what simdgroup w of mhc_pre has
    const int count = (N * C + 31) / 32;
    const auto rows = runs + size_t(t) * size_t(count * PITCH);
    for (int q = tid; q < SLICES * PITCH; q += THREADS) {
      float s = 0.0f;
#pragma unroll 8
      for (int r = q / PITCH; r < count; r += SLICES) s += static_cast<float>(rows[r * PITCH + q % PITCH]);
      sums[q] = s;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int o = tid; o < OUTS; o += THREADS) {
      float s = 0.0f, squares = 0.0f;
      UNROLL for (int w = 0; w < SLICES; ++w) {
        const int row = w * PITCH;
        s += sums[row + o];
        squares += (sums[row + OUTS] + sums[row + OUTS + 1]) + (sums[row + OUTS + 2] + sums[row + OUTS + 3]);
      }
      const int part = mhc::part_of<N>(o);
      const float scale = metal::precise::rsqrt(squares / static_cast<float>(N * C) + static_cast<float>(params[3]));
      const float unit = scale * s;
      const float v = static_cast<float>(alpha[part]) * unit + static_cast<float>(bias[o]);
      if (SAVE) l[size_t(t) * (OUTS + 1) + o] = unit;
      if (SAVE && o == 0) l[size_t(t) * (OUTS + 1) + OUTS] = scale;
      if (part == 0) {
        pre[at + o] = mhc::gate(v, part, params);
        if (WRITE_PRE) made_pre[size_t(t) * N + o] = pre[at + o];
      } else if (!HEAD && part == 1) {
        const float h = mhc::gate(v, part, params);
        if (BACK) post[at + o - N] = h;
        else made_post[size_t(t) * N + (o - N)] = h;
      } else if (PROJECT) {
        z[o - 2 * N] = v;
      } else if (R > 0) {
        logits[size_t(t) * R + (o - 2 * N)] = v;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if constexpr (PROJECT) {
      const bool live = lane < mhc::projecting(N, START, ITERS);
      if (simd == SIMDS - 1) {
        const float eps = static_cast<float>(params[5]);
        if constexpr (BACK) mhc::project_token<N, START, COLUMNS, !OUT_COLUMNS, ITERS>(z, mix + at * N, live, eps, lane);
        else mhc::project_token<N, START, COLUMNS, OUT_COLUMNS, ITERS>(z, made_res + size_t(t) * (N * N), live, eps, lane);
      }
    }
  } else {
    mhc::load_gates<N, THREADS, false, false>(h_pre + size_t(t) * N, pre + at, params, uint(tid));
    if (BACK) mhc::load_gates<N, THREADS, false, true>(h_post + size_t(t) * N, post + at, params, uint(tid));
    if (BACK) mhc::load_mix<N, THREADS, true>(h_res + size_t(t) * (N * N), mix + at * N, uint(tid));
  }
  if (BACK || !SWEPT) threadgroup_barrier(mem_flags::mem_threadgroup);

  const size_t base = size_t(t) * size_t(N * C);
  float ss[1] = {}, u_of[KEPT ? PASSES * VEC : VEC], r = 1.0f;
  UNROLL for (int sweep = NORM ? 0 : 1; READ && sweep < 2; ++sweep) {
#pragma unroll UNROLLED
    for (int k = 0; k < PASSES; ++k) {
      const int c = (k * THREADS + tid) * VEC, own = KEPT ? k * VEC : 0;
      if (c < C) {
        if (sweep == 0 || !NORM || !KEPT) {
          float acc[BACK ? N * VEC : 1];
          if constexpr (BACK) {
            const mhc::Pack<T, VEC> yv = mhc::load<T, VEC>(y + size_t(t) * size_t(C) + c, y_whole);
            UNROLL for (int i = 0; i < N; ++i) {
              UNROLL for (int e = 0; e < VEC; ++e) acc[i * VEC + e] = post[at + i] * static_cast<float>(yv.v[e]);
            }
          }
          UNROLL for (int e = 0; e < VEC; ++e) u_of[own + e] = 0.0f;
#pragma unroll AHEAD
          for (int j = 0; j < N; ++j) {
            const mhc::Pack<T, VEC> v = mhc::load<T, VEC>(x + base + j * C + c, whole);
            if constexpr (BACK) {
              UNROLL for (int i = 0; i < N; ++i) {
                const float m = mix[(at + j) * N + i];
                UNROLL for (int e = 0; e < VEC; ++e) acc[i * VEC + e] = metal::fma(m, static_cast<float>(v.v[e]), acc[i * VEC + e]);
              }
            } else {
              UNROLL for (int e = 0; e < VEC; ++e) u_of[own + e] += pre[at + j] * static_cast<float>(v.v[e]);
            }
          }
          if constexpr (BACK) {
            UNROLL for (int i = 0; i < N; ++i) {
              mhc::Pack<T, VEC> o;
              UNROLL for (int e = 0; e < VEC; ++e) {
                o.v[e] = static_cast<T>(acc[i * VEC + e]);
                u_of[own + e] = metal::fma(pre[at + i], static_cast<float>(o.v[e]), u_of[own + e]);
              }
              if (sweep == 0 || !NORM) *(device mhc::Pack<T, VEC>*)(out + base + i * C + c) = o;
            }
          }
          if (ROUND && NORM) {
            UNROLL for (int e = 0; e < VEC; ++e) u_of[own + e] = static_cast<float>(static_cast<T>(u_of[own + e]));
          }
        }
        if (sweep == 0) {
          float squared = 0.0f;
          UNROLL for (int e = 0; e < VEC; ++e) squared += u_of[own + e] * u_of[own + e];
          if (CHAIN) some[k * THREADS + tid] = squared;
          else ss[0] += squared;
        } else {
          float w[VEC];
          mhc::Pack<T, VEC> o;
          if (NORM) mhc::load_floats<VEC>(w, weight + c, w_whole);
          UNROLL for (int e = 0; e < VEC; ++e) {
            float v = u_of[own + e];
            if (NORM) v *= r;
            if (NORM && ROUND) v = static_cast<float>(static_cast<T>(v));
            o.v[e] = static_cast<T>(NORM ? v * w[e] : v);
          }
          *(device mhc::Pack<T, VEC>*)(u + size_t(t) * size_t(C) + c) = o;
        }
      } else if (CHAIN && sweep == 0) {
        some[k * THREADS + tid] = 0.0f;
      }
    }
    if (sweep == 0) {
      if constexpr (CHAIN) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = lane; i < PASSES * THREADS; i += 32) ss[0] += some[i];
        ss[0] = simd_sum(ss[0]);
      } else {
        mhc::sum_everywhere<SIMDS>(ss, partial, turn, uint(simd), uint(lane));
      }
      r = metal::precise::rsqrt(ss[0] / static_cast<float>(C) + static_cast<float>(params[4]));
    }
  }
  turn ^= 1;
  if (TURNS == 1) threadgroup_barrier(mem_flags::mem_threadgroup);
}

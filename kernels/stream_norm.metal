// stream_norm: streams are written back and each is normalised by itself; x is read once.
//
//   out[j] = x[j] + h_post[j] y, rounded to T, with WRITE_BACK; otherwise out is x and is not written
//   s[j] = out[j] * roots[j] * (1 + weight[j]), rounded to T;   roots[j] = rsqrt(mean(out[j]**2) + eps)
//   next_post[i] = 2 sigmoid(post_logits[i]), post_logits[i] = inject[i] @ vec(s) / N, with INJECT
//
// in   x [tokens, N, C] T; y [tokens, C] T and h_post [tokens, N] (POST_PER_TOKEN) or [N] any float (WRITE_BACK);
//      weight [N, C] any float; inject [N, N * C] any float (INJECT); params [6 or 8] float, by mhc::param: EPS
// out  out [tokens, N, C] T (WRITE_BACK), s [tokens, N, C] T, next_post [tokens, N] float (INJECT); for the gradient
//      roots and (INJECT) post_logits [tokens, N] float
// CACHED: a block of a token stays in registers between the sums of squares and s; without CACHED it is read twice.
// owners  A threadgroup takes TILE tokens in turn, which share loads of weight and inject, and of each BLOCK streams at
//      once; BLOCK divides N. A thread takes VEC neighbours of them, PASSES times. TILE is 1 without CACHED. Sums of a
//      token are the same for each TILE.
// template  T, N, VEC, THREADS, PASSES, CACHED, BLOCK, WRITE_BACK, POST_PER_TOKEN, INJECT, TILE
// grid  any number of threadgroups
#include "stream_norm.h"
constexpr int SIMDS = THREADS / 32;
constexpr int CACHED_PASSES = CACHED ? PASSES : 1;
constexpr int ROW_UNROLL = TILE > 1 ? 1 : N <= 8 ? N : 2;  // rows of inject that are loaded before the first is used
threadgroup float scratch[2 * SIMDS * TILE * BLOCK];
threadgroup float products[INJECT ? SIMDS * TILE * N : 1];  // of each simdgroup, with rows of inject
const uint tid = thread_position_in_threadgroup.x;
const uint simd = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const int C = x_shape[2];
const uint tokens = x_shape[0];
const uint zero = tokens >> 31;  // the compiler does not know that it is 0
const bool x_aligned = mhc::is_aligned<VEC>(x);
const bool y_aligned = WRITE_BACK && mhc::is_aligned<VEC>(y);
const bool weight_aligned = mhc::is_aligned<VEC>(weight);
const bool inject_aligned = INJECT && mhc::is_aligned<VEC>(inject);
mhc::Pack<T, VEC> streams[TILE * CACHED_PASSES * BLOCK];  // of x, then of out, then of s

int parity = 0;
for (uint t0 = threadgroup_position_in_grid.x * TILE; t0 < tokens; t0 += threadgroups_per_grid.x * TILE) {
  for (int j0 = 0; j0 < N; j0 += BLOCK) {
    // squares[j] = sum(out[j] ** 2)
    float squares[TILE * BLOCK] = {};
#pragma unroll(CACHED_PASSES)
    for (int k = 0; k < PASSES; ++k) {
      const int c = mhc::each_turn((k * THREADS + int(tid)) * VEC, (t0 + uint(k)) >> 31);
      if (c < C) {
        UNROLL_FOR (int q = 0; q < TILE; ++q) {
          const uint t = mhc::token_of_tile(t0, q, tokens);
          const size_t base = size_t(t) * size_t(N * C) + size_t(j0 * C);
          const int at = (q * CACHED_PASSES + (CACHED ? k : 0)) * BLOCK;
          mhc::load_written<WRITE_BACK, BLOCK>(streams + at, x + base, y + size_t(t) * size_t(C),
                                               h_post + ((POST_PER_TOKEN ? size_t(t) * N : 0) + size_t(j0)), C, c,
                                               x_aligned, y_aligned);
          UNROLL_FOR (int j = 0; j < BLOCK; ++j) {
            UNROLL_FOR (int e = 0; e < VEC; ++e) {
              const float o = mhc::float_of(streams[at + j], e);
              squares[q * BLOCK + j] = metal::fma(o, o, squares[q * BLOCK + j]);
            }
            if (WRITE_BACK && t0 + q < tokens)
              mhc::store(mhc::at((device T*)out + base, j * C + c), streams[at + j]);  // an absent out is one of floats
          }
        }
      }
    }
    mhc::sum_everywhere<SIMDS>(squares, scratch, parity, simd, lane);
    parity ^= 1;
    float r[TILE * BLOCK];
    UNROLL_FOR (int a = 0; a < TILE * BLOCK; ++a) {
      r[a] = metal::precise::rsqrt(squares[a] / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));
      const uint t = t0 + a / BLOCK;
      if (tid == 0 && t < tokens) roots[size_t(t) * N + size_t(j0 + a % BLOCK)] = r[a];
    }

#pragma unroll(CACHED_PASSES)
    for (int k = 0; k < PASSES; ++k) {
      const int c = mhc::each_turn((k * THREADS + int(tid)) * VEC, (t0 + uint(k)) >> 31);
      if (c < C) {
        if (!CACHED)
          mhc::load_written<WRITE_BACK, BLOCK>(
              streams, x + (size_t(t0) * size_t(N * C) + size_t(j0 * C)), y + size_t(t0) * size_t(C),
              h_post + ((POST_PER_TOKEN ? size_t(t0) * N : 0) + size_t(j0)), C, c, x_aligned, y_aligned);
        UNROLL_FOR (int j = 0; j < BLOCK; ++j) {
          float w[VEC];
          mhc::load_floats<VEC>(w, mhc::at(weight, (j0 + j) * C + c), weight_aligned);
          UNROLL_FOR (int q = 0; q < TILE; ++q) {
            const int at = (q * CACHED_PASSES + (CACHED ? k : 0)) * BLOCK + j;
            if (TILE > 1) mhc::all_stay_packed(streams[at], zero);
            UNROLL_FOR (int e = 0; e < VEC; ++e)
              mhc::set_element(streams[at], e,
                               static_cast<T>(mhc::float_of(streams[at], e) * r[q * BLOCK + j] * (1.0f + w[e])));
            if (t0 + q < tokens) mhc::store(mhc::at(s + size_t(t0 + q) * size_t(N * C), (j0 + j) * C + c), streams[at]);
          }
        }
      }
      if (INJECT) {  // products[i] += sum(inject[i] * s) over the channels at hand
#pragma unroll(ROW_UNROLL)
        for (int i = 0; i < N; ++i) {
          float product[TILE] = {};
          if (c < C) {
            const auto inject_row = inject + size_t(i) * size_t(N * C);
            UNROLL_FOR (int j = 0; j < BLOCK; ++j) {
              float w[VEC];
              mhc::load_floats<VEC>(w, mhc::at(inject_row, (j0 + j) * C + c), inject_aligned);
              UNROLL_FOR (int q = 0; q < TILE; ++q) {
                const int at = (q * CACHED_PASSES + (CACHED ? k : 0)) * BLOCK + j;
                if (TILE > 1) mhc::all_stay_packed(streams[at], zero);
                UNROLL_FOR (int e = 0; e < VEC; ++e)
                  product[q] = metal::fma(w[e], mhc::float_of(streams[at], e), product[q]);
              }
            }
          }
          UNROLL_FOR (int q = 0; q < TILE; ++q) {
            const float sum = simd_sum(product[q]);
            const int to = (int(simd) * TILE + q) * N + i;
            if (lane == 0) products[to] = sum + (k == 0 && j0 == 0 ? 0.0f : products[to]);
          }
        }
      }
    }
  }
  if (INJECT) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int a = int(tid); a < TILE * N; a += THREADS) {
      const float z = mhc::sum_of_simdgroups<TILE * N, THREADS>(products, a) / static_cast<float>(N);
      if (t0 + a / N < tokens) {
        post_logits[size_t(t0) * N + size_t(a)] = z;
        next_post[size_t(t0) * N + size_t(a)] = 2.0f * mhc::sigmoid(z);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

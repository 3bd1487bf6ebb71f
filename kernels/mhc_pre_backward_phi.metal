// mhc_pre_backward_phi: dphi[o, k] = sum_t dp[t, o] vec(x[t])[k], the first stage of the sum over tokens.
//
// in   x [tokens, N, C] T, dp [tokens, NUM_LOGITS] float
// out  partial [chunks, NUM_LOGITS * N * C] float: a row is a chunk's sum
// owners  A threadgroup takes a chunk of tokens, THREADS * VEC neighbours k and LOGITS_PER_THREAD logits. A thread sums
//      VEC * LOGITS_PER_THREAD products.
// template  T, N, NUM_LOGITS, VEC, THREADS, LOGITS_PER_THREAD
// grid  chunks * ceil(N C / (THREADS VEC)) * ceil(NUM_LOGITS / LOGITS_PER_THREAD) threadgroups
#include "common.h"
constexpr int TOKENS_AT_ONCE = mhc::by_backend(2, 8);  // as registers allow
constexpr int STAGE = 64;  // tokens whose dp lies in threadgroup memory at once
constexpr int LOGIT_BLOCKS = (NUM_LOGITS + LOGITS_PER_THREAD - 1) / LOGITS_PER_THREAD;
constexpr int DP_PACKS = (LOGITS_PER_THREAD + 3) / 4;
threadgroup mhc::Floats<4> dps[STAGE * DP_PACKS];
const int tid = int(thread_position_in_threadgroup.x);
const int K = N * x_shape[2];
const uint tokens = x_shape[0];
const int id = int(threadgroup_position_in_grid.x);
const int k_blocks = (K + THREADS * VEC - 1) / (THREADS * VEC);
const int o0 = id % LOGIT_BLOCKS * LOGITS_PER_THREAD;
const int k = (id / LOGIT_BLOCKS % k_blocks * THREADS + tid) * VEC;
const int chunk = id / LOGIT_BLOCKS / k_blocks;
const uint chunks = threadgroups_per_grid.x / uint(LOGIT_BLOCKS * k_blocks);
const uint tokens_per_chunk = (tokens + chunks - 1) / chunks;
const uint begin = uint(chunk) * tokens_per_chunk;
const uint end = begin + tokens_per_chunk < tokens ? begin + tokens_per_chunk : tokens;
const bool x_aligned = mhc::is_aligned<VEC>(x);

float acc[LOGITS_PER_THREAD * VEC] = {};
for (uint t0 = begin; t0 < end; t0 += STAGE) {
  for (int q = tid; q < STAGE * DP_PACKS * 4; q += THREADS) {
    const size_t t = t0 + uint(q / (4 * DP_PACKS));
    const int e = q % (4 * DP_PACKS), o = o0 + e;
    dps[q / 4].v[q % 4] =
        t < end && e < LOGITS_PER_THREAD && o < NUM_LOGITS ? static_cast<float>(dp[t * NUM_LOGITS + o]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (k < K) {
    const auto row = x + (size_t(t0) * size_t(K) + size_t(k));
    const int count = end - t0 < uint(STAGE) ? int(end - t0) : STAGE;
#pragma unroll(TOKENS_AT_ONCE)
    for (int i = 0; i < count; ++i) {
      float v[VEC];
      mhc::load_floats<VEC>(v, row + size_t(i) * size_t(K), x_aligned);
      UNROLL_FOR (int q = 0; q < DP_PACKS; ++q) {
        const mhc::Floats<4> g = dps[i * DP_PACKS + q];
        UNROLL_FOR (int o = 4 * q; o < 4 * q + 4 && o < LOGITS_PER_THREAD; ++o) {
          UNROLL_FOR (int e = 0; e < VEC; ++e) acc[o * VEC + e] += g.v[o - 4 * q] * v[e];
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (k < K) {
  UNROLL_FOR (int o = 0; o < LOGITS_PER_THREAD; ++o) {
    if (o0 + o < NUM_LOGITS) {
      UNROLL_FOR (int e = 0; e < VEC; ++e)
        partial[(size_t(chunk) * NUM_LOGITS + size_t(o0 + o)) * size_t(K) + size_t(k + e)] = acc[o * VEC + e];
    }
  }
}

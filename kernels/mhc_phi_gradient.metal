// mhc_phi_gradient: dphi[o, k] = sum_t dp[t, o] vec(x[t])[k], the first stage of the sum over tokens.
//
// in   x [tokens, N, C] T, dp [tokens, OUTS] float     out  partial [chunks, OUTS * N * C] float, a row per chunk of tokens
// own  a threadgroup takes a chunk of tokens, THREADS * VEC neighbours k and EACH outputs; a thread sums VEC * EACH products
// template  T, N, OUTS, VEC, THREADS, EACH     grid  chunks * ceil(N C / (THREADS VEC)) * ceil(OUTS / EACH)
#include "common.h"
constexpr int TILE = 64;  // tokens whose dp is staged at once
constexpr int BLOCKS = (OUTS + EACH - 1) / EACH;
constexpr int PACKS = (EACH + 3) / 4;
threadgroup mhc::Pack<float, 4> dps[TILE * PACKS];
const int tid = int(thread_position_in_threadgroup.x);
const int K = N * x_shape[2];
const uint tokens = x_shape[0];
const int id = int(threadgroup_position_in_grid.x);
const int spans = (K + THREADS * VEC - 1) / (THREADS * VEC);
const int o0 = id % BLOCKS * EACH;
const int k = (id / BLOCKS % spans * THREADS + tid) * VEC;
const int chunk = id / BLOCKS / spans;
const uint chunks = threadgroups_per_grid.x / uint(BLOCKS * spans);
const uint each = (tokens + chunks - 1) / chunks;
const uint begin = uint(chunk) * each;
const uint end = begin + each < tokens ? begin + each : tokens;
const bool whole = mhc::aligned<VEC>(x);

float acc[EACH * VEC] = {};
for (uint t0 = begin; t0 < end; t0 += TILE) {
  for (int q = tid; q < TILE * PACKS * 4; q += THREADS) {
    const size_t t = t0 + uint(q / (4 * PACKS));
    const int e = q % (4 * PACKS), o = o0 + e;
    dps[q / 4].v[q % 4] = t < end && e < EACH && o < OUTS ? static_cast<float>(dp[t * OUTS + o]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (k < K) {
    const auto row = x + (size_t(t0) * size_t(K) + size_t(k));
    const int count = end - t0 < uint(TILE) ? int(end - t0) : TILE;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      float v[VEC];
      mhc::load_floats<VEC>(v, row + size_t(i) * size_t(K), whole);
      UNROLL for (int q = 0; q < PACKS; ++q) {
        const mhc::Pack<float, 4> g = dps[i * PACKS + q];
        UNROLL for (int o = 4 * q; o < 4 * q + 4 && o < EACH; ++o) {
          UNROLL for (int e = 0; e < VEC; ++e) acc[o * VEC + e] += g.v[o - 4 * q] * v[e];
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (k < K) {
  UNROLL for (int o = 0; o < EACH; ++o) {
    if (o0 + o < OUTS) {
      UNROLL for (int e = 0; e < VEC; ++e)
        partial[(size_t(chunk) * OUTS + size_t(o0 + o)) * size_t(K) + size_t(k + e)] = acc[o * VEC + e];
    }
  }
}

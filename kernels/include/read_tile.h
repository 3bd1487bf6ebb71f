// mhc_pre reads a tile of tokens by one of these functions, u = sum_j pre[j] x[j] with or without a norm. A simdgroup
// takes a token, half of one, or a share of one.
#include "streams.h"

namespace mhc {

constexpr int packs_at_once(int n) { return n <= 2 ? 4 : n <= 4 ? 2 : 1; }  // a lane makes so many packs of u at once

// o[k] += sum_j pre[j] x[j], of a lane's VEC channels of PACKS_AT_ONCE packs that lie 32 * VEC channels apart. With N
// <= 8 all streams are loaded before the first is used, otherwise one by one. LAST: x is not read again soon.
template <bool LAST, int N, typename T, int PACKS_AT_ONCE, int VEC, typename X, typename S>
METAL_FUNC void read_streams(thread float (&o)[PACKS_AT_ONCE][VEC], X x, S pre, int C) {
  constexpr int STREAMS_AT_ONCE = N <= 8 ? N : 1;
#pragma unroll 1
  for (int j0 = 0; j0 < N; j0 += STREAMS_AT_ONCE) {
    Pack<T, VEC> v[PACKS_AT_ONCE][STREAMS_AT_ONCE];
    UNROLL_FOR (int k = 0; k < PACKS_AT_ONCE; ++k) {
      UNROLL_FOR (int j = 0; j < STREAMS_AT_ONCE; ++j) {
        const auto from = at(x, (j0 + j) * C + k * 32 * VEC);
        if constexpr (LAST) v[k][j] = load_last<VEC>(from);
        else v[k][j] = load_aligned<VEC>(from);
      }
    }
    UNROLL_FOR (int k = 0; k < PACKS_AT_ONCE; ++k) {
      UNROLL_FOR (int j = 0; j < STREAMS_AT_ONCE; ++j) {
        UNROLL_FOR (int e = 0; e < VEC; ++e) o[k][e] = metal::fma(pre[j0 + j], float_of(v[k][j], e), o[k][e]);
      }
    }
  }
}

// o[k] += sum_j pre[j] x[j] as read_streams computes it, for the first `remaining` channels, at any alignment.
template <int N, typename T, int PACKS_AT_ONCE, int VEC, typename X, typename S>
METAL_FUNC void read_ragged(thread float (&o)[PACKS_AT_ONCE][VEC], X x, S pre, int C, int remaining, bool aligned) {
  constexpr int STREAMS_AT_ONCE = N <= 8 ? N : 1;
  UNROLL_FOR (int k = 0; k < PACKS_AT_ONCE; ++k) {
#pragma unroll(STREAMS_AT_ONCE)
    for (int j = 0; j < N && k * 32 * VEC < remaining; ++j) {
      float v[VEC];
      load_floats<VEC>(v, x + (j * C + k * 32 * VEC), aligned);
      UNROLL_FOR (int e = 0; e < VEC; ++e) o[k][e] = metal::fma(pre[j], v[e], o[k][e]);
    }
  }
}

// o[k] += sum_j pre[j] x[j] for the first `remaining` channels.
template <bool LAST, int N, typename T, int PACKS_AT_ONCE, int VEC, typename X, typename S>
METAL_FUNC void read_packs(thread float (&o)[PACKS_AT_ONCE][VEC], X x, S pre, int C, int remaining, bool aligned) {
  if (!aligned || (PACKS_AT_ONCE - 1) * 32 * VEC >= remaining) read_ragged<N, T>(o, x, pre, C, remaining, aligned);
  else read_streams<LAST, N, T>(o, x, pre, C);
}

// u without a norm of the tile's first `count` tokens. Each of READERS simdgroups takes half a token at a time: the
// smaller a piece is, the shorter the others wait for the last.
template <int N, int VEC, int READERS, typename T, typename U, typename X, typename S>
METAL_FUNC void read_tile(U u, X x, S pre, int count, int C, bool aligned, int simd, int lane) {
  constexpr int PACKS = packs_at_once(N), STEP = PACKS * 32 * VEC;
  for (int q = simd; q < 2 * count; q += READERS) {
    const int i = q / 2;
    for (int c0 = q % 2 * STEP + lane * VEC; c0 < C; c0 += 2 * STEP) {
      float o[PACKS][VEC] = {};
      read_packs<true, N, T>(o, x + (size_t(i) * size_t(N * C) + c0), pre + i * N, C, C - c0, aligned);
      UNROLL_FOR (int k = 0; k < PACKS; ++k) {
        const int c = c0 + k * 32 * VEC;
        if (c < C) store_last(u + (size_t(i) * size_t(C) + c), (finish_u<false, false, T>(o[k], 1.0f, u, false)));
      }
    }
  }
}

// u with a norm of these tokens. Each of READERS simdgroups takes a token at a time and makes u twice, first for its
// squares.
template <int N, int VEC, int READERS, typename T, typename U, typename X, typename S, typename W>
METAL_FUNC void read_tile_twice(U u, X x, S pre, W weight, float eps, int count, int C, bool aligned, int simd,
                                int lane) {
  constexpr int PACKS = packs_at_once(N), STEP = PACKS * 32 * VEC;
  const bool weight_aligned = is_aligned<VEC>(weight);
  for (int i = simd; i < count; i += READERS) {
    const auto row = x + size_t(i) * size_t(N * C);
    float u_dot_u = 0.0f;
    for (int c0 = lane * VEC; c0 < C; c0 += STEP) {
      float o[PACKS][VEC] = {};
      read_packs<false, N, T>(o, row + c0, pre + i * N, C, C - c0, aligned);
      UNROLL_FOR (int k = 0; k < PACKS; ++k) u_dot_u += c0 + k * 32 * VEC < C ? sum_of_squares(o[k]) : 0.0f;
    }
    const float r = metal::precise::rsqrt(simd_sum(u_dot_u) / static_cast<float>(C) + eps);
    for (int c0 = lane * VEC; c0 < C; c0 += STEP) {
      float o[PACKS][VEC] = {};
      read_packs<true, N, T>(o, row + c0, pre + i * N, C, C - c0, aligned);
      UNROLL_FOR (int k = 0; k < PACKS; ++k) {
        const int c = c0 + k * 32 * VEC;
        if (c < C)
          store_last(u + (size_t(i) * size_t(C) + c), (finish_u<true, false, T>(o[k], r, weight + c, weight_aligned)));
      }
    }
  }
}

// u with a norm of these tokens, where a lane keeps U_PACKS packs of u until they are scaled. Each of READERS
// simdgroups takes a token at a time; or SHARERS > 1 simdgroups of all SIMDS share one, and its squares are added in
// the order in which one simdgroup adds them. The tile has TILE_TOKENS places, and scratch SIMDS * U_PACKS * 32 floats.
template <int N, int VEC, int READERS, int SIMDS, int SHARERS, int U_PACKS, int TILE_TOKENS, typename T, typename U,
          typename X, typename S, typename W>
METAL_FUNC void read_tile_cached(U u, X x, S pre, W weight, S scratch, float eps, int count, int C, bool aligned,
                                 int simd, int lane) {
  constexpr int PACKS = packs_at_once(N), TEAMS = SHARERS > 1 ? SIMDS / SHARERS : READERS;
  const int team = simd / SHARERS, c0 = (simd % SHARERS * U_PACKS * 32 + lane) * VEC;
  const bool weight_aligned = is_aligned<VEC>(weight);
  for (int i0 = 0; i0 < TILE_TOKENS; i0 += TEAMS) {
    const int i = i0 + team;
    const bool in_range = team < TEAMS && i < count;
    float o[U_PACKS / PACKS][PACKS][VEC] = {}, u_dot_u = 0.0f;
    UNROLL_FOR (int k = 0; k < U_PACKS / PACKS; ++k) {
      const int c = c0 + k * PACKS * 32 * VEC;
      if (in_range && c < C)
        read_packs<true, N, T>(o[k], x + (size_t(i) * size_t(N * C) + c), pre + i * N, C, C - c, aligned);
    }
    UNROLL_FOR (int k = 0; k < U_PACKS; ++k) {
      const float squares = sum_of_squares(o[k / PACKS][k % PACKS]);
      if (SHARERS == 1) u_dot_u += squares;
      else scratch[(simd * U_PACKS + k) * 32 + lane] = squares;
    }
    if constexpr (SHARERS > 1) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      UNROLL_FOR (int k = 0; k < SHARERS * U_PACKS; ++k) u_dot_u += scratch[(team * SHARERS * U_PACKS + k) * 32 + lane];
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const float r = metal::precise::rsqrt(simd_sum(u_dot_u) / static_cast<float>(C) + eps);
    UNROLL_FOR (int k = 0; k < U_PACKS; ++k) {
      const int c = c0 + k * 32 * VEC;
      if (in_range && c < C)
        store_last(u + (size_t(i) * size_t(C) + c),
                   (finish_u<true, false, T>(o[k / PACKS][k % PACKS], r, weight + c, weight_aligned)));
    }
  }
}

}  // namespace mhc

// mhc_pre: the coefficients that each token makes for itself, and what its sublayer reads.
//
//   l = rsqrt(mean(x**2) + norm_eps) * (phi @ vec(x));   z = alpha * l + bias, in the parts pre [N], post [N], res [R]
//   h_pre = sigmoid(z_pre) + pre_eps;   h_post = post_scale * sigmoid(z_post) + post_eps
//   h_res = sinkhorn_knopp(z_res) with PROJECT, N <= 8;   logits = z_res without PROJECT
//   u = sum_j h_pre[j] x[j], with NORM u * rsqrt(mean(u**2) + eps) * weight
//
// in   x [tokens, N, C] T; phi [NUM_LOGITS, N * C] PHI_T, bias [NUM_LOGITS], alpha [parts], weight [C] any float,
//      NUM_LOGITS = 2 N + R, or N (HEAD), where pre is the only part;
//      params [6 or 8] float, by mhc::param: PRE_EPS, NORM_EPS; without HEAD POST_SCALE, POST_EPS; with PROJECT
//      PROJECTION_EPS, with CLAMP also CLAMP_LOW, CLAMP_HIGH; with NORM EPS
// out  u [tokens, C] T (WRITE_U) or h_pre [tokens, N] float; h_post [tokens, N] float (without HEAD); h_res
//      [tokens, N, N] float (PROJECT) or logits [tokens, R] float; l [tokens, NUM_LOGITS + 1] float (SAVE_LOGITS): l,
//      then the token's rsqrt(mean(x**2) + norm_eps)
// owners  A threadgroup takes tiles of TILE_TOKENS tokens in turn.
//      phi product: a simdgroup takes every SLICES-th run of 32 k, for 8 * TILES tokens and 8 * BLOCK logits at once; x
//      and phi go straight into products of matrices. SPLITS threadgroups may share a tile: each makes a range of
//      logits, and the first also u. RING_BYTES: on CUDA a launch adds so many bytes of threadgroup memory, in which
//      fetched runs arrive. u: a simdgroup takes a token, without NORM half of one; if simdgroups are left that do not
//      project, only these do. x is read once more, from cache as far as that reaches. With NORM, U_SIMDGROUPS
//      simdgroups share a token, and a lane keeps U_PACKS packs of u until it is scaled; where U_PACKS is 0, a
//      simdgroup makes u twice. The order of every sum depends on N and C alone.
// template  T, PHI_T, N, NUM_LOGITS, VEC, THREADS, SLICES, TILES, BLOCK, U_SIMDGROUPS, U_PACKS, SPLITS, RING_BYTES,
//      WRITE_U, NORM, SAVE_LOGITS, PROJECT, ITERS, START, COLUMNS, OUT_COLUMNS, CLAMP
// grid  any multiple of SPLITS threadgroups
#include "coefficients.h"
#include "BACKEND/phi_product_ring.h"
#include "read_tile.h"
constexpr bool HEAD = NUM_LOGITS == N;
constexpr int NUM_RES_LOGITS = HEAD ? 0 : NUM_LOGITS - 2 * N;
constexpr int SIMDS = THREADS / 32;
constexpr int TILE_TOKENS = 8 * TILES * (SIMDS / SLICES);
constexpr int LOGITS_AT_ONCE = 8 * BLOCK;
constexpr int PITCH = LOGITS_AT_ONCE + 1;  // the last column is sum(x ** 2)
static_assert(PITCH <= 32, "a lane finishes each logit");
constexpr int LOGITS_PER_GROUP =
    ((NUM_LOGITS + LOGITS_AT_ONCE - 1) / LOGITS_AT_ONCE + SPLITS - 1) / SPLITS * LOGITS_AT_ONCE;
constexpr int PROJECTION_LANES = PROJECT ? mhc::projection_lanes(N, START, ITERS) : 1;  // so many lanes project a token
constexpr int PROJECTING_SIMDGROUPS = PROJECT ? (TILE_TOKENS * PROJECTION_LANES + 31) / 32 : 0;
constexpr int READING_SIMDGROUPS = PROJECTING_SIMDGROUPS < SIMDS ? SIMDS - PROJECTING_SIMDGROUPS : SIMDS;
static_assert(U_SIMDGROUPS == 1 || SIMDS * U_PACKS * 32 <= SLICES * TILE_TOKENS * PITCH,
              "the squares of u lie where the sums did");
threadgroup float sums[SLICES * TILE_TOKENS * PITCH];
threadgroup float pre[TILE_TOKENS * N];
threadgroup float mix[PROJECT ? TILE_TOKENS * N * N : 1];
const int simd = int(simdgroup_index_in_threadgroup);
const int slice = simd % SLICES,
          first_row = simd / SLICES * TILES * 8;  // the simdgroup's tokens begin at first_row of the tile
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const bool x_aligned = mhc::is_aligned<VEC>(x);
const bool x_and_phi_aligned = mhc::runs_aligned<T, PHI_T>(x, phi, K);
const int logit_begin = int(threadgroup_position_in_grid.x % SPLITS) * LOGITS_PER_GROUP;
const int logit_end = logit_begin + LOGITS_PER_GROUP < NUM_LOGITS ? logit_begin + LOGITS_PER_GROUP : NUM_LOGITS;

const uint token_stride = threadgroups_per_grid.x / SPLITS * TILE_TOKENS;
for (uint first = threadgroup_position_in_grid.x / SPLITS * TILE_TOKENS; first < tokens; first += token_stride) {
  const int lane = mhc::each_turn(int(thread_index_in_simdgroup), first >> 31);
  const mhc::Runs runs = {tokens, K, 32 * slice, 32 * SLICES, lane, simd};
  const int count = tokens - first < uint(TILE_TOKENS) ? int(tokens - first) : TILE_TOKENS;
  for (int o0 = logit_begin; o0 < logit_end; o0 += LOGITS_AT_ONCE) {
    // sum = phi @ vec(x), squares = sum(x ** 2), over the runs of a slice
    float sum[TILES][BLOCK][2] = {}, squares[TILES] = {};
    if (x_and_phi_aligned)
      mhc::accumulate_runs_ring<NUM_LOGITS, THREADS, RING_BYTES, T, PHI_T>(sum, squares, x, phi, runs,
                                                                           first + uint(first_row), o0);
    else mhc::accumulate_runs<false, NUM_LOGITS, T, PHI_T>(sum, squares, x, phi, runs, first + uint(first_row), o0);
    mhc::store_sums(sums + (slice * TILE_TOKENS + first_row) * PITCH, sum, squares, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // h_pre, h_post = gates(alpha * l + bias); a lane finishes each logit
    for (int i = simd; i < TILE_TOKENS; i += SIMDS) {
      const int o = o0 + lane;
      const size_t t = first + uint(i);
      float s = 0.0f;
      UNROLL_FOR (int w = 0; w < SLICES; ++w) s += lane < PITCH ? sums[(w * TILE_TOKENS + i) * PITCH + lane] : 0.0f;
      const float x_dot_x = simd_shuffle(s, ushort(LOGITS_AT_ONCE));
      if (i < count && lane < LOGITS_AT_ONCE && o < NUM_LOGITS) {
        const float h = mhc::finish_logit<N, NUM_LOGITS, SAVE_LOGITS>(o, s, x_dot_x, K, alpha, bias, params,
                                                                      l + t * (NUM_LOGITS + 1));
        if (o < N) {
          pre[i * N + o] = h;
          if (!WRITE_U) h_pre[t * N + o] = h;
        } else if (!HEAD && o < 2 * N) {
          h_post[t * N + (o - N)] = h;
        } else if (PROJECT) {
          mix[i * NUM_RES_LOGITS + (o - 2 * N)] = h;
        } else if (NUM_RES_LOGITS > 0) {
          logits[t * NUM_RES_LOGITS + (o - 2 * N)] = h;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // h_res = sinkhorn_knopp(z_res)
  if constexpr (PROJECT) {
    mhc::project_tile<N, START, COLUMNS, OUT_COLUMNS, ITERS, SIMDS, TILE_TOKENS>(
        mix, h_res, first, tokens, mhc::projection_numbers<CLAMP>(params), simd, lane);
  }

  // u = sum_j h_pre[j] x[j]; of the threadgroups that share a tile, the first makes it
  if constexpr (WRITE_U) {
    const auto tile_x = x + size_t(first) * size_t(K);
    const auto tile_u = u + size_t(first) * size_t(C);
    const float eps = static_cast<float>(params[mhc::param::EPS]);
    const int u_count = logit_begin == 0 ? count : 0;
    if constexpr (U_PACKS > 0) {
      mhc::read_tile_cached<N, VEC, READING_SIMDGROUPS, SIMDS, U_SIMDGROUPS, U_PACKS, TILE_TOKENS, T>(
          tile_u, tile_x, pre, weight, sums, eps, u_count, C, x_aligned, simd, lane);
    } else if (simd < READING_SIMDGROUPS) {
      if constexpr (NORM)
        mhc::read_tile_twice<N, VEC, READING_SIMDGROUPS, T>(tile_u, tile_x, pre, weight, eps, u_count, C, x_aligned,
                                                            simd, lane);
      else mhc::read_tile<N, VEC, READING_SIMDGROUPS, T>(tile_u, tile_x, pre, u_count, C, x_aligned, simd, lane);
    }
  }
}

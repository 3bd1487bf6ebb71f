// mhc_pre: the coefficients that each token makes for itself, and what its sublayer reads.
//
//   l = rsqrt(mean(x**2) + norm_eps) * (phi @ vec(x));   z = alpha * l + bias, in the parts pre [N], post [N], res [R]
//   h_pre = sigmoid(z_pre) + pre_eps;   h_post = post_scale * sigmoid(z_post) + post_eps
//   h_res = sinkhorn_knopp(z_res) with PROJECT, N <= 8;   logits = z_res without PROJECT
//   u = sum_j h_pre[j] x[j], with NORM u * rsqrt(mean(u**2) + eps) * weight
//
// in   x [tokens, N, C] T; phi [NUM_LOGITS, N * C] PHI_T, bias [NUM_LOGITS], alpha [parts], weight [C] any float,
//      NUM_LOGITS = 2 N + R, with HEAD N, whose only part is pre;
//      params [6] float, by mhc::param: PRE_EPS, NORM_EPS; without HEAD POST_SCALE, POST_EPS; with PROJECT
//      PROJECTION_EPS; with NORM EPS
// out  h_pre [tokens, N] float (WRITE_H_PRE), h_post [tokens, N] float (without HEAD), h_res [tokens, N, N] float
//      (PROJECT), logits [tokens, R] float (without PROJECT), u [tokens, C] T (WRITE_U),
//      l [tokens, NUM_LOGITS + 1] float (SAVE_LOGITS): l, then the token's rsqrt(mean(x**2) + norm_eps)
// owners  A threadgroup takes tiles of TILE_TOKENS tokens in turn.
//      phi product: a simdgroup takes every SLICES-th run of 32 k, for 8 * TILES tokens and 8 * BLOCK logits at once; x
//      and phi go straight into products of matrices. SPLITS threadgroups may share a tile: each makes a range of
//      logits, and the first also u. RING_BYTES: on CUDA a launch adds so many bytes of threadgroup memory, in which
//      fetched runs arrive. u: a simdgroup takes a token, without NORM half of one; if simdgroups are left that do not
//      project, only these do. x is read once more, from cache as far as that reaches. With NORM, U_SIMDGROUPS
//      simdgroups share a token, and a lane keeps U_PACKS packs of u until it is scaled; where U_PACKS is 0, a
//      simdgroup makes u twice. The order of every sum depends on N and C alone.
// template  T, PHI_T, N, NUM_LOGITS, VEC, THREADS, SLICES, TILES, BLOCK, U_SIMDGROUPS, U_PACKS, SPLITS, RING_BYTES,
//      HEAD, WRITE_U, NORM, WRITE_H_PRE, SAVE_LOGITS, PROJECT, ITERS, START, COLUMNS, OUT_COLUMNS
// grid  any multiple of SPLITS threadgroups
#include "coefficients.h"
#include "BACKEND/phi_product_ring.h"
#include "streams.h"
constexpr int SIMDS = THREADS / 32;
constexpr int TILE_TOKENS = 8 * TILES * (SIMDS / SLICES);
constexpr int LOGITS_AT_ONCE = 8 * BLOCK;
constexpr int PITCH = LOGITS_AT_ONCE + 1;  // the last column is sum(x ** 2)
static_assert(PITCH <= 32, "a lane finishes each logit");
constexpr int LOGITS_PER_GROUP = ((NUM_LOGITS + LOGITS_AT_ONCE - 1) / LOGITS_AT_ONCE + SPLITS - 1) / SPLITS * LOGITS_AT_ONCE;
constexpr int NUM_RES_LOGITS = HEAD ? 0 : NUM_LOGITS - 2 * N;
constexpr int PACKS_AT_ONCE = N <= 2 ? 4 : N <= 4 ? 2 : 1;  // packs of u
constexpr int PROJECTION_LANES = PROJECT ? mhc::projection_lanes(N, START, ITERS) : 1;  // lanes that project a token
constexpr int PROJECTING_SIMDGROUPS = PROJECT ? (TILE_TOKENS * PROJECTION_LANES + 31) / 32 : 0;
constexpr int READING_SIMDGROUPS = PROJECTING_SIMDGROUPS < SIMDS ? SIMDS - PROJECTING_SIMDGROUPS : SIMDS;
constexpr int PIECES_PER_TOKEN = NORM ? 1 : 2;  // the smaller they are, the shorter the others wait for the last
constexpr bool CACHES_U = WRITE_U && NORM && U_PACKS > 0;
constexpr int LANE_PACKS = CACHES_U ? U_PACKS : PACKS_AT_ONCE;
threadgroup float sums[SLICES * TILE_TOKENS * PITCH];
threadgroup float pre[TILE_TOKENS * N];
threadgroup float mix[PROJECT ? TILE_TOKENS * N * N : 1];
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int slice = simd % SLICES, first_row = simd / SLICES * TILES * 8;  // first_row: the simdgroup's first token in the tile
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const bool x_aligned = mhc::is_aligned<VEC>(x);
const bool x_and_phi_aligned = K % 32 == 0 && mhc::is_aligned<mhc::run_vec<T, 8>()>(x) && mhc::is_aligned<mhc::run_vec<PHI_T, 8 / mhc::PHI_ROWS>()>(phi);
const int logit_begin = int(threadgroup_position_in_grid.x % SPLITS) * LOGITS_PER_GROUP;
const int logit_end = logit_begin + LOGITS_PER_GROUP < NUM_LOGITS ? logit_begin + LOGITS_PER_GROUP : NUM_LOGITS;

const mhc::Runs runs = {tokens, K, 32 * slice, 32 * SLICES, lane, simd};
const uint token_stride = threadgroups_per_grid.x / SPLITS * TILE_TOKENS;
for (uint first = threadgroup_position_in_grid.x / SPLITS * TILE_TOKENS; first < tokens; first += token_stride) {
  for (int o0 = logit_begin; o0 < logit_end; o0 += LOGITS_AT_ONCE) {
    float sum[TILES][BLOCK][2] = {}, squares[TILES] = {};
    if (x_and_phi_aligned) mhc::accumulate_runs_ring<NUM_LOGITS, THREADS, RING_BYTES, T, PHI_T>(sum, squares, x, phi, runs, first + uint(first_row), o0);
    else mhc::accumulate_runs<false, NUM_LOGITS, T, PHI_T>(sum, squares, x, phi, runs, first + uint(first_row), o0);
    UNROLL for (int m = 0; m < TILES; ++m) {
      const int row = (slice * TILE_TOKENS + first_row + m * 8) * PITCH;
      UNROLL for (int b = 0; b < BLOCK; ++b) {
        UNROLL for (int e = 0; e < 2; ++e)
          sums[row + mhc::sum_token(lane) * PITCH + b * 8 + mhc::sum_logit(lane, e)] = sum[m][b][e];
      }
      const float s = mhc::sum_squares(squares[m]);
      if (mhc::x_k(lane) == 0) sums[row + mhc::x_row(lane) * PITCH + LOGITS_AT_ONCE] = s;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (int i = simd; i < TILE_TOKENS; i += SIMDS) {  // a lane finishes each logit
      const int o = o0 + lane, part = mhc::part_of<N>(o);
      const size_t t = first + uint(i);
      float s = 0.0f;
      UNROLL for (int w = 0; w < SLICES; ++w) s += lane < PITCH ? sums[(w * TILE_TOKENS + i) * PITCH + lane] : 0.0f;
      const float x_dot_x = simd_shuffle(s, ushort(LOGITS_AT_ONCE));
      if (t < tokens && lane < LOGITS_AT_ONCE && o < NUM_LOGITS) {
        const float scale = metal::precise::rsqrt(x_dot_x / static_cast<float>(K) + static_cast<float>(params[mhc::param::NORM_EPS]));
        const float logit = scale * s;
        const float z = static_cast<float>(alpha[part]) * logit + static_cast<float>(bias[o]);
        if (SAVE_LOGITS) l[t * (NUM_LOGITS + 1) + o] = logit;
        if (SAVE_LOGITS && o == 0) l[t * (NUM_LOGITS + 1) + NUM_LOGITS] = scale;
        if (part == 0) {
          const float h = mhc::gate(z, part, params);
          pre[i * N + o] = h;
          if (WRITE_H_PRE) h_pre[t * N + o] = h;
        } else if (!HEAD && part == 1) {
          h_post[t * N + (o - N)] = mhc::gate(z, part, params);
        } else if (PROJECT) {
          mix[i * NUM_RES_LOGITS + (o - 2 * N)] = z;
        } else if (NUM_RES_LOGITS > 0) {
          logits[t * NUM_RES_LOGITS + (o - 2 * N)] = z;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  if constexpr (PROJECT) {  // the last simdgroups project; the others go on to u
    for (int m0 = (SIMDS - 1 - simd) * (32 / PROJECTION_LANES); m0 < TILE_TOKENS; m0 += THREADS / PROJECTION_LANES) {
      const int m = m0 + lane / PROJECTION_LANES;
      const size_t t = first + uint(m);
      const bool in_range = m < TILE_TOKENS && t < tokens;
      mhc::project_token<N, START, COLUMNS, OUT_COLUMNS, ITERS>(
          mix + (in_range ? m : 0) * N * N, h_res + (in_range ? t : 0) * (N * N), in_range, static_cast<float>(params[mhc::param::PROJECTION_EPS]), lane);
    }
  }

  if constexpr (CACHES_U) {
    constexpr int U_TEAMS = U_SIMDGROUPS > 1 ? SIMDS / U_SIMDGROUPS : READING_SIMDGROUPS;
    static_assert(U_SIMDGROUPS == 1 || SIMDS * LANE_PACKS * 32 <= SLICES * TILE_TOKENS * PITCH, "the squares lie where the sums did");
    for (int i0 = 0; i0 < TILE_TOKENS; i0 += U_TEAMS) {
      const int i = i0 + simd / U_SIMDGROUPS, c0 = (simd % U_SIMDGROUPS * LANE_PACKS * 32 + lane) * VEC;
      const size_t t = first + uint(i);
      const bool in_range = simd < U_TEAMS * U_SIMDGROUPS && i < TILE_TOKENS && t < tokens && logit_begin == 0;
      float o[LANE_PACKS / PACKS_AT_ONCE][PACKS_AT_ONCE][VEC] = {}, u_dot_u = 0.0f, pack_squares[LANE_PACKS];
      UNROLL for (int k = 0; k < LANE_PACKS / PACKS_AT_ONCE; ++k) {
        const int c = c0 + k * PACKS_AT_ONCE * 32 * VEC;
        if (in_range && c < C) {
          if (!x_aligned || c + (PACKS_AT_ONCE - 1) * 32 * VEC >= C) mhc::read_ragged<N, T>(o[k], x + (t * size_t(K) + c), pre + i * N, C, C - c, x_aligned);
          else mhc::read_streams<true, N, T>(o[k], x + (t * size_t(K) + c), pre + i * N, C);
        }
      }
      UNROLL for (int k = 0; k < LANE_PACKS; ++k) {
        pack_squares[k] = 0.0f;
        UNROLL for (int e = 0; e < VEC; ++e) pack_squares[k] += o[k / PACKS_AT_ONCE][k % PACKS_AT_ONCE][e] * o[k / PACKS_AT_ONCE][k % PACKS_AT_ONCE][e];
        if (U_SIMDGROUPS == 1) u_dot_u += pack_squares[k];
        else sums[(simd * LANE_PACKS + k) * 32 + lane] = pack_squares[k];
      }
      if constexpr (U_SIMDGROUPS > 1) {  // the squares are added in the order of one simdgroup
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL for (int k = 0; k < U_SIMDGROUPS * LANE_PACKS; ++k) u_dot_u += sums[(simd / U_SIMDGROUPS * U_SIMDGROUPS * LANE_PACKS + k) * 32 + lane];
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      const float r = metal::precise::rsqrt(simd_sum(u_dot_u) / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));
      UNROLL for (int k = 0; k < LANE_PACKS; ++k) {
        const int c = c0 + k * 32 * VEC;
        if (in_range && c < C) {
          float w[VEC];
          mhc::load_floats<VEC>(w, weight + c, mhc::is_aligned<VEC>(weight));
          mhc::Pack<T, VEC> packed;
          UNROLL for (int e = 0; e < VEC; ++e) packed.v[e] = static_cast<T>(o[k / PACKS_AT_ONCE][k % PACKS_AT_ONCE][e] * r * w[e]);
          STORE_STREAMING((device mhc::Pack<T, VEC>*)(u + t * size_t(C) + c), packed);
        }
      }
    }
  }

  for (int q = simd; WRITE_U && !CACHES_U && simd < READING_SIMDGROUPS && q < TILE_TOKENS * PIECES_PER_TOKEN && first + uint(q / PIECES_PER_TOKEN) < tokens && logit_begin == 0; q += READING_SIMDGROUPS) {
    const int i = q / PIECES_PER_TOKEN;
    const size_t t = first + uint(i);
    const auto row = x + t * size_t(K);
    float u_dot_u = 0.0f, r = 1.0f;
    UNROLL for (int phase = NORM ? 0 : 1; phase < 2; ++phase) {
      for (int c0 = (q % PIECES_PER_TOKEN * PACKS_AT_ONCE * 32 + lane) * VEC; c0 < C; c0 += PIECES_PER_TOKEN * PACKS_AT_ONCE * 32 * VEC) {
        float o[PACKS_AT_ONCE][VEC] = {};
        if (!x_aligned || c0 + (PACKS_AT_ONCE - 1) * 32 * VEC >= C) mhc::read_ragged<N, T>(o, row + c0, pre + i * N, C, C - c0, x_aligned);
        else if (phase == 0) mhc::read_streams<false, N, T>(o, row + c0, pre + i * N, C);
        else mhc::read_streams<true, N, T>(o, row + c0, pre + i * N, C);
        UNROLL for (int k = 0; k < PACKS_AT_ONCE; ++k) {
          const int c = c0 + k * 32 * VEC;
          if (c < C) {
            if (phase == 0) {
              float pack_squares = 0.0f;
              UNROLL for (int e = 0; e < VEC; ++e) pack_squares += o[k][e] * o[k][e];
              u_dot_u += pack_squares;
            } else {
              float w[VEC];
              if (NORM) mhc::load_floats<VEC>(w, weight + c, mhc::is_aligned<VEC>(weight));
              mhc::Pack<T, VEC> packed;
              UNROLL for (int e = 0; e < VEC; ++e) packed.v[e] = static_cast<T>(NORM ? o[k][e] * r * w[e] : o[k][e]);
              STORE_STREAMING((device mhc::Pack<T, VEC>*)(u + t * size_t(C) + c), packed);
            }
          }
        }
      }
      if (phase == 0) r = metal::precise::rsqrt(simd_sum(u_dot_u) / static_cast<float>(C) + static_cast<float>(params[mhc::param::EPS]));
    }
  }
}

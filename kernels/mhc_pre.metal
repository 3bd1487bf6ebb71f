// mhc_pre: the coefficients that each token makes for itself, and what its sublayer reads.
//
//   l = rsqrt(mean(x**2) + norm_eps) * (phi @ vec(x));   z = alpha * l + bias, in the parts pre [N], post [N], res [R]
//   h_pre = sigmoid(z_pre) + pre_eps;   h_post = post_scale * sigmoid(z_post) + post_eps
//   PROJECT: h_res = sinkhorn_knopp(z_res), N <= 8; otherwise logits = z_res
//   u = sum_j h_pre[j] x[j], or with NORM u = rms_norm(u, weight, eps)
//
// in   x [tokens, N, C] T; phi [OUTS, N * C] P, bias [OUTS], alpha [parts], weight [C] any float, OUTS = 2 N + R (N for
//      HEAD); params [6] float: pre_eps, post_scale, post_eps, norm_eps, eps, the projection's eps
// out  h_pre, h_post [tokens, N], h_res [tokens, N, N], logits [tokens, R] float, u [tokens, C] T, as far as they are
//      asked for; SAVE: l [tokens, OUTS + 1] float, whose last is the token's rsqrt(mean(x**2) + norm_eps)
// own  a threadgroup takes tiles of TILE tokens in turn. Projection: of the runs of 32 k a simdgroup takes every
//      SLICES-th, for 8 * TILES tokens and 8 * BLOCK outputs at once; x and phi go straight into products of matrices.
//      SPLITS threadgroups may share a tile: each makes a range of outputs, the first also u.
//      u: a simdgroup takes a token, or without NORM half of one, of those that do not project if any are left; x is read
//      once more, from cache as far as that reaches. With NORM a lane keeps HELD packs of u until it is scaled, and TEAM
//      simdgroups share a token; where HELD is 0 a simdgroup makes it twice.
//      The order of every sum depends on N and C alone.
// template  T, P, N, OUTS, VEC, THREADS, SLICES, TILES, BLOCK, SPLITS, HEAD, READ (u is made), NORM, TEAM, HELD, WRITE_PRE,
//           SAVE, RING (bytes that a launch gives on CUDA for what is on its way), PROJECT, ITERS, START, COLUMNS, OUT_COLUMNS
#include "coefficients.h"
#include "ring_BACKEND.h"
#include "streams.h"
constexpr int SIMDS = THREADS / 32;
constexpr int TILE = 8 * TILES * (SIMDS / SLICES);
constexpr int WIDE = 8 * BLOCK;  // outputs at once
constexpr int PITCH = WIDE + 1;  // and sum(x ** 2)
static_assert(PITCH <= 32, "a lane for each output");
constexpr int SHARE = ((OUTS + WIDE - 1) / WIDE + SPLITS - 1) / SPLITS * WIDE;  // outputs of a threadgroup
constexpr int R = HEAD ? 0 : OUTS - 2 * N;
constexpr int CHUNKS = N <= 2 ? 4 : N <= 4 ? 2 : 1;           // packs of u that a lane makes at once
constexpr int LANES = PROJECT ? mhc::projecting(N, START, ITERS) : 1;  // of a token's projection
constexpr int BUSY = PROJECT ? (TILE * LANES + 31) / 32 : 0;  // simdgroups that project
constexpr int READERS = BUSY < SIMDS ? SIMDS - BUSY : SIMDS;
constexpr int PIECES = NORM ? 1 : 2;  // of a token, for simdgroups in turn: less to wait for the last
constexpr bool KEEPS = READ && NORM && HELD > 0;
constexpr int KEPT = KEEPS ? HELD : CHUNKS;
threadgroup float sums[SLICES * TILE * PITCH];
threadgroup float pre[TILE * N];
threadgroup float mix[PROJECT ? TILE * N * N : 1];
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int slice = simd % SLICES, band = simd / SLICES * TILES * 8;  // of k; of tokens
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const bool whole = mhc::aligned<VEC>(x);
const bool all_whole = K % 32 == 0 && mhc::aligned<mhc::run_vec<T, 8>()>(x) && mhc::aligned<mhc::run_vec<P, 8 / mhc::PHI_ROWS>()>(phi);
const int begin = int(threadgroup_position_in_grid.x % SPLITS) * SHARE;
const int end = begin + SHARE < OUTS ? begin + SHARE : OUTS;

const mhc::Course course = {tokens, K, 32 * slice, 32 * SLICES, lane, simd};
const uint turn = threadgroups_per_grid.x / SPLITS * TILE;
for (uint first = threadgroup_position_in_grid.x / SPLITS * TILE; first < tokens; first += turn) {
  for (int o0 = begin; o0 < end; o0 += WIDE) {
    float sum[TILES][BLOCK][2] = {}, squares[TILES] = {};
    if (all_whole) mhc::sweep_ring<OUTS, THREADS, RING, T, P>(sum, squares, x, phi, course, first + uint(band), o0);
    else mhc::sweep<false, OUTS, T, P>(sum, squares, x, phi, course, first + uint(band), o0);
    UNROLL for (int m = 0; m < TILES; ++m) {
      const int row = (slice * TILE + band + m * 8) * PITCH;
      UNROLL for (int b = 0; b < BLOCK; ++b) {
        UNROLL for (int e = 0; e < 2; ++e)
          sums[row + mhc::sum_token(lane) * PITCH + b * 8 + mhc::sum_output(lane, e)] = sum[m][b][e];
      }
      const float s = mhc::sum_squares(squares[m]);
      if (mhc::x_k(lane) == 0) sums[row + mhc::x_row(lane) * PITCH + WIDE] = s;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (int i = simd; i < TILE; i += SIMDS) {  // a lane for each output
      const int o = o0 + lane, part = mhc::part_of<N>(o);
      const size_t t = first + uint(i);
      float s = 0.0f;
      UNROLL for (int w = 0; w < SLICES; ++w) s += lane < PITCH ? sums[(w * TILE + i) * PITCH + lane] : 0.0f;
      const float square = simd_shuffle(s, ushort(WIDE));
      if (t < tokens && lane < WIDE && o < OUTS) {
        const float scale = metal::precise::rsqrt(square / static_cast<float>(K) + static_cast<float>(params[3]));
        const float unit = scale * s;
        const float z = static_cast<float>(alpha[part]) * unit + static_cast<float>(bias[o]);
        if (SAVE) l[t * (OUTS + 1) + o] = unit;
        if (SAVE && o == 0) l[t * (OUTS + 1) + OUTS] = scale;
        if (part == 0) {
          const float h = mhc::gate(z, part, params);
          pre[i * N + o] = h;
          if (WRITE_PRE) h_pre[t * N + o] = h;
        } else if (!HEAD && part == 1) {
          h_post[t * N + (o - N)] = mhc::gate(z, part, params);
        } else if (PROJECT) {
          mix[i * R + (o - 2 * N)] = z;
        } else if (R > 0) {
          logits[t * R + (o - 2 * N)] = z;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  if constexpr (PROJECT) {  // by the last simdgroups; the others go on to u
    for (int m0 = (SIMDS - 1 - simd) * (32 / LANES); m0 < TILE; m0 += THREADS / LANES) {
      const int m = m0 + lane / LANES;
      const size_t t = first + uint(m);
      const bool live = m < TILE && t < tokens;
      mhc::project_token<N, START, COLUMNS, OUT_COLUMNS, ITERS>(
          mix + (live ? m : 0) * N * N, h_res + (live ? t : 0) * (N * N), live, static_cast<float>(params[5]), lane);
    }
  }

  if constexpr (KEEPS) {
    constexpr int TEAMS = TEAM > 1 ? SIMDS / TEAM : READERS;
    static_assert(TEAM == 1 || SIMDS * KEPT * 32 <= SLICES * TILE * PITCH, "squares lie where sums did");
    for (int i0 = 0; i0 < TILE; i0 += TEAMS) {
      const int i = i0 + simd / TEAM, c0 = (simd % TEAM * KEPT * 32 + lane) * VEC;
      const size_t t = first + uint(i);
      const bool live = simd < TEAMS * TEAM && i < TILE && t < tokens && begin == 0;
      float o[KEPT / CHUNKS][CHUNKS][VEC] = {}, squared = 0.0f, some[KEPT];
      UNROLL for (int k = 0; k < KEPT / CHUNKS; ++k) {
        const int c = c0 + k * CHUNKS * 32 * VEC;
        if (live && c < C) {
          if (!whole || c + (CHUNKS - 1) * 32 * VEC >= C) mhc::read_ragged<N, T>(o[k], x + (t * size_t(K) + c), pre + i * N, C, C - c, whole);
          else mhc::read_streams<true, N, T>(o[k], x + (t * size_t(K) + c), pre + i * N, C);
        }
      }
      UNROLL for (int k = 0; k < KEPT; ++k) {
        some[k] = 0.0f;
        UNROLL for (int e = 0; e < VEC; ++e) some[k] += o[k / CHUNKS][k % CHUNKS][e] * o[k / CHUNKS][k % CHUNKS][e];
        if (TEAM == 1) squared += some[k];
        else sums[(simd * KEPT + k) * 32 + lane] = some[k];
      }
      if constexpr (TEAM > 1) {  // added as one simdgroup would
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL for (int k = 0; k < TEAM * KEPT; ++k) squared += sums[(simd / TEAM * TEAM * KEPT + k) * 32 + lane];
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      const float r = metal::precise::rsqrt(simd_sum(squared) / static_cast<float>(C) + static_cast<float>(params[4]));
      UNROLL for (int k = 0; k < KEPT; ++k) {
        const int c = c0 + k * 32 * VEC;
        if (live && c < C) {
          float w[VEC];
          mhc::load_floats<VEC>(w, weight + c, mhc::aligned<VEC>(weight));
          mhc::Pack<T, VEC> packed;
          UNROLL for (int e = 0; e < VEC; ++e) packed.v[e] = static_cast<T>(o[k / CHUNKS][k % CHUNKS][e] * r * w[e]);
          STORE_STREAMING((device mhc::Pack<T, VEC>*)(u + t * size_t(C) + c), packed);
        }
      }
    }
  }

  for (int q = simd; READ && !KEEPS && simd < READERS && q < TILE * PIECES && first + uint(q / PIECES) < tokens && begin == 0; q += READERS) {
    const int i = q / PIECES;
    const size_t t = first + uint(i);
    const auto row = x + t * size_t(K);
    float squared = 0.0f, r = 1.0f;
    UNROLL for (int sweep = NORM ? 0 : 1; sweep < 2; ++sweep) {
      for (int c0 = (q % PIECES * CHUNKS * 32 + lane) * VEC; c0 < C; c0 += PIECES * CHUNKS * 32 * VEC) {
        float o[CHUNKS][VEC] = {};
        if (!whole || c0 + (CHUNKS - 1) * 32 * VEC >= C) mhc::read_ragged<N, T>(o, row + c0, pre + i * N, C, C - c0, whole);
        else if (sweep == 0) mhc::read_streams<false, N, T>(o, row + c0, pre + i * N, C);
        else mhc::read_streams<true, N, T>(o, row + c0, pre + i * N, C);
        UNROLL for (int k = 0; k < CHUNKS; ++k) {
          const int c = c0 + k * 32 * VEC;
          if (c < C) {
            if (sweep == 0) {
              float some = 0.0f;
              UNROLL for (int e = 0; e < VEC; ++e) some += o[k][e] * o[k][e];
              squared += some;
            } else {
              float w[VEC];
              if (NORM) mhc::load_floats<VEC>(w, weight + c, mhc::aligned<VEC>(weight));
              mhc::Pack<T, VEC> packed;
              UNROLL for (int e = 0; e < VEC; ++e) packed.v[e] = static_cast<T>(NORM ? o[k][e] * r * w[e] : o[k][e]);
              STORE_STREAMING((device mhc::Pack<T, VEC>*)(u + t * size_t(C) + c), packed);
            }
          }
        }
      }
      if (sweep == 0) r = metal::precise::rsqrt(simd_sum(squared) / static_cast<float>(C) + static_cast<float>(params[4]));
    }
  }
}

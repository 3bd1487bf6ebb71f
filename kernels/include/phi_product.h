// The phi product, sums over k of products of matrices: tiles of 8 tokens x 32 k by 8 logits x 32 k.
#include "BACKEND/matrices.h"

namespace mhc {

// LaneRuns are a lane's elements of a run, of TILES tiles of tokens and BLOCK tiles of logits.
template <typename T, typename PHI_T, int TILES, int BLOCK> struct LaneRuns {
  Run<T, 8> xs[TILES];
  Run<PHI_T, 8 / PHI_ROWS> ps[BLOCK][PHI_ROWS];
};

// RunPointers say where a lane reads them: the addresses of a run of the first token and logit, the same in all lanes,
// and a lane's offsets from there, within at most 16 rows of x and 24 of phi. Rows past the last are clamped to the
// first; their sums are discarded.
template <typename XP, typename PP, int TILES, int BLOCK> struct RunPointers {
  XP x;
  PP phi;
  int x_at[TILES], phi_at[BLOCK][PHI_ROWS];
};
// Returns the pointers at k, for tokens from `token` on and logits from `logit` on.
template <int TILES, int BLOCK, int NUM_LOGITS, typename XP, typename PP>
METAL_FUNC RunPointers<XP, PP, TILES, BLOCK> run_pointers(XP x, PP phi, uint tokens, int K, uint token, int logit,
                                                          int k, int lane) {
  RunPointers<XP, PP, TILES, BLOCK> pointers;
  pointers.x = x + (size_t(token < tokens ? token : 0u) * size_t(K) + size_t(k));
  pointers.phi = phi + (size_t(logit) * size_t(K) + size_t(k));
  UNROLL_FOR (int m = 0; m < TILES; ++m) {
    const int t = m * 8 + x_row(lane);
    pointers.x_at[m] = (token + uint(t) < tokens ? t : 0) * K + x_k(lane);
  }
  UNROLL_FOR (int b = 0; b < BLOCK; ++b) {
    UNROLL_FOR (int q = 0; q < PHI_ROWS; ++q) {
      const int o = b * 8 + phi_row(lane) + q;
      pointers.phi_at[b][q] = (NUM_LOGITS % (8 * BLOCK) == 0 || logit + o < NUM_LOGITS ? o : 0) * K + phi_k(lane);
    }
  }
  return pointers;
}

// sum[token, logit] += x phi^T and squares[token] += sum(x ** 2) over the run in lane_runs; then pointers are `step`
// further on. LOAD_NEXT: lane_runs then holds the aligned run there; each register is loaded again as soon as it has
// been used.
template <bool LOAD_NEXT, typename T, typename PHI_T, int TILES, int BLOCK, typename XP, typename PP>
METAL_FUNC void multiply_run(thread float (&sum)[TILES][BLOCK][2], thread float (&squares)[TILES],
                             thread LaneRuns<T, PHI_T, TILES, BLOCK>& lane_runs,
                             thread RunPointers<XP, PP, TILES, BLOCK>& pointers, int step) {
  XTile<T> xt[TILES];
  pointers.x += step;
  pointers.phi += step;
  UNROLL_FOR (int m = 0; m < TILES; ++m) {
    to_tile(xt[m], lane_runs.xs[m]);
    add_squares(squares[m], xt[m], lane_runs.xs[m]);
    if (LOAD_NEXT) load_run<true>(lane_runs.xs[m], at(pointers.x, pointers.x_at[m]), 8);
  }
  UNROLL_FOR (int b = 0; b < BLOCK; ++b) {
    PhiTile<PHI_T> pt;
    to_tile(pt, lane_runs.ps[b]);
    multiply_add(sum, b, xt, pt);
    UNROLL_FOR (int q = 0; q < PHI_ROWS && LOAD_NEXT; ++q)
      load_run<true>(lane_runs.ps[b][q], at(pointers.phi, pointers.phi_at[b][q]), 8);
  }
}

// The same over the run at pointers, of which `remaining` elements are left, at any alignment. It is loaded when it is
// needed: single elements take many registers.
template <typename T, typename PHI_T, int TILES, int BLOCK, typename XP, typename PP>
METAL_FUNC void multiply_ragged_run(thread float (&sum)[TILES][BLOCK][2], thread float (&squares)[TILES],
                                    const thread RunPointers<XP, PP, TILES, BLOCK>& pointers, int remaining, int lane) {
  XTile<T> xt[TILES];
  UNROLL_FOR (int m = 0; m < TILES; ++m) {
    Run<T, 8> r;
    load_run<false>(r, at(pointers.x, pointers.x_at[m]), remaining - x_k(lane));
    to_tile(xt[m], r);
    add_squares(squares[m], xt[m], r);
  }
  UNROLL_FOR (int b = 0; b < BLOCK; ++b) {
    PhiTile<PHI_T> pt;
    Run<PHI_T, 8 / PHI_ROWS> r[PHI_ROWS];
    UNROLL_FOR (int q = 0; q < PHI_ROWS; ++q)
      load_run<false>(r[q], at(pointers.phi, pointers.phi_at[b][q]), remaining - phi_k(lane));
    to_tile(pt, r);
    multiply_add(sum, b, xt, pt);
  }
}

// The runs of a simdgroup lie at k = first, first + step, ... < K.
struct Runs {
  uint tokens;
  int K, first, step, lane, simd;
};

// Adds the sums over these runs, for tokens from `token` on and logits from `logit` on. ALIGNED: x and phi are aligned,
// and K % 32 == 0.
template <bool ALIGNED, int NUM_LOGITS, typename T, typename PHI_T, int TILES, int BLOCK, typename XP, typename PP>
METAL_FUNC void accumulate_runs(thread float (&sum)[TILES][BLOCK][2], thread float (&squares)[TILES], XP x, PP phi,
                                const thread Runs& runs, uint token, int logit) {
  if (runs.first < runs.K) {
    auto pointers =
        run_pointers<TILES, BLOCK, NUM_LOGITS>(x, phi, runs.tokens, runs.K, token, logit, runs.first, runs.lane);
    if constexpr (ALIGNED) {
      LaneRuns<T, PHI_T, TILES, BLOCK> lane_runs;
      UNROLL_FOR (int m = 0; m < TILES; ++m) load_run<true>(lane_runs.xs[m], at(pointers.x, pointers.x_at[m]), 8);
      UNROLL_FOR (int b = 0; b < BLOCK; ++b) {
        UNROLL_FOR (int q = 0; q < PHI_ROWS; ++q)
          load_run<true>(lane_runs.ps[b][q], at(pointers.phi, pointers.phi_at[b][q]), 8);
      }
      for (int k = runs.first + runs.step; k < runs.K; k += runs.step)
        multiply_run<true>(sum, squares, lane_runs, pointers, runs.step);
      multiply_run<false>(sum, squares, lane_runs, pointers, runs.step);
    } else {
      for (int k = runs.first; k < runs.K; k += runs.step) {
        multiply_ragged_run<T, PHI_T>(sum, squares, pointers, runs.K - k, runs.lane);
        pointers.x += runs.step;
        pointers.phi += runs.step;
      }
    }
  }
}

// Returns whether x and phi are aligned and K % 32 == 0.
template <typename T, typename PHI_T, typename XP, typename PP> METAL_FUNC bool runs_aligned(XP x, PP phi, int K) {
  return K % 32 == 0 && is_aligned<run_vec<T, 8>()>(x) && is_aligned<run_vec<PHI_T, 8 / PHI_ROWS>()>(phi);
}

// Each token gets a row of sums: its 8 * BLOCK logits, then sum(x ** 2).
template <int TILES, int BLOCK, typename S>
METAL_FUNC void store_sums(S sums, thread const float (&sum)[TILES][BLOCK][2], thread const float (&squares)[TILES],
                           int lane) {
  constexpr int PITCH = 8 * BLOCK + 1;
  UNROLL_FOR (int m = 0; m < TILES; ++m) {
    UNROLL_FOR (int b = 0; b < BLOCK; ++b) {
      UNROLL_FOR (int e = 0; e < 2; ++e)
        sums[(m * 8 + sum_token(lane)) * PITCH + b * 8 + sum_logit(lane, e)] = sum[m][b][e];
    }
    const float s = sum_squares(squares[m]);
    if (x_k(lane) == 0) sums[(m * 8 + x_row(lane)) * PITCH + 8 * BLOCK] = s;
  }
}

}  // namespace mhc

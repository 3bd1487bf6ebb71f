// Sums over k of products of tiles, 8 tokens x 32 k by 8 outputs x 32 k.
#include "tiles_BACKEND.h"

namespace mhc {

// A lane's share of a run of 32 k: of TILES tiles of tokens and BLOCK of outputs.
template <typename T, typename P, int TILES, int BLOCK> struct Loaded {
  Run<T, 8> xs[TILES];
  Run<P, 8 / PHI_ROWS> ps[BLOCK][PHI_ROWS];
};

// The run at k = first, of tokens from `token` on and outputs from `output` on. WHOLE: all is aligned, and K % 32 == 0: in
// a shorter last run a lane with nothing left would use what it holds again.
template <bool WHOLE, int OUTS, typename T, typename P, int TILES, int BLOCK, typename XP, typename PP>
inline void load_first(thread Loaded<T, P, TILES, BLOCK>& runs, XP x, PP phi, uint tokens, int K, uint token, int output, int first, int lane) {
  UNROLL for (int m = 0; m < TILES; ++m) {
    const uint t = token + uint(m * 8 + x_row(lane));
    load_run<WHOLE>(runs.xs[m], x + (size_t(t < tokens ? t : 0u) * size_t(K) + size_t(first + x_k(lane))), t < tokens ? K - first - x_k(lane) : 0);
  }
  UNROLL for (int b = 0; b < BLOCK; ++b) {
    UNROLL for (int q = 0; q < PHI_ROWS; ++q) {
      const int o = output + b * 8 + phi_row(lane) + q;
      const bool made = OUTS % (8 * BLOCK) == 0 || o < OUTS;
      load_run<WHOLE>(runs.ps[b][q], phi + (size_t(made ? o : 0) * size_t(K) + size_t(first + phi_k(lane))), made ? K - first - phi_k(lane) : 0);
    }
  }
}

// Over the runs at first, of which `runs` has this, first + step, ...: sum[token, output] += x phi^T and
// squares[token] += sum(x ** 2).
template <bool WHOLE, int OUTS, typename T, typename P, int TILES, int BLOCK, typename XP, typename PP>
inline void sweep(thread float (&sum)[TILES][BLOCK][2], thread float (&squares)[TILES][2], thread Loaded<T, P, TILES, BLOCK>& runs,
                  XP x, PP phi, uint tokens, int K, uint token, int output, int first, int step, int lane) {
  XP x_at[TILES];
  PP p_at[BLOCK][PHI_ROWS];
  bool live[TILES], made[BLOCK][PHI_ROWS];
  UNROLL for (int m = 0; m < TILES; ++m) {
    const uint t = token + uint(m * 8 + x_row(lane));
    live[m] = t < tokens;
    x_at[m] = x + (size_t(live[m] ? t : 0u) * size_t(K) + size_t(first + x_k(lane)));
  }
  UNROLL for (int b = 0; b < BLOCK; ++b) {
    UNROLL for (int q = 0; q < PHI_ROWS; ++q) {
      const int o = output + b * 8 + phi_row(lane) + q;
      made[b][q] = OUTS % (8 * BLOCK) == 0 || o < OUTS;
      p_at[b][q] = phi + (size_t(made[b][q] ? o : 0) * size_t(K) + size_t(first + phi_k(lane)));
    }
  }
  for (int k = first; k < K; k += step) {  // registers are loaded again as soon as they are used
    const int left = K - k - step;
    XTile<T> xt[TILES];
    UNROLL for (int m = 0; m < TILES; ++m) {
      to_tile(xt[m], runs.xs[m]);
      add_squares(squares[m], xt[m], runs.xs[m]);
      x_at[m] += step;
      load_run<WHOLE>(runs.xs[m], x_at[m], live[m] ? left - x_k(lane) : 0);
    }
    UNROLL for (int b = 0; b < BLOCK; ++b) {
      PhiTile<P> pt;
      to_tile(pt, runs.ps[b]);
      multiply_add(sum, b, xt, pt);
      UNROLL for (int q = 0; q < PHI_ROWS; ++q) {
        p_at[b][q] += step;
        load_run<WHOLE>(runs.ps[b][q], p_at[b][q], made[b][q] ? left - phi_k(lane) : 0);
      }
    }
  }
}

}  // namespace mhc

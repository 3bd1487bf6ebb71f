// Sums over k of products of tiles, 8 tokens x 32 k by 8 outputs x 32 k.
#include "tiles_BACKEND.h"

namespace mhc {

// A lane's share of a run of 32 k: of TILES tiles of tokens and BLOCK of outputs.
template <typename T, typename P, int TILES, int BLOCK> struct Loaded {
  Run<T, 8> xs[TILES];
  Run<P, 8 / PHI_ROWS> ps[BLOCK][PHI_ROWS];
};

// Where a lane reads it. Rows past the last are others again, whose sums no one takes.
template <typename XP, typename PP, int TILES, int BLOCK> struct Cursors {
  XP x[TILES];
  PP phi[BLOCK][PHI_ROWS];
};
// at k, of tokens from `token` on and outputs from `output` on
template <int TILES, int BLOCK, int OUTS, typename XP, typename PP>
inline Cursors<XP, PP, TILES, BLOCK> cursors(XP x, PP phi, uint tokens, int K, uint token, int output, int k, int lane) {
  Cursors<XP, PP, TILES, BLOCK> at;
  UNROLL for (int m = 0; m < TILES; ++m) {
    const uint t = token + uint(m * 8 + x_row(lane));
    at.x[m] = x + (size_t(t < tokens ? t : 0u) * size_t(K) + size_t(k + x_k(lane)));
  }
  UNROLL for (int b = 0; b < BLOCK; ++b) {
    UNROLL for (int q = 0; q < PHI_ROWS; ++q) {
      const int o = output + b * 8 + phi_row(lane) + q;
      at.phi[b][q] = phi + (size_t(OUTS % (8 * BLOCK) == 0 || o < OUTS ? o : 0) * size_t(K) + size_t(k + phi_k(lane)));
    }
  }
  return at;
}

// sum[token, output] += x phi^T and squares[token] += sum(x ** 2) over the run that `runs` holds; MORE: then it holds the one
// `step` further on, of which `left` elements are there, registers being loaded again as soon as they are used
template <bool WHOLE, bool MORE, typename T, typename P, int TILES, int BLOCK, typename XP, typename PP>
inline void take(thread float (&sum)[TILES][BLOCK][2], thread float (&squares)[TILES], thread Loaded<T, P, TILES, BLOCK>& runs,
                 thread Cursors<XP, PP, TILES, BLOCK>& at, int step, int left, int lane) {
  XTile<T> xt[TILES];
  UNROLL for (int m = 0; m < TILES; ++m) {
    to_tile(xt[m], runs.xs[m]);
    add_squares(squares[m], xt[m], runs.xs[m]);
    if (MORE) load_run<WHOLE>(runs.xs[m], at.x[m] += step, left - x_k(lane));
  }
  UNROLL for (int b = 0; b < BLOCK; ++b) {
    PhiTile<P> pt;
    to_tile(pt, runs.ps[b]);
    multiply_add(sum, b, xt, pt);
    UNROLL for (int q = 0; q < PHI_ROWS && MORE; ++q) load_run<WHOLE>(runs.ps[b][q], at.phi[b][q] += step, left - phi_k(lane));
  }
}

// The runs of a simdgroup: at first, first + step, ... < K.
struct Course {
  uint tokens;
  int K, first, step, lane, simd;
};

// Over them, of tokens from `token` on and outputs from `output` on. WHOLE: x and phi are aligned, and K % 32 == 0.
template <bool WHOLE, int OUTS, typename T, typename P, int TILES, int BLOCK, typename XP, typename PP>
inline void sweep(thread float (&sum)[TILES][BLOCK][2], thread float (&squares)[TILES], XP x, PP phi, const thread Course& c, uint token, int output) {
  if (c.first < c.K) {
    Loaded<T, P, TILES, BLOCK> runs;
    auto at = cursors<TILES, BLOCK, OUTS>(x, phi, c.tokens, c.K, token, output, c.first, c.lane);
    const int left = c.K - c.first;
    UNROLL for (int m = 0; m < TILES; ++m) load_run<WHOLE>(runs.xs[m], at.x[m], left - x_k(c.lane));
    UNROLL for (int b = 0; b < BLOCK; ++b) {
      UNROLL for (int q = 0; q < PHI_ROWS; ++q) load_run<WHOLE>(runs.ps[b][q], at.phi[b][q], left - phi_k(c.lane));
    }
    for (int k = c.first + c.step; k < c.K; k += c.step) take<WHOLE, true>(sum, squares, runs, at, c.step, c.K - k, c.lane);
    take<WHOLE, false>(sum, squares, runs, at, c.step, 0, c.lane);
  }
}

}  // namespace mhc

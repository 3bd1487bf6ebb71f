// The products of mhc_pre on CUDA. Runs are on their way into a ring in threadgroup memory before a simdgroup needs them: they take no
// registers, and it fetches 64 or 128 bytes of a row at once, whatever its products want where.
#include "tiles.h"

namespace mhc {

// The i-th of a lane's fetches of 16 bytes, of 8 rows of 32 elements: of two bytes in one fetch, of four in two. Neighbours in odd
// rows of four-byte elements swap places, so that lanes read from all banks.
template <int FETCHES> inline uint fetched_row(int i, int lane) { return uint(i * (8 / FETCHES) + lane / (4 * FETCHES)); }
template <int FETCHES> inline uint fetched_bytes(int i, int lane) {
  return uint(lane % (4 * FETCHES) ^ (FETCHES == 2 ? int(fetched_row<FETCHES>(i, lane)) & 1 : 0)) * 16u;
}
template <int FETCHES> inline int place_of(int i, int lane) {  // of the i-th 16 bytes of the lane's 8 elements
  return FETCHES == 1 ? lane : lane / 4 * 8 + ((lane % 4 * 2 + i) ^ (lane / 4 & 1));
}

// `sweep`, all of it aligned
template <int OUTS, int THREADS, int RING, typename T, typename P, int TILES, int BLOCK>
inline void sweep_ring(float (&sum)[TILES][BLOCK][2], float (&squares)[TILES], const T* x, const P* phi, const Course& c, uint token, int output) {
  if constexpr (RING == 0) {
    sweep<true, OUTS, T, P>(sum, squares, x, phi, c, token, output);
  } else {
    constexpr int XS = sizeof(T) / 2, PHIS = sizeof(P) / 2, FETCHES = TILES * XS + BLOCK * PHIS, STAGES = RING / (THREADS * 16 * FETCHES);
    static_assert(STAGES > 0, "a ring holds a run of each simdgroup");
    uint x_bytes[TILES * XS], phi_bytes[BLOCK * PHIS];
    UNROLL for (int i = 0; i < TILES * XS; ++i) {
      const uint t = token + fetched_row<XS>(i, c.lane);
      x_bytes[i] = (t < c.tokens ? t - token : 0u) * uint(c.K) * uint(sizeof(T)) + fetched_bytes<XS>(i, c.lane);
    }
    UNROLL for (int i = 0; i < BLOCK * PHIS; ++i) {
      const uint o = fetched_row<PHIS>(i, c.lane);
      phi_bytes[i] = (OUTS % (8 * BLOCK) == 0 || output + int(o) < OUTS ? o : 0u) * uint(c.K) * uint(sizeof(P)) + fetched_bytes<PHIS>(i, c.lane);
    }
    x += size_t(token < c.tokens ? token : 0u) * size_t(c.K) + size_t(c.first);
    phi += size_t(output) * size_t(c.K) + size_t(c.first);
    uint4* own = dynamic_threadgroup + c.simd * STAGES * FETCHES * 32;
    int wanted = c.first, stage = 0;
    auto want = [&](int stage) {  // the next run, if there is one
      if (wanted < c.K) {
        const uint to = shared_address(own + stage * FETCHES * 32 + c.lane);
        UNROLL for (int i = 0; i < TILES * XS; ++i) copy_16(to + uint(i) * 512u, (const char*)x + x_bytes[i]);
        UNROLL for (int i = 0; i < BLOCK * PHIS; ++i) copy_16(to + uint(TILES * XS + i) * 512u, (const char*)phi + phi_bytes[i]);
        x += c.step;
        phi += c.step;
        wanted += c.step;
      }
      commit_copies();
    };
    UNROLL for (int s = 0; s < STAGES; ++s) want(s);
    for (int k = c.first; k < c.K; k += c.step) {
      wait_for_copies<STAGES - 1>();
      simdgroup_sync();
      const uint4* from = own + stage * FETCHES * 32;
      XTile<T> xt[TILES];
      UNROLL for (int m = 0; m < TILES; ++m) {
        Run<T, 8> r;
        UNROLL for (int i = 0; i < XS; ++i) reinterpret_cast<uint4*>(&r)[i] = from[32 * m * XS + place_of<XS>(i, c.lane)];
        to_tile(xt[m], r);
        add_squares(squares[m], xt[m], r);
      }
      UNROLL for (int b = 0; b < BLOCK; ++b) {
        Run<P, 8> r[1];
        UNROLL for (int i = 0; i < PHIS; ++i) reinterpret_cast<uint4*>(r)[i] = from[32 * (TILES * XS + b * PHIS) + place_of<PHIS>(i, c.lane)];
        PhiTile<P> pt;
        to_tile(pt, r);
        multiply_add(sum, b, xt, pt);
      }
      simdgroup_sync();
      want(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
  }
}

}  // namespace mhc

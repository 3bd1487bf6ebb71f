// The phi product of mhc_pre on CUDA. Runs are copied into a ring in threadgroup memory before a simdgroup needs them:
// they take no registers, and each copy fetches 64 or 128 bytes of a row at once, whichever lanes need them.
#include "phi_product.h"

namespace mhc {

// The row and the byte of a lane's i-th fetch of 16 bytes, of 8 rows of 32 elements: two-byte elements take one fetch,
// four-byte elements two. Neighbours in odd rows of four-byte elements swap places, so that lanes read from all banks.
template <int FETCHES> inline uint fetch_row(int i, int lane) { return uint(i * (8 / FETCHES) + lane / (4 * FETCHES)); }
template <int FETCHES> inline uint fetch_bytes(int i, int lane) {
  return uint(lane % (4 * FETCHES) ^ (FETCHES == 2 ? int(fetch_row<FETCHES>(i, lane)) & 1 : 0)) * 16u;
}
template <int FETCHES>
inline int slot_offset(int i, int lane) {  // where the i-th 16 bytes of the lane's 8 elements lie
  return FETCHES == 1 ? lane : lane / 4 * 8 + ((lane % 4 * 2 + i) ^ (lane / 4 & 1));
}

// accumulate_runs, where everything is aligned.
template <int NUM_LOGITS, int THREADS, int RING_BYTES, typename T, typename PHI_T, int TILES, int BLOCK>
inline void accumulate_runs_ring(float (&sum)[TILES][BLOCK][2], float (&squares)[TILES], const T* x, const PHI_T* phi,
                                 const Runs& runs, uint token, int logit) {
  if constexpr (RING_BYTES == 0) {
    accumulate_runs<true, NUM_LOGITS, T, PHI_T>(sum, squares, x, phi, runs, token, logit);
  } else {
    constexpr int X_FETCHES = sizeof(T) / 2, PHI_FETCHES = sizeof(PHI_T) / 2,
                  FETCHES = TILES * X_FETCHES + BLOCK * PHI_FETCHES, SLOTS = RING_BYTES / (THREADS * 16 * FETCHES);
    static_assert(SLOTS > 0, "a ring holds a run of each simdgroup");
    uint x_bytes[TILES * X_FETCHES], phi_bytes[BLOCK * PHI_FETCHES];
    UNROLL_FOR (int i = 0; i < TILES * X_FETCHES; ++i) {
      const uint t = token + fetch_row<X_FETCHES>(i, runs.lane);
      x_bytes[i] =
          (t < runs.tokens ? t - token : 0u) * uint(runs.K) * uint(sizeof(T)) + fetch_bytes<X_FETCHES>(i, runs.lane);
    }
    UNROLL_FOR (int i = 0; i < BLOCK * PHI_FETCHES; ++i) {
      const uint o = fetch_row<PHI_FETCHES>(i, runs.lane);
      phi_bytes[i] =
          (NUM_LOGITS % (8 * BLOCK) == 0 || logit + int(o) < NUM_LOGITS ? o : 0u) * uint(runs.K) * uint(sizeof(PHI_T)) +
          fetch_bytes<PHI_FETCHES>(i, runs.lane);
    }
    x += size_t(token < runs.tokens ? token : 0u) * size_t(runs.K) + size_t(runs.first);
    phi += size_t(logit) * size_t(runs.K) + size_t(runs.first);
    uint4* slots = dynamic_threadgroup + runs.simd * SLOTS * FETCHES * 32;
    int next_k = runs.first, slot = 0;
    auto fetch_next = [&](int slot) {  // it copies the next run, if there is one
      if (next_k < runs.K) {
        const uint to = shared_address(slots + slot * FETCHES * 32 + runs.lane);
        UNROLL_FOR (int i = 0; i < TILES * X_FETCHES; ++i) copy_16(to + uint(i) * 512u, (const char*)x + x_bytes[i]);
        UNROLL_FOR (int i = 0; i < BLOCK * PHI_FETCHES; ++i)
          copy_16(to + uint(TILES * X_FETCHES + i) * 512u, (const char*)phi + phi_bytes[i]);
        x += runs.step;
        phi += runs.step;
        next_k += runs.step;
      }
      commit_copies();
    };
    UNROLL_FOR (int s = 0; s < SLOTS; ++s) fetch_next(s);
    for (int k = runs.first; k < runs.K; k += runs.step) {
      wait_for_copies<SLOTS - 1>();
      simdgroup_sync();
      const uint4* from = slots + slot * FETCHES * 32;
      XTile<T> xt[TILES];
      UNROLL_FOR (int m = 0; m < TILES; ++m) {
        Run<T, 8> r;
        UNROLL_FOR (int i = 0; i < X_FETCHES; ++i)
          reinterpret_cast<uint4*>(&r)[i] = from[32 * m * X_FETCHES + slot_offset<X_FETCHES>(i, runs.lane)];
        to_tile(xt[m], r);
        add_squares(squares[m], xt[m], r);
      }
      UNROLL_FOR (int b = 0; b < BLOCK; ++b) {
        Run<PHI_T, 8> r[1];
        UNROLL_FOR (int i = 0; i < PHI_FETCHES; ++i)
          reinterpret_cast<uint4*>(r)[i] =
              from[32 * (TILES * X_FETCHES + b * PHI_FETCHES) + slot_offset<PHI_FETCHES>(i, runs.lane)];
        PhiTile<PHI_T> pt;
        to_tile(pt, r);
        multiply_add(sum, b, xt, pt);
      }
      simdgroup_sync();
      fetch_next(slot);
      slot = slot + 1 == SLOTS ? 0 : slot + 1;
    }
  }
}

}  // namespace mhc

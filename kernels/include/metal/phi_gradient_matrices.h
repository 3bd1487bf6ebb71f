// Products of matrices by a simdgroup on Metal, for mhc_pre_backward_projection: 8 tokens x SPAN k by NUM_LOGITS <= 32
// logits. A lane has a token, and SPAN / 4 neighbours of it. cuda/phi_gradient_matrices.h defines the same words for
// CUDA.
#include "metal/matrices.h"

namespace mhc {

enum { TILE_TOKENS = 8, LANE_TOKENS = 1 };  // tokens of a tile; tokens of a lane
METAL_FUNC int token_of(int lane, int) { return matrix_row(lane); }
METAL_FUNC int quarter_of(int lane) { return matrix_column(lane) / 2; }
constexpr int logit_tiles(int num_logits) { return (num_logits + 7) / 8; }

// phi of SPAN k. Column i of the p-th product is k = i / 2 * (SPAN / 4) + 2 p + i % 2, so that a lane's k are
// neighbours.
template <typename PHI_T, int NUM_LOGITS, int SPAN> struct PhiColumns {
  float v[SPAN / 8][logit_tiles(NUM_LOGITS)][2];
};
template <typename PHI_T, int NUM_LOGITS, int SPAN, typename PP>
METAL_FUNC void load_phi(thread PhiColumns<PHI_T, NUM_LOGITS, SPAN>& c, PP phi, int K, int remaining, int lane) {
  UNROLL_FOR (int p = 0; p < SPAN / 8; ++p) {
    UNROLL_FOR (int s = 0; s < logit_tiles(NUM_LOGITS); ++s) {
      const int o = s * 8 + matrix_row(lane);
      UNROLL_FOR (int e = 0; e < 2; ++e) {
        const int k = quarter_of(lane) * (SPAN / 4) + 2 * p + e;
        c.v[p][s][e] = o < NUM_LOGITS && k < remaining ? static_cast<float>(phi[size_t(o) * size_t(K) + k]) : 0.0f;
      }
    }
  }
}

// The lane's elements 2 p and 2 p + 1.
template <typename T, int COUNT> METAL_FUNC void run_pair(thread float (&v)[2], const thread Run<T, COUNT>& r, int p) {
  UNROLL_FOR (int e = 0; e < 2; ++e) v[e] = run_float(r, 2 * p + e);
}
template <typename T, int COUNT> METAL_FUNC void set_pair(thread Run<T, COUNT>& r, int p, const thread float (&v)[2]) {
  constexpr int VEC = run_vec<T, COUNT>();
  UNROLL_FOR (int e = 0; e < 2; ++e) set_element(r.p[(2 * p + e) / VEC], (2 * p + e) % VEC, static_cast<T>(v[e]));
}

// Metal has no prefetch, and no tile waits in a ring.
template <typename P> METAL_FUNC void prefetch(P) {}
template <typename TileSlot, bool HAS_DU, bool HAS_DX_OUT, typename T, int RUN, typename S>
METAL_FUNC void fetch_tile_async(const thread S&, int, uint, uint, int) {}
template <int SLOTS> METAL_FUNC void wait_for_tile() {}
template <typename T, int RUN> METAL_FUNC void read_tile(thread Run<T, RUN> (&)[LANE_TOKENS], int, int) {}

// dp of STAGE tokens in threadgroup memory.
typedef float Staged;
constexpr int staged_row(int num_logits) { return 8 * logit_tiles(num_logits) + 1; }
constexpr int staged_size(int num_logits, int stage) { return stage * staged_row(num_logits); }
template <int NUM_LOGITS, int STAGE, int THREADS, typename S, typename D>
METAL_FUNC void stage_dp(S staged, D dp, uint base, uint end, int tid) {
  constexpr int PADDED_LOGITS = 8 * logit_tiles(NUM_LOGITS);
  for (int i = tid; i < STAGE * PADDED_LOGITS; i += THREADS) {
    const int o = i % PADDED_LOGITS;
    const uint t = base + uint(i / PADDED_LOGITS);
    staged[i / PADDED_LOGITS * staged_row(NUM_LOGITS) + o] =
        t < end && o < NUM_LOGITS ? dp[size_t(t) * NUM_LOGITS + o] : 0.0f;
  }
}

// dp of the tile's tokens.
template <int NUM_LOGITS> struct DpRows { float v[logit_tiles(NUM_LOGITS)][2]; };
template <int NUM_LOGITS, int STAGE, typename S>
METAL_FUNC void load_dp_rows(thread DpRows<NUM_LOGITS>& rows, S staged, int row, int lane) {
  UNROLL_FOR (int s = 0; s < logit_tiles(NUM_LOGITS); ++s) {
    UNROLL_FOR (int e = 0; e < 2; ++e)
      rows.v[s][e] = staged[(row + matrix_row(lane)) * staged_row(NUM_LOGITS) + s * 8 + matrix_column(lane) + e];
  }
}

// v[0][e] += sum_o dp[token, o] phi[o, k], where k is the lane's 2 p + e.
template <typename PHI_T, int NUM_LOGITS, int SPAN>
METAL_FUNC void add_phi_dp(thread float (&v)[LANE_TOKENS][2], const thread DpRows<NUM_LOGITS>& rows,
                           const thread PhiColumns<PHI_T, NUM_LOGITS, SPAN>& c, int p) {
  UNROLL_FOR (int s = 0; s < logit_tiles(NUM_LOGITS); ++s) multiply(v[0], rows.v[s], c.v[p][s]);
}

// sums += sum_t dp[t, o] x[t, k]
template <int NUM_LOGITS, int SPAN> struct DphiSums { float v[logit_tiles(NUM_LOGITS)][SPAN / 8][2]; };
template <int STAGE, int NUM_LOGITS, int SPAN, typename T, typename S>
METAL_FUNC void accumulate_dphi(thread DphiSums<NUM_LOGITS, SPAN>& sums,
                                const thread Run<T, SPAN / 4> (&x)[LANE_TOKENS], S staged, int row, int lane) {
  UNROLL_FOR (int s = 0; s < logit_tiles(NUM_LOGITS); ++s) {
    float a[2];
    UNROLL_FOR (int e = 0; e < 2; ++e)
      a[e] = staged[(row + matrix_column(lane) + e) * staged_row(NUM_LOGITS) + s * 8 + matrix_row(lane)];
    UNROLL_FOR (int p = 0; p < SPAN / 8; ++p) {
      float b[2], d[2] = {};
      run_pair(b, x[0], p);
      multiply(d, a, b);
      UNROLL_FOR (int e = 0; e < 2; ++e) sums.v[s][p][e] += d[e];
    }
  }
}
template <int NUM_LOGITS, int SPAN, typename O>
METAL_FUNC void store_dphi(const thread DphiSums<NUM_LOGITS, SPAN>& sums, O out, int K, int remaining, int lane) {
  UNROLL_FOR (int s = 0; s < logit_tiles(NUM_LOGITS); ++s) {
    const int o = s * 8 + matrix_row(lane);
    UNROLL_FOR (int p = 0; p < SPAN / 8; ++p) {
      UNROLL_FOR (int e = 0; e < 2; ++e) {
        const int k = quarter_of(lane) * (SPAN / 4) + 2 * p + e;
        if (o < NUM_LOGITS && k < remaining) out[size_t(o) * size_t(K) + k] = sums.v[s][p][e];
      }
    }
  }
}

}  // namespace mhc

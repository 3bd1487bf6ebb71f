// Products of matrices by a simdgroup on CUDA, for mhc_pre_backward_projection: 16 tokens x SPAN k by NUM_LOGITS <= 32
// logits.
//
// A lane has two tokens, and SPAN / 4 neighbours of each. x is bfloat16. float32 factors are sums of bfloat16 terms:
// two terms make dx, which is bfloat16, and three make dphi.
#include "cuda/ptx.h"

namespace mhc {

// Two values as pairs of bfloat16: the first pair is the nearest, each further pair is nearest to what is left.
template <int COUNT> inline void split_pair(uint (&w)[COUNT], float low, float high) {
  UNROLL_FOR (int term = 0; term < COUNT; ++term) {
    w[term] = bfloat_pair(low, high);
    low -= __uint_as_float(w[term] << 16);
    high -= __uint_as_float(w[term] & 0xffff0000u);
  }
}

enum { TILE_TOKENS = 16, LANE_TOKENS = 2 };  // tokens of a tile; tokens of a lane
inline int token_of(int lane, int r) { return lane / 4 + 8 * r; }
inline int quarter_of(int lane) { return lane % 4; }
constexpr int logit_tiles(int num_logits) { return (num_logits + 7) / 8; }
template <typename PHI_T> constexpr int PHI_TERMS = 2;
template <> constexpr int PHI_TERMS<__nv_bfloat16> = 1;

// Starts to copy a tile into a ring in threadgroup memory, from byte `at` on, where each lane finds its own runs of 16
// bytes. Rows past the last are clamped to the last, and channels past the last to the last run; their sums are
// discarded.
template <bool ALIGNED, typename T, int RUN, typename P>
inline void fetch_runs_async(int at, P from, uint row, uint first, uint end, int remaining, int lane) {
  const int c = quarter_of(lane) * RUN;
  UNROLL_FOR (int r = 0; r < LANE_TOKENS; ++r) {
    const uint t = first + uint(token_of(lane, r));
    const auto p = from + size_t(t < end ? t : end - 1) * row;
    uint4* to = dynamic_threadgroup + at / 16 + r * 32 + lane;
    if (ALIGNED) {
      copy_16(shared_address(to), p + (c < remaining ? c : remaining - RUN));
    } else {
      Run<T, RUN> run;
      load_run<false>(run, p + c, remaining - c);
      *to = reinterpret_cast<const uint4&>(run);
    }
  }
}
template <bool ALIGNED, typename TileSlot, bool HAS_DU, bool HAS_DX_OUT, typename T, int RUN, typename S>
inline void fetch_arrays_async(const S& from, int at, uint first, uint end, int lane) {
  fetch_runs_async<ALIGNED, T, RUN>(at, from.x, from.K, first, end, from.remaining, lane);
  if (HAS_DU) fetch_runs_async<ALIGNED, T, RUN>(at + TileSlot::DU, from.du, from.C, first, end, from.remaining, lane);
  if (HAS_DX_OUT)
    fetch_runs_async<ALIGNED, T, RUN>(at + TileSlot::PASSED, from.dx_out, from.K, first, end, from.remaining, lane);
}
template <typename TileSlot, bool HAS_DU, bool HAS_DX_OUT, typename T, int RUN, typename S>
inline void fetch_tile_async(const S& from, int at, uint first, uint end, int lane) {
  simdgroup_sync();
  if (first < end) {
    if (from.aligned) fetch_arrays_async<true, TileSlot, HAS_DU, HAS_DX_OUT, T, RUN>(from, at, first, end, lane);
    else fetch_arrays_async<false, TileSlot, HAS_DU, HAS_DX_OUT, T, RUN>(from, at, first, end, lane);
  }
  commit_copies();
}
template <int SLOTS> inline void wait_for_tile() { wait_for_copies<SLOTS - 1>(); }
template <typename T, int RUN> inline void tile_from_ring(Run<T, RUN> (&runs)[LANE_TOKENS], int at, int lane) {
  UNROLL_FOR (int r = 0; r < LANE_TOKENS; ++r)
    reinterpret_cast<uint4&>(runs[r]) = dynamic_threadgroup[at / 16 + r * 32 + lane];
}

// The lane's elements 2 p and 2 p + 1.
template <typename T, int COUNT> inline void run_pair(float (&v)[2], const Run<T, COUNT>& r, int p) {
  UNROLL_FOR (int e = 0; e < 2; ++e) v[e] = run_float(r, 2 * p + e);
}
template <int COUNT> inline void run_pair(float (&v)[2], const Run<__nv_bfloat16, COUNT>& r, int p) {
  const uint w = reinterpret_cast<const uint*>(&r)[p];
  v[0] = __uint_as_float(w << 16);
  v[1] = __uint_as_float(w & 0xffff0000u);
}
template <int COUNT> inline void set_pair(Run<__nv_bfloat16, COUNT>& r, int p, const float (&v)[2]) {
  uint w[1];
  split_pair(w, v[0], v[1]);
  reinterpret_cast<uint*>(&r)[p] = w[0];
}

// dp of STAGE tokens in threadgroup memory: three terms, and in each a row of eight logits at a time for a token. An
// odd number of such eights in a row keeps ldmatrix free of bank conflicts.
struct alignas(16) Staged { uint2 v[2]; };
constexpr int staged_row(int num_logits) { return logit_tiles(num_logits) | 1; }
constexpr int staged_size(int num_logits, int stage) { return 3 * stage * staged_row(num_logits); }
template <int NUM_LOGITS, int STAGE, int THREADS, typename S, typename D>
inline void stage_dp(S staged, D dp, uint base, uint end, int tid) {
  constexpr int FOURS = 2 * logit_tiles(NUM_LOGITS), LOADS_PER_THREAD = (STAGE * FOURS + THREADS - 1) / THREADS;
  constexpr int LOADS_IN_FLIGHT = LOADS_PER_THREAD < 3 ? LOADS_PER_THREAD : 3;  // loads in flight
  const bool aligned = NUM_LOGITS % 4 == 0 && is_aligned<4>(dp);
  for (int begin = tid; begin < STAGE * FOURS; begin += LOADS_IN_FLIGHT * THREADS) {
    float v[LOADS_IN_FLIGHT][4] = {};
    UNROLL_FOR (int q = 0; q < LOADS_IN_FLIGHT; ++q) {
      const int i = begin + q * THREADS, o = i % FOURS * 4;
      const uint t = base + uint(i / FOURS);
      const auto from = dp + (size_t(t) * NUM_LOGITS + o);
      const int remaining = t < end && i < STAGE * FOURS ? NUM_LOGITS - o : 0;
      if (aligned) {
        if (remaining > 0) load_floats<4>(v[q], from, true);
      } else {
        UNROLL_FOR (int e = 0; e < 4; ++e) {
          if (e < remaining) v[q][e] = from[e];
        }
      }
    }
    UNROLL_FOR (int q = 0; q < LOADS_IN_FLIGHT; ++q) {
      const int i = begin + q * THREADS, t = i / FOURS, f = i % FOURS;
      uint w[2][3];
      UNROLL_FOR (int h = 0; h < 2; ++h) split_pair(w[h], v[q][2 * h], v[q][2 * h + 1]);
      UNROLL_FOR (int term = 0; term < 3; ++term) {
        if (i < STAGE * FOURS)
          staged[(term * STAGE + t) * staged_row(NUM_LOGITS) + f / 2].v[f % 2] = make_uint2(w[0][term], w[1][term]);
      }
    }
  }
}

// Of the tile at `row`, a term of logits 8 s.. for tokens 0.. and for tokens 8.., with FOUR also of the next 8 logits.
// TRANSPOSED: a lane gets a logit of two tokens; without TRANSPOSED it gets two logits of a token.
template <int NUM_LOGITS, int STAGE, bool FOUR, bool TRANSPOSED, typename S>
inline void load_staged(uint* w, S staged, int row, int term, int s, int lane) {
  const uint lanes = shared_address(staged) + uint((row + lane % 16) * staged_row(NUM_LOGITS) + lane / 16) * 16u;
  load_matrices<FOUR ? 4 : 2, TRANSPOSED>(w, lanes + uint(term * STAGE * staged_row(NUM_LOGITS) + s) * 16u);
}
template <int NUM_LOGITS, int STAGE, bool TRANSPOSED, typename S>
inline void load_term(uint (&w)[2 * logit_tiles(NUM_LOGITS)], S staged, int row, int term, int lane) {
  UNROLL_FOR (int s = 0; s + 1 < logit_tiles(NUM_LOGITS); s += 2)
    load_staged<NUM_LOGITS, STAGE, true, TRANSPOSED>(w + 2 * s, staged, row, term, s, lane);
  if constexpr (logit_tiles(NUM_LOGITS) % 2 == 1)
    load_staged<NUM_LOGITS, STAGE, false, TRANSPOSED>(w + 2 * logit_tiles(NUM_LOGITS) - 2, staged, row, term,
                                                      logit_tiles(NUM_LOGITS) - 1, lane);
}

// phi of SPAN k. Column i of the p-th product is k = i / 2 * (SPAN / 4) + 2 p + i % 2, so that a lane's k are
// neighbours.
template <typename PHI_T, int NUM_LOGITS, int SPAN> struct PhiColumns {
  uint w[PHI_TERMS<PHI_T>][SPAN / 8][logit_tiles(NUM_LOGITS)];
};
template <typename PHI_T, int NUM_LOGITS, int SPAN, typename PP>
inline void load_phi(PhiColumns<PHI_T, NUM_LOGITS, SPAN>& c, PP phi, int K, int remaining, int lane) {
  const int column = lane / 4;
  UNROLL_FOR (int p = 0; p < SPAN / 8; ++p) {
    const int k = column / 2 * (SPAN / 4) + 2 * p + column % 2;
    UNROLL_FOR (int s = 0; s < logit_tiles(NUM_LOGITS); ++s) {
      float v[2];
      UNROLL_FOR (int e = 0; e < 2; ++e) {
        const int o = s * 8 + lane % 4 * 2 + e;
        v[e] = o < NUM_LOGITS && k < remaining ? static_cast<float>(phi[size_t(o) * size_t(K) + k]) : 0.0f;
      }
      uint w[PHI_TERMS<PHI_T>];
      split_pair(w, v[0], v[1]);
      UNROLL_FOR (int term = 0; term < PHI_TERMS<PHI_T>; ++term) c.w[term][p][s] = w[term];
    }
  }
}

// dp of the tile's tokens.
template <int NUM_LOGITS> struct DpRows { uint w[2][2 * logit_tiles(NUM_LOGITS)]; };
template <int NUM_LOGITS, int STAGE, typename S>
inline void load_dp_rows(DpRows<NUM_LOGITS>& rows, S staged, int row, int lane) {
  UNROLL_FOR (int term = 0; term < 2; ++term)
    load_term<NUM_LOGITS, STAGE, false>(rows.w[term], staged, row, term, lane);
}

// d += a b
template <int COUNT> inline void multiply_row(float (&d)[4], const uint (&a)[2 * COUNT], const uint (&b)[COUNT]) {
  UNROLL_FOR (int s = 0; s + 1 < COUNT; s += 2)
    multiply_16(d, a[2 * s], a[2 * s + 1], a[2 * s + 2], a[2 * s + 3], b[s], b[s + 1]);
  if constexpr (COUNT % 2 == 1) multiply_8(d, a[2 * COUNT - 2], a[2 * COUNT - 1], b[COUNT - 1]);
}

// v[r][e] += sum_o dp[token r, o] phi[o, k], where k is the lane's 2 p + e. bfloat16 does not hold what the matrix unit
// truncates.
template <typename PHI_T, int NUM_LOGITS, int SPAN>
inline void add_phi_dp(float (&v)[LANE_TOKENS][2], const DpRows<NUM_LOGITS>& rows,
                       const PhiColumns<PHI_T, NUM_LOGITS, SPAN>& c, int p) {
  float d[4] = {v[0][0], v[0][1], v[1][0], v[1][1]};
  multiply_row<logit_tiles(NUM_LOGITS)>(d, rows.w[1], c.w[0][p]);
  if (PHI_TERMS<PHI_T> == 2) multiply_row<logit_tiles(NUM_LOGITS)>(d, rows.w[0], c.w[PHI_TERMS<PHI_T> - 1][p]);
  multiply_row<logit_tiles(NUM_LOGITS)>(d, rows.w[0], c.w[0][p]);
  UNROLL_FOR (int r = 0; r < LANE_TOKENS; ++r) {
    UNROLL_FOR (int e = 0; e < 2; ++e) v[r][e] = d[2 * r + e];
  }
}

// sums += sum_t dp[t, o] x[t, k], for the columns of products m and m + 1, two logits each.
template <int NUM_LOGITS, int SPAN> struct DphiSums { float v[SPAN / 16][logit_tiles(NUM_LOGITS)][4]; };
template <int STAGE, int NUM_LOGITS, int SPAN, typename T, typename S>
inline void accumulate_dphi(DphiSums<NUM_LOGITS, SPAN>& sums, const Run<T, SPAN / 4> (&x)[LANE_TOKENS], S staged,
                            int row, int lane) {
  uint a[SPAN / 8][2];  // tokens in pairs
  UNROLL_FOR (int p = 0; p < SPAN / 8; ++p) {
    UNROLL_FOR (int r = 0; r < LANE_TOKENS; ++r) {
      a[p][r] = transposed(reinterpret_cast<const uint*>(&x[r])[p]);
    }
  }
  UNROLL_FOR (int s = 0; s < logit_tiles(NUM_LOGITS); s += 2) {
    constexpr int LAST = logit_tiles(NUM_LOGITS) - 1;
    uint b[3][4];
    UNROLL_FOR (int term = 0; term < 3; ++term) {
      if (s < LAST) load_staged<NUM_LOGITS, STAGE, true, true>(b[term], staged, row, term, s, lane);
      else load_staged<NUM_LOGITS, STAGE, false, true>(b[term], staged, row, term, s, lane);
    }
    UNROLL_FOR (int h = 0; h < 2; ++h) {
      UNROLL_FOR (int m = 0; m < SPAN / 16; ++m) {
        if (s + h <= LAST) {  // the matrix unit truncates its sums, so each starts at zero
          float d[4] = {};
          UNROLL_FOR (int term = 2; term >= 0; --term)
            multiply_16(d, a[2 * m][0], a[2 * m + 1][0], a[2 * m][1], a[2 * m + 1][1], b[term][2 * h],
                        b[term][2 * h + 1]);
          UNROLL_FOR (int i = 0; i < 4; ++i) sums.v[m][s + h <= LAST ? s + h : 0][i] += d[i];
        }
      }
    }
  }
}
template <int NUM_LOGITS, int SPAN, typename O>
inline void store_dphi(const DphiSums<NUM_LOGITS, SPAN>& sums, O out, int K, int remaining, int lane) {
  const int column = lane / 4;
  UNROLL_FOR (int s = 0; s < logit_tiles(NUM_LOGITS); ++s) {
    UNROLL_FOR (int e = 0; e < 2; ++e) {
      const int o = s * 8 + lane % 4 * 2 + e;
      UNROLL_FOR (int p = 0; p < SPAN / 8; ++p) {
        const int k = column / 2 * (SPAN / 4) + 2 * p + column % 2;
        if (o < NUM_LOGITS && k < remaining) out[size_t(o) * size_t(K) + k] = sums.v[p / 2][s][p % 2 * 2 + e];
      }
    }
  }
}

}  // namespace mhc

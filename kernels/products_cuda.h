// Products of matrices by a simdgroup on CUDA, for mhc_projection_backward: 16 tokens x SPAN k with OUTS <= 32 outputs.
//
// A lane has two tokens, and of each SPAN / 4 neighbours. x is bfloat16; of float32 factors two parts make dx, which is
// bfloat16, and three dphi.
#include "ptx.h"

namespace mhc {

// Two values as pairs of bfloat16: the nearest, and what is left.
template <int COUNT> inline void split_pair(uint (&w)[COUNT], float low, float high) {
  UNROLL for (int part = 0; part < COUNT; ++part) {
    w[part] = bfloat_pair(low, high);
    low -= __uint_as_float(w[part] << 16);
    high -= __uint_as_float(w[part] & 0xffff0000u);
  }
}

enum { TOKENS = 16, HELD = 2 };  // of a tile; of a lane
inline int token_of(int lane, int r) { return lane / 4 + 8 * r; }
inline int quarter_of(int lane) { return lane % 4; }
constexpr int eights(int outs) { return (outs + 7) / 8; }
template <typename P> constexpr int PHI_PARTS = 2;
template <> constexpr int PHI_PARTS<__nv_bfloat16> = 1;

// A tile on its way into a ring in threadgroup memory, from byte `at` on, where each lane finds its own runs, of 16 bytes. Rows past
// the last are that again; channels past it others, whose sums no one takes.
template <bool WHOLE, typename T, int RUN, typename P>
inline void want_runs(int at, P from, uint row, uint first, uint end, int left, int lane) {
  const int c = quarter_of(lane) * RUN;
  UNROLL for (int r = 0; r < HELD; ++r) {
    const uint t = first + uint(token_of(lane, r));
    const auto p = from + size_t(t < end ? t : end - 1) * row;
    uint4* to = dynamic_threadgroup + at / 16 + r * 32 + lane;
    if (WHOLE) {
      copy_16(shared_address(to), p + (c < left ? c : left - RUN));
    } else {
      Run<T, RUN> run;
      load_run<false>(run, p + c, left - c);
      *to = reinterpret_cast<const uint4&>(run);
    }
  }
}
template <bool WHOLE, typename Place, bool READ, bool PASS, typename T, int RUN, typename S>
inline void want_tile(const S& from, int at, uint first, uint end, int lane) {
  want_runs<WHOLE, T, RUN>(at, from.x, from.K, first, end, from.left, lane);
  if (READ) want_runs<WHOLE, T, RUN>(at + Place::DU, from.du, from.C, first, end, from.left, lane);
  if (PASS) want_runs<WHOLE, T, RUN>(at + Place::PASSED, from.dx_out, from.K, first, end, from.left, lane);
}
template <typename Place, bool READ, bool PASS, typename T, int RUN, typename S>
inline void ask_tile(const S& from, int at, uint first, uint end, int lane) {
  simdgroup_sync();
  if (first < end) {
    if (from.whole) want_tile<true, Place, READ, PASS, T, RUN>(from, at, first, end, lane);
    else want_tile<false, Place, READ, PASS, T, RUN>(from, at, first, end, lane);
  }
  commit_copies();
}
template <int SLOTS> inline void wait_for_tile() { wait_for_copies<SLOTS - 1>(); }
template <typename T, int RUN> inline void have_tile(Run<T, RUN> (&runs)[HELD], int at, int lane) {
  UNROLL for (int r = 0; r < HELD; ++r) reinterpret_cast<uint4&>(runs[r]) = dynamic_threadgroup[at / 16 + r * 32 + lane];
}

// The lane's elements 2 p and 2 p + 1
template <typename T, int COUNT> inline void run_pair(float (&v)[2], const Run<T, COUNT>& r, int p) {
  UNROLL for (int e = 0; e < 2; ++e) v[e] = run_float(r, 2 * p + e);
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

// dp of STAGE tokens in threadgroup memory: three parts, in each a row of eights a token. An odd number of them in a row
// keeps ldmatrix free of bank conflicts.
struct alignas(16) Staged { uint2 v[2]; };
constexpr int staged_row(int outs) { return eights(outs) | 1; }
constexpr int staged_size(int outs, int stage) { return 3 * stage * staged_row(outs); }
template <int OUTS, int STAGE, int THREADS, typename S, typename D>
inline void stage_dp(S staged, D dp, uint base, uint end, int tid) {
  constexpr int FOURS = 2 * eights(OUTS), ROUNDS = (STAGE * FOURS + THREADS - 1) / THREADS;
  constexpr int ROUND = ROUNDS < 3 ? ROUNDS : 3;  // loads in flight
  const bool whole = OUTS % 4 == 0 && aligned<4>(dp);
  for (int begin = tid; begin < STAGE * FOURS; begin += ROUND * THREADS) {
    float v[ROUND][4] = {};
    UNROLL for (int q = 0; q < ROUND; ++q) {
      const int i = begin + q * THREADS, o = i % FOURS * 4;
      const uint t = base + uint(i / FOURS);
      const auto from = dp + (size_t(t) * OUTS + o);
      const int left = t < end && i < STAGE * FOURS ? OUTS - o : 0;
      if (whole) {
        if (left > 0) load_floats<4>(v[q], from, true);
      } else {
        UNROLL for (int e = 0; e < 4; ++e) {
          if (e < left) v[q][e] = from[e];
        }
      }
    }
    UNROLL for (int q = 0; q < ROUND; ++q) {
      const int i = begin + q * THREADS, t = i / FOURS, f = i % FOURS;
      uint w[2][3];
      UNROLL for (int h = 0; h < 2; ++h) split_pair(w[h], v[q][2 * h], v[q][2 * h + 1]);
      UNROLL for (int part = 0; part < 3; ++part) {
        if (i < STAGE * FOURS)
          staged[(part * STAGE + t) * staged_row(OUTS) + f / 2].v[f % 2] = make_uint2(w[0][part], w[1][part]);
      }
    }
  }
}

// Of the tile at row: a part of outputs 8 s.. for tokens 0.. and for tokens 8.., with FOUR also of the next 8 outputs.
// TRANSPOSED: a lane has an output of two tokens, else two outputs of a token.
template <int OUTS, int STAGE, bool FOUR, bool TRANSPOSED, typename S>
inline void load_staged(uint* w, S staged, int row, int part, int s, int lane) {
  const uint lanes = shared_address(staged) + uint((row + lane % 16) * staged_row(OUTS) + lane / 16) * 16u;
  load_matrices<FOUR ? 4 : 2, TRANSPOSED>(w, lanes + uint(part * STAGE * staged_row(OUTS) + s) * 16u);
}
template <int OUTS, int STAGE, bool TRANSPOSED, typename S>
inline void load_part(uint (&w)[2 * eights(OUTS)], S staged, int row, int part, int lane) {
  UNROLL for (int s = 0; s + 1 < eights(OUTS); s += 2)
    load_staged<OUTS, STAGE, true, TRANSPOSED>(w + 2 * s, staged, row, part, s, lane);
  if constexpr (eights(OUTS) % 2 == 1)
    load_staged<OUTS, STAGE, false, TRANSPOSED>(w + 2 * eights(OUTS) - 2, staged, row, part, eights(OUTS) - 1, lane);
}

// phi of SPAN k; column i of the pairs' p-th product is k = i / 2 * (SPAN / 4) + 2 p + i % 2, so that a lane's are neighbours.
template <typename P, int OUTS, int SPAN> struct Columns { uint w[PHI_PARTS<P>][SPAN / 8][eights(OUTS)]; };
template <typename P, int OUTS, int SPAN, typename PP>
inline void load_columns(Columns<P, OUTS, SPAN>& c, PP phi, int K, int left, int lane) {
  const int column = lane / 4;
  UNROLL for (int p = 0; p < SPAN / 8; ++p) {
    const int k = column / 2 * (SPAN / 4) + 2 * p + column % 2;
    UNROLL for (int s = 0; s < eights(OUTS); ++s) {
      float v[2];
      UNROLL for (int e = 0; e < 2; ++e) {
        const int o = s * 8 + lane % 4 * 2 + e;
        v[e] = o < OUTS && k < left ? static_cast<float>(phi[size_t(o) * size_t(K) + k]) : 0.0f;
      }
      uint w[PHI_PARTS<P>];
      split_pair(w, v[0], v[1]);
      UNROLL for (int part = 0; part < PHI_PARTS<P>; ++part) c.w[part][p][s] = w[part];
    }
  }
}

// dp of the tile's tokens
template <int OUTS> struct Rows { uint w[2][2 * eights(OUTS)]; };
template <int OUTS, int STAGE, typename S> inline void load_rows(Rows<OUTS>& rows, S staged, int row, int lane) {
  UNROLL for (int part = 0; part < 2; ++part) load_part<OUTS, STAGE, false>(rows.w[part], staged, row, part, lane);
}

// d += a b
template <int COUNT> inline void multiply_row(float (&d)[4], const uint (&a)[2 * COUNT], const uint (&b)[COUNT]) {
  UNROLL for (int s = 0; s + 1 < COUNT; s += 2) multiply_16(d, a[2 * s], a[2 * s + 1], a[2 * s + 2], a[2 * s + 3], b[s], b[s + 1]);
  if constexpr (COUNT % 2 == 1) multiply_8(d, a[2 * COUNT - 2], a[2 * COUNT - 1], b[COUNT - 1]);
}

// v[r][e] += sum_o dp[token r, o] phi[o, k], k the lane's 2 p + e. What the matrix unit truncates, bfloat16 does not hold.
template <typename P, int OUTS, int SPAN>
inline void spread(float (&v)[HELD][2], const Rows<OUTS>& rows, const Columns<P, OUTS, SPAN>& c, int p) {
  float d[4] = {v[0][0], v[0][1], v[1][0], v[1][1]};
  multiply_row<eights(OUTS)>(d, rows.w[1], c.w[0][p]);
  if (PHI_PARTS<P> == 2) multiply_row<eights(OUTS)>(d, rows.w[0], c.w[PHI_PARTS<P> - 1][p]);
  multiply_row<eights(OUTS)>(d, rows.w[0], c.w[0][p]);
  UNROLL for (int r = 0; r < HELD; ++r) {
    UNROLL for (int e = 0; e < 2; ++e) v[r][e] = d[2 * r + e];
  }
}

// sum_t dp[t, o] x[t, k]: of the columns of pairs m and m + 1, two outputs each
template <int OUTS, int SPAN> struct Sums { float v[SPAN / 16][eights(OUTS)][4]; };
template <int STAGE, int OUTS, int SPAN, typename T, typename S>
inline void collect(Sums<OUTS, SPAN>& sums, const Run<T, SPAN / 4> (&x)[HELD], S staged, int row, int lane) {
  uint a[SPAN / 8][2];  // tokens in pairs
  UNROLL for (int p = 0; p < SPAN / 8; ++p) {
    UNROLL for (int r = 0; r < HELD; ++r) {
      a[p][r] = transposed(reinterpret_cast<const uint*>(&x[r])[p]);
    }
  }
  UNROLL for (int s = 0; s < eights(OUTS); s += 2) {
    constexpr int LAST = eights(OUTS) - 1;
    uint b[3][4];
    UNROLL for (int part = 0; part < 3; ++part) {
      if (s < LAST) load_staged<OUTS, STAGE, true, true>(b[part], staged, row, part, s, lane);
      else load_staged<OUTS, STAGE, false, true>(b[part], staged, row, part, s, lane);
    }
    UNROLL for (int h = 0; h < 2; ++h) {
      UNROLL for (int m = 0; m < SPAN / 16; ++m) {
        if (s + h <= LAST) {  // the matrix unit truncates its sums: they are not taken on
          float d[4] = {};
          UNROLL for (int part = 2; part >= 0; --part)
            multiply_16(d, a[2 * m][0], a[2 * m + 1][0], a[2 * m][1], a[2 * m + 1][1], b[part][2 * h], b[part][2 * h + 1]);
          UNROLL for (int i = 0; i < 4; ++i) sums.v[m][s + h <= LAST ? s + h : 0][i] += d[i];
        }
      }
    }
  }
}
template <int OUTS, int SPAN, typename O>
inline void store_sums(const Sums<OUTS, SPAN>& sums, O out, int K, int left, int lane) {
  const int column = lane / 4;
  UNROLL for (int s = 0; s < eights(OUTS); ++s) {
    UNROLL for (int e = 0; e < 2; ++e) {
      const int o = s * 8 + lane % 4 * 2 + e;
      UNROLL for (int p = 0; p < SPAN / 8; ++p) {
        const int k = column / 2 * (SPAN / 4) + 2 * p + column % 2;
        if (o < OUTS && k < left) out[size_t(o) * size_t(K) + k] = sums.v[p / 2][s][p % 2 * 2 + e];
      }
    }
  }
}

}  // namespace mhc

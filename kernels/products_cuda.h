// Products of matrices by a simdgroup on CUDA, for mhc_projection_backward: 16 tokens x SPAN k with OUTS <= 32 outputs.
//
// A lane has two tokens, and of each SPAN / 4 neighbours. x is bfloat16; of float32 factors two parts make dx, which is
// bfloat16, and three dphi.
#include "common.h"

namespace mhc {

// Two values as pairs of bfloat16: the nearest, and what is left.
template <int COUNT> inline void split_pair(uint (&w)[COUNT], float low, float high) {
  UNROLL for (int part = 0; part < COUNT; ++part) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[part]) : "f"(high), "f"(low));
    low -= __uint_as_float(w[part] << 16);
    high -= __uint_as_float(w[part] & 0xffff0000u);
  }
}

enum { TOKENS = 16, HELD = 2 };  // of a tile; of a lane
inline int token_of(int lane, int r) { return lane / 4 + 8 * r; }
inline int quarter_of(int lane) { return lane % 4; }
constexpr int sixteens(int outs) { return (outs + 15) / 16; }
template <typename P> constexpr int PHI_PARTS = 2;
template <> constexpr int PHI_PARTS<__nv_bfloat16> = 1;

// d += a b, 16 x 16 by 16 x 8
inline void multiply_16(float (&d)[4], const uint (&a)[4], uint b0, uint b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// phi of SPAN k; column i of the pairs' p-th product is k = i / 2 * (SPAN / 4) + 2 p + i % 2, so that a lane's are neighbours.
template <typename P, int OUTS, int SPAN> struct Columns { uint w[PHI_PARTS<P>][SPAN / 8][sixteens(OUTS)][2]; };
template <typename P, int OUTS, int SPAN, typename PP>
inline void load_columns(Columns<P, OUTS, SPAN>& c, PP phi, int K, int left, int lane) {
  const int column = lane / 4;
  UNROLL for (int p = 0; p < SPAN / 8; ++p) {
    const int k = column / 2 * (SPAN / 4) + 2 * p + column % 2;
    UNROLL for (int s = 0; s < sixteens(OUTS); ++s) {
      UNROLL for (int h = 0; h < 2; ++h) {
        float v[2];
        UNROLL for (int e = 0; e < 2; ++e) {
          const int o = s * 16 + h * 8 + lane % 4 * 2 + e;
          v[e] = o < OUTS && k < left ? static_cast<float>(phi[size_t(o) * size_t(K) + k]) : 0.0f;
        }
        uint w[PHI_PARTS<P>];
        split_pair(w, v[0], v[1]);
        UNROLL for (int part = 0; part < PHI_PARTS<P>; ++part) c.w[part][p][s][h] = w[part];
      }
    }
  }
}

// dp of the tile's tokens
template <int OUTS> struct Rows { uint w[2][sixteens(OUTS)][4]; };
template <int OUTS, typename D> inline float dp_of(D dp, uint t, uint end, int o) {
  return t < end && o < OUTS ? dp[size_t(t) * OUTS + o] : 0.0f;
}
template <int OUTS, typename D> inline void load_rows(Rows<OUTS>& rows, D dp, uint first, uint end, int lane) {
  UNROLL for (int s = 0; s < sixteens(OUTS); ++s) {
    UNROLL for (int q = 0; q < 4; ++q) {
      const uint t = first + uint(lane / 4 + q % 2 * 8);
      const int o = s * 16 + q / 2 * 8 + lane % 4 * 2;
      uint w[2];
      split_pair(w, dp_of<OUTS>(dp, t, end, o), dp_of<OUTS>(dp, t, end, o + 1));
      UNROLL for (int part = 0; part < 2; ++part) rows.w[part][s][q] = w[part];
    }
  }
}

// v[r][e] = sum_o dp[token r, o] phi[o, k], k the lane's 2 p + e
template <typename P, int OUTS, int SPAN>
inline void spread(float (&v)[HELD][2], const Rows<OUTS>& rows, const Columns<P, OUTS, SPAN>& c, int p) {
  float d[4] = {};
  UNROLL for (int s = 0; s < sixteens(OUTS); ++s) {
    multiply_16(d, rows.w[1][s], c.w[0][p][s][0], c.w[0][p][s][1]);
    if (PHI_PARTS<P> == 2) multiply_16(d, rows.w[0][s], c.w[PHI_PARTS<P> - 1][p][s][0], c.w[PHI_PARTS<P> - 1][p][s][1]);
  }
  UNROLL for (int s = 0; s < sixteens(OUTS); ++s) multiply_16(d, rows.w[0][s], c.w[0][p][s][0], c.w[0][p][s][1]);
  UNROLL for (int r = 0; r < HELD; ++r) {
    UNROLL for (int e = 0; e < 2; ++e) v[r][e] = d[2 * r + e];
  }
}

// sum_t dp[t, o] x[t, k]
template <int OUTS, int SPAN> struct Sums { float v[sixteens(OUTS)][SPAN / 8][4]; };
template <int OUTS, int SPAN, typename T, typename D>
inline void collect(Sums<OUTS, SPAN>& sums, const Run<T, SPAN / 4> (&x)[HELD], D dp, uint first, uint end, int lane) {
  uint b[SPAN / 8][2];  // tokens in pairs
  UNROLL for (int p = 0; p < SPAN / 8; ++p) {
    UNROLL for (int r = 0; r < HELD; ++r) {
      const uint w = reinterpret_cast<const uint*>(&x[r])[p];
      asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b[p][r]) : "r"(w));
    }
  }
  UNROLL for (int s = 0; s < sixteens(OUTS); ++s) {
    uint a[3][4];
    UNROLL for (int q = 0; q < 4; ++q) {
      const uint t = first + uint(lane % 4 * 2 + q / 2 * 8);
      const int o = s * 16 + lane / 4 + q % 2 * 8;
      uint w[3];
      split_pair(w, dp_of<OUTS>(dp, t, end, o), dp_of<OUTS>(dp, t + 1, end, o));
      UNROLL for (int part = 0; part < 3; ++part) a[part][q] = w[part];
    }
    UNROLL for (int p = 0; p < SPAN / 8; ++p) {  // the matrix unit truncates its sums: they are not taken on
      float d[4] = {};
      UNROLL for (int part = 2; part >= 0; --part) multiply_16(d, a[part], b[p][0], b[p][1]);
      UNROLL for (int i = 0; i < 4; ++i) sums.v[s][p][i] += d[i];
    }
  }
}
template <int OUTS, int SPAN, typename O>
inline void store_sums(const Sums<OUTS, SPAN>& sums, O out, int K, int left, int lane) {
  UNROLL for (int s = 0; s < sixteens(OUTS); ++s) {
    UNROLL for (int h = 0; h < 2; ++h) {
      const int o = s * 16 + lane / 4 + 8 * h;
      UNROLL for (int p = 0; p < SPAN / 8; ++p) {
        UNROLL for (int e = 0; e < 2; ++e) {
          const int k = lane % 4 * (SPAN / 4) + 2 * p + e;
          if (o < OUTS && k < left) out[size_t(o) * size_t(K) + k] = sums.v[s][p][2 * h + e];
        }
      }
    }
  }
}

}  // namespace mhc

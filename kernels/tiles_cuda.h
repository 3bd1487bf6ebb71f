// Products of matrices by a simdgroup on CUDA: tiles of 8 tokens x 32 k and of 8 outputs x 32 k.
//
// The instruction multiplies bfloat16. A value of more bits is a sum of parts, each rounded to bfloat16: float32 has
// three, float16 two; products of parts below the 24th bit are left out. Its 16 rows are two parts of 8 outputs, its 8
// columns tokens. A lane holds 8 neighbours of its row, which orders k alike on both sides.
#include "common.h"

namespace mhc {

enum { PHI_ROWS = 1 };

inline int x_row(int lane) { return lane / 4; }
inline int x_k(int lane) { return lane % 4 * 8; }
inline int phi_row(int lane) { return lane / 4; }
inline int phi_k(int lane) { return lane % 4 * 8; }
inline int sum_token(int lane, int e) { return lane % 4 * 2 + e; }
inline int sum_output(int lane, int) { return lane / 4; }
template <typename T> struct parts_of { static constexpr int count = 3; };
template <> struct parts_of<__nv_bfloat16> { static constexpr int count = 1; };
template <> struct parts_of<__half> { static constexpr int count = 2; };
template <typename T> constexpr int PARTS = parts_of<T>::count;

// Two values as pairs of bfloat16: the nearest, and what is left.
template <int COUNT> inline void split_pair(uint (&w)[COUNT], float low, float high) {
  UNROLL for (int part = 0; part < COUNT; ++part) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[part]) : "f"(high), "f"(low));
    low -= __uint_as_float(w[part] << 16);
    high -= __uint_as_float(w[part] & 0xffff0000u);
  }
}

// A lane's 8 values as pairs of bfloat16, part by part.
template <typename T> struct Parts { uint w[PARTS<T>][4]; };
template <typename T> struct XTile : Parts<T> {};
template <typename P> struct PhiTile : Parts<P> {};

template <typename T> inline void split(Parts<T>& t, const Run<T, 8>& r) {
  if constexpr (PARTS<T> == 1) {
    UNROLL for (int i = 0; i < 4; ++i) t.w[0][i] = reinterpret_cast<const uint*>(&r)[i];
  } else {
    UNROLL for (int i = 0; i < 4; ++i) {
      uint w[PARTS<T>];
      split_pair(w, run_float(r, 2 * i), run_float(r, 2 * i + 1));
      UNROLL for (int part = 0; part < PARTS<T>; ++part) t.w[part][i] = w[part];
    }
  }
}
template <typename T> inline void to_tile(XTile<T>& t, const Run<T, 8>& r) { split(t, r); }
template <typename P> inline void to_tile(PhiTile<P>& t, const Run<P, 8> (&r)[PHI_ROWS]) { split(t, r[0]); }

// d += rows of a, two parts of 8 or one and zeros, times tokens of b; FRESH: d = ...
template <bool FRESH> inline void multiply(float (&d)[4], const uint* a, const uint* a2, const uint* b) {
  UNROLL for (int h = 0; h < 4; h += 2) {
    const bool zero = FRESH && h == 0;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[h]), "r"(a2 ? a2[h] : 0u), "r"(a[h + 1]), "r"(a2 ? a2[h + 1] : 0u), "r"(b[h]), "r"(b[h + 1]),
          "f"(zero ? 0.0f : d[0]), "f"(zero ? 0.0f : d[1]), "f"(zero ? 0.0f : d[2]), "f"(zero ? 0.0f : d[3]));
  }
}

// s += a lane's share of sum(x ** 2) of its token; the share at x_k(lane) / 8 of four; their sum, in all lanes of the
// token. In bfloat16 the squares are the diagonal of the tile times itself: one share.
template <typename T> inline void add_squares(float (&s)[2], const XTile<T>& x, const Run<T, 8>& r) {
  if constexpr (PARTS<T> == 1) {
    float d[4];
    multiply<true>(d, x.w[0], nullptr, x.w[0]);
    UNROLL for (int e = 0; e < 2; ++e) s[e] += d[e];
  } else {
    float run = 0.0f;
    UNROLL for (int e = 0; e < 8; ++e) run += run_float(r, e) * run_float(r, e);
    s[0] += run;
  }
}
template <typename T> inline float sum_squares(const float (&s)[2], int lane) {
  if constexpr (PARTS<T> == 1) {
    const int row = x_row(lane);
    return simd_shuffle(row % 2 == 0 ? s[0] : s[1], static_cast<ushort>(row * 4 + row / 2));
  } else {
    const float v = s[0] + simd_shuffle_xor(s[0], 1);
    return v + simd_shuffle_xor(v, 2);
  }
}
template <typename T> inline float share_of_squares(const float (&s)[2], int lane) {
  if constexpr (PARTS<T> == 1) {
    const float v = sum_squares<T>(s, lane);
    return x_k(lane) == 0 ? v : 0.0f;
  } else {
    return s[0];
  }
}

// sum[token, output] += x phi^T
template <typename T, typename P> inline void multiply_add(float (&sum)[2], const XTile<T>& x, const PhiTile<P>& phi) {
  constexpr int LAST = (PARTS<P> - 1) / 2 * 2;  // of the parts of phi, in pairs; small products first
  constexpr int MOST = PARTS<T> - 1 < 2 - LAST ? PARTS<T> - 1 : 2 - LAST;
  float d[4];
  UNROLL for (int p = LAST; p >= 0; p -= 2) {
    UNROLL for (int q = PARTS<T> - 1; q >= 0; --q) {
      const uint* second = p + 1 < PARTS<P> ? phi.w[p + 1 < PARTS<P> ? p + 1 : p] : nullptr;
      if (p == LAST && q == MOST) multiply<true>(d, phi.w[p], second, x.w[q]);
      else if (p + q <= 2) multiply<false>(d, phi.w[p], second, x.w[q]);
    }
  }
  UNROLL for (int e = 0; e < 2; ++e) sum[e] += d[e] + d[e + 2];
}

}  // namespace mhc

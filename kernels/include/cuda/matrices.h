// Products of matrices by a simdgroup on CUDA: tiles of 8 tokens x 32 k and of 8 logits x 32 k.
//
// The instruction multiplies TF32, float32 whose last 13 bits it ignores (seen on sm_90, where ptxas relies on it). The
// 11 significant bits hold a 16-bit float without loss; a float32 is a sum of two such terms but for its last two bits.
// It takes 16 tokens, two tiles, and 8 logits. A lane holds 8 neighbours of a row, which orders k alike on both sides.
#include "cuda/ptx.h"

namespace mhc {

enum { PHI_ROWS = 1 };

inline int x_row(int lane) { return lane / 4; }
inline int x_k(int lane) { return lane % 4 * 8; }
inline int phi_row(int lane) { return lane / 4; }
inline int phi_k(int lane) { return lane % 4 * 8; }
inline int sum_token(int lane) { return lane / 4; }
inline int sum_logit(int lane, int e) { return lane % 4 * 2 + e; }

// A lane's 8 values as sums of TERMS numbers that TF32 holds.
template <typename T> constexpr int TERMS = sizeof(T) == 2 ? 1 : 2;
template <typename T> struct Terms { uint w[TERMS<T>][8]; };
template <typename T> struct XTile : Terms<T> {};
template <typename PHI_T> struct PhiTile : Terms<PHI_T> {};

template <typename T> inline void split(Terms<T>& t, const Run<T, 8>& r) {
  UNROLL_FOR (int e = 0; e < 8; ++e) {
    const float v = run_float(r, e);
    t.w[0][e] = __float_as_uint(v);
    if constexpr (TERMS<T> == 2) t.w[1][e] = __float_as_uint(v - __uint_as_float(__float_as_uint(v) & 0xffffe000u));
  }
}
inline void split(Terms<__nv_bfloat16>& t, const Run<__nv_bfloat16, 8>& r) {
  UNROLL_FOR (int i = 0; i < 4; ++i) {
    const uint w = reinterpret_cast<const uint*>(&r)[i];
    t.w[0][2 * i] = w << 16;
    t.w[0][2 * i + 1] = w & 0xffff0000u;
  }
}
template <typename T> inline void to_tile(XTile<T>& t, const Run<T, 8>& r) { split(t, r); }
template <typename PHI_T> inline void to_tile(PhiTile<PHI_T>& t, const Run<PHI_T, 8> (&r)[PHI_ROWS]) { split(t, r[0]); }

// s += sum(x ** 2) over a lane's elements of its token, the x_k(lane) / 8-th of four shares. sum_squares adds the
// shares, in all lanes of a token.
template <typename T> inline void add_squares(float& s, const XTile<T>& x, const Run<T, 8>&) {
  float run = 0.0f;
  UNROLL_FOR (int e = 0; e < 8; ++e) run = metal::fma(__uint_as_float(x.w[0][e]), __uint_as_float(x.w[0][e]), run);
  s += run;
}
inline float sum_squares(float s) {
  const float v = s + simd_shuffle_xor(s, 1);
  return v + simd_shuffle_xor(v, 2);
}

// d += the products of term p of the tokens of x and y, or of x alone, with term q of phi.
template <typename T, typename PHI_T>
inline void multiply(float (&d)[4], const Terms<T>& x, const Terms<T>* y, int p, const Terms<PHI_T>& phi, int q) {
  UNROLL_FOR (int e = 0; e < 8; e += 2)
    multiply_tf32(d, x.w[p][e], y ? y->w[p][e] : 0u, x.w[p][e + 1], y ? y->w[p][e + 1] : 0u, phi.w[q][e],
                  phi.w[q][e + 1]);
}

// sum[.][b] += x phi^T; small products are added first.
template <typename T, typename PHI_T, int TILES, int BLOCK>
inline void multiply_add(float (&sum)[TILES][BLOCK][2], int b, const XTile<T> (&x)[TILES], const PhiTile<PHI_T>& phi) {
  static_assert(TILES <= 2, "");
  constexpr int X = TERMS<T> - 1, PHI = TERMS<PHI_T> - 1;
  const Terms<T>* next = TILES == 2 ? &x[TILES - 1] : nullptr;
  float d[4] = {};
  if constexpr (X == 1) multiply(d, x[0], next, X, phi, 0);
  if constexpr (PHI == 1) multiply(d, x[0], next, 0, phi, PHI);
  multiply(d, x[0], next, 0, phi, 0);
  UNROLL_FOR (int m = 0; m < TILES; ++m) {
    UNROLL_FOR (int e = 0; e < 2; ++e) sum[m][b][e] += d[2 * m + e];
  }
}

}  // namespace mhc

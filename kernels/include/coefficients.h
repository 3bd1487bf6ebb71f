// A token makes its coefficients of its own logits by these steps.
#include "sinkhorn_elements.h"

namespace mhc {

// Returns the coefficient of logit o, h_pre, h_post or for h_res z, from its phi product and x_dot_x = sum(x ** 2):
//   scale = rsqrt(x_dot_x / K + norm_eps);   l = scale * product;   z = alpha l + bias
// SAVE_LOGITS: l[o] = l and l[NUM_LOGITS] = scale are saved.
template <int N, int NUM_LOGITS, bool SAVE_LOGITS, typename A, typename B, typename Q, typename O>
METAL_FUNC float finish_logit(int o, float product, float x_dot_x, int K, A alpha, B bias, Q params, O l) {
  const int part = part_of<N>(o);
  const float scale =
      metal::precise::rsqrt(x_dot_x / static_cast<float>(K) + static_cast<float>(params[param::NORM_EPS]));
  const float value = scale * product;
  const float z = metal::fma(static_cast<float>(alpha[part]), value, static_cast<float>(bias[o]));
  if (SAVE_LOGITS) l[o] = value;
  if (SAVE_LOGITS && o == 0) l[NUM_LOGITS] = scale;
  return part == 0 ? gate(z, 0, params) : part == 1 ? gate(z, 1, params) : z;
}

// Row w of sums, PITCH floats, = the sum of a token's runs w, w + SLICES, ...; these are the runs of slice w in
// mhc_pre.
template <int PITCH, int SLICES, int THREADS, typename S, typename P>
METAL_FUNC void add_runs(S sums, P runs, int num_runs, int tid) {
  constexpr int AT_ONCE = by_backend(16, 8);  // runs that are loaded before the first is added
  for (int q = tid; q < SLICES * PITCH; q += THREADS) {
    float s = 0.0f;
    int r = q / PITCH;
    for (; r + (AT_ONCE - 1) * SLICES < num_runs; r += AT_ONCE * SLICES) {
      float v[AT_ONCE];
      UNROLL_FOR (int i = 0; i < AT_ONCE; ++i)
        v[i] = static_cast<float>(*at(runs, (r + i * SLICES) * PITCH + q % PITCH));
      UNROLL_FOR (int i = 0; i < AT_ONCE; ++i) s += v[i];
    }
#pragma unroll 8
    for (; r < num_runs; r += SLICES) s += static_cast<float>(runs[r * PITCH + q % PITCH]);
    sums[q] = s;
  }
}

// Adds column o over the slices, and sum(x ** 2), whose four shares follow the NUM_LOGITS columns.
struct SliceSums { float product, x_dot_x; };
template <int NUM_LOGITS, int SLICES, typename S> METAL_FUNC SliceSums add_slices(S sums, int o) {
  SliceSums found = {0.0f, 0.0f};
  UNROLL_FOR (int w = 0; w < SLICES; ++w) {
    const int row = w * (NUM_LOGITS + 4), at = row + NUM_LOGITS;
    found.product += sums[row + o];
    found.x_dot_x += (sums[at] + sums[at + 1]) + (sums[at + 2] + sums[at + 3]);
  }
  return found;
}

// Logits are read like an array: [i] = alpha l[i] + bias[i].
template <typename L, typename B> struct Logits {
  L l;
  B bias;
  float alpha;
  METAL_FUNC float operator[](uint i) const thread {
    return alpha * static_cast<float>(l[i]) + static_cast<float>(bias[i]);
  }
};
template <typename L, typename B> METAL_FUNC Logits<L, B> logits_of(L l, B bias, float alpha) {
  return {l, bias, alpha};
}

// So many lanes project a token's N x N logits, N <= 8: one lane holds four lines if it need not return to the logits.
constexpr int projection_lanes(int n, int start, int iters) {
  return n <= 4 && return_period(n, start, iters) == 0 ? 1 : matrix_lanes(n);
}
// So many lanes project the only token of a simdgroup: on Metal they share what one lane would do.
constexpr int lanes_of_one_token(int n, int start, int iters) {
  return projection_lanes(n, start, iters) == 1 ? by_backend(n * n, 1) : projection_lanes(n, start, iters);
}

// h_res = sinkhorn_knopp of the logits at z, written by lanes in_range. COLUMNS: lines are columns of the logits, and
// OUT_COLUMNS: line i becomes column i of h_res. LANES, of one of the functions above, share a token.
template <int N, int START, bool COLUMNS, bool OUT_COLUMNS, int ITERS, int LANES, bool CLAMP, typename S, typename O>
METAL_FUNC void project_token(S z, O h_res, bool in_range, ProjectionNumbers<CLAMP> numbers, int simd_lane) {
  if constexpr (N > 1 && LANES == N * N) {
    project_elements<N, START, COLUMNS, OUT_COLUMNS, ITERS>(z, h_res, in_range, numbers, simd_lane);
  } else if constexpr (LANES == 1) {
    float p[N][N];
    const auto logits = clipped(z, numbers);
    UNROLL_FOR (int q = 0; q < N * N; ++q) p[q / N][q % N] = logits[COLUMNS ? q % N * N + q / N : q];
    sinkhorn_one_lane<N, START>(p, ITERS, numbers.eps);
    if (in_range) {
      UNROLL_FOR (int q = 0; q < N * N; ++q) h_res[q] = OUT_COLUMNS ? p[q % N][q / N] : p[q / N][q % N];
    }
  } else {
    project_lanes<N, START, COLUMNS, OUT_COLUMNS, ITERS>(z, h_res, in_range, numbers, uint(simd_lane));
  }
}

// h_res = the projection of the logits at z, for the tokens from `first` on of a tile of TILE_TOKENS, whose logits lie
// one behind the other. The last simdgroups project, and the others may go on.
template <int N, int START, bool COLUMNS, bool OUT_COLUMNS, int ITERS, int SIMDS, int TILE_TOKENS, bool CLAMP,
          typename S, typename O>
METAL_FUNC void project_tile(S z, O h_res, uint first, uint tokens, ProjectionNumbers<CLAMP> numbers, int simd,
                             int lane) {
  constexpr int LANES = projection_lanes(N, START, ITERS);
  for (int m0 = (SIMDS - 1 - simd) * (32 / LANES); m0 < TILE_TOKENS; m0 += SIMDS * (32 / LANES)) {
    const int m = m0 + lane / LANES;
    const size_t t = first + uint(m);
    const bool in_range = m < TILE_TOKENS && t < tokens;
    project_token<N, START, COLUMNS, OUT_COLUMNS, ITERS, LANES>(z + (in_range ? m : 0) * N * N,
                                                                h_res + (in_range ? t : 0) * (N * N), in_range,
                                                                numbers, lane);
  }
}

}  // namespace mhc

// Sinkhorn-Knopp of one matrix by N * N lanes of a simdgroup, N <= 4: lane N * i + j holds element j of line i. A lane
// alone takes each half-step's N reciprocals and N * N products one after the other.
#include "sinkhorn.h"

namespace mhc {

// v[b] = element b of the lane's line, with ACROSS of its place in each line.
template <bool ACROSS, int N> METAL_FUNC void line_of_element(thread float (&v)[N], float p, int lane) {
  UNROLL_FOR (int b = 0; b < N; ++b)
    v[b] = simd_shuffle(p, static_cast<ushort>(ACROSS ? b * N + lane % N : lane / N * N + b));
}

template <bool ACROSS, int N> METAL_FUNC float line_max(float p, int lane) {
  float v[N];
  line_of_element<ACROSS>(v, p, lane);
  float m = v[0];
  UNROLL_FOR (int b = 1; b < N; ++b) m = metal::max(m, v[b]);
  return m;
}

// s + the sum of the line, in the order of sinkhorn_one_lane: both give the same bits.
template <bool ACROSS, int N> METAL_FUNC float add_line(float s, float p, int lane) {
  float v[N];
  line_of_element<ACROSS>(v, p, lane);
  UNROLL_FOR (int b = 0; b < N; ++b) s += v[b];
  return s;
}

// Returns the element of the projection of the logits whose element is p.
template <int N, int START> METAL_FUNC float sinkhorn_element(float p, int iters, float eps, int lane) {
  if (START == START_EXP) {
    const float m = line_max<false, N>(p, lane);
    p = clamp_to_float32((p - m) - metal::precise::log(add_line<false, N>(0.0f, metal::precise::exp(p - m), lane)));
    p = metal::precise::exp(p - line_max<true, N>(p, lane));
    p *= RECIPROCAL((add_line<true, N>(0.0f, p, lane)));
  } else if (START == START_SOFTMAX || START == START_EXP_PLAIN) {
    p = metal::precise::exp(p - line_max<false, N>(p, lane));
    float v[N];
    line_of_element<false>(v, p, lane);
    const float sum = line_sum(v);
    p = START == START_SOFTMAX ? p / sum + eps : p / (sum + eps);
  } else {
    p += lane / N == lane % N ? 1.0f : 0.0f;
  }
  for (int k = start_half_steps(START); k < 2 * iters; ++k)
    p *= k % 2 == 0 ? RECIPROCAL((add_line<false, N>(eps, p, lane))) : RECIPROCAL((add_line<true, N>(eps, p, lane)));
  return p;
}

// h_res = the projection of the logits at z, written by lanes in_range; see project_token.
template <int N, int START, bool COLUMNS, bool OUT_COLUMNS, int ITERS, bool CLAMP, typename S, typename O>
METAL_FUNC void project_elements(S z, O h_res, bool in_range, ProjectionNumbers<CLAMP> numbers, int simd_lane) {
  const int lane = simd_lane % (N * N), i = lane / N, j = lane % N;
  const auto logits = clipped(z, numbers);
  const float p = sinkhorn_element<N, START>(logits[COLUMNS ? j * N + i : lane], ITERS, numbers.eps, lane);
  if (in_range) h_res[OUT_COLUMNS ? j * N + i : lane] = p;
}

}  // namespace mhc

// Sinkhorn-Knopp: matrix_lanes(N) lanes hold a matrix, lane i its line i. Lines are what the first half-step
// normalises.
#include "common.h"

namespace mhc {

constexpr int matrix_lanes(int n) {
  return n <= 1 ? 1 : n <= 2 ? 2 : n <= 4 ? 4 : n <= 8 ? 8 : n <= 16 ? 16 : n <= 32 ? 32 : 64;
}

// A difference of logits beyond float32 becomes the least number that float32 holds, since the sum across may have no
// other term. NaN stays.
constexpr float lowest() { return -3.4e38f; }
METAL_FUNC float clamp_to_float32(float a) { return a < lowest() ? lowest() : a; }

// The sum (with MAX the maximum) of v[c] over W <= 32 lanes, in lane c's v[0]: each exchange halves the columns.
template <int O, bool MAX, int W> METAL_FUNC void scatter_reduce(thread float (&v)[W], uint lane) {
  if constexpr (O > 0) {
    const bool high = (lane & uint(O)) != 0;
    UNROLL_16_FOR (int j = 0; j < O; ++j) {
      const float first = v[j], second = v[j + O];  // a choice between places would leave v in memory
      const float other = simd_shuffle_xor(high ? first : second, static_cast<ushort>(O));
      const float value = high ? second : first;
      v[j] = MAX ? metal::max(value, other) : value + other;
    }
    scatter_reduce<O / 2, MAX>(v, lane);
  }
}

// The sum (with MAX the maximum) of column c over all lines of the matrix, in lane c. Above 32 lines scratch holds 128
// floats.
template <int N, bool MAX, typename S>
METAL_FUNC float column_reduce(thread const float (&p)[N], uint lane, S scratch) {
  constexpr int W = matrix_lanes(N) < 32 ? matrix_lanes(N) : 32;
  const float none = MAX ? lowest() : 0.0f;
  float v[W];
  UNROLL_16_FOR (int j = 0; j < W; ++j) v[j] = j < N ? p[j < N ? j : 0] : none;
  scatter_reduce<W / 2, MAX>(v, lane);
  const float low = v[0];
  if constexpr (N <= 32) {
    return low;
  } else {
    UNROLL_16_FOR (int j = 0; j < W; ++j) v[j] = j + 32 < N ? p[j + 32 < N ? j + 32 : 0] : none;
    scatter_reduce<W / 2, MAX>(v, lane);
    const float high = v[0];
    const uint c = lane % 32, half_of = (lane / 32) * 64;
    scratch[half_of + c] = low;
    scratch[half_of + 32 + c] = high;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float a = scratch[lane], b = scratch[64 + lane];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return MAX ? metal::max(a, b) : a + b;
  }
}

// all[c] = lane c's value, in every lane of the matrix.
template <int N, typename S>
METAL_FUNC void broadcast_columns(thread float (&all)[N], float value, uint lane, uint simd_lane, S scratch) {
  if constexpr (N <= 32) {
    const uint first = simd_lane & ~uint(matrix_lanes(N) - 1);
    UNROLL_16_FOR (int j = 0; j < N; ++j) all[j] = simd_shuffle(value, static_cast<ushort>(first + uint(j)));
  } else {
    scratch[lane] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL_16_FOR (int j = 0; j < N; ++j) all[j] = scratch[j];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// To use each lane's value without an array as in broadcast_columns: publish, publish_barrier, then published<N>(value,
// j, ...) is lane j's value, and publish_barrier again. offset is 0, or 64 for a second value. Above 32 lines scratch holds 128 floats.
template <int N, typename S> METAL_FUNC void publish(float value, uint lane, S scratch, int offset = 0) {
  if (N > 32) scratch[uint(offset) + lane] = value;
}
template <int N> METAL_FUNC void publish_barrier() {
  if constexpr (N > 32) threadgroup_barrier(mem_flags::mem_threadgroup);
}
template <int N, typename S> METAL_FUNC float published(float value, int j, uint simd_lane, S scratch, int offset = 0) {
  if constexpr (N > 32) return scratch[offset + j];
  else return simd_shuffle(value, static_cast<ushort>((simd_lane & ~uint(matrix_lanes(N) - 1)) + uint(j)));
}

// What a projection starts from, and how many half-steps that already was: START_EXP makes two on the logits
// (l -= logsumexp(l) along, then across: exact at any logits), START_SOFTMAX one (softmax + eps), START_EXP_PLAIN one
// (exp(l - max(l)) / (its sum + eps) along), START_ADDITIVE none (I + l). Python passes the numbers of
// conventions.START_CODES; a test compares them with these.
enum { START_EXP = 0, START_SOFTMAX = 1, START_ADDITIVE = 2, START_EXP_PLAIN = 3 };
constexpr int start_half_steps(int start) { return start == START_EXP ? 2 : start == START_ADDITIVE ? 0 : 1; }

// The numbers of a projection, of params. CLAMP: logits are clipped to [low, high], and one that is not strictly
// between has no gradient. Without CLAMP low and high are not used.
template <bool CLAMP> struct ProjectionNumbers { float eps, low, high; };
template <bool CLAMP, typename Q> METAL_FUNC ProjectionNumbers<CLAMP> projection_numbers(Q params) {
  if constexpr (CLAMP)
    return {static_cast<float>(params[param::PROJECTION_EPS]), static_cast<float>(params[param::CLAMP_LOW]),
            static_cast<float>(params[param::CLAMP_HIGH])};
  else return {static_cast<float>(params[param::PROJECTION_EPS]), 0.0f, 0.0f};
}

// Logits are read like an array: [i] = l[i], with CLAMP clipped. NaN stays.
template <typename L> struct ClippedLogits {
  L l;
  float low, high;
  METAL_FUNC float operator[](uint i) const thread {
    const float v = static_cast<float>(l[i]);
    return v < low ? low : v > high ? high : v;
  }
};
template <bool CLAMP, typename L> METAL_FUNC auto clipped(L l, ProjectionNumbers<CLAMP> numbers) {
  if constexpr (CLAMP) return ClippedLogits<L>{l, numbers.low, numbers.high};
  else return l;
}

// The number of half-steps that multiply an element by at most `bound`: over many, each multiplies by at most n - 1,
// since n - 1 lines need one line across.
constexpr int growing_steps(int n, float bound) {
  int steps = 0;
  for (float growth = float(n - 1); n > 2 && growth <= bound; growth *= float(n - 1)) ++steps;
  return n > 2 ? steps : 1 << 20;
}
// After how many half-steps small elements are computed again from the logits, since what float32 has lost may matter
// later; 0 is never. The bounds are 2^107, by which 2^-126 grows to 2^-19 within all half-steps, and 2^96, by which it
// grows to 2^-30 (return_small) between two returns. START_EXP_PLAIN: all elements of a column may be small, at least
// 2^-93, and grow together besides, so that the product of its divisors needs the other 2^-33 of float32.
constexpr int return_period(int n, int start, int iters) {
  return start == START_ADDITIVE || 2 * iters - 2 <= growing_steps(n, 1.6225928e32f)
             ? 0
             : growing_steps(n, start == START_EXP_PLAIN ? 1.0737418e9f : 7.9228163e28f);
}

// log p = the start's logits - along - across, where lane i holds those of line i and column i. The divisors since the
// last return are multiplied in along_since and across_since. A softmax along the line is exp(logit - top) / sum; in
// the sum of START_EXP_PLAIN there is eps.
struct LogDivisors { float along, across, along_since, across_since, top, sum; };
METAL_FUNC void record_divisor(thread LogDivisors& log_divisors, int k, float d) {
  if (k % 2 == 0) log_divisors.along_since *= d;
  else log_divisors.across_since *= d;
}

// A line's sum, eight by eight: so small elements are not rounded at each step to the last digit of a large one beside
// them.
template <int N> METAL_FUNC float line_sum(thread const float (&p)[N]) {
  float sum = 0.0f;
  UNROLL_16_FOR (int j = 0; j < N; j += 8) {
    float part = p[j];
    UNROLL_16_FOR (int e = 1; e < 8; ++e) part += j + e < N ? p[j + e < N ? j + e : 0] : 0.0f;
    sum = j == 0 ? part : sum + part;
  }
  return sum;
}

template <int N, bool COLUMNS, typename P> METAL_FUNC void load_line(thread float (&p)[N], P logits, uint lane) {
  UNROLL_16_FOR (int j = 0; j < N; ++j) {
    const uint i = lane < uint(N) ? lane : 0u;
    p[j] = static_cast<float>(logits[COLUMNS ? uint(j * N) + i : i * uint(N) + uint(j)]);
  }
}

// p = softmax(p) along the line; START_EXP_PLAIN: with eps in the sum.
template <int START, int N>
METAL_FUNC void softmax_line(thread float (&p)[N], thread float& top, thread float& sum, float eps) {
  top = p[0];
  UNROLL_16_FOR (int j = 1; j < N; ++j) top = metal::max(top, p[j]);
  UNROLL_16_FOR (int j = 0; j < N; ++j) p[j] = metal::precise::exp(p[j] - top);
  sum = line_sum(p);
  if (START == START_EXP_PLAIN) sum += eps;
  UNROLL_16_FOR (int j = 0; j < N; ++j) p[j] /= sum;
}

template <int N, int START, typename S>
METAL_FUNC void sinkhorn_start(thread float (&p)[N], thread LogDivisors& log_divisors, float eps, uint lane,
                               uint simd_lane, S scratch) {
  const bool in_range = lane < uint(N);
  log_divisors = {0.0f, 0.0f, 1.0f, 1.0f, 0.0f, 1.0f};
  if constexpr (START == START_EXP) {
    float m = p[0], s = 0.0f, all[N];
    UNROLL_16_FOR (int j = 1; j < N; ++j) m = metal::max(m, p[j]);
    UNROLL_16_FOR (int j = 0; j < N; j += 8) {  // this is line_sum, whose array would take registers
      float part = metal::precise::exp(p[j] - m);
      UNROLL_16_FOR (int e = 1; e < 8; ++e)
        part += j + e < N ? metal::precise::exp(p[j + e < N ? j + e : 0] - m) : 0.0f;
      s = j == 0 ? part : s + part;
    }
    s = metal::precise::log(s);
    UNROLL_16_FOR (int j = 0; j < N; ++j) p[j] = in_range ? clamp_to_float32((p[j] - m) - s) : lowest();
    const float top = column_reduce<N, true>(p, lane, scratch);
    broadcast_columns<N>(all, top, lane, simd_lane, scratch);
    UNROLL_16_FOR (int j = 0; j < N; ++j) p[j] = in_range ? metal::precise::exp(p[j] - all[j]) : 0.0f;
    const float sum = column_reduce<N, false>(p, lane, scratch);
    broadcast_columns<N>(all, RECIPROCAL(sum), lane, simd_lane, scratch);
    UNROLL_16_FOR (int j = 0; j < N; ++j) p[j] *= all[j];
    log_divisors = {m + s, top, 1.0f, sum, 0.0f, 1.0f};
  } else {
    if (START != START_ADDITIVE) softmax_line<START>(p, log_divisors.top, log_divisors.sum, eps);
    UNROLL_16_FOR (int j = 0; j < N; ++j) {
      if (START == START_EXP_PLAIN) p[j] = in_range ? p[j] : 0.0f;
      else p[j] = !in_range ? 0.0f : p[j] + (START == START_SOFTMAX ? eps : uint(j) == lane ? 1.0f : 0.0f);
    }
  }
}

// p = p / (p.sum() + eps), along the lines for even k and across them for odd k; returns this lane's divisor.
template <int N, typename S>
METAL_FUNC float half_step(thread float (&p)[N], int k, float eps, uint lane, uint simd_lane, S scratch) {
  float d = 0.0f;
  if (k % 2 == 0) {
    d = lane < uint(N) ? line_sum(p) + eps : 1.0f;
    const float r = RECIPROCAL(d);
    UNROLL_16_FOR (int j = 0; j < N; ++j) p[j] *= r;
  } else {
    float r[N];
    d = column_reduce<N, false>(p, lane, scratch) + eps;
    broadcast_columns<N>(r, RECIPROCAL(d), lane, simd_lane, scratch);
    UNROLL_16_FOR (int j = 0; j < N; ++j) p[j] *= r[j];
  }
  return d;
}

// Small elements of p become exp(the start's logits - along - across). A logit is loaded where it is needed, since
// registers do not hold all of them.
template <int N, int START, bool COLUMNS, typename P, typename S>
METAL_FUNC void return_small(thread float (&p)[N], P logits, thread LogDivisors& log_divisors, float eps, uint lane,
                             uint simd_lane, S scratch) {
  constexpr float SMALL = 9.3132257e-10f;  // 2^-30
  log_divisors.along += metal::precise::log(log_divisors.along_since);
  log_divisors.across += metal::precise::log(log_divisors.across_since);
  log_divisors.along_since = log_divisors.across_since = 1.0f;
  publish<N>(log_divisors.across, lane, scratch);
  publish_barrier<N>();
  UNROLL_16_FOR (int j = 0; j < N; ++j) {
    const float other = published<N>(log_divisors.across, j, simd_lane, scratch);
    if (lane < uint(N) && p[j] < SMALL) {
      float a = static_cast<float>(logits[COLUMNS ? uint(j * N) + lane : lane * uint(N) + uint(j)]);
      if (START == START_SOFTMAX)
        a = metal::precise::log(metal::precise::exp(a - log_divisors.top) / log_divisors.sum + eps);
      if (START == START_EXP_PLAIN) a = (a - log_divisors.top) - metal::precise::log(log_divisors.sum);
      p[j] = metal::precise::exp((a - log_divisors.along) - other);
    }
  }
  publish_barrier<N>();  // before it no lane may publish again
}

template <int N, int START, bool COLUMNS, int ITERS, bool CLAMP, typename P, typename S>
METAL_FUNC void sinkhorn(thread float (&p)[N], P given, ProjectionNumbers<CLAMP> numbers, uint lane, uint simd_lane,
                         S scratch) {
  constexpr int FIRST = start_half_steps(START), RETURN = return_period(N, START, ITERS);
  const float eps = numbers.eps;
  const auto logits = clipped(given, numbers);
  LogDivisors log_divisors;
  load_line<N, COLUMNS>(p, logits, lane);
  sinkhorn_start<N, START>(p, log_divisors, eps, lane, simd_lane, scratch);
  if constexpr (RETURN == 0) {
    for (int k = FIRST; k < 2 * ITERS; ++k) half_step(p, k, eps, lane, simd_lane, scratch);
  } else {
    for (int from = FIRST; from < 2 * ITERS; from += RETURN) {
      if (from > FIRST) return_small<N, START, COLUMNS>(p, logits, log_divisors, eps, lane, simd_lane, scratch);
      for (int k = from; k < from + RETURN && k < 2 * ITERS; ++k)
        record_divisor(log_divisors, k, half_step(p, k, eps, lane, simd_lane, scratch));
    }
  }
}

// p = p / (p.sum() + eps), along the lines, with ACROSS across them.
template <bool ACROSS, int N> METAL_FUNC void half_step_one_lane(thread float (&p)[N][N], float eps) {
  UNROLL_16_FOR (int a = 0; a < N; ++a) {
    float d = eps;
    UNROLL_16_FOR (int b = 0; b < N; ++b) d += ACROSS ? p[b][a] : p[a][b];
    d = RECIPROCAL(d);
    UNROLL_16_FOR (int b = 0; b < N; ++b) {
      if (ACROSS) p[b][a] *= d;
      else p[a][b] *= d;
    }
  }
}

// p = the projection of the logits p, N * N of them in one lane; p[i] is line i.
template <int N, int START> METAL_FUNC void sinkhorn_one_lane(thread float (&p)[N][N], int iters, float eps) {
  if (START == START_EXP) {
    UNROLL_16_FOR (int i = 0; i < N; ++i) {
      float m = p[i][0], s = 0.0f;
      UNROLL_16_FOR (int j = 1; j < N; ++j) m = metal::max(m, p[i][j]);
      UNROLL_16_FOR (int j = 0; j < N; ++j) s += metal::precise::exp(p[i][j] - m);
      s = metal::precise::log(s);
      UNROLL_16_FOR (int j = 0; j < N; ++j) p[i][j] = clamp_to_float32((p[i][j] - m) - s);
    }
    UNROLL_16_FOR (int j = 0; j < N; ++j) {
      float m = p[0][j], s = 0.0f;
      UNROLL_16_FOR (int i = 1; i < N; ++i) m = metal::max(m, p[i][j]);
      UNROLL_16_FOR (int i = 0; i < N; ++i) s += (p[i][j] = metal::precise::exp(p[i][j] - m));
      UNROLL_16_FOR (int i = 0; i < N; ++i) p[i][j] *= RECIPROCAL(s);
    }
  } else {
    UNROLL_16_FOR (int i = 0; i < N; ++i) {
      float top, sum;
      if (START != START_ADDITIVE) softmax_line<START>(p[i], top, sum, eps);
      UNROLL_16_FOR (int j = 0; j < N; ++j) {
        if (START != START_EXP_PLAIN) p[i][j] += START == START_SOFTMAX ? eps : i == j ? 1.0f : 0.0f;
      }
    }
  }
  for (int k = start_half_steps(START); k < 2 * iters; ++k) {
    if (k % 2 == 0) half_step_one_lane<false>(p, eps);
    else half_step_one_lane<true>(p, eps);
  }
}

// h_res = the projection of N x N logits, N <= 8, by matrix_lanes(N) lanes, written by lanes in_range. COLUMNS: lines
// are columns of the logits, and OUT_COLUMNS: line i becomes column i of h_res.
template <int N, int START, bool COLUMNS, bool OUT_COLUMNS, int ITERS, bool CLAMP, typename P, typename O>
METAL_FUNC void project_lanes(P logits, O h_res, bool in_range, ProjectionNumbers<CLAMP> numbers, uint simd_lane) {
  const uint lane = simd_lane % matrix_lanes(N);
  float p[N];
  sinkhorn<N, START, COLUMNS, ITERS>(p, logits, numbers, lane, simd_lane, h_res);
  UNROLL_16_FOR (int j = 0; j < N; ++j) {
    if (in_range && lane < uint(N)) h_res[OUT_COLUMNS ? uint(j * N) + lane : lane * uint(N) + uint(j)] = p[j];
  }
}

}  // namespace mhc

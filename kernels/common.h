// What the bodies share; compiled before every body on Metal, on CUDA and in the simulator.

#ifndef UNROLL  // Metal; cuda.h has its own words
#define UNROLL _Pragma("clang loop unroll(full)")
#define STAY_PACKED(value)
#define RECIPROCAL(v) (1.0f / (v))
#endif

namespace mhc {

// VEC neighbours that move in one load or store.
template <typename T, int VEC> struct alignas(sizeof(T) * VEC) Pack { T v[VEC]; };

template <int VEC, typename T> inline const device Pack<T, VEC>* packs(const device T* p) {
  return (const device Pack<T, VEC>*)p;
}
template <typename T> inline size_t address(const device T* p) {
  return static_cast<size_t>((const device char*)p - (const device char*)nullptr);
}
#ifndef ONE_ADDRESS_SPACE  // on Metal, MLX puts inputs of fewer than 8 elements in the constant address space
template <int VEC, typename T> inline const constant Pack<T, VEC>* packs(const constant T* p) {
  return (const constant Pack<T, VEC>*)p;
}
template <typename T> inline size_t address(const constant T* p) {
  return static_cast<size_t>((const constant char*)p - (const constant char*)nullptr);
}
#endif

// A contiguous slice keeps its byte offset, so an input need not be aligned to a pack; outputs are.
template <int VEC, typename P> inline bool aligned(P p) {
  return VEC == 1 || address(p) % sizeof(*packs<VEC>(p)) == 0;
}

template <typename T, int VEC, typename P> inline Pack<T, VEC> load(P p, bool whole) {
  if (whole) return *packs<VEC>(p);
  Pack<T, VEC> r;
  UNROLL for (int e = 0; e < VEC; ++e) r.v[e] = p[e];
  return r;
}

template <int VEC, typename P> inline void load_floats(thread float (&v)[VEC], P p, bool whole) {
  if (whole) {
    const auto pack = *packs<VEC>(p);
    UNROLL for (int e = 0; e < VEC; ++e) v[e] = static_cast<float>(pack.v[e]);
  } else {
    UNROLL for (int e = 0; e < VEC; ++e) v[e] = static_cast<float>(p[e]);
  }
}

// A lane's share of a row, in loads of up to 16 bytes.
template <typename T, int COUNT> constexpr int run_vec() { return COUNT * int(sizeof(T)) > 16 ? 16 / int(sizeof(T)) : COUNT; }
template <typename T, int COUNT> struct Run { Pack<T, run_vec<T, COUNT>()> p[COUNT / run_vec<T, COUNT>()]; };
template <typename T, int COUNT> inline float run_float(const thread Run<T, COUNT>& r, int e) {
  return static_cast<float>(r.p[e / run_vec<T, COUNT>()].v[e % run_vec<T, COUNT>()]);
}

// to[i] = channels c.. of stream i, for COUNT streams of C channels
template <int COUNT, int VEC, typename T, typename P>
inline void load_streams(thread Pack<T, VEC>* to, P row, int C, int c, bool whole) {
  UNROLL for (int i = 0; i < COUNT; ++i) to[i] = load<T, VEC>(row + i * C + c, whole);
}

inline float sigmoid(float v) { return 1.0f / (1.0f + metal::precise::exp(-v)); }

// h_pre = sigmoid(H) + params[1], h_post (POST) = params[2] * sigmoid(H) + params[3]; H itself unless GATES
template <int N, int THREADS, bool GATES, bool POST, typename P, typename S, typename Q>
inline void load_gates(P H, S h, Q params, uint tid) {
  for (uint i = tid; i < uint(N); i += THREADS) {
    h[i] = static_cast<float>(H[i]);
    if (GATES) {
      const float scale = POST ? static_cast<float>(params[2]) : 1.0f;
      h[i] = scale * sigmoid(h[i]) + static_cast<float>(params[POST ? 3 : 1]);
    }
  }
}

// mix = H, or its transpose
template <int N, int THREADS, bool TRANSPOSED, typename P, typename S> inline void load_mix(P H, S mix, uint tid) {
  for (uint k = tid; k < uint(N * N); k += THREADS)
    mix[TRANSPOSED ? (k % N) * N + k / N : k] = static_cast<float>(H[k]);
}

// v[a] = sum over the threadgroup of v[a], in every thread. scratch holds 2 * SIMDS * COUNT floats: with turn going
// 0, 1, 0, ... one barrier a call is enough.
template <int SIMDS, int COUNT, typename S>
inline void sum_everywhere(thread float (&v)[COUNT], S scratch, int turn, uint simd, uint simd_lane) {
  UNROLL for (int a = 0; a < COUNT; ++a) {
    v[a] = simd_sum(v[a]);
    if (SIMDS > 1 && simd_lane == 0) scratch[(uint(turn * SIMDS) + simd) * COUNT + a] = v[a];
  }
  if constexpr (SIMDS > 1) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (int a = 0; a < COUNT; ++a) {
      v[a] = 0.0f;
      UNROLL for (int s = 0; s < SIMDS; ++s) v[a] += scratch[(turn * SIMDS + s) * COUNT + a];
    }
  }
}

// out[a] = sum over the threadgroup of v[a]. scratch holds COUNT * THREADS / 32 floats.
template <int COUNT, int THREADS, typename S, typename O>
inline void group_sum(thread float (&v)[COUNT], S scratch, O out, uint tid) {
  UNROLL for (int a = 0; a < COUNT; ++a) {
    const float s = simd_sum(v[a]);
    if (tid % 32 == 0) scratch[(tid / 32) * COUNT + a] = s;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint a = tid; a < COUNT; a += THREADS) {
    float s = 0.0f;
    for (int g = 0; g < THREADS / 32; ++g) s += scratch[g * COUNT + a];
    out[a] = s;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// ---- Sinkhorn-Knopp: W lanes hold a matrix, lane i its line i (the lines that the first half-step normalises).

constexpr int lanes(int n) { return n <= 1 ? 1 : n <= 2 ? 2 : n <= 4 ? 4 : n <= 8 ? 8 : n <= 16 ? 16 : n <= 32 ? 32 : 64; }

// Sum (or maximum) over W <= 32 lanes of v[c], left in lane c's v[0]: each exchange halves the columns.
template <int O, bool MAX, int W> inline void scatter_sum(thread float (&v)[W], uint lane) {
  if constexpr (O > 0) {
    const bool high = (lane & uint(O)) != 0;
    UNROLL for (int j = 0; j < O; ++j) {
      const float other = simd_shuffle_xor(high ? v[j] : v[j + O], static_cast<ushort>(O));
      const float mine = high ? v[j + O] : v[j];
      v[j] = MAX ? metal::max(mine, other) : mine + other;
    }
    scatter_sum<O / 2, MAX>(v, lane);
  }
}

// The sum (maximum) of column c over all lines of the matrix, in lane c. scratch is used above 32 lines: 128 floats.
template <int N, bool MAX, typename S> inline float across(thread const float (&p)[N], uint lane, S scratch) {
  constexpr int W = lanes(N) < 32 ? lanes(N) : 32;
  const float none = MAX ? -3.0e38f : 0.0f;
  float v[W];
  UNROLL for (int j = 0; j < W; ++j) v[j] = j < N ? p[j < N ? j : 0] : none;
  scatter_sum<W / 2, MAX>(v, lane);
  const float low = v[0];
  if constexpr (N <= 32) {
    return low;
  } else {
    UNROLL for (int j = 0; j < W; ++j) v[j] = j + 32 < N ? p[j + 32 < N ? j + 32 : 0] : none;
    scatter_sum<W / 2, MAX>(v, lane);
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
inline void gather(thread float (&all)[N], float value, uint lane, uint simd_lane, S scratch) {
  if constexpr (N <= 32) {
    const uint first = simd_lane & ~uint(lanes(N) - 1);
    UNROLL for (int j = 0; j < N; ++j) all[j] = simd_shuffle(value, static_cast<ushort>(first + uint(j)));
  } else {
    scratch[lane] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (int j = 0; j < N; ++j) all[j] = scratch[j];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// line i of the matrix before the first plain half-step, and how many half-steps that start already was:
// 2 for exp (l -= logsumexp(l) along, then across: exact at any logits), 1 for softmax + eps, 0 for I + l.
enum { START_EXP = 0, START_SOFTMAX = 1, START_ADDITIVE = 2 };
constexpr int steps_of(int start) { return start == START_EXP ? 2 : start == START_SOFTMAX ? 1 : 0; }

template <int N, bool COLUMNS, typename P> inline void load_line(thread float (&p)[N], P logits, uint lane) {
  UNROLL for (int j = 0; j < N; ++j) {
    const uint i = lane < uint(N) ? lane : 0u;
    p[j] = static_cast<float>(logits[COLUMNS ? uint(j * N) + i : i * uint(N) + uint(j)]);
  }
}

// p = softmax(p) along the line
template <int N> inline void softmax_line(thread float (&p)[N]) {
  float m = p[0], s = 0.0f;
  UNROLL for (int j = 1; j < N; ++j) m = metal::max(m, p[j]);
  UNROLL for (int j = 0; j < N; ++j) s += (p[j] = metal::precise::exp(p[j] - m));
  UNROLL for (int j = 0; j < N; ++j) p[j] /= s;
}

template <int N, int START, typename S>
inline void sinkhorn_start(thread float (&p)[N], float eps, uint lane, uint simd_lane, S scratch) {
  const bool live = lane < uint(N);
  if constexpr (START == START_EXP) {
    float m = p[0], s = 0.0f, all[N];
    UNROLL for (int j = 1; j < N; ++j) m = metal::max(m, p[j]);
    UNROLL for (int j = 0; j < N; ++j) s += metal::precise::exp(p[j] - m);
    s = metal::precise::log(s);
    UNROLL for (int j = 0; j < N; ++j) p[j] = live ? (p[j] - m) - s : -3.0e38f;
    gather<N>(all, across<N, true>(p, lane, scratch), lane, simd_lane, scratch);
    UNROLL for (int j = 0; j < N; ++j) p[j] = live ? metal::precise::exp(p[j] - all[j]) : 0.0f;
    gather<N>(all, RECIPROCAL((across<N, false>(p, lane, scratch))), lane, simd_lane, scratch);
    UNROLL for (int j = 0; j < N; ++j) p[j] *= all[j];
  } else {
    if (START == START_SOFTMAX) softmax_line(p);
    UNROLL for (int j = 0; j < N; ++j)
      p[j] = !live ? 0.0f : p[j] + (START == START_SOFTMAX ? eps : uint(j) == lane ? 1.0f : 0.0f);
  }
}

// p = p / (p.sum() + eps) along the lines for even k, across them for odd k; returns this lane's divisor.
template <int N, typename S>
inline float half_step(thread float (&p)[N], int k, float eps, uint lane, uint simd_lane, S scratch) {
  float d = 0.0f;
  if (k % 2 == 0) {
    UNROLL for (int j = 0; j < N; ++j) d += p[j];
    d = lane < uint(N) ? d + eps : 1.0f;
    const float r = RECIPROCAL(d);
    UNROLL for (int j = 0; j < N; ++j) p[j] *= r;
  } else {
    float r[N];
    d = across<N, false>(p, lane, scratch) + eps;
    gather<N>(r, RECIPROCAL(d), lane, simd_lane, scratch);
    UNROLL for (int j = 0; j < N; ++j) p[j] *= r[j];
  }
  return d;
}

template <int N, int START, bool COLUMNS, typename P, typename S>
inline void sinkhorn(thread float (&p)[N], P logits, int iters, float eps, uint lane, uint simd_lane, S scratch) {
  load_line<N, COLUMNS>(p, logits, lane);
  sinkhorn_start<N, START>(p, eps, lane, simd_lane, scratch);
  for (int k = steps_of(START); k < 2 * iters; ++k) half_step(p, k, eps, lane, simd_lane, scratch);
}

// p = the projection of the logits p, N * N in one lane; p[i] is line i
template <int N, int START> inline void sinkhorn_alone(thread float (&p)[N][N], int iters, float eps) {
  if (START == START_EXP) {
    UNROLL for (int i = 0; i < N; ++i) {
      float m = p[i][0], s = 0.0f;
      UNROLL for (int j = 1; j < N; ++j) m = metal::max(m, p[i][j]);
      UNROLL for (int j = 0; j < N; ++j) s += metal::precise::exp(p[i][j] - m);
      s = metal::precise::log(s);
      UNROLL for (int j = 0; j < N; ++j) p[i][j] = (p[i][j] - m) - s;
    }
    UNROLL for (int j = 0; j < N; ++j) {
      float m = p[0][j], s = 0.0f;
      UNROLL for (int i = 1; i < N; ++i) m = metal::max(m, p[i][j]);
      UNROLL for (int i = 0; i < N; ++i) s += (p[i][j] = metal::precise::exp(p[i][j] - m));
      UNROLL for (int i = 0; i < N; ++i) p[i][j] *= RECIPROCAL(s);
    }
  } else {
    UNROLL for (int i = 0; i < N; ++i) {
      if (START == START_SOFTMAX) softmax_line(p[i]);
      UNROLL for (int j = 0; j < N; ++j) p[i][j] += START == START_SOFTMAX ? eps : i == j ? 1.0f : 0.0f;
    }
  }
  for (int k = steps_of(START); k < 2 * iters; ++k) {
    UNROLL for (int a = 0; a < N; ++a) {
      float d = eps;
      UNROLL for (int b = 0; b < N; ++b) d += k % 2 == 0 ? p[a][b] : p[b][a];
      d = RECIPROCAL(d);
      UNROLL for (int b = 0; b < N; ++b) {
        if (k % 2 == 0) p[a][b] *= d;
        else p[b][a] *= d;
      }
    }
  }
}

// mix = the projection of N x N logits, N <= 8, by one simdgroup; COLUMNS as in sinkhorn_knopp.metal
template <int N, int START, bool COLUMNS, bool OUT_COLUMNS, typename P, typename S>
inline void project(P logits, S mix, int iters, float eps, uint simd_lane) {
  const uint lane = simd_lane % lanes(N);
  float p[N];
  sinkhorn<N, START, COLUMNS>(p, logits, iters, eps, lane, simd_lane, mix);
  UNROLL for (int j = 0; j < N; ++j) {
    if (simd_lane < uint(N)) mix[OUT_COLUMNS ? uint(j * N) + lane : lane * uint(N) + uint(j)] = p[j];
  }
}

// Where permutation w of N things, in lexicographic order, sends i.
template <int N> inline int permuted(int w, int i) {
  int left = (1 << N) - 1, j = 0, ways = 1;
  for (int k = 2; k < N; ++k) ways *= k;
  for (int place = 0; place <= i; ++place) {
    int skip = w / ways;
    w -= skip * ways;
    if (N - 1 - place > 1) ways /= N - 1 - place;
    for (j = 0; j < N; ++j) {
      if (((left >> j) & 1) != 0 && skip-- == 0) break;
    }
    left &= ~(1 << j);
  }
  return j;
}

}  // namespace mhc

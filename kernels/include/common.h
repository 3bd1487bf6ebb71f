// What all bodies share: the slots of params, packs and their loads and stores, gates, sums over a threadgroup.
// Functions say METAL_FUNC, Metal's word for what is always inlined: arrays that a call takes would lie in memory.
#include "BACKEND/packs.h"

namespace mhc {

// The slots of the array params, which all bodies read by these names: the gates' three numbers, the projection's eps,
// norm_eps of the logits, eps of the RMSNorm of u, and, where the convention has one, the clamp of the logits of
// h_res: six numbers or eight. Python fills them; a test compares its order with this one.
namespace param {
enum { PRE_EPS, POST_SCALE, POST_EPS, PROJECTION_EPS, NORM_EPS, EPS, CLAMP_LOW, CLAMP_HIGH, COUNT };
}

// A contiguous slice keeps its byte offset, so an input need not be aligned to a pack; outputs are.
template <int VEC, typename P> METAL_FUNC bool is_aligned(P p) {
  return VEC == 1 || address(p) % (sizeof(p[0]) * VEC) == 0;
}

template <typename T, int VEC> METAL_FUNC float float_of(const thread Pack<T, VEC>& pack, int e) {
  return static_cast<float>(element(pack, e));
}

// Neighbours in threadgroup memory that move at once.
template <int COUNT> struct alignas(4 * COUNT) Floats { float v[COUNT]; };

template <typename T, int VEC, typename P> METAL_FUNC Pack<T, VEC> load(P p, bool aligned) {
  if (aligned) return load_aligned<VEC>(p);
  Pack<T, VEC> pack = {};
  UNROLL_FOR (int e = 0; e < VEC; ++e) set_element(pack, e, T(p[e]));
  return pack;
}

template <int VEC, typename P> METAL_FUNC void load_floats(thread float (&v)[VEC], P p, bool aligned) {
  if (aligned) {
    const auto pack = load_aligned<VEC>(p);
    UNROLL_FOR (int e = 0; e < VEC; ++e) v[e] = float_of(pack, e);
  } else {
    UNROLL_FOR (int e = 0; e < VEC; ++e) v[e] = static_cast<float>(p[e]);
  }
}

template <int VEC, typename P> METAL_FUNC void store_floats(P p, thread const float (&v)[VEC], bool aligned) {
  if (aligned) {
    Pack<float, VEC> pack = {};
    UNROLL_FOR (int e = 0; e < VEC; ++e) set_element(pack, e, v[e]);
    store(p, pack);
  } else {
    UNROLL_FOR (int e = 0; e < VEC; ++e) p[e] = v[e];
  }
}

// v = p[0..COUNT), in as few loads as the alignment of p allows.
template <int COUNT, typename P> METAL_FUNC void load_all(thread float* v, P p) {
  constexpr int VEC = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
  const bool aligned = is_aligned<VEC>(p);
  UNROLL_FOR (int i = 0; i < COUNT; i += VEC) {
    float pack[VEC];
    load_floats<VEC>(pack, p + i, aligned);
    UNROLL_FOR (int e = 0; e < VEC; ++e) v[i + e] = pack[e];
  }
}

// A Run is a lane's COUNT neighbours in a row, which loads of up to 16 bytes bring.
template <typename T, int COUNT> constexpr int run_vec() {
  return COUNT * int(sizeof(T)) > 16 ? 16 / int(sizeof(T)) : COUNT;
}
template <typename T, int COUNT> struct Run { Pack<T, run_vec<T, COUNT>()> p[COUNT / run_vec<T, COUNT>()]; };
template <typename T, int COUNT> METAL_FUNC float run_float(const thread Run<T, COUNT>& r, int e) {
  return float_of(r.p[e / run_vec<T, COUNT>()], e % run_vec<T, COUNT>());
}

// r = from[0..COUNT), with zeros from element `remaining` on. ALIGNED: all elements remain, and from is aligned.
template <bool ALIGNED, typename T, int COUNT, typename P>
METAL_FUNC void load_run(thread Run<T, COUNT>& r, P from, int remaining) {
  constexpr int VEC = run_vec<T, COUNT>();
  if (ALIGNED) {
    UNROLL_FOR (int i = 0; i < COUNT / VEC; ++i) r.p[i] = load_aligned<VEC>(from + i * VEC);
  } else {
    r = {};
    UNROLL_FOR (int e = 0; e < COUNT; ++e) {
      if (e < remaining) set_element(r.p[e / VEC], e % VEC, T(from[e]));
    }
  }
}

// to[i] = channels c.. of stream i, for COUNT streams of C channels.
template <int COUNT, int VEC, typename T, typename P>
METAL_FUNC void load_streams(thread Pack<T, VEC>* to, P row, int C, int c, bool aligned) {
  UNROLL_FOR (int i = 0; i < COUNT; ++i) to[i] = load<T, VEC>(at(row, i * C + c), aligned);
}

METAL_FUNC float sigmoid(float v) { return 1.0f / (1.0f + metal::precise::exp(-v)); }

// 0, 1, 2: logit o is of pre, post, res.
template <int N> METAL_FUNC int part_of(int o) {
  return o < N ? 0 : o < 2 * N ? 1 : 2;
}

// h_pre = sigmoid(z) + pre_eps, and with part 1 h_post = post_scale * sigmoid(z) + post_eps.
template <typename Q> METAL_FUNC float gate(float z, int part, Q params) {
  const float scale = part == 0 ? 1.0f : static_cast<float>(params[param::POST_SCALE]);
  return metal::fma(scale, sigmoid(z), static_cast<float>(params[part == 0 ? param::PRE_EPS : param::POST_EPS]));
}

// h = gate(H), without GATES h = H. POST: h_post, without POST h_pre.
template <int N, int THREADS, bool GATES, bool POST, typename P, typename S, typename Q>
METAL_FUNC void load_gates(P H, S h, Q params, uint tid) {
  for (uint i = tid; i < uint(N); i += THREADS) {
    const float z = static_cast<float>(H[i]);
    h[i] = GATES ? gate(z, POST ? 1 : 0, params) : z;
  }
}

// mix = H, with TRANSPOSED its transpose.
template <int N, int THREADS, bool TRANSPOSED, typename P, typename S> METAL_FUNC void load_mix(P H, S mix, uint tid) {
  for (uint k = tid; k < uint(N * N); k += THREADS)
    mix[TRANSPOSED ? (k % N) * N + k / N : k] = static_cast<float>(H[k]);
}

// v[a] = the sum over the threadgroup of v[a], in every thread. scratch holds 2 * SIMDS * COUNT floats. If parity goes
// 0, 1, 0, ... from call to call, one barrier a call is enough.
template <int SIMDS, int COUNT, typename S>
METAL_FUNC void sum_everywhere(thread float (&v)[COUNT], S scratch, int parity, uint simd, uint simd_lane) {
  UNROLL_FOR (int a = 0; a < COUNT; ++a) {
    v[a] = simd_sum(v[a]);
    if (SIMDS > 1 && simd_lane == 0) scratch[(uint(parity * SIMDS) + simd) * COUNT + a] = v[a];
  }
  if constexpr (SIMDS > 1) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL_FOR (int a = 0; a < COUNT; ++a) {
      v[a] = 0.0f;
      UNROLL_FOR (int s = 0; s < SIMDS; ++s) v[a] += scratch[(parity * SIMDS + s) * COUNT + a];
    }
  }
}

// out[a] = the sum over the threadgroup of v[a]. scratch holds COUNT * THREADS / 32 floats.
template <int COUNT, int THREADS, typename S, typename O>
METAL_FUNC void group_sum(thread float (&v)[COUNT], S scratch, O out, uint tid) {
  UNROLL_FOR (int a = 0; a < COUNT; ++a) {
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

}  // namespace mhc

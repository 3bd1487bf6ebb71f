// kernels/include/cuda/ptx.h for the CPU: the PTX ISA's layouts of matrices over lanes, g = lane / 4 and q = lane % 4.
struct uint2 { uint x, y; };
struct alignas(16) uint4 { uint x, y, z, w; };
inline uint2 make_uint2(uint x, uint y) { return {x, y}; }
typedef bfloat __nv_bfloat16;
inline uint __float_as_uint(float v) { return __builtin_bit_cast(uint, v); }
inline float __uint_as_float(uint v) { return __builtin_bit_cast(float, v); }

extern "C" {
void sim_lanes(const void* mine, void* all, size_t bytes, const char* file, int line);
void sim_simdgroup_sync(const char* file, int line);
uint sim_address(const void* p);
void* sim_pointer(uint address);
void* sim_dynamic();
void sim_copy(uint to, const void* from);
void sim_commit();
void sim_wait(int left);
}

namespace mhc {
#define HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct SimMatrix { uint a[4], b[2]; };  // a lane's share of both factors

// d += a b, 16 x K by K x 8; element(w, k, i): of a lane's word the i-th k. Products are exact, the sum is rounded at its end.
template <int K, typename F>
inline void sim_multiply(float (&d)[4], const SimMatrix& mine, F value, const char* file, int line) {
  SimMatrix all[32];
  sim_lanes(&mine, all, sizeof mine, file, line);
  const uint g = sim_thread() % 32 / 4, q = sim_thread() % 4;
  for (uint i = 0; i < 4; ++i) {
    const uint row = g + i / 2 * 8, column = 2 * q + i % 2;
    double sum = d[i];
    for (uint k = 0; k < K; ++k) sum += double(value(all, row, k, true)) * double(value(all, column, k, false));
    d[i] = float(sum);
  }
}
inline float sim_tf32(uint w) { return __uint_as_float(w & 0xffffe000u); }
inline float sim_half_word(uint w, uint k) { return __uint_as_float(k % 2 ? w & 0xffff0000u : w << 16); }

inline void multiply_tf32(float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, HERE) {
  sim_multiply<8>(d, {{a0, a1, a2, a3}, {b0, b1}}, [](const SimMatrix* all, uint i, uint k, bool first) {
    const SimMatrix& m = all[i % 8 * 4 + k % 4];
    return sim_tf32(first ? m.a[i / 8 + k / 4 * 2] : m.b[k / 4]);
  }, file, line);
}
inline void multiply_16(float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, HERE) {
  sim_multiply<16>(d, {{a0, a1, a2, a3}, {b0, b1}}, [](const SimMatrix* all, uint i, uint k, bool first) {
    const SimMatrix& m = all[i % 8 * 4 + k % 8 / 2];
    return sim_half_word(first ? m.a[i / 8 + k / 8 * 2] : m.b[k / 8], k);
  }, file, line);
}
inline void multiply_8(float (&d)[4], uint a0, uint a1, uint b0, HERE) {
  sim_multiply<8>(d, {{a0, a1}, {b0}}, [](const SimMatrix* all, uint i, uint k, bool first) {
    const SimMatrix& m = all[i % 8 * 4 + k / 2];
    return sim_half_word(first ? m.a[i / 8] : m.b[0], k);
  }, file, line);
}

inline uint bfloat_pair(float low, float high) { return uint(bfloat(low).bits) | uint(bfloat(high).bits) << 16; }

inline uint shared_address(const void* p) { return sim_address(p); }
template <int COUNT, bool TRANSPOSED> inline void load_matrices(uint* w, uint row, HERE) {
  uint rows[32];
  sim_lanes(&row, rows, sizeof row, file, line);
  const uint g = sim_thread() % 32 / 4, q = sim_thread() % 4;
  for (uint m = 0; m < COUNT; ++m) {
    uint v[2];
    for (uint e = 0; e < 2; ++e) {
      const uint r = TRANSPOSED ? 2 * q + e : g, c = TRANSPOSED ? g : 2 * q + e;
      v[e] = static_cast<const ushort*>(sim_pointer(rows[8 * m + r]))[c];
    }
    w[m] = v[0] | v[1] << 16;
  }
}
inline uint transposed(uint w, HERE) {
  uint all[32];
  sim_lanes(&w, all, sizeof w, file, line);
  const uint g = sim_thread() % 32 / 4, q = sim_thread() % 4;
  uint v[2];
  for (uint e = 0; e < 2; ++e) v[e] = all[(2 * q + e) * 4 + g / 2] >> g % 2 * 16 & 0xffffu;
  return v[0] | v[1] << 16;
}

inline void copy_16(uint to, const void* from) { sim_copy(to, from); }
inline void commit_copies() { sim_commit(); }
template <int LEFT> inline void wait_for_copies() { sim_wait(LEFT); }
inline void simdgroup_sync(HERE) { sim_simdgroup_sync(file, line); }
template <typename P> inline void prefetch(P) {}
#define dynamic_threadgroup (static_cast<uint4*>(sim_dynamic()))
#undef HERE
}  // namespace mhc

// kernels/include/cuda/ptx.h for the CPU: the PTX ISA's layouts of matrices over lanes, g = lane / 4 and q = lane % 4.
struct uint2 { uint x, y; };
struct alignas(16) uint4 { uint x, y, z, w; };
inline uint2 make_uint2(uint x, uint y) { return {x, y}; }
typedef bfloat __nv_bfloat16;
inline uint __float_as_uint(float v) { return __builtin_bit_cast(uint, v); }
inline float __uint_as_float(uint v) { return __builtin_bit_cast(float, v); }

extern "C" {
void sim_multiply_tf32(float* d, const uint* factors, const char* file, int line);
void sim_multiply_16(float* d, const uint* factors, uint K, const char* file, int line);
void sim_load_matrices(uint* w, uint address, uint count, bool transposed, const char* file, int line);
uint sim_transposed(uint w, const char* file, int line);
void sim_simdgroup_sync(const char* file, int line);
uint sim_address(const void* p);
void* sim_dynamic();
void sim_copy(uint to, const void* from);
void sim_commit();
void sim_wait(int left);
}

namespace mhc {
#define HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// d += a b, 16 x K by K x 8, of a lane's share of both factors
inline void multiply_tf32(float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, HERE) {
  const uint factors[] = {a0, a1, a2, a3, b0, b1};
  sim_multiply_tf32(d, factors, file, line);
}
inline void multiply_16(float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, HERE) {
  const uint factors[] = {a0, a1, a2, a3, b0, b1};
  sim_multiply_16(d, factors, 16, file, line);
}
inline void multiply_8(float (&d)[4], uint a0, uint a1, uint b0, HERE) {
  const uint factors[] = {a0, a1, 0, 0, b0, 0};
  sim_multiply_16(d, factors, 8, file, line);
}

inline uint bfloat_pair(float low, float high) { return uint(bfloat(low).bits) | uint(bfloat(high).bits) << 16; }

inline uint shared_address(const void* p) { return sim_address(p); }
template <int COUNT, bool TRANSPOSED> inline void load_matrices(uint* w, uint row, HERE) {
  sim_load_matrices(w, row, COUNT, TRANSPOSED, file, line);
}
inline uint transposed(uint w, HERE) { return sim_transposed(w, file, line); }

inline void copy_16(uint to, const void* from) { sim_copy(to, from); }
inline void commit_copies() { sim_commit(); }
template <int LEFT> inline void wait_for_copies() { sim_wait(LEFT); }
inline void simdgroup_sync(HERE) { sim_simdgroup_sync(file, line); }
template <typename P> inline void prefetch(P) {}
#define dynamic_threadgroup (static_cast<uint4*>(sim_dynamic()))
#undef HERE
}  // namespace mhc

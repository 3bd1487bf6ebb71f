// Metal's words for a body compiled for the CPU. Every call that needs the other threads goes to runtime.cpp.
#pragma once
#define ONE_ADDRESS_SPACE
#define METAL_FUNC inline
#define UNROLL_FOR for
#define STAY_PACKED(value)
#define RECIPROCAL(v) (1.0f / (v))
#define LOAD_STREAMING(p) (*(p))
#define STORE_STREAMING(p, v) (*(p) = (v))

typedef unsigned int uint;
typedef unsigned short ushort;
typedef __UINT64_TYPE__ ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;
struct uint3 {
  uint x, y, z;
};
template <typename T, int N> struct alignas(sizeof(T) * N) vec {
  T v[N];
  T& operator[](int i) { return v[i]; }
  T operator[](int i) const { return v[i]; }
};
template <typename To, typename From> inline To as_type(From v) { return __builtin_bit_cast(To, v); }

struct bfloat {  // round to nearest even; conversions from float are explicit, as in Metal
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float f) {
    const uint32_t u = __builtin_bit_cast(uint32_t, f);
    bits = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
};
typedef bfloat bfloat16_t;
typedef _Float16 half;
typedef half float16_t;

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

extern "C" {
uint sim_thread();
uint sim_group();
uint sim_groups();
uint sim_threads();
void* sim_buffer(int k);
void* sim_threadgroup(const char* name, size_t bytes, size_t element);
void sim_barrier(int flags, const char* file, int line);
float sim_exchange(float v, uint lane, const char* file, int line);
float sim_sum(float v, const char* file, int line);
uint sim_row();
uint sim_column();
void sim_matrix(float* d, const float* a, const float* b, const float* c, const char* file, int line);
}

#define HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void threadgroup_barrier(mem_flags flags, HERE) { sim_barrier(int(flags), file, line); }
inline float simd_shuffle_xor(float v, ushort mask, HERE) { return sim_exchange(v, (sim_thread() & 31u) ^ mask, file, line); }
inline float simd_shuffle(float v, ushort lane, HERE) { return sim_exchange(v, lane, file, line); }
inline float simd_sum(float v, HERE) { return sim_sum(v, file, line); }

struct simdgroup_float8x8 {
  typedef float Elements __attribute__((vector_size(8)));  // of this lane
  simdgroup_float8x8() : elements{__builtin_nanf(""), __builtin_nanf("")} {}
  explicit simdgroup_float8x8(float v)  // a diagonal matrix
      : elements{sim_row() == sim_column() ? v : 0.0f, sim_row() == sim_column() + 1 ? v : 0.0f} {}
  Elements& thread_elements() { return elements; }
  Elements thread_elements() const { return elements; }

 private:
  Elements elements;
};
inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b,
                                          simdgroup_float8x8 c, HERE) {
  sim_matrix((float*)&d, (float*)&a, (float*)&b, (float*)&c, file, line);
}
#undef HERE
namespace metal {
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
namespace precise {
inline float exp(float v) { return __builtin_expf(v); }
inline float log(float v) { return __builtin_logf(v); }
inline float rsqrt(float v) { return 1.0f / __builtin_sqrtf(v); }
}  // namespace precise
}  // namespace metal
using namespace metal;

// The declaration `threadgroup T name[extent];` becomes a reference to memory that the runtime watches, number by number.
template <typename T> constexpr auto sim_element(int) -> decltype(sizeof(T().v[0])) { return sizeof(T().v[0]); }
template <typename T> constexpr size_t sim_element(...) { return sizeof(T); }
#define THREADGROUP_ARRAY(name, extents, ...)                                       \
  __VA_ARGS__(&name) extents = *reinterpret_cast<__VA_ARGS__(*) extents>(sim_threadgroup( \
      #name, sizeof(__VA_ARGS__ extents), sim_element<__VA_ARGS__>(0)))

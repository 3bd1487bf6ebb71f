// The words of Metal that the bodies use, for CUDA. This file goes before all others there.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define ONE_ADDRESS_SPACE
#define device
#define constant
#define thread
#define threadgroup __shared__
#define METAL_FUNC inline  // NVRTC inlines all; on Metal this word says so
typedef unsigned int uint;
typedef unsigned short ushort;

enum class mem_flags { mem_threadgroup };
__forceinline__ void threadgroup_barrier(mem_flags) { __syncthreads(); }
__forceinline__ float simd_shuffle_xor(float v, ushort o) { return __shfl_xor_sync(0xffffffffu, v, o); }
__forceinline__ float simd_shuffle(float v, ushort lane) { return __shfl_sync(0xffffffffu, v, lane); }
__forceinline__ float simd_sum(float v) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) v += simd_shuffle_xor(v, o);
  return v;
}
namespace metal {
__forceinline__ float max(float a, float b) { return ::fmaxf(a, b); }
__forceinline__ float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
namespace precise {
__forceinline__ float exp(float v) { return ::expf(v); }
__forceinline__ float log(float v) { return ::logf(v); }
__forceinline__ float rsqrt(float v) { return 1.0f / ::sqrtf(v); }
}  // namespace precise
}  // namespace metal

// MLX writes the kernel's signature. This bounds its registers, so that every threads_per_group can be launched.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(THREADS)

#define METAL_POSITIONS \
  const uint3 thread_position_in_threadgroup = threadIdx, threadgroup_position_in_grid = blockIdx; \
  const dim3 threadgroups_per_grid = gridDim; \
  const uint thread_index_in_simdgroup = threadIdx.x % 32, simdgroup_index_in_threadgroup = threadIdx.x / 32;

#define UNROLL_FOR _Pragma("unroll") for
#define RECIPROCAL(v) __fdividef(1.0f, v)  // this is one instruction instead of eight, within 1 ulp

// The compiler does not know the value after this.
#define STAY_PACKED(value) \
  if (sizeof(value) >= 4) { \
    for (int word = 0; word < int(sizeof(value) / 4); ++word) \
      asm volatile("" : "+r"(reinterpret_cast<uint*>(&(value))[word])); \
  }

// Accesses whose lines leave the cache first, so that others stay.
template <typename V, typename F> __forceinline__ void by_words(F f) {
  if constexpr (sizeof(V) == 16) f(uint4());
  else if constexpr (sizeof(V) == 8) f(uint2());
  else if constexpr (sizeof(V) == 4) f(uint());
  else {
    static_assert(sizeof(V) == 2, "");
    f(ushort());
  }
}
template <typename V> __forceinline__ V load_streaming(const V* p) {
  V v;
  by_words<V>(
      [&](auto word) { reinterpret_cast<decltype(word)&>(v) = __ldcs(reinterpret_cast<const decltype(word)*>(p)); });
  return v;
}
template <typename V> __forceinline__ void store_streaming(V* p, const V& v) {
  by_words<V>(
      [&](auto word) { __stcs(reinterpret_cast<decltype(word)*>(p), reinterpret_cast<const decltype(word)&>(v)); });
}
#define LOAD_STREAMING(p) load_streaming(p)
#define STORE_STREAMING(p, v) store_streaming(p, v)

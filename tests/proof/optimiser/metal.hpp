// Metal's words in C++ for OpenCL, so that an optimising LLVM compiles the text that MLX generates. What is one
// instruction on Apple's GPUs and none of LLVM's is opaque here: a function without a body for spir64, a line of
// assembly that holds a comment for amdgcn.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define METAL_FUNC inline __attribute__((always_inline))
#define device __attribute__((opencl_global_device))
#define constant const __attribute__((opencl_global_host))
#define threadgroup __local
#define thread __private
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef long int64_t;
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef float float2 __attribute__((ext_vector_type(2)));
template <typename T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <typename To, typename From> METAL_FUNC To as_type(From v) { return __builtin_bit_cast(To, v); }

namespace of_optimiser {
#ifdef __AMDGCN__
METAL_FUNC uint position() { return __builtin_amdgcn_workitem_id_x(); }
METAL_FUNC uint group() { return __builtin_amdgcn_workgroup_id_x(); }
METAL_FUNC uint simdgroup() { return uint(__builtin_amdgcn_readfirstlane(int(position() / 32))); }
METAL_FUNC void barrier() { __builtin_amdgcn_s_barrier(); }
METAL_FUNC float exp2(float v) { return __builtin_amdgcn_exp2f(v); }
METAL_FUNC float log2(float v) { return __builtin_amdgcn_logf(v); }
METAL_FUNC float rsqrt(float v) { return __builtin_amdgcn_rsqf(v); }
METAL_FUNC float sum(float v) {
  float r;
  __asm__ volatile("; simd_sum %0 %1" : "=v"(r) : "v"(v));
  return r;
}
METAL_FUNC float shuffle(float v, uint lane) {
  float r;
  __asm__ volatile("; simd_shuffle %0 %1 %2" : "=v"(r) : "v"(v), "v"(lane));
  return r;
}
METAL_FUNC float shuffle_xor(float v, uint mask) {
  float r;
  __asm__ volatile("; simd_shuffle %0 %1 %2" : "=v"(r) : "v"(v), "s"(mask));
  return r;
}
METAL_FUNC float2 multiply(float2 c, float2 a, float2 b) {
  __asm__("; simdgroup_multiply %0 %1 %2" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
#elif defined(__NVPTX__)  // for the model of times, which counts PTX, and knows the words that PTX lacks
METAL_FUNC uint position() { return __nvvm_read_ptx_sreg_tid_x(); }
METAL_FUNC uint group() { return __nvvm_read_ptx_sreg_ctaid_x(); }
METAL_FUNC uint simdgroup() { return position() / 32; }
METAL_FUNC void barrier() { __asm__ volatile("bar.sync 0;" ::: "memory"); }
METAL_FUNC float exp2(float v) {
  float r;
  __asm__("ex2.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
METAL_FUNC float log2(float v) {
  float r;
  __asm__("lg2.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
METAL_FUNC float rsqrt(float v) {
  float r;
  __asm__("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
METAL_FUNC float sum(float v) {
  float r;
  __asm__ volatile("simd_sum.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
METAL_FUNC float shuffle(float v, uint lane) {
  float r;
  __asm__ volatile("shfl.sync.idx.b32 %0, %1, %2, 31, -1;" : "=f"(r) : "f"(v), "r"(lane));
  return r;
}
METAL_FUNC float shuffle_xor(float v, uint mask) {
  float r;
  __asm__ volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(r) : "f"(v), "r"(mask));
  return r;
}
METAL_FUNC float2 multiply(float2 c, float2 a, float2 b) {
  float2 r;
  __asm__("simd_multiply.f32 {%0, %1}, {%2, %3}, {%4, %5}, {%6, %7};"
          : "=f"(r.x), "=f"(r.y)
          : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y), "f"(c.x), "f"(c.y));
  return r;
}
#else
uint position() __attribute__((const));
uint group() __attribute__((const));
uint simdgroup() __attribute__((const));
void barrier() __attribute__((convergent));
float exp2(float) __attribute__((const));
float log2(float) __attribute__((const));
float rsqrt(float) __attribute__((const));
float sum(float) __attribute__((convergent));
float shuffle(float, uint) __attribute__((convergent));
float shuffle_xor(float, uint) __attribute__((convergent));
float2 multiply(float2, float2, float2) __attribute__((convergent, const));
#endif
}  // namespace of_optimiser

struct bfloat {
  bfloat() = default;
  METAL_FUNC explicit bfloat(float f) {
    const uint u = __builtin_astype(f, uint);
    bits = f != f ? ushort((u >> 16) | 0x40u) : ushort((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  METAL_FUNC operator float() const { return __builtin_astype(uint(bits) << 16, float); }

 private:
  ushort bits;
};
typedef bfloat bfloat16_t;
typedef half float16_t;

enum class mem_flags { mem_threadgroup };
METAL_FUNC void threadgroup_barrier(mem_flags) { of_optimiser::barrier(); }
METAL_FUNC float simd_sum(float v) { return of_optimiser::sum(v); }
METAL_FUNC float simd_shuffle(float v, ushort lane) { return of_optimiser::shuffle(v, lane); }
METAL_FUNC float simd_shuffle_xor(float v, ushort mask) { return of_optimiser::shuffle_xor(v, mask); }

struct simdgroup_float8x8 {
  simdgroup_float8x8() = default;
  METAL_FUNC thread float2& thread_elements() thread { return elements; }

 private:
  float2 elements;
};
METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b,
                                              simdgroup_float8x8 c) {
  d.thread_elements() = of_optimiser::multiply(c.thread_elements(), a.thread_elements(), b.thread_elements());
}

namespace metal {
METAL_FUNC float max(float a, float b) { return __builtin_fmaxf(a, b); }
METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
namespace precise {
METAL_FUNC float exp(float v) { return of_optimiser::exp2(v * 1.44269504f); }
METAL_FUNC float log(float v) { return of_optimiser::log2(v) * 0.69314718f; }
METAL_FUNC float rsqrt(float v) { return of_optimiser::rsqrt(v); }
}  // namespace precise
}  // namespace metal
using namespace metal;

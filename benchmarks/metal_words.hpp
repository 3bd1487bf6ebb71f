// Metal's words in C++ for OpenCL, so that clang compiles the exact text that MLX generates: to PTX, whose instructions
// the model counts, and for a GPU of AMD with 32 lanes, whose registers stand for Apple's.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define ALWAYS inline __attribute__((always_inline))
#define METAL_FUNC ALWAYS
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
typedef float float2_ __attribute__((ext_vector_type(2)));
template <typename T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <typename To, typename From> ALWAYS To as_type(From v) { return __builtin_bit_cast(To, v); }

#ifdef __AMDGCN__
#define POSITION __builtin_amdgcn_workitem_id_x()
#define GROUP __builtin_amdgcn_workgroup_id_x()
#define UNIFORM(v) __builtin_amdgcn_readfirstlane(v)
#define BARRIER __builtin_amdgcn_s_barrier()
#define SHUFFLE(v, lane) __builtin_amdgcn_ds_bpermute(4 * (lane), v)
#define EXP2 __builtin_amdgcn_exp2f
#define LOG2 __builtin_amdgcn_logf
#define RSQRT __builtin_amdgcn_rsqf
ALWAYS float SUM(float v) { float r; __asm__ volatile("; simd_sum %0 %1" : "=v"(r) : "v"(v)); return r; }
ALWAYS float2_ MULTIPLY(float2_ c, float2_ a, float2_ b) { __asm__("; multiply %0 %1 %2" : "+v"(c) : "v"(a), "v"(b)); return c; }
#else  // PTX; what it has no word for stands in the listing under a word of its own, which the count knows
#define POSITION uint(__nvvm_read_ptx_sreg_tid_x())
#define GROUP uint(__nvvm_read_ptx_sreg_ctaid_x())
#define UNIFORM(v) (v)
#define BARRIER __asm__ volatile("bar.sync 0;" ::: "memory")
ALWAYS int SHUFFLE(int v, int lane) {
  int r;
  __asm__ volatile("shfl.sync.idx.b32 %0, %1, %2, 31, -1;" : "=r"(r) : "r"(v), "r"(lane));
  return r;
}
ALWAYS float EXP2(float v) { float r; __asm__("ex2.approx.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
ALWAYS float LOG2(float v) { float r; __asm__("lg2.approx.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
ALWAYS float RSQRT(float v) { float r; __asm__("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
ALWAYS float SUM(float v) { float r; __asm__ volatile("simd_sum.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
ALWAYS float2_ MULTIPLY(float2_ c, float2_ a, float2_ b) {
  float2_ r;
  __asm__("simd_multiply.f32 {%0, %1}, {%2, %3}, {%4, %5}, {%6, %7};"
          : "=f"(r.x), "=f"(r.y) : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y), "f"(c.x), "f"(c.y));
  return r;
}
#endif

struct bfloat {
  bfloat() = default;
  ALWAYS explicit bfloat(float f) {
    const uint u = __builtin_astype(f, uint);
    bits = f != f ? ushort((u >> 16) | 0x40u) : ushort((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  ALWAYS operator float() const { return __builtin_astype(uint(bits) << 16, float); }
 private:
  ushort bits;
};
typedef bfloat bfloat16_t;
typedef half float16_t;
enum class mem_flags { mem_threadgroup };
ALWAYS void threadgroup_barrier(mem_flags) { BARRIER; }
ALWAYS float simd_shuffle(float v, ushort lane) { return __builtin_astype(SHUFFLE(__builtin_astype(v, int), int(lane)), float); }
ALWAYS float simd_shuffle_xor(float v, ushort mask) { return simd_shuffle(v, ushort((POSITION & 31) ^ mask)); }
ALWAYS float simd_sum(float v) { return SUM(v); }
struct simdgroup_float8x8 {
  simdgroup_float8x8() = default;
  ALWAYS thread float2_& thread_elements() thread { return elements; }
  float2_ elements;
};
ALWAYS void simdgroup_multiply_accumulate(thread simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, simdgroup_float8x8 c) {
  d.elements = MULTIPLY(c.elements, a.elements, b.elements);
}
namespace metal {
ALWAYS float max(float a, float b) { return __builtin_fmaxf(a, b); }
ALWAYS float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
namespace precise {
ALWAYS float exp(float v) { return EXP2(v * 1.44269504f); }
ALWAYS float log(float v) { return LOG2(v) * 0.69314718f; }
ALWAYS float rsqrt(float v) { return RSQRT(v); }
}
}
using namespace metal;
template <typename T> ALWAYS T val(T v) { return v; }

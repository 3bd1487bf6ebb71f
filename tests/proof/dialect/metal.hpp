// Metal's words for clang's C++ for OpenCL, of the dialects clang knows the nearest to Metal: address spaces are part
// of a type, there is no double, no new, no pointer to a function, no library. Only names that MLX's own kernels use,
// each with a file of mlx/backend/metal/kernels that does: a check against invented names proves nothing.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

// These spaces do not convert to each other, and objects in each can be copied, as in Metal.
#define device __attribute__((opencl_global_device))
#define constant const __attribute__((opencl_global_host))
#define threadgroup __local
#define thread __private
#define METAL_FUNC  // it is always inlined, which does not matter to a parser

typedef unsigned int uint;                               // utils.h
typedef unsigned short ushort;                           // bf16_math.h
typedef unsigned long ulong;                             // steel/utils.h
typedef __SIZE_TYPE__ size_t;                            // utils.h
typedef uint uint3 __attribute__((ext_vector_type(3)));  // copy.h
template <typename T, int N> using vec = T __attribute__((ext_vector_type(N)));  // fp_quantized.h

struct bfloat {  // bf16.h
  bfloat() = default;
  explicit bfloat(float);  // a cast to bfloat must be written, one to float need not
  operator float() const;

 private:
  ushort bits;
};
typedef bfloat bfloat16_t;  // bf16.h
typedef half float16_t;     // utils.h

template <typename To, typename From> To as_type(From);  // utils.h

enum class mem_flags { mem_threadgroup };    // sort.h
void threadgroup_barrier(mem_flags);         // sort.h
float simd_sum(float);                       // sdpa_vector.h
float simd_shuffle(float, ushort lane);      // scan.h
float simd_shuffle_xor(float, ushort mask);  // steel/attn/mma.h

struct simdgroup_float8x8 {  // gated_delta_update.h
  typedef float elements __attribute__((vector_size(8)));
  simdgroup_float8x8() = default;
  explicit simdgroup_float8x8(float);  // a diagonal matrix
  thread elements& thread_elements() thread;
  elements thread_elements() const thread;

 private:
  elements of_lane;
};
void simdgroup_multiply_accumulate(  // gated_delta_update.h
    thread simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, simdgroup_float8x8 c);

namespace metal {
float max(float, float);  // binary_ops.h
float fma(float, float, float);  // erf.h
namespace precise {
float exp(float);    // unary_ops.h
float log(float);    // unary_ops.h
float rsqrt(float);  // unary_ops.h
}  // namespace precise
}  // namespace metal
using namespace metal;

namespace of_checker {
template <typename T> T value(T);  // see `parse`
}

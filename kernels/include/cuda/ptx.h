// Functions for what only PTX can say; the simulator has its own in their place. A lane's elements of a matrix are
// those of the PTX ISA: of rows g and g + 8, with g = lane / 4 and q = lane % 4.
#include "common.h"

namespace mhc {

// d += a b in float32, of 16 x 8 by 8 x 8 TF32, and of 16 x 16 by 16 x 8 and 16 x 8 by 8 x 8 bfloat16, two in a
// register.
inline void multiply_tf32(float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
inline void multiply_16(float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
inline void multiply_8(float (&d)[4], uint a0, uint a1, uint b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// low and high as the nearest bfloat16, in one register.
inline uint bfloat_pair(float low, float high) {
  uint w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}

// Loads COUNT matrices of 8 x 8 16-bit elements; the rows of matrix m lie at the addresses of lanes 8 m... TRANSPOSED:
// a lane gets two elements of a column.
inline uint shared_address(const void* p) { return uint(__cvta_generic_to_shared(p)); }
template <int COUNT, bool TRANSPOSED> inline void load_matrices(uint* w, uint row) {
  if constexpr (COUNT == 4 && TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(row));
  } else if constexpr (COUNT == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(row));
  } else if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(row));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(row));
  }
}
inline uint transposed(uint w) {
  uint t;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(w));
  return t;
}

// Starts to copy 16 bytes into threadgroup memory. wait_for_copies waits for all of the lane's copies but those of its
// last REMAINING commits.
inline void copy_16(uint to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int REMAINING> inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(REMAINING) : "memory");
}
inline void simdgroup_sync() { __syncwarp(); }

// Asks the second cache for a line; no register waits for it.
template <typename P> inline void prefetch(P from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// The RING_BYTES of threadgroup memory that the launch adds.
extern __shared__ uint4 dynamic_threadgroup[];

}  // namespace mhc

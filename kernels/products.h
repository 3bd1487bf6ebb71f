// Runs of a row, for mhc_projection_backward; its products of matrices.
#include "products_BACKEND.h"

namespace mhc {

// from[0..left), if whole all or none of it
template <typename T, int COUNT, typename P> inline void load_some(thread Run<T, COUNT>& r, P from, int left, bool whole) {
  if (whole) load_run<true>(r, from, left);
  else load_run<false>(r, from, left);
}
template <typename T, int COUNT, typename P> inline void store_some(P to, thread const Run<T, COUNT>& r, int left, bool whole) {
  constexpr int VEC = run_vec<T, COUNT>();
  if (whole) {
    if (left > 0) {
      UNROLL for (int i = 0; i < COUNT / VEC; ++i) *(device Pack<T, VEC>*)(to + i * VEC) = r.p[i];
    }
  } else {
    UNROLL for (int e = 0; e < COUNT; ++e) {
      if (e < left) to[e] = r.p[e / VEC].v[e % VEC];
    }
  }
}

}  // namespace mhc

// Runs of a row, for mhc_projection_backward; its products of matrices.
#include "products_BACKEND.h"

namespace mhc {

// The lane's runs of a tile's tokens, each of a row of `from`: zeros from token `end` and from the `left`-th on; whole: all or
// none are left, from is aligned, and what is not there stays as it was
template <bool WHOLE, typename T, int COUNT, typename P>
inline void load_runs(thread Run<T, COUNT> (&runs)[HELD], P from, uint row, uint first, uint end, int left, int lane) {
  UNROLL for (int r = 0; r < HELD; ++r) {
    const uint t = first + uint(token_of(lane, r));
    if (!WHOLE || (t < end && left > 0)) load_run<WHOLE>(runs[r], from + size_t(t) * row, t < end ? left : 0);
  }
}
template <typename T, int COUNT, typename P>
inline void load_tile(thread Run<T, COUNT> (&runs)[HELD], P from, uint row, uint first, uint end, int left, bool whole, int lane) {
  if (whole) load_runs<true>(runs, from, row, first, end, left, lane);
  else load_runs<false>(runs, from, row, first, end, left, lane);
}
// Towards the cache what load_tile will load
template <typename P> inline void fetch_tile(P from, uint row, uint first, uint end, int left, int lane) {
  UNROLL for (int r = 0; r < HELD; ++r) {
    const uint t = first + uint(token_of(lane, r));
    if (t < end && left > 0) fetch(from + size_t(t) * row);
  }
}

// What a simdgroup reads, from its first channel on; left: channels from there; whole: as in load_tile. And where in bytes a tile of it
// lies in a ring.
template <typename X, typename D, typename M> struct Sources {
  X x;
  D du;
  M dx_out;
  uint K, C;
  int left;
  bool whole;
};
template <typename X, typename D, typename M>
inline Sources<X, D, M> sources(X x, D du, M dx_out, int K, int C, int left, bool whole) {
  return {x, du, dx_out, uint(K), uint(C), left, whole};
}
template <typename T, int RUN, bool READ, bool PASS> struct Slot {
  enum { DU = 32 * HELD * RUN * int(sizeof(T)), PASSED = DU * (1 + READ), BYTES = DU * (1 + READ + PASS) };
};

// to[0..left), if whole all or none of it
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

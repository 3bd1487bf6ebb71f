// Tiles of rows for mhc_pre_backward_projection, and the products of matrices that it makes of them.
#include "BACKEND/phi_gradient_matrices.h"

namespace mhc {

// A lane's elements of a tile's tokens, each of a row of `from`, with zeros from token `end` and from element
// `remaining` on. ALIGNED: all or none remain, from is aligned, and what does not remain is left as it was.
template <bool ALIGNED, typename T, int COUNT, typename P>
METAL_FUNC void load_runs(thread Run<T, COUNT> (&runs)[LANE_TOKENS], P from, uint row, uint first, uint end,
                          int remaining, int lane) {
  UNROLL_FOR (int r = 0; r < LANE_TOKENS; ++r) {
    const uint t = first + uint(token_of(lane, r));
    if (!ALIGNED || (t < end && remaining > 0))
      load_run<ALIGNED>(runs[r], from + size_t(t) * row, t < end ? remaining : 0);
  }
}
template <typename T, int COUNT, typename P>
METAL_FUNC void load_tile(thread Run<T, COUNT> (&runs)[LANE_TOKENS], P from, uint row, uint first, uint end,
                          int remaining, bool aligned, int lane) {
  if (aligned) load_runs<true>(runs, from, row, first, end, remaining, lane);
  else load_runs<false>(runs, from, row, first, end, remaining, lane);
}
// Asks the cache for what load_tile will load.
template <typename P> METAL_FUNC void prefetch_tile(P from, uint row, uint first, uint end, int remaining, int lane) {
  UNROLL_FOR (int r = 0; r < LANE_TOKENS; ++r) {
    const uint t = first + uint(token_of(lane, r));
    if (t < end && remaining > 0) prefetch(from + size_t(t) * row);
  }
}

// What a simdgroup reads, from its first channel on: of each row `remaining` channels are left from there. aligned: all
// of a lane's channels remain or none, and every array is aligned. A Slot says at which bytes of a tile in a ring its
// du and the passed-through dx_out lie.
template <typename X, typename D, typename M> struct Sources {
  X x;
  D du;
  M dx_out;
  uint K, C;
  int remaining;
  bool aligned;
};
template <typename X, typename D, typename M>
METAL_FUNC Sources<X, D, M> sources(X x, D du, M dx_out, int K, int C, int remaining, bool aligned) {
  return {x, du, dx_out, uint(K), uint(C), remaining, aligned};
}
template <typename T, int RUN, bool HAS_DU, bool HAS_DX_OUT> struct Slot {
  enum {
    DU = 32 * LANE_TOKENS * RUN * int(sizeof(T)),
    PASSED = DU * (1 + HAS_DU),
    BYTES = DU * (1 + HAS_DU + HAS_DX_OUT)
  };
};

// to[0..remaining) = r. aligned: all elements remain or none.
template <typename T, int COUNT, typename P>
METAL_FUNC void store_run(P to, thread const Run<T, COUNT>& r, int remaining, bool aligned) {
  constexpr int VEC = run_vec<T, COUNT>();
  if (aligned) {
    if (remaining > 0) {
      UNROLL_FOR (int i = 0; i < COUNT / VEC; ++i) store(to + i * VEC, r.p[i]);
    }
  } else {
    UNROLL_FOR (int e = 0; e < COUNT; ++e) {
      if (e < remaining) to[e] = element(r.p[e / VEC], e % VEC);
    }
  }
}

}  // namespace mhc

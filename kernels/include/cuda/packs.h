// Packs on CUDA: structs that their alignment lets a load or store move at once. metal/packs.h defines the same words
// for Metal.

namespace mhc {

template <typename P> inline P at(P p, int i) { return p + i; }

// A Pack is VEC neighbours, which move in one load or store.
template <typename T, int VEC> struct alignas(sizeof(T) * VEC) Pack { T v[VEC]; };

template <typename T, int VEC> inline T element(const Pack<T, VEC>& pack, int e) { return pack.v[e]; }
template <typename T, int VEC> inline void set_element(Pack<T, VEC>& pack, int e, T v) { pack.v[e] = v; }

// Keeps a pack packed: without it NVRTC converts it once and holds the wider floats across a barrier. Metal's form needs
// an element and a zero.
template <typename T, int VEC> inline void stay_packed(Pack<T, VEC>& pack, uint) { STAY_PACKED(pack); }
template <typename T, int VEC> inline void stay_packed(Pack<T, VEC>& pack, int, uint) { STAY_PACKED(pack); }

// Return v. NVRTC computes in a loop what it needs there, but not what it needs after one.
inline int each_turn(int v, uint) { return v; }
inline uint after_loop(uint v) {
  STAY_PACKED(v);
  return v;
}

// Returns the pack at p, which is aligned.
template <int VEC, typename T> inline Pack<T, VEC> load_aligned(const T* p) { return *(const Pack<T, VEC>*)p; }
template <int VEC, typename T> inline void store(T* p, const Pack<T, VEC>& pack) { *(Pack<T, VEC>*)p = pack; }

// The same for what is not read again soon.
template <int VEC, typename T> inline Pack<T, VEC> load_last(const T* p) {
  return LOAD_STREAMING((const Pack<T, VEC>*)p);
}
template <int VEC, typename T> inline void store_last(T* p, const Pack<T, VEC>& pack) {
  STORE_STREAMING((Pack<T, VEC>*)p, pack);
}

}  // namespace mhc

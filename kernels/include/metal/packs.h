// Packs on Metal: words of 32 bits, of which a load or store moves up to four. A compiler splits and joins loads of
// structs and of 16 bits as it likes, but it does not split these. cuda/packs.h defines the same words for CUDA.

#ifndef UNROLL_FOR  // the simulator has its own
#define UNROLL_FOR _Pragma("clang loop unroll(full)") for
#define UNROLL_16_FOR _Pragma("clang loop unroll_count(16)") for  // a longer loop could be too much for a compiler
#define RECIPROCAL(v) (1.0f / (v))
#endif

namespace mhc {

template <typename T> METAL_FUNC ulong address(const device T* p) { return (ulong)p; }
#ifndef ONE_ADDRESS_SPACE  // on Metal, MLX puts inputs of fewer than 8 elements in the constant address space
template <typename T> METAL_FUNC ulong address(const constant T* p) { return (ulong)p; }
#endif

// Returns p + i, i >= 0: an address that is the same in all threads and an offset of 32 bits, which take a register
// where an address of its own takes two (clang-19: with offsets of 64 bits mhc_seam_backward spills 15 registers, not
// 9). So p + i lies within 4 GiB, in a token or in 24 rows of phi: ops/checks.py refuses longer ones.
template <typename T> METAL_FUNC const device T* at(const device T* p, int i) {
  return (const device T*)((const device char*)p + uint(i) * uint(sizeof(T)));
}
template <typename T> METAL_FUNC device T* at(device T* p, int i) {
  return (device T*)((device char*)p + uint(i) * uint(sizeof(T)));
}
#ifndef ONE_ADDRESS_SPACE
template <typename T> METAL_FUNC const constant T* at(const constant T* p, int i) { return p + i; }
#endif

constexpr int by_backend(int metal, int) { return metal; }

// A Pack is VEC neighbours, which move in one load or store. An element of 16 bits is half a word, the low half first.
template <typename T, int VEC> struct Pack { uint w[(VEC * int(sizeof(T)) + 3) / 4]; };

template <typename T, int VEC> METAL_FUNC T element(const thread Pack<T, VEC>& pack, int e) {
  if constexpr (sizeof(T) == 4) return as_type<T>(pack.w[e]);
  else return as_type<T>(ushort(pack.w[e / 2] >> (e % 2 * 16)));
}
template <typename T, int VEC> METAL_FUNC void set_element(thread Pack<T, VEC>& pack, int e, T v) {
  if constexpr (sizeof(T) == 4) pack.w[e] = as_type<uint>(v);
  else pack.w[e / 2] = (pack.w[e / 2] & (0xffff0000u >> (e % 2 * 16))) | (uint(as_type<ushort>(v)) << (e % 2 * 16));
}

// Adds zero, of which the compiler does not know that it is 0, to the word of element e, or to all words: so a compiler
// cannot hold the floats that it has made of them before.
template <typename T, int VEC> METAL_FUNC void stay_packed(thread Pack<T, VEC>& pack, int e, uint zero) {
  if constexpr (sizeof(T) == 2) pack.w[e / 2] += zero;
}
template <typename T, int VEC> METAL_FUNC void all_stay_packed(thread Pack<T, VEC>& pack, uint zero) {
  UNROLL_FOR (int e = 0; e < VEC; e += 2) stay_packed(pack, e, zero);
}

// Returns v. zero is as above, and changes from turn to turn of a loop for all that the compiler knows: so what is
// computed of v is computed in each turn, where it would otherwise occupy registers all the time.
METAL_FUNC int each_turn(int v, uint zero) { return v + int(zero); }
METAL_FUNC uint after_loop(uint v) { return v; }

// w = the words at p, by pairs: a compiler may take a load of four words apart into loads of one.
template <int WORDS> METAL_FUNC void load_words(thread uint (&w)[WORDS], const device uint* p) {
  if constexpr (WORDS == 1) {
    w[0] = *p;
  } else if constexpr (WORDS == 2) {
    const ulong v = *(const device ulong*)p;
    w[0] = uint(v);
    w[1] = uint(v >> 32);
  } else {
    UNROLL_FOR (int i = 0; i < WORDS; i += 4) {
      const vec<ulong, 2> v = *(const device vec<ulong, 2>*)(p + i);
      UNROLL_FOR (int k = 0; k < 2; ++k) {
        w[i + 2 * k] = uint(v[k]);
        w[i + 2 * k + 1] = uint(v[k] >> 32);
      }
    }
  }
}
template <int WORDS> METAL_FUNC void store_words(device uint* p, const thread uint (&w)[WORDS]) {
  if constexpr (WORDS == 1) {
    *p = w[0];
  } else {
    constexpr int WIDTH = WORDS < 4 ? WORDS : 4;
    UNROLL_FOR (int i = 0; i < WORDS; i += WIDTH) {
      vec<uint, WIDTH> v;
      UNROLL_FOR (int k = 0; k < WIDTH; ++k) v[k] = w[i + k];
      *(device vec<uint, WIDTH>*)(p + i) = v;
    }
  }
}

// Returns the pack at p, which is aligned. Small inputs lie in the constant address space.
template <int VEC, typename T> METAL_FUNC Pack<T, VEC> load_aligned(const device T* p) {
  Pack<T, VEC> pack;
  if constexpr (VEC * sizeof(T) < 4) pack.w[0] = as_type<ushort>(*p);
  else load_words(pack.w, (const device uint*)p);
  return pack;
}
#ifndef ONE_ADDRESS_SPACE
template <int VEC, typename T> METAL_FUNC Pack<T, VEC> load_aligned(const constant T* p) {
  Pack<T, VEC> pack = {};
  UNROLL_FOR (int e = 0; e < VEC; ++e) set_element(pack, e, T(p[e]));
  return pack;
}
#endif
template <int VEC, typename T> METAL_FUNC void store(device T* p, Pack<T, VEC> pack) {
  if constexpr (VEC * sizeof(T) < 4) *p = element(pack, 0);
  else store_words((device uint*)p, pack.w);
}

// The same for what is not read again soon, which Metal has no word for.
template <int VEC, typename P> METAL_FUNC auto load_last(P p) { return load_aligned<VEC>(p); }
template <int VEC, typename T> METAL_FUNC void store_last(device T* p, Pack<T, VEC> pack) { store(p, pack); }

}  // namespace mhc

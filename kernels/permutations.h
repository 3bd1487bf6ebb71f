// The order of permutations, for mixing_matrix and its backward.
#include "common.h"

namespace mhc {

// Where permutation w of N things, in lexicographic order, sends i.
template <int N> inline int permuted(int w, int i) {
  int left = (1 << N) - 1, j = 0, ways = 1;
  for (int k = 2; k < N; ++k) ways *= k;
  for (int place = 0; place <= i; ++place) {
    int skip = w / ways;
    w -= skip * ways;
    if (N - 1 - place > 1) ways /= N - 1 - place;
    for (j = 0; j < N; ++j) {
      if (((left >> j) & 1) != 0 && skip-- == 0) break;
    }
    left &= ~(1 << j);
  }
  return j;
}

// The 1 of row i of permutation matrix w, or of the transpose's column i, in a matrix row by row.
template <int N, bool TRANSPOSED> inline int entry(int w, int i) {
  const int j = permuted<N>(w, i);
  return TRANSPOSED ? j * N + i : i * N + j;
}

// Which of R logits is the largest, the first of equals, and its value.
template <typename P> inline int largest_of(P logits, int R, thread float& top) {
  int largest = 0;
  top = static_cast<float>(logits[0]);
  for (int w = 1; w < R; ++w) {
    const float z = static_cast<float>(logits[w]);
    if (z > top) {
      largest = w;
      top = z;
    }
  }
  return largest;
}

// What permutation w sends to j.
template <int N> inline int permuted_from(int w, int j) {
  int i = 0;
  while (permuted<N>(w, i) != j) ++i;
  return i;
}

}  // namespace mhc

// The order of permutations, for mixing_matrix and its backward.
#include "common.h"

namespace mhc {

// Where permutation w of N things, in lexicographic order, sends i.
template <int N> METAL_FUNC int permuted(int w, int i) {
  int unused = (1 << N) - 1, j = 0, ways = 1;
  for (int k = 2; k < N; ++k) ways *= k;
  for (int position = 0; position <= i; ++position) {
    int skip = w / ways;
    w -= skip * ways;
    if (N - 1 - position > 1) ways /= N - 1 - position;
    for (j = 0; j < N; ++j) {
      if (((unused >> j) & 1) != 0 && skip-- == 0) break;
    }
    unused &= ~(1 << j);
  }
  return j;
}

// The index of the 1 of row i of permutation matrix w, with TRANSPOSED of column i of its transpose, row by row.
template <int N, bool TRANSPOSED> METAL_FUNC int entry(int w, int i) {
  const int j = permuted<N>(w, i);
  return TRANSPOSED ? j * N + i : i * N + j;
}

// The index of the largest of num_logits logits, the first of equal ones; top becomes its value.
template <typename P> METAL_FUNC int largest_of(P logits, int num_logits, thread float& top) {
  int largest = 0;
  top = static_cast<float>(logits[0]);
  for (int w = 1; w < num_logits; ++w) {
    const float z = static_cast<float>(logits[w]);
    if (z > top) {
      largest = w;
      top = z;
    }
  }
  return largest;
}

// What permutation w sends to j.
template <int N> METAL_FUNC int permuted_from(int w, int j) {
  int i = 0;
  while (permuted<N>(w, i) != j) ++i;
  return i;
}

}  // namespace mhc

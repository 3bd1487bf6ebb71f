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

}  // namespace mhc

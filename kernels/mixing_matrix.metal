// mixing_matrix: h_res without an iteration, exactly doubly stochastic.
//
//   PERMUTATIONS  h_res = sum_w softmax(l)[w] P_w over the N! permutations in lexicographic order, N <= 5
//   otherwise     h_res = the Kronecker product of [[p, q], [q, p]] over the pairs b of logits, pair 0 outermost,
//                 p = sigmoid(l[2 b] - l[2 b + 1]), q = sigmoid(l[2 b + 1] - l[2 b])
//   TRANSPOSED    h_res is the transpose of that.
//
// in   logits [M, NUM_LOGITS] any float
// out  h_res [M, N, N] float
// owners  A thread makes a row of a matrix.
// template  N, NUM_LOGITS, THREADS, PERMUTATIONS, TRANSPOSED
// grid  any number of threadgroups
#include "permutations.h"
const size_t rows = size_t(logits_shape[0]) * N;
for (size_t id = size_t(threadgroup_position_in_grid.x) * THREADS + thread_position_in_threadgroup.x; id < rows;
     id += size_t(threadgroups_per_grid.x) * THREADS) {
  const size_t m = id / N;
  const int i = int(id % N);
  if constexpr (PERMUTATIONS) {
    float top, sum = 0.0f, line[N] = {};
    const int largest = mhc::largest_of(logits + m * NUM_LOGITS, NUM_LOGITS,
                                        top);  // it is added last: the sum of the others may be small beside it
    for (int k = 1; k <= NUM_LOGITS; ++k) {
      const int w = k == NUM_LOGITS ? largest : k <= largest ? k - 1 : k;
      const float e = metal::precise::exp(static_cast<float>(logits[m * NUM_LOGITS + w]) - top);
      const int j = TRANSPOSED ? mhc::permuted_from<N>(w, i) : mhc::permuted<N>(w, i);
      sum += e;
      UNROLL_FOR (int c = 0; c < N; ++c) line[c] += c == j ? e : 0.0f;
    }
    UNROLL_FOR (int c = 0; c < N; ++c) h_res[id * N + c] = line[c] / sum;
  } else {
    for (int j = 0; j < N; ++j) {
      float product = 1.0f;
      for (int b = 0; b < NUM_LOGITS / 2; ++b) {
        const float z =
            static_cast<float>(logits[m * NUM_LOGITS + 2 * b]) - static_cast<float>(logits[m * NUM_LOGITS + 2 * b + 1]);
        product *= mhc::sigmoid((((i ^ j) >> (NUM_LOGITS / 2 - 1 - b)) & 1) == 0 ? z : -z);
      }
      h_res[id * N + j] = product;
    }
  }
}

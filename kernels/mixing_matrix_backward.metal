// mixing_matrix_backward: the gradient of mixing_matrix.
//
//   PERMUTATIONS  h_res = sum_w softmax(l)[w] P_w over the N! permutations in lexicographic order, N <= 5
//   otherwise     h_res = the Kronecker product of [[p, q], [q, p]] over the pairs b of logits, pair 0 outermost,
//                 p = sigmoid(l[2 b] - l[2 b + 1]), q = sigmoid(l[2 b + 1] - l[2 b])
//   TRANSPOSED    h_res is the transpose of that.
//   PERMUTATIONS  s = softmax(l);   ds[w] = sum_i dh_res[i, P_w(i)], less that of the largest s;
//   dl = s * (ds - sum(s ds))
//   otherwise     dp[b] = sum_ij dh_res[i, j] (1 if i and j agree in bit b, else -1) times the other factors;
//   dl = +- dp p q
//
// in   logits [M, NUM_LOGITS], dh_res [M, N, N] any float
// out  dlogits [M, NUM_LOGITS] DLOGITS_T
// owners  A thread takes a matrix.
// template  N, NUM_LOGITS, THREADS, PERMUTATIONS, TRANSPOSED, DLOGITS_T
// grid  any number of threadgroups
#include "permutations.h"
const size_t count = logits_shape[0];
for (size_t m = size_t(threadgroup_position_in_grid.x) * THREADS + thread_position_in_threadgroup.x; m < count;
     m += size_t(threadgroups_per_grid.x) * THREADS) {
  const size_t at = m * NUM_LOGITS, from = m * (N * N);
  if constexpr (PERMUTATIONS) {
    float top, sum = 0.0f, dot = 0.0f, shift = 0.0f;
    const int largest = mhc::largest_of(logits + at, NUM_LOGITS, top);
    for (int i = 0; i < N; ++i) shift += static_cast<float>(dh_res[from + mhc::entry<N, TRANSPOSED>(largest, i)]);
    for (int w = 0; w < NUM_LOGITS; ++w) {
      const float e = metal::precise::exp(static_cast<float>(logits[at + w]) - top);
      float ds = 0.0f;
      for (int i = 0; i < N; ++i) ds += static_cast<float>(dh_res[from + mhc::entry<N, TRANSPOSED>(w, i)]);
      sum += w == largest ? 0.0f : e;
      dot += e * (ds - shift);
    }
    sum += 1.0f;
    for (int w = 0; w < NUM_LOGITS; ++w) {
      const float s = metal::precise::exp(static_cast<float>(logits[at + w]) - top) / sum;
      float ds = 0.0f;
      for (int i = 0; i < N; ++i) ds += static_cast<float>(dh_res[from + mhc::entry<N, TRANSPOSED>(w, i)]);
      dlogits[at + w] = static_cast<DLOGITS_T>(s * ((ds - shift) - dot / sum));
    }
  } else {
    for (int b = 0; b < NUM_LOGITS / 2; ++b) {
      float dp = 0.0f, z_b = 0.0f;  // z_b: the difference of pair b
      for (int k = 0; k < N * N; ++k) {
        float product = 1.0f;
        for (int a = 0; a < NUM_LOGITS / 2; ++a) {
          const float z = static_cast<float>(logits[at + 2 * a]) - static_cast<float>(logits[at + 2 * a + 1]);
          const bool equal = (((k / N ^ k % N) >> (NUM_LOGITS / 2 - 1 - a)) & 1) == 0;
          if (a == b) {
            z_b = z;
            product *= equal ? 1.0f : -1.0f;
          } else {
            product *= mhc::sigmoid(equal ? z : -z);
          }
        }
        dp += product * static_cast<float>(dh_res[from + k]);
      }
      dp *= mhc::sigmoid(z_b) * mhc::sigmoid(-z_b);
      dlogits[at + 2 * b] = static_cast<DLOGITS_T>(dp);
      dlogits[at + 2 * b + 1] = static_cast<DLOGITS_T>(-dp);
    }
  }
}

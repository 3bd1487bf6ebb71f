// mixing_matrix_backward: the gradient of mixing_matrix.
//
//   PERMUTATIONS  s = softmax(l);   ds[w] = sum_i dh_res[i, P_w(i)], less that of the largest s;   dl = s * (ds - sum(s ds))
//   otherwise     dp[b] = sum_ij dh_res[i, j] (+-1, equal bits b or not) product of the other factors;   dl = +- dp p q
// TRANSPOSED  dh_res is that of the transpose
//
// in   logits [M, R], dh_res [M, N, N] any float     out  dlogits [M, R] of D
// own  a thread takes a matrix     template  N, R, PERMUTATIONS, TRANSPOSED, THREADS, D     grid  any number of threadgroups
#include "permutations.h"
const size_t count = logits_shape[0];
for (size_t m = size_t(threadgroup_position_in_grid.x) * THREADS + thread_position_in_threadgroup.x; m < count;
     m += size_t(threadgroups_per_grid.x) * THREADS) {
  const size_t at = m * R, from = m * (N * N);
  if constexpr (PERMUTATIONS) {
    float top, sum = 0.0f, dot = 0.0f, shift = 0.0f;
    const int largest = mhc::largest_of(logits + at, R, top);
    for (int i = 0; i < N; ++i) shift += static_cast<float>(dh_res[from + mhc::entry<N, TRANSPOSED>(largest, i)]);
    for (int w = 0; w < R; ++w) {
      const float e = metal::precise::exp(static_cast<float>(logits[at + w]) - top);
      float ds = 0.0f;
      for (int i = 0; i < N; ++i) ds += static_cast<float>(dh_res[from + mhc::entry<N, TRANSPOSED>(w, i)]);
      sum += w == largest ? 0.0f : e;
      dot += e * (ds - shift);
    }
    sum += 1.0f;
    for (int w = 0; w < R; ++w) {
      const float s = metal::precise::exp(static_cast<float>(logits[at + w]) - top) / sum;
      float ds = 0.0f;
      for (int i = 0; i < N; ++i) ds += static_cast<float>(dh_res[from + mhc::entry<N, TRANSPOSED>(w, i)]);
      dlogits[at + w] = static_cast<D>(s * ((ds - shift) - dot / sum));
    }
  } else {
    for (int b = 0; b < R / 2; ++b) {
      float dp = 0.0f, own = 0.0f;  // own: of the pair b
      for (int k = 0; k < N * N; ++k) {
        float product = 1.0f;
        for (int a = 0; a < R / 2; ++a) {
          const float z = static_cast<float>(logits[at + 2 * a]) - static_cast<float>(logits[at + 2 * a + 1]);
          const bool equal = (((k / N ^ k % N) >> (R / 2 - 1 - a)) & 1) == 0;
          if (a == b) {
            own = z;
            product *= equal ? 1.0f : -1.0f;
          } else {
            product *= mhc::sigmoid(equal ? z : -z);
          }
        }
        dp += product * static_cast<float>(dh_res[from + k]);
      }
      dp *= mhc::sigmoid(own) * mhc::sigmoid(-own);
      dlogits[at + 2 * b] = static_cast<D>(dp);
      dlogits[at + 2 * b + 1] = static_cast<D>(-dp);
    }
  }
}

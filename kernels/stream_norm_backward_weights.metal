// stream_norm_backward_weights: the gradients of the weights of stream_norm, the first stage of the sums over tokens.
//
//   dweight = sum_t (ds + sum_i dlogits[i] inject[i]) * out * roots
//   dinject[i] = sum_t dlogits[i] s,   s = out * roots * (1 + weight), rounded to T
//
// in   x [tokens, N, C] T: out; roots [tokens, N] float; ds [tokens, N, C] T; with INJECT dlogits [tokens, N] float,
//      weight [N, C] and inject [N, N * C] any float
// out  partial [chunks, (N / ROWS) (1 + ROWS) N C] float, without INJECT [chunks, N C]: a row is a chunk's sums, for each
//      ROWS rows of inject dweight from these, from the first also that of ds, and dinject of these
// owners  A threadgroup takes a chunk of tokens, THREADS * VEC neighbours k of N * C and ROWS rows of inject, which
//      divide N. A thread sums VEC * (1 + ROWS) products.
// template  T, N, VEC, THREADS, ROWS, INJECT
// grid  chunks * ceil(N C / (THREADS VEC)) * (with INJECT N / ROWS) threadgroups
#include "common.h"
constexpr int TOKENS_AT_ONCE = mhc::by_backend(2, 8);  // as registers allow
constexpr int ROW_BLOCKS = INJECT ? N / ROWS : 1;
constexpr int SUMS = INJECT ? ROWS : 1;
const int C = x_shape[2];
const int K = N * C;
const uint tokens = x_shape[0];
const int id = int(threadgroup_position_in_grid.x);
const int k_blocks = (K + THREADS * VEC - 1) / (THREADS * VEC);
const int row_block = id % ROW_BLOCKS, i0 = row_block * ROWS;
const int k = (id / ROW_BLOCKS % k_blocks * THREADS + int(thread_position_in_threadgroup.x)) * VEC;
const int chunk = id / ROW_BLOCKS / k_blocks;
const uint chunks = threadgroups_per_grid.x / uint(ROW_BLOCKS * k_blocks);
const uint tokens_per_chunk = (tokens + chunks - 1) / chunks;
const uint begin = uint(chunk) * tokens_per_chunk;
const uint end = begin + tokens_per_chunk < tokens ? begin + tokens_per_chunk : tokens;
const bool x_aligned = mhc::is_aligned<VEC>(x);
const bool ds_aligned = mhc::is_aligned<VEC>(ds);

if (k < K) {
  const int j = k / C;  // the stream
  float w[VEC] = {}, rows[SUMS][VEC] = {}, dweight[VEC] = {}, dinject[SUMS][VEC] = {};
  if (INJECT) {
    mhc::load_floats<VEC>(w, weight + k, mhc::is_aligned<VEC>(weight));
    UNROLL_FOR (int i = 0; i < SUMS; ++i)
      mhc::load_floats<VEC>(rows[i], inject + size_t(i0 + i) * size_t(K) + size_t(k), mhc::is_aligned<VEC>(inject));
  }
#pragma unroll(TOKENS_AT_ONCE)
  for (uint t = begin; t < end; ++t) {
    const size_t at = size_t(t) * size_t(K) + size_t(k);
    const float r = static_cast<float>(roots[size_t(t) * N + size_t(j)]);
    const mhc::Pack<T, VEC> out = mhc::load<T, VEC>(x + at, x_aligned);
    float d[VEC];
    mhc::load_floats<VEC>(d, ds + at, ds_aligned);
    UNROLL_FOR (int e = 0; e < VEC; ++e) d[e] = row_block == 0 ? d[e] : 0.0f;
    if (INJECT) {
      UNROLL_FOR (int i = 0; i < SUMS; ++i) {
        const float gate = static_cast<float>(dlogits[size_t(t) * N + size_t(i0 + i)]);
        UNROLL_FOR (int e = 0; e < VEC; ++e) {
          d[e] = metal::fma(gate, rows[i][e], d[e]);
          const T s = static_cast<T>(mhc::float_of(out, e) * r * (1.0f + w[e]));
          dinject[i][e] = metal::fma(gate, static_cast<float>(s), dinject[i][e]);
        }
      }
    }
    UNROLL_FOR (int e = 0; e < VEC; ++e) dweight[e] += d[e] * (mhc::float_of(out, e) * r);
  }

  const auto sums =
      partial + (size_t(chunk) * ROW_BLOCKS + size_t(row_block)) * size_t(INJECT ? 1 + ROWS : 1) * size_t(K);
  mhc::store_floats<VEC>(sums + k, dweight, true);
  if (INJECT) {
    UNROLL_FOR (int i = 0; i < SUMS; ++i)
      mhc::store_floats<VEC>(sums + size_t(1 + i) * size_t(K) + size_t(k), dinject[i], true);
  }
}

// mhc_projection_backward: dx of mhc_pre and the first stage of dphi's sum over tokens, by products of matrices; x is read
// once for both. For OUTS <= 32; mhc_pre_backward (without SPREAD) makes what it needs of a token.
//
//   dx[t, j] = sum_o phi[o, j] dp[t, o] + pull[t] x[t, j] + h_pre[t, j] du[t] (+ dx_out[t, j])
//   dphi[o, k] = sum_t dp[t, o] vec(x[t])[k]
//
// in   x [tokens, N, C] T, phi [OUTS, N * C] P, dp [tokens, OUTS] float, side [tokens, N + 1] float: h_pre, then pull;
//      du [tokens, C] D (READ), dx_out [tokens, N, C] T (PASS)
// out  dx [tokens, N, C] T, partial [chunks, OUTS * N * C] float, a row per chunk of tokens
// own  a simdgroup takes SPAN channels of a stream and a chunk of tokens, a tile of them at a time: phi, and the sums of
//      dphi, stay in its registers
// template  T, P, D, N, OUTS, THREADS, SPAN, READ, PASS     grid  chunks * N * ceil(C / SPAN) simdgroups, exactly
#include "products.h"
constexpr int SIMDS = THREADS / 32;
constexpr int RUN = SPAN / 4;
const int lane = int(thread_index_in_simdgroup);
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const int spans = (C + SPAN - 1) / SPAN, units = N * spans;
const uint id = threadgroup_position_in_grid.x * uint(SIMDS) + simdgroup_index_in_threadgroup;
const uint chunk = id / uint(units), chunks = threadgroups_per_grid.x * uint(SIMDS) / uint(units);
const int unit = int(id % uint(units)), j = unit / spans, c0 = unit % spans * SPAN;
const uint each = (tokens + chunks - 1) / chunks;
const uint begin = chunk * each;
const uint end = begin + each < tokens ? begin + each : tokens;
const int own = c0 + mhc::quarter_of(lane) * RUN;  // the lane's first channel
const bool all_whole = C % RUN == 0 && mhc::aligned<mhc::run_vec<T, RUN>()>(x) && (!READ || mhc::aligned<mhc::run_vec<D, RUN>()>(du)) &&
                       (!PASS || mhc::aligned<mhc::run_vec<T, RUN>()>(dx_out));

mhc::Columns<P, OUTS, SPAN> columns;
mhc::load_columns(columns, phi + (j * C + c0), K, C - c0, lane);
mhc::Sums<OUTS, SPAN> sums = {};
for (uint first = begin; first < end; first += mhc::TOKENS) {
  mhc::Run<T, RUN> xs[mhc::HELD] = {}, more[mhc::HELD] = {};
  mhc::Run<D, RUN> ds[mhc::HELD] = {};
  float pre[mhc::HELD], pull[mhc::HELD];
  UNROLL for (int r = 0; r < mhc::HELD; ++r) {
    const uint t = first + uint(mhc::token_of(lane, r));
    const int left = t < end ? C - own : 0;
    mhc::load_some(xs[r], x + (size_t(left > 0 ? t : 0u) * size_t(K) + size_t(j * C + own)), left, all_whole);
  }
  mhc::collect(sums, xs, dp, first, end, lane);
  UNROLL for (int r = 0; r < mhc::HELD; ++r) {
    const uint t = first + uint(mhc::token_of(lane, r));
    const int left = t < end ? C - own : 0;
    const size_t row = left > 0 ? t : 0u;
    if (READ) mhc::load_some(ds[r], du + row * size_t(C) + own, left, all_whole);
    if (PASS) mhc::load_some(more[r], dx_out + row * size_t(K) + size_t(j * C + own), left, all_whole);
    pre[r] = READ ? side[row * (N + 1) + j] : 0.0f;
    pull[r] = side[row * (N + 1) + N];
  }
  mhc::Rows<OUTS> rows;
  mhc::load_rows(rows, dp, first, end, lane);
  mhc::Run<T, RUN> made[mhc::HELD];
  UNROLL for (int p = 0; p < RUN / 2; ++p) {
    float v[mhc::HELD][2];
    mhc::spread(v, rows, columns, p);
    UNROLL for (int r = 0; r < mhc::HELD; ++r) {
      UNROLL for (int e = 0; e < 2; ++e) {
        const int i = 2 * p + e;
        float a = v[r][e] + pull[r] * mhc::run_float(xs[r], i);
        if (READ) a += pre[r] * mhc::run_float(ds[r], i);
        if (PASS) a += mhc::run_float(more[r], i);
        made[r].p[i / mhc::run_vec<T, RUN>()].v[i % mhc::run_vec<T, RUN>()] = static_cast<T>(a);
      }
    }
  }
  UNROLL for (int r = 0; r < mhc::HELD; ++r) {
    const uint t = first + uint(mhc::token_of(lane, r));
    if (t < end) mhc::store_some(dx + (size_t(t) * size_t(K) + size_t(j * C + own)), made[r], C - own, all_whole);
  }
}
mhc::store_sums(sums, partial + (size_t(chunk) * OUTS * size_t(K) + size_t(j * C + c0)), K, C - c0, lane);

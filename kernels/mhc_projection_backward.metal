// mhc_projection_backward: dx of mhc_pre and the first stage of dphi's sum over tokens, by products of matrices; x is read
// once for both. For OUTS <= 32; mhc_token_backward makes what it needs of a token.
//
//   dx[t, j] = sum_o phi[o, j] dp[t, o] + pull[t] x[t, j] + h_pre[t, j] du[t] (+ dx_out[t, j])
//   dphi[o, k] = sum_t dp[t, o] vec(x[t])[k]
//
// in   x [tokens, N, C] T, phi [OUTS, N * C] P, dp [tokens, OUTS] float, side [tokens, N + 1] float: h_pre, then pull;
//      du [tokens, C] T (READ), dx_out [tokens, N, C] T (PASS)
// out  dx [tokens, N, C] T, partial [chunks, OUTS * N * C] float, a row per chunk of tokens
// own  a threadgroup takes a chunk of tokens, of which it keeps STAGE at a time, dp and side, in threadgroup memory; each
//      of its simdgroups takes a unit, SPAN channels of a stream, and a tile of these tokens at a time: phi, and the sums
//      of dphi, stay in its registers
//      RING: on CUDA, bytes that a launch gives for the tiles that are on their way
// template  T, P, N, OUTS, THREADS, SPAN, STAGE, READ, PASS, RING
// grid  chunks * ceil(N * ceil(C / SPAN) / (THREADS / 32)) threadgroups, exactly
#include "products.h"
constexpr int SIMDS = THREADS / 32;
constexpr int RUN = SPAN / 4;
typedef mhc::Slot<T, RUN, READ, PASS> Place;
constexpr int SLOTS = RING / (SIMDS * Place::BYTES);
static_assert(STAGE % mhc::TOKENS == 0, "a stage is whole tiles");
threadgroup mhc::Staged staged[mhc::staged_size(OUTS, STAGE)];
threadgroup float sides[STAGE * (N + 1)];
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const int spans = (C + SPAN - 1) / SPAN, units = N * spans;
const uint groups = uint((units + SIMDS - 1) / SIMDS);  // that share a chunk
const uint chunk = threadgroup_position_in_grid.x / groups, chunks = threadgroups_per_grid.x / groups;
const int unit = int(threadgroup_position_in_grid.x % groups) * SIMDS + int(simdgroup_index_in_threadgroup);
const bool live = unit < units;
const int j = live ? unit / spans : 0, c0 = unit % spans * SPAN;
const uint each = (tokens + chunks - 1) / chunks;
const uint begin = chunk * each;
const uint end = begin + each < tokens ? begin + each : tokens;
const uint last = live ? end : 0u;
const int own = c0 + mhc::quarter_of(lane) * RUN;  // the lane's first channel
const bool all_whole = C % RUN == 0 && mhc::aligned<mhc::run_vec<T, RUN>()>(x) && (!READ || mhc::aligned<mhc::run_vec<T, RUN>()>(du)) &&
                       (!PASS || mhc::aligned<mhc::run_vec<T, RUN>()>(dx_out));

mhc::Columns<P, OUTS, SPAN> columns;
mhc::load_columns(columns, phi + (j * C + c0), K, live ? C - c0 : 0, lane);
mhc::Sums<OUTS, SPAN> sums = {};
const auto from = mhc::sources(x + (j * C + c0), du + c0, dx_out + (j * C + c0), K, C, C - c0, all_whole);
const int ahead = own - c0;
int slot = int(simdgroup_index_in_threadgroup) * SLOTS;
for (int s = 0; RING > 0 && s < SLOTS; ++s) mhc::ask_tile<Place, READ, PASS, T, RUN>(from, (slot + s) * Place::BYTES, begin + uint(s * mhc::TOKENS), last, lane);
for (uint base = begin; base < end; base += STAGE) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  mhc::stage_dp<OUTS, STAGE, THREADS>(staged, dp, base, end, tid);
  for (int i = tid; i < STAGE * (N + 1); i += THREADS)
    sides[i] = base + uint(i / (N + 1)) < end ? side[size_t(base) * (N + 1) + i] : 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint stop = base + STAGE < last ? base + STAGE : last;
  for (uint first = base; first < stop; first += mhc::TOKENS) {
    const int row = int(first - base);
    mhc::Run<T, RUN> xs[mhc::HELD] = {}, more[mhc::HELD] = {};
    mhc::Run<T, RUN> ds[mhc::HELD] = {};
    if constexpr (RING > 0) {
      mhc::wait_for_tile<SLOTS>();
      mhc::have_tile(xs, slot * Place::BYTES, lane);
    } else {
      mhc::load_tile(xs, from.x + ahead, from.K, first, stop, C - own, all_whole, lane);
      mhc::fetch_tile(from.x + ahead, from.K, first + mhc::TOKENS, tokens, C - own, lane);
      if (READ) mhc::fetch_tile(from.du + ahead, from.C, first + mhc::TOKENS, tokens, C - own, lane);
      if (PASS) mhc::fetch_tile(from.dx_out + ahead, from.K, first + mhc::TOKENS, tokens, C - own, lane);
    }
    mhc::collect<STAGE>(sums, xs, staged, row, lane);
    if constexpr (RING > 0) {
      if (READ) mhc::have_tile(ds, slot * Place::BYTES + Place::DU, lane);
      if (PASS) mhc::have_tile(more, slot * Place::BYTES + Place::PASSED, lane);
      mhc::ask_tile<Place, READ, PASS, T, RUN>(from, slot * Place::BYTES, first + uint(SLOTS * mhc::TOKENS), last, lane);
      slot = (slot + 1) % SLOTS == 0 ? slot + 1 - SLOTS : slot + 1;
    } else {
      if (READ) mhc::load_tile(ds, from.du + ahead, from.C, first, stop, C - own, all_whole, lane);
      if (PASS) mhc::load_tile(more, from.dx_out + ahead, from.K, first, stop, C - own, all_whole, lane);
    }
    float pre[mhc::HELD], pull[mhc::HELD];
    UNROLL for (int r = 0; r < mhc::HELD; ++r) {
      const int at = (row + mhc::token_of(lane, r)) * (N + 1);
      pre[r] = sides[at + j];
      pull[r] = sides[at + N];
    }
    mhc::Rows<OUTS> rows;
    mhc::load_rows<OUTS, STAGE>(rows, staged, row, lane);
    UNROLL for (int p = 0; p < RUN / 2; ++p) {
      float v[mhc::HELD][2] = {}, w[2];
      UNROLL for (int r = 0; r < mhc::HELD; ++r) {
        if (PASS) mhc::run_pair(v[r], more[r], p);
        mhc::run_pair(w, xs[r], p);
        UNROLL for (int e = 0; e < 2; ++e) v[r][e] += pull[r] * w[e];
        if (READ) mhc::run_pair(w, ds[r], p);
        UNROLL for (int e = 0; e < 2; ++e) v[r][e] += READ ? pre[r] * w[e] : 0.0f;
      }
      mhc::spread(v, rows, columns, p);
      UNROLL for (int r = 0; r < mhc::HELD; ++r) mhc::set_pair(xs[r], p, v[r]);
    }
    UNROLL for (int r = 0; r < mhc::HELD; ++r) {
      const uint t = first + uint(mhc::token_of(lane, r));
      if (t < stop) mhc::store_some(dx + (size_t(t) * size_t(K) + size_t(j * C + own)), xs[r], C - own, all_whole);
    }
  }
}

uint id = threadgroup_position_in_grid.x;  // once more, or what follows would take registers all along
STAY_PACKED(id);
const int u = int(id % groups) * SIMDS + int(simdgroup_index_in_threadgroup), c = u % spans * SPAN;
mhc::store_sums(sums, partial + (size_t(id / groups) * OUTS * size_t(K) + size_t(u / spans * C + c)), K, u < units ? C - c : 0, lane);

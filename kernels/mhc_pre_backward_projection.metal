// mhc_pre_backward_projection: dx of mhc_pre and the first stage of dphi's sum over tokens, by products of matrices; x
// is read once for both. NUM_LOGITS <= 32. mhc_pre_backward_coefficients makes dp and token_factors.
//
//   dx[t, j] = sum_o phi[o, j] dp[t, o] + pull[t] x[t, j] + h_pre[t, j] du[t] (+ dx_out[t, j])
//   dphi[o, k] = sum_t dp[t, o] vec(x[t])[k]
//
// in   x [tokens, N, C] T, phi [NUM_LOGITS, N * C] PHI_T, dp [tokens, NUM_LOGITS] float,
//      token_factors [tokens, N + 1] float: h_pre, pull;
//      du [tokens, C] T (HAS_DU); dx_out [tokens, N, C] T (HAS_DX_OUT): the cotangent of the x that was passed through
// out  dx [tokens, N, C] T, partial [chunks, NUM_LOGITS * N * C] float: a row is a chunk's sum of dphi
// owners  A threadgroup takes a chunk of tokens. dp and token_factors of STAGE tokens at a time lie in threadgroup
//      memory. Each simdgroup takes a span, SPAN channels of a stream, and goes through the chunk tile by tile: its
//      part of phi and its sums of dphi stay in registers.
//      RING_BYTES: on CUDA a launch adds so many bytes of threadgroup memory, in which fetched tiles arrive.
// template  T, PHI_T, N, NUM_LOGITS, THREADS, SPAN, STAGE, RING_BYTES, HAS_DU, HAS_DX_OUT
// grid  exactly chunks * ceil(N * ceil(C / SPAN) / (THREADS / 32)) threadgroups
#include "phi_gradient.h"
constexpr int SIMDS = THREADS / 32;
constexpr int RUN = SPAN / 4;
typedef mhc::Slot<T, RUN, HAS_DU, HAS_DX_OUT> TileSlot;
constexpr int SLOTS = RING_BYTES / (SIMDS * TileSlot::BYTES);
static_assert(STAGE % mhc::TILE_TOKENS == 0, "a stage is whole tiles");
threadgroup mhc::Staged staged[mhc::staged_size(NUM_LOGITS, STAGE)];
threadgroup float factors[STAGE * (N + 1)];
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const int spans_per_stream = (C + SPAN - 1) / SPAN, num_spans = N * spans_per_stream;
const uint groups_per_chunk = uint((num_spans + SIMDS - 1) / SIMDS);  // they share a chunk
const uint chunk = threadgroup_position_in_grid.x / groups_per_chunk,
           chunks = threadgroups_per_grid.x / groups_per_chunk;
const int span = int(threadgroup_position_in_grid.x % groups_per_chunk) * SIMDS + int(simdgroup_index_in_threadgroup);
const bool in_range = span < num_spans;
const int j = in_range ? span / spans_per_stream : 0, c0 = span % spans_per_stream * SPAN;
const uint tokens_per_chunk = (tokens + chunks - 1) / chunks;
const uint begin = chunk * tokens_per_chunk;
const uint end = begin + tokens_per_chunk < tokens ? begin + tokens_per_chunk : tokens;
const uint span_end = in_range ? end : 0u;
const int first_channel = c0 + mhc::quarter_of(lane) * RUN;  // the lane's run begins here
const bool aligned = C % RUN == 0 && mhc::is_aligned<mhc::run_vec<T, RUN>()>(x) &&
                     (!HAS_DU || mhc::is_aligned<mhc::run_vec<T, RUN>()>(du)) &&
                     (!HAS_DX_OUT || mhc::is_aligned<mhc::run_vec<T, RUN>()>(dx_out));

mhc::PhiColumns<PHI_T, NUM_LOGITS, SPAN> columns;
mhc::load_phi(columns, phi + (j * C + c0), K, in_range ? C - c0 : 0, lane);
mhc::DphiSums<NUM_LOGITS, SPAN> sums = {};
const auto from = mhc::sources(x + (j * C + c0), du + c0, dx_out + (j * C + c0), K, C, C - c0, aligned);
const int lane_offset = first_channel - c0;
int slot = int(simdgroup_index_in_threadgroup) * SLOTS;
for (int s = 0; RING_BYTES > 0 && s < SLOTS; ++s)
  mhc::fetch_tile_async<TileSlot, HAS_DU, HAS_DX_OUT, T, RUN>(from, (slot + s) * TileSlot::BYTES,
                                                              begin + uint(s * mhc::TILE_TOKENS), span_end, lane);
for (uint base = begin; base < end; base += STAGE) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  mhc::stage_dp<NUM_LOGITS, STAGE, THREADS>(staged, dp, base, end, tid);
  for (int i = tid; i < STAGE * (N + 1); i += THREADS)
    factors[i] = base + uint(i / (N + 1)) < end ? token_factors[size_t(base) * (N + 1) + i] : 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint stop = base + STAGE < span_end ? base + STAGE : span_end;
  for (uint first = base; first < stop; first += mhc::TILE_TOKENS) {
    const int row = int(first - base);
    mhc::Run<T, RUN> xs[mhc::LANE_TOKENS] = {}, passed[mhc::LANE_TOKENS] = {};
    mhc::Run<T, RUN> ds[mhc::LANE_TOKENS] = {};
    if constexpr (RING_BYTES > 0) {
      mhc::wait_for_tile<SLOTS>();
      mhc::read_tile(xs, slot * TileSlot::BYTES, lane);
    } else {
      mhc::load_tile(xs, from.x + lane_offset, from.K, first, stop, C - first_channel, aligned, lane);
      mhc::prefetch_tile(from.x + lane_offset, from.K, first + mhc::TILE_TOKENS, tokens, C - first_channel, lane);
      if (HAS_DU)
        mhc::prefetch_tile(from.du + lane_offset, from.C, first + mhc::TILE_TOKENS, tokens, C - first_channel, lane);
      if (HAS_DX_OUT)
        mhc::prefetch_tile(from.dx_out + lane_offset, from.K, first + mhc::TILE_TOKENS, tokens, C - first_channel,
                           lane);
    }
    mhc::accumulate_dphi<STAGE>(sums, xs, staged, row, lane);
    if constexpr (RING_BYTES > 0) {
      if (HAS_DU) mhc::read_tile(ds, slot * TileSlot::BYTES + TileSlot::DU, lane);
      if (HAS_DX_OUT) mhc::read_tile(passed, slot * TileSlot::BYTES + TileSlot::PASSED, lane);
      mhc::fetch_tile_async<TileSlot, HAS_DU, HAS_DX_OUT, T, RUN>(
          from, slot * TileSlot::BYTES, first + uint(SLOTS * mhc::TILE_TOKENS), span_end, lane);
      slot = (slot + 1) % SLOTS == 0 ? slot + 1 - SLOTS : slot + 1;
    } else {
      if (HAS_DU) mhc::load_tile(ds, from.du + lane_offset, from.C, first, stop, C - first_channel, aligned, lane);
      if (HAS_DX_OUT)
        mhc::load_tile(passed, from.dx_out + lane_offset, from.K, first, stop, C - first_channel, aligned, lane);
    }
    float pre[mhc::LANE_TOKENS], pull[mhc::LANE_TOKENS];
    UNROLL_FOR (int r = 0; r < mhc::LANE_TOKENS; ++r) {
      const int at = (row + mhc::token_of(lane, r)) * (N + 1);
      pre[r] = factors[at + j];
      pull[r] = factors[at + N];
    }
    mhc::DpRows<NUM_LOGITS> rows;
    mhc::load_dp_rows<NUM_LOGITS, STAGE>(rows, staged, row, lane);
    UNROLL_FOR (int p = 0; p < RUN / 2; ++p) {
      float v[mhc::LANE_TOKENS][2] = {}, w[2];
      UNROLL_FOR (int r = 0; r < mhc::LANE_TOKENS; ++r) {
        if (HAS_DX_OUT) mhc::run_pair(v[r], passed[r], p);
        mhc::run_pair(w, xs[r], p);
        UNROLL_FOR (int e = 0; e < 2; ++e) v[r][e] += pull[r] * w[e];
        if (HAS_DU) mhc::run_pair(w, ds[r], p);
        UNROLL_FOR (int e = 0; e < 2; ++e) v[r][e] += HAS_DU ? pre[r] * w[e] : 0.0f;
      }
      mhc::add_phi_dp(v, rows, columns, p);
      UNROLL_FOR (int r = 0; r < mhc::LANE_TOKENS; ++r) mhc::set_pair(xs[r], p, v[r]);
    }
    UNROLL_FOR (int r = 0; r < mhc::LANE_TOKENS; ++r) {
      const uint t = first + uint(mhc::token_of(lane, r));
      if (t < stop)
        mhc::store_run(dx + (size_t(t) * size_t(K) + size_t(j * C + first_channel)), xs[r], C - first_channel, aligned);
    }
  }
}

// what follows would otherwise occupy registers in the loop
const uint id = mhc::after_loop(threadgroup_position_in_grid.x);
const int u = int(id % groups_per_chunk) * SIMDS + int(simdgroup_index_in_threadgroup), c = u % spans_per_stream * SPAN;
mhc::store_dphi(sums,
                partial +
                    (size_t(id / groups_per_chunk) * NUM_LOGITS * size_t(K) + size_t(u / spans_per_stream * C + c)),
                K, u < num_spans ? C - c : 0, lane);

// stream_norm_backward: the gradient of stream_norm but for its weights, from the streams that it normalised.
//
//   dlogits[i] = dnext_post[i] * 2 sigmoid(z) sigmoid(-z) / N,   z = post_logits[i]
//   g[j] = (ds[j] + sum_i dlogits[i] inject[i, j]) * (1 + weight[j])
//   dx[j] = dout[j] + roots[j] * g[j] - out[j] * roots[j]**3 * mean(g[j] * out[j])
//   dy = sum_j h_post[j] dx[j];   dh_post[j] = sum dx[j] y
//
// in   x [tokens, N, C] T: out, the streams after the write-back; roots [tokens, N] float: rsqrt(mean(out**2) + eps);
//      dout, ds [tokens, N, C] T; weight [N, C] any float;
//      y [tokens, C] T and h_post [tokens, N] (POST_PER_TOKEN) or [N] any float (WRITE_BACK);
//      inject [N, N * C] any float, post_logits, dnext_post [tokens, N] float (INJECT)
// out  dx [tokens, N, C] T; dy [tokens, C] T (WRITE_BACK); dh_post [tokens, N] float (WRITE_BACK, POST_PER_TOKEN), or
//      partial [threadgroups, N] float: its sum over this threadgroup's tokens; dlogits [tokens, N] float (INJECT)
// CACHED: out and g of a token stay in registers between the sums of the norm and dx; without CACHED out, ds and inject
//      are read twice.
// owners  A threadgroup takes tokens in turn. A thread takes VEC neighbours of all streams, BLOCK streams at once,
//      PASSES times; BLOCK divides N, and is N with CACHED.
// template  T, N, VEC, THREADS, PASSES, CACHED, BLOCK, WRITE_BACK, POST_PER_TOKEN, INJECT
// grid  any number of threadgroups
#include "stream_norm.h"
constexpr int SIMDS = THREADS / 32;
constexpr int CACHED_PASSES = CACHED ? PASSES : 1;
threadgroup float scratch[BLOCK * SIMDS];
threadgroup float dots[N];  // sum(g * out)
threadgroup float gates[INJECT ? N : 1];  // dlogits
threadgroup float post_sums[WRITE_BACK ? SIMDS * N : 1];  // of each simdgroup, for dh_post
const uint tid = thread_position_in_threadgroup.x;
const uint simd = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const int C = x_shape[2];
const uint tokens = x_shape[0];
const bool aligned = mhc::is_aligned<VEC>(x) && mhc::is_aligned<VEC>(ds);
const bool dout_aligned = mhc::is_aligned<VEC>(dout);
const bool y_aligned = WRITE_BACK && mhc::is_aligned<VEC>(y);
const bool weight_aligned = mhc::is_aligned<VEC>(weight);
const bool inject_aligned = INJECT && mhc::is_aligned<VEC>(inject);
mhc::Pack<T, VEC> streams[CACHED_PASSES * BLOCK];
float g[CACHED_PASSES * BLOCK][VEC];

bool is_first_token = true;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const size_t token = size_t(t) * size_t(N * C);
  if (INJECT) {
    for (int i = int(tid); i < N; i += THREADS) {
      const float z = static_cast<float>(post_logits[size_t(t) * N + i]);
      const float slope = 2.0f * mhc::sigmoid(z) * mhc::sigmoid(-z);
      gates[i] = static_cast<float>(dnext_post[size_t(t) * N + i]) * slope / static_cast<float>(N);
      dlogits[size_t(t) * N + i] = gates[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // dots[j] = sum(g[j] * out[j])
  for (int j0 = 0; j0 < N; j0 += BLOCK) {
    float sums[BLOCK] = {};
#pragma unroll(CACHED_PASSES)
    for (int k = 0; k < PASSES; ++k) {
      const int c = mhc::each_turn((k * THREADS + int(tid)) * VEC, (t + uint(k)) >> 31), at = CACHED ? k * BLOCK : 0;
      if (c < C) {
        mhc::load_streams<BLOCK>(streams + at, x + token + j0 * C, C, c, aligned);
        mhc::load_g<N, INJECT, BLOCK>(g + at, ds + token, aligned, gates, inject, inject_aligned, weight,
                                      weight_aligned, j0 * C + c, C);
        UNROLL_FOR (int j = 0; j < BLOCK; ++j) {
          UNROLL_FOR (int e = 0; e < VEC; ++e) sums[j] += g[at + j][e] * mhc::float_of(streams[at + j], e);
        }
      }
    }
    mhc::group_sum<BLOCK, THREADS>(sums, scratch, dots + j0, tid);
  }

#pragma unroll(CACHED_PASSES)
  for (int k = 0; k < PASSES; ++k) {
    const int c = mhc::each_turn((k * THREADS + int(tid)) * VEC, (t + uint(k)) >> 31), at = CACHED ? k * BLOCK : 0;
    float yv[VEC] = {}, dyv[VEC] = {};
    if (WRITE_BACK && c < C) mhc::load_floats<VEC>(yv, mhc::at(y + size_t(t) * size_t(C), c), y_aligned);
    for (int j0 = 0; j0 < N; j0 += BLOCK) {
      float post_dots[BLOCK] = {};
      if (c < C) {
        if (!CACHED) {
          mhc::load_streams<BLOCK>(streams, x + token + j0 * C, C, c, aligned);
          mhc::load_g<N, INJECT, BLOCK>(g, ds + token, aligned, gates, inject, inject_aligned, weight, weight_aligned,
                                        j0 * C + c, C);
        }
        UNROLL_FOR (int j = 0; j < BLOCK; ++j) {
          const int stream_at = (j0 + j) * C + c;
          const float r = static_cast<float>(roots[size_t(t) * N + size_t(j0 + j)]);
          const float slope = r * r * r * (dots[j0 + j] / static_cast<float>(C));
          const float post =
              WRITE_BACK ? static_cast<float>(h_post[(POST_PER_TOKEN ? size_t(t) * N : 0) + size_t(j0 + j)]) : 0.0f;
          mhc::Pack<T, VEC> o = mhc::load<T, VEC>(mhc::at(dout + token, stream_at), dout_aligned);  // dout, then dx
          UNROLL_FOR (int e = 0; e < VEC; ++e) {
            const float a = mhc::float_of(o, e) + (r * g[at + j][e] - mhc::float_of(streams[at + j], e) * slope);
            dyv[e] += post * a;
            post_dots[j] += a * yv[e];
            mhc::set_element(o, e, static_cast<T>(a));
          }
          mhc::store(mhc::at(dx + token, stream_at), o);
        }
      }
      if (WRITE_BACK) {
        UNROLL_FOR (int j = 0; j < BLOCK; ++j) {
          const float sum = simd_sum(post_dots[j]);
          const bool first = k == 0 && (POST_PER_TOKEN || is_first_token);
          const int to = int(simd) * N + j0 + j;
          if (lane == 0) post_sums[to] = sum + (first ? 0.0f : post_sums[to]);
        }
      }
    }
    if (WRITE_BACK && c < C) {
      mhc::Pack<T, VEC> o = {};
      UNROLL_FOR (int e = 0; e < VEC; ++e) mhc::set_element(o, e, static_cast<T>(dyv[e]));
      mhc::store(mhc::at((device T*)dy + size_t(t) * size_t(C), c), o);  // an absent dy is one of floats
    }
  }
  is_first_token = false;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const bool last = t + threadgroups_per_grid.x >= tokens;
  if (WRITE_BACK && (POST_PER_TOKEN || last)) {
    const auto to = POST_PER_TOKEN ? dh_post + size_t(t) * N : partial + size_t(threadgroup_position_in_grid.x) * N;
    for (int j = int(tid); j < N; j += THREADS) to[j] = mhc::sum_of_simdgroups<N, THREADS>(post_sums, j);
  }
}

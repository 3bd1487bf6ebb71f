// mhc_fused: the whole static sublayer, x read once and out written once.
//
//   u = sum_j h_pre[j] x[j];   y = u * rsqrt(mean(u**2) + eps) * weight
//   out[i] = sum_j h_res[i, j] x[j] + h_post[i] y          (out = y unless MIX)
//
// in   x [tokens, N, C] T, H_pre [N], H_post [N], H_res [N, N], weight [C] any float,
//      params [5] float: eps, pre_eps, post_scale, post_eps, the projection's eps
// out  out [tokens, N, C] ([tokens, C] unless MIX) T
// GATES: H_pre and H_post are logits, h_pre = sigmoid + pre_eps, h_post = post_scale * sigmoid + post_eps.
// SINKHORN: H_res holds logits too and every threadgroup projects them itself (N <= 8).
// own  a threadgroup takes tokens in turn; a thread takes VEC neighbours of all streams, PASSES times
// CACHED: a token stays in registers between the sum and the output; otherwise x is read twice.
// template  T, N, VEC, THREADS, PASSES, CACHED, MIX, GATES, SINKHORN, ITERS, START, COLUMNS, OUT_COLUMNS
constexpr int SIMDS = THREADS / 32;
constexpr int UNROLL = N <= 8 ? N : 4;
constexpr int KEPT = CACHED ? PASSES : 1;
constexpr int R = MIX ? N : 1;
constexpr int STEP = CACHED && N <= 4 && VEC > 1 ? 2 : VEC;  // channels worked on at once
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float mix[N * N];  // h_res transposed: mix[j * N + i] goes from stream j to stream i
threadgroup float partial[2 * SIMDS];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];

for (uint i = tid; i < N; i += THREADS) {
  const float a = static_cast<float>(H_pre[i]);
  pre[i] = GATES ? mhc::sigmoid(a) + params[1] : a;
  if (MIX) {
    const float b = static_cast<float>(H_post[i]);
    post[i] = GATES ? params[2] * mhc::sigmoid(b) + params[3] : b;
  }
}
if constexpr (SINKHORN) {
  if (simdgroup_index_in_threadgroup == 0) {
    const uint lane = thread_index_in_simdgroup % mhc::lanes(N);
    float p[N];
    mhc::sinkhorn<N, START, COLUMNS>(p, H_res, ITERS, params[4], lane, thread_index_in_simdgroup, mix);
    if (thread_index_in_simdgroup < N) {
#pragma unroll
      for (int j = 0; j < N; ++j) mix[OUT_COLUMNS ? lane * N + j : j * N + lane] = p[j];
    }
  }
} else if (MIX) {
  for (uint k = tid; k < N * N; k += THREADS) mix[(k % N) * N + k / N] = static_cast<float>(H_res[k]);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const bool whole = mhc::aligned<VEC>(x);
const uint tokens = x_shape[0];
const bool w_whole = mhc::aligned<VEC>(weight);
mhc::Pack<T, VEC> xv[KEPT * (CACHED ? N : 1)];

int turn = 0;
for (uint t = threadgroup_position_in_grid.x; t < tokens; t += threadgroups_per_grid.x) {
  const auto row = x + size_t(t) * size_t(N * C);
  const auto orow = out + size_t(t) * size_t(R * C);

  // ss = sum(u ** 2)
  float ss = 0.0f;
#pragma unroll KEPT
  for (int k = 0; k < PASSES; ++k) {
    const int c = (k * THREADS + int(tid)) * VEC;
    if (c < C) {
      float u[VEC] = {};
#pragma unroll UNROLL
      for (int j = 0; j < N; ++j) {
        const mhc::Pack<T, VEC> v = mhc::load<T, VEC>(row + j * C + c, whole);
        if (CACHED) xv[k * N + j] = v;
#pragma unroll
        for (int e = 0; e < VEC; ++e) u[e] += pre[j] * static_cast<float>(v.v[e]);
      }
#pragma unroll
      for (int e = 0; e < VEC; ++e) ss += u[e] * u[e];
    }
  }
  ss = simd_sum(ss);
  if (SIMDS > 1) {  // two buffers, so one barrier a token is enough
    if (thread_index_in_simdgroup == 0) partial[turn * SIMDS + simdgroup_index_in_threadgroup] = ss;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ss = 0.0f;
#pragma unroll
    for (int s = 0; s < SIMDS; ++s) ss += partial[turn * SIMDS + s];
    turn ^= 1;
  }
  const float r = metal::precise::rsqrt(ss / static_cast<float>(C) + params[0]);

#pragma unroll KEPT
  for (int k = 0; k < PASSES; ++k) {
    const int c = (k * THREADS + int(tid)) * VEC;
    if (c < C) {
      float w[VEC];
      mhc::Pack<T, VEC> o[CACHED ? R : 1];
      mhc::load_floats<VEC>(w, weight + c, w_whole);
#pragma unroll
      for (int e = 0; e < VEC; e += STEP) {
        float acc[R * STEP] = {}, u[STEP] = {};
#pragma unroll UNROLL
        for (int j = 0; j < N; ++j) {
          const mhc::Pack<T, VEC> v = CACHED ? xv[k * N + j] : mhc::load<T, VEC>(row + j * C + c, whole);
#pragma unroll
          for (int q = 0; q < STEP; ++q) {
            const float f = static_cast<float>(v.v[e + q]);
            u[q] += pre[j] * f;
            if (MIX) {
#pragma unroll
              for (int i = 0; i < N; ++i) acc[i * STEP + q] += mix[j * N + i] * f;
            }
          }
        }
#pragma unroll
        for (int q = 0; q < STEP; ++q) u[q] *= r * w[e + q];
#pragma unroll
        for (int i = 0; i < R; ++i) {
#pragma unroll
          for (int q = 0; q < STEP; ++q)
            o[CACHED ? i : 0].v[e + q] = static_cast<T>(MIX ? acc[i * STEP + q] + post[i] * u[q] : u[q]);
          if (!CACHED) *(device mhc::Pack<T, VEC>*)(orow + i * C + c) = o[0];
        }
      }
#pragma unroll
      for (int i = 0; i < R; ++i) {
        if (CACHED) *(device mhc::Pack<T, VEC>*)(orow + i * C + c) = o[i];
      }
    }
  }
}

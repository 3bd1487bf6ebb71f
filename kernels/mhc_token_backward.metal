// mhc_token_backward: the gradient of mhc_pre but for dx and dphi, of which it makes all that mhc_projection_backward needs.
//
//   z = alpha l + bias, s = sigmoid(z);   dz_post = dh_post post_scale s (1 - s)
//   dz_res is given, or with PROJECT the gradient of sinkhorn_knopp(z_res) for dh_res
//   dz_pre[j] = dh_pre[j] s (1 - s), where READ makes dh_pre from du: sum du x[j], or with NORM
//   r (sum du weight x[j] - slope sum u x[j]), r = rsqrt(mean(u**2) + eps), slope = r**2 mean(du weight u)
//   dl = alpha dz;   dp = scale dl, scale = rsqrt(mean(x**2) + norm_eps);   pull = -scale**2 sum(dl l) / (N C)
//   NORM: du' = r * (du weight - u slope), u = sum_j h_pre[j] x[j];   dweight = sum_t du u r
//   dbias[o] = sum_t dz[o];   dalpha of a part = its sum of dz l
//
// in   x [tokens, N, C] T; bias [OUTS], alpha [parts], weight [C] any float, params as in mhc_pre; l [tokens, OUTS + 1] float;
//      du [tokens, C] T, or without READ dh_pre [tokens, N] float; dh_post [tokens, N] float; dh_res [tokens, N, N] float
//      (PROJECT) or dz_res [tokens, R] float
// out  side [tokens, N + 1] float: h_pre, then pull; NORM: dread [tokens, C] T: du'; dp [tokens, OUTS] float;
//      partial [simdgroups, P] float: sums of dz, of dz l, and with NORM dweight, in this order
// own  a simdgroup takes BATCH tokens in turn: all their matrices at once, lanes(N) lanes each; then token by token, a lane
//      VEC channels of all streams and an output, and with NORM once more its channels, from the cache. OUTS <= 32
// template  T, N, OUTS, VEC, THREADS, BATCH, HEAD, READ, NORM, PROJECT, ITERS, START, COLUMNS, OUT_COLUMNS, KEPT (half-steps
//      whose divisors stay in threadgroup memory)
#include "coefficients.h"
#include "sinkhorn_backward.h"
#include "streams.h"
constexpr int SIMDS = THREADS / 32;
constexpr int GATED = HEAD ? N : 2 * N;
constexpr int R = OUTS - GATED;
constexpr int W = mhc::lanes(N);
constexpr int CHUNKS = N <= 4 ? 2 : 1;  // packs under way at once
constexpr bool PACKED = 2 * OUTS % VEC == 0;  // dweight's sums
static_assert(OUTS <= 32 && (!PROJECT || BATCH * W <= 32), "a lane for each output, and for each line");
threadgroup float divisors[PROJECT ? KEPT * THREADS : 1];
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const uint self = threadgroup_position_in_grid.x * SIMDS + simdgroup_index_in_threadgroup;
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const bool whole = mhc::aligned<VEC>(x) && (!READ || mhc::aligned<VEC>(du));
const int o = lane < OUTS ? lane : 0, part = mhc::part_of<N>(o), entry = part == 2 ? o - GATED : 0;
const int line = COLUMNS ? entry % N : entry / N, place = COLUMNS ? entry / N : entry % N;  // of dz_res in PROJECT
const float a = static_cast<float>(alpha[part]), b = static_cast<float>(bias[o]);
const auto mine = partial + size_t(self) * size_t(2 * OUTS + (NORM ? C : 0));
float sum = 0.0f, sum_l = 0.0f;

for (uint first = self * BATCH; first < tokens; first += threadgroups_per_grid.x * SIMDS * BATCH) {
  float g_res[N] = {};
  if constexpr (PROJECT) {
    const uint t = first + uint(lane / W) < tokens && lane / W < BATCH ? first + uint(lane / W) : first;
    mhc::load_line<N, OUT_COLUMNS>(g_res, dh_res + size_t(t) * (N * N), uint(lane % W));
    UNROLL for (int j = 0; j < N; ++j) g_res[j] = lane % W < N ? g_res[j] : 0.0f;
    const auto z = mhc::logits_of(l + (size_t(t) * (OUTS + 1) + GATED), bias + GATED, static_cast<float>(alpha[2]));
    mhc::sinkhorn_gradient<N, START, COLUMNS, ITERS, KEPT, THREADS>(
        g_res, z, divisors + tid, static_cast<float>(params[5]), uint(lane % W), uint(lane), divisors);
  }

  for (int i = 0; i < BATCH && first + uint(i) < tokens; ++i) {
    const size_t t = first + uint(i);
    const float unit = static_cast<float>(l[t * (OUTS + 1) + o]), scale = static_cast<float>(l[t * (OUTS + 1) + OUTS]);
    const float s = mhc::sigmoid(a * unit + b), h = s + static_cast<float>(params[0]);
    mhc::Dots<N> dots = {};
    float r = 1.0f, slope = 0.0f;
    if constexpr (READ) {
      UNROLL for (int j = 0; j < N; ++j) dots.pre[j] = NORM ? simd_shuffle(h, ushort(j)) : 0.0f;
      mhc::dot_streams<NORM, CHUNKS, T, VEC>(dots, x + t * size_t(K), du + t * size_t(C), weight, C, lane, whole);
      if constexpr (NORM) {
        r = metal::precise::rsqrt(simd_sum(dots.squared) / static_cast<float>(C) + static_cast<float>(params[4]));
        slope = r * r * (simd_sum(dots.both) / static_cast<float>(C));
      }
    }

    float d = s * (1.0f - s), given = 0.0f;
    UNROLL for (int j = 0; j < N && READ; ++j) {
      const float through = simd_sum(dots.x[j]), norm = NORM ? simd_sum(dots.u[j]) : 0.0f;
      given = o == j ? r * (through - slope * norm) : given;
    }
    UNROLL for (int j = 0; j < N && PROJECT; ++j) {
      const float v = simd_shuffle(g_res[j], ushort(i * W + line));
      given = part == 2 && place == j ? v : given;
    }
    if (!READ && part == 0) given = static_cast<float>(dh_pre[t * N + o]);
    if (!HEAD && part == 1) given = static_cast<float>(params[1]) * static_cast<float>(dh_post[t * N + (o - N)]);
    if (part == 2) {
      d = 1.0f;
      if (!PROJECT && R > 0) given = static_cast<float>(dz_res[t * R + entry]);
    }
    d = lane < OUTS ? d * given : 0.0f;
    sum += d;
    sum_l += d * unit;
    d *= a * scale;
    const float pull = -simd_sum(d * unit) * scale / static_cast<float>(K);
    if (lane < OUTS) dp[t * OUTS + lane] = d;
    if (lane < N) side[t * (N + 1) + lane] = h;
    if (lane == 0) side[t * (N + 1) + N] = pull;

    for (int c = lane * VEC; NORM && c < C; c += 32 * VEC) {
      float u[VEC] = {}, v[VEC], g[VEC], w[VEC], g_weight[VEC] = {};
      mhc::Pack<T, VEC> read;
      if (i > 0 || first != self * BATCH) mhc::load_floats<VEC>(g_weight, mine + (2 * OUTS + c), PACKED);
      mhc::load_floats<VEC>(w, weight + c, mhc::aligned<VEC>(weight));
      mhc::load_floats<VEC>(g, du + t * size_t(C) + c, whole);
      UNROLL for (int j = 0; j < N; ++j) {
        mhc::load_floats<VEC>(v, x + t * size_t(K) + (j * C + c), whole);
        UNROLL for (int e = 0; e < VEC; ++e) u[e] += dots.pre[j] * v[e];
      }
      UNROLL for (int e = 0; e < VEC; ++e) {
        read.v[e] = static_cast<T>(r * (g[e] * w[e] - u[e] * slope));
        g_weight[e] += g[e] * u[e] * r;
      }
      *(device mhc::Pack<T, VEC>*)(dread + t * size_t(C) + c) = read;
      mhc::store_floats<VEC>(mine + (2 * OUTS + c), g_weight, PACKED);
    }
  }
}

if (lane < OUTS) {
  mine[lane] = sum;
  mine[OUTS + lane] = sum_l;
}
for (int c = lane; NORM && self * BATCH >= tokens && c < C; c += 32) mine[2 * OUTS + c] = 0.0f;

// mhc_pre_backward: the gradient of x in mhc_pre, from what mhc_pre<BACKWARD> made.
//
//   dl = alpha dz;   dp = scale dl, scale = rsqrt(mean(x**2) + norm_eps);   pull = -scale**2 sum(dl l) / (N C)
//   du' = du, or with NORM r * (du weight - u slope), u = sum_j h_pre[j] x[j];   dweight = sum_t du u r
//   dx[j] = sum_o phi[o, j] dp[o] + pull x[j] + h_pre[j] du' (+ dx_out[j], the cotangent of the x passed through)
//   dbias[o] = sum_t dz[o];   dalpha of a part = its sum of dz l
//
// in   x, phi, alpha, weight as in mhc_pre; l [tokens, OUTS], dz [tokens, GATED], dz_res [tokens, R], h_pre [tokens, N],
//      rows [tokens, 3] float; du [tokens, C] T, dx_out [tokens, N, C] T
// out  dx [tokens, N, C] T, dp [tokens, OUTS] float, partial [threadgroups, P] float: sums of dz, of dz l, and with NORM
//      dweight, in this order
// own  a threadgroup takes tiles of TILE tokens in turn, a thread VEC neighbours of all streams: phi is read once a tile
// template  T, N, OUTS, VEC, THREADS, TILE, HEAD, READ, NORM, PASS (dx_out is given)
constexpr int SIMDS = THREADS / 32;
constexpr int GATED = HEAD ? N : 2 * N;
constexpr int R = OUTS - GATED;
constexpr int AHEAD = N <= 8 ? N : 1;
threadgroup float dps[TILE * OUTS];
threadgroup float pre[TILE * N];
threadgroup float pull[TILE];
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const bool whole = mhc::aligned<VEC>(x);
const bool p_whole = mhc::aligned<VEC>(phi);
const auto mine = partial + size_t(threadgroup_position_in_grid.x) * size_t(2 * OUTS + (NORM ? C : 0));

bool again = false;
for (uint first = threadgroup_position_in_grid.x * TILE; first < tokens; first += threadgroups_per_grid.x * TILE) {
  for (int o = tid; o < OUTS; o += THREADS) {
    const float a = static_cast<float>(alpha[o < N ? 0 : o < 2 * N ? 1 : 2]);
    float sum = 0.0f, sum_l = 0.0f;
    for (int i = 0; i < TILE; ++i) {
      const size_t t = first + uint(i);
      float g = 0.0f;
      if (t < tokens) {
        if (o < GATED) g = static_cast<float>(dz[t * GATED + o]);
        else if (R > 0) g = static_cast<float>(dz_res[t * R + (o - GATED)]);
        sum += g;
        sum_l += g * static_cast<float>(l[t * OUTS + o]);
        g *= a * static_cast<float>(rows[t * 3]);
        dp[t * OUTS + o] = g;
      }
      dps[i * OUTS + o] = g;
    }
    mine[o] = (again ? mine[o] : 0.0f) + sum;
    mine[OUTS + o] = (again ? mine[OUTS + o] : 0.0f) + sum_l;
  }
  for (int q = tid; q < TILE * N; q += THREADS) {
    const size_t t = first + uint(q / N);
    pre[q] = t < tokens ? static_cast<float>(h_pre[t * N + q % N]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(simdgroup_index_in_threadgroup); i < TILE; i += SIMDS) {
    const size_t t = first + uint(i);
    float s = 0.0f;
    for (int o = lane; o < OUTS && t < tokens; o += 32) s += dps[i * OUTS + o] * static_cast<float>(l[t * OUTS + o]);
    s = simd_sum(s);
    if (lane == 0) pull[i] = t < tokens ? -s * static_cast<float>(rows[t * 3]) / static_cast<float>(K) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int c = tid * VEC; c < C; c += THREADS * VEC) {
    float d[TILE * VEC] = {}, w[VEC], g_weight[VEC] = {}, v[VEC];
    if (NORM) mhc::load_floats<VEC>(w, weight + c, mhc::aligned<VEC>(weight));
    UNROLL for (int i = 0; i < TILE; ++i) {
      const size_t t = first + uint(i);
      if (READ && t < tokens) {
        mhc::load_floats<VEC>(v, du + t * size_t(C) + c, mhc::aligned<VEC>(du));
        UNROLL for (int e = 0; e < VEC; ++e) d[i * VEC + e] = v[e];
        if (NORM) {
          const float r = static_cast<float>(rows[t * 3 + 1]), slope = static_cast<float>(rows[t * 3 + 2]);
          float u[VEC] = {};
#pragma unroll AHEAD
          for (int j = 0; j < N; ++j) {
            mhc::load_floats<VEC>(v, x + t * size_t(K) + (j * C + c), whole);
            UNROLL for (int e = 0; e < VEC; ++e) u[e] += pre[i * N + j] * v[e];
          }
          UNROLL for (int e = 0; e < VEC; ++e) {
            g_weight[e] += d[i * VEC + e] * u[e] * r;
            d[i * VEC + e] = r * (d[i * VEC + e] * w[e] - u[e] * slope);
          }
        }
      }
    }
    if (NORM) {
      UNROLL for (int e = 0; e < VEC; ++e) mine[2 * OUTS + c + e] = (again ? mine[2 * OUTS + c + e] : 0.0f) + g_weight[e];
    }
    for (int j = 0; j < N; ++j) {
      float acc[TILE * VEC] = {}, p[VEC];
      auto column = phi + (j * C + c);
#pragma unroll 2
      for (int o = 0; o < OUTS; ++o, column += K) {
        mhc::load_floats<VEC>(p, column, p_whole);
        UNROLL for (int i = 0; i < TILE; ++i) {
          UNROLL for (int e = 0; e < VEC; ++e) acc[i * VEC + e] += dps[i * OUTS + o] * p[e];
        }
      }
      UNROLL for (int i = 0; i < TILE; ++i) {
        const size_t t = first + uint(i);
        if (t < tokens) {
          const size_t at = t * size_t(K) + size_t(j * C + c);
          mhc::load_floats<VEC>(v, x + at, whole);
          float more[VEC] = {};
          if (PASS) mhc::load_floats<VEC>(more, dx_out + at, mhc::aligned<VEC>(dx_out));
          mhc::Pack<T, VEC> packed;
          UNROLL for (int e = 0; e < VEC; ++e) {
            const float read = READ ? pre[i * N + j] * d[i * VEC + e] : 0.0f;
            packed.v[e] = static_cast<T>(acc[i * VEC + e] + pull[i] * v[e] + read + more[e]);
          }
          *(device mhc::Pack<T, VEC>*)(dx + at) = packed;
        }
      }
    }
  }
  again = true;
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

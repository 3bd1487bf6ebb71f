// mhc_pre: the coefficients that each token makes for itself, and what its sublayer reads.
//
//   l = rsqrt(mean(x**2) + norm_eps) * (phi @ vec(x));   z = alpha * l + bias, in the parts pre [N], post [N], res [R]
//   h_pre = sigmoid(z_pre) + pre_eps;   h_post = post_scale * sigmoid(z_post) + post_eps;   logits = z_res
//   u = sum_j h_pre[j] x[j], or with NORM u = rms_norm(u, weight, eps)
//   BACKWARD, from the cotangents of u and h_post, with r = rsqrt(mean(u**2) + eps) and slope = r**2 mean(du weight u):
//   dh_pre[j] = sum du x[j], or with NORM r * (sum du weight x[j] - slope * sum u x[j]);   dz of pre and post
//
// in   x [tokens, N, C] T; phi [OUTS, N * C], bias [OUTS], alpha [parts], weight [C] any float, OUTS = 2 N + R (N for HEAD);
//      params [5] float: pre_eps, post_scale, post_eps, norm_eps, eps;   BACKWARD: du [tokens, C] T (dh_pre [tokens, N] float
//      without READ), dh_post [tokens, N] float
// out  h_pre, h_post [tokens, N], logits [tokens, R] float, u [tokens, C] T, as far as they are asked for;
//      BACKWARD: h_pre, logits, l [tokens, OUTS], dz [tokens, N or 2 N], rows [tokens, 3] float: the token's
//      rsqrt(mean(x**2) + norm_eps), r, slope
// own  a threadgroup takes tiles of TILE tokens in turn. Projection: a simdgroup takes EACH outputs of all of them, x
//      goes through threadgroup memory, so x and phi are read once a tile. u: a simdgroup takes a token, x comes from cache.
//      The order of every sum depends on N and C alone.
// template  T, N, OUTS, VEC, THREADS, TILE, EACH, HEAD, READ (u is made), NORM, BACKWARD, WRITE_PRE
constexpr int SIMDS = THREADS / 32;
constexpr int SPAN = 64 * VEC;  // elements of a token staged at once
constexpr int OWN = (TILE + SIMDS - 1) / SIMDS;
constexpr int R = HEAD ? 0 : OUTS - 2 * N;
constexpr int GATED = HEAD ? N : 2 * N;
constexpr int AHEAD = N <= 8 ? N : 1;
threadgroup float xs[TILE * SPAN];
threadgroup float raw[TILE * (OUTS + 1)];  // phi @ vec(x), then sum(x ** 2)
threadgroup float pre[TILE * N];
const int tid = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int simd = int(simdgroup_index_in_threadgroup);
const int C = x_shape[2], K = N * C;
const uint tokens = x_shape[0];
const bool whole = mhc::aligned<VEC>(x);
const bool p_whole = mhc::aligned<VEC>(phi);

for (uint first = threadgroup_position_in_grid.x * TILE; first < tokens; first += threadgroups_per_grid.x * TILE) {
  float squares[OWN] = {};
  for (int o0 = 0; o0 < OUTS; o0 += SIMDS * EACH) {
    float acc[TILE * EACH] = {};
    for (int k0 = 0; k0 < K; k0 += SPAN) {
      UNROLL for (int q = 0; q < OWN; ++q) {
        const int i = q * SIMDS + simd;
        if (i < TILE) {
          UNROLL for (int k = 0; k < SPAN; k += 32 * VEC) {
            const int at = k + lane * VEC;
            float v[VEC] = {};
            if (first + i < tokens && k0 + at < K)
              mhc::load_floats<VEC>(v, x + size_t(first + i) * size_t(K) + (k0 + at), whole);
            UNROLL for (int e = 0; e < VEC; ++e) {
              xs[i * SPAN + at + e] = v[e];
              if (o0 == 0) squares[q] += v[e] * v[e];
            }
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      UNROLL for (int k = 0; k < SPAN; k += 32 * VEC) {
        const int at = k + lane * VEC;
        if (k0 + at < K) {
          UNROLL for (int p = 0; p < EACH; ++p) {
            const int o = o0 + simd * EACH + p;
            if (o < OUTS) {
              float w[VEC];
              mhc::load_floats<VEC>(w, phi + size_t(o) * size_t(K) + (k0 + at), p_whole);
              UNROLL for (int i = 0; i < TILE; ++i) {
                UNROLL for (int e = 0; e < VEC; ++e) acc[i * EACH + p] += w[e] * xs[i * SPAN + at + e];
              }
            }
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    UNROLL for (int p = 0; p < EACH; ++p) {
      const int o = o0 + simd * EACH + p;
      UNROLL for (int i = 0; i < TILE; ++i) {
        const float s = simd_sum(acc[i * EACH + p]);
        if (lane == 0 && o < OUTS) raw[i * (OUTS + 1) + o] = s;
      }
    }
  }
  UNROLL for (int q = 0; q < OWN; ++q) {
    const float s = simd_sum(squares[q]);
    if (lane == 0 && q * SIMDS + simd < TILE) raw[(q * SIMDS + simd) * (OUTS + 1) + OUTS] = s;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int q = tid; q < TILE * OUTS; q += THREADS) {
    const int i = q / OUTS, o = q % OUTS, part = o < N ? 0 : o < 2 * N ? 1 : 2;
    const size_t t = first + i;
    if (t < tokens) {
      const float mean = raw[i * (OUTS + 1) + OUTS] / static_cast<float>(K);
      const float scale = metal::precise::rsqrt(mean + static_cast<float>(params[3]));
      const float unit = scale * raw[i * (OUTS + 1) + o];
      const float z = static_cast<float>(alpha[part]) * unit + static_cast<float>(bias[o]);
      if (part == 0) {
        const float s = mhc::sigmoid(z), h = s + static_cast<float>(params[0]);
        if (BACKWARD && !READ) dz[t * GATED + o] = static_cast<float>(dh_pre[t * N + o]) * s * (1.0f - s);
        pre[i * N + o] = h;
        if (WRITE_PRE) h_pre[t * N + o] = h;
      } else if (!HEAD && part == 1) {
        const float s = mhc::sigmoid(z), scale_post = static_cast<float>(params[1]);
        if (BACKWARD) dz[t * GATED + o] = static_cast<float>(dh_post[t * N + (o - N)]) * scale_post * s * (1.0f - s);
        else h_post[t * N + (o - N)] = scale_post * s + static_cast<float>(params[2]);
      } else if (R > 0) {
        logits[t * R + (o - 2 * N)] = z;
      }
      if (BACKWARD) {
        l[t * OUTS + o] = unit;
        if (o == 0) rows[t * 3] = scale;
        if (!READ && o < 2) rows[t * 3 + 1 + o] = 0.0f;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int i = simd; i < TILE && first + uint(i) < tokens && READ; i += SIMDS) {
    const size_t t = first + uint(i);
    const auto row = x + t * size_t(K);
    float squared = 0.0f, both = 0.0f;
    if (BACKWARD) {
      float g_pre[N] = {}, g_norm[N] = {};
      for (int c = lane * VEC; c < C; c += 32 * VEC) {
        float d[VEC], u[VEC] = {}, v[VEC];
        mhc::load_floats<VEC>(d, du + t * size_t(C) + c, mhc::aligned<VEC>(du));
        if (NORM) {
          float w[VEC];
          mhc::load_floats<VEC>(w, weight + c, mhc::aligned<VEC>(weight));
#pragma unroll AHEAD
          for (int j = 0; j < N; ++j) {
            mhc::load_floats<VEC>(v, row + j * C + c, whole);
            UNROLL for (int e = 0; e < VEC; ++e) u[e] += pre[i * N + j] * v[e];
          }
          UNROLL for (int e = 0; e < VEC; ++e) {
            d[e] *= w[e];
            squared += u[e] * u[e];
            both += d[e] * u[e];
          }
        }
#pragma unroll AHEAD
        for (int j = 0; j < N; ++j) {
          mhc::load_floats<VEC>(v, row + j * C + c, whole);
          UNROLL for (int e = 0; e < VEC; ++e) {
            g_pre[j] += d[e] * v[e];
            if (NORM) g_norm[j] += u[e] * v[e];
          }
        }
      }
      float r = 1.0f, slope = 0.0f;
      if (NORM) {
        r = metal::precise::rsqrt(simd_sum(squared) / static_cast<float>(C) + static_cast<float>(params[4]));
        slope = r * r * (simd_sum(both) / static_cast<float>(C));
      }
#pragma unroll AHEAD
      for (int j = 0; j < N; ++j) {
        const float through = simd_sum(g_pre[j]), norm = NORM ? simd_sum(g_norm[j]) : 0.0f;
        const float s = pre[i * N + j] - static_cast<float>(params[0]);
        if (lane == 0) dz[t * GATED + j] = r * (through - slope * norm) * s * (1.0f - s);
      }
      if (lane < 2) rows[t * 3 + 1 + lane] = lane == 0 ? r : slope;
    } else {
      float r = 1.0f;
      UNROLL for (int pass = NORM ? 0 : 1; pass < 2; ++pass) {
        for (int c = lane * VEC; c < C; c += 32 * VEC) {
          float o[VEC] = {}, v[VEC], w[VEC];
#pragma unroll AHEAD
          for (int j = 0; j < N; ++j) {
            mhc::load_floats<VEC>(v, row + j * C + c, whole);
            UNROLL for (int e = 0; e < VEC; ++e) o[e] += pre[i * N + j] * v[e];
          }
          if (pass == 0) {
            UNROLL for (int e = 0; e < VEC; ++e) squared += o[e] * o[e];
          } else {
            if (NORM) mhc::load_floats<VEC>(w, weight + c, mhc::aligned<VEC>(weight));
            mhc::Pack<T, VEC> packed;
            UNROLL for (int e = 0; e < VEC; ++e) packed.v[e] = static_cast<T>(NORM ? o[e] * r * w[e] : o[e]);
            *(device mhc::Pack<T, VEC>*)(u + t * size_t(C) + c) = packed;
          }
        }
        if (pass == 0) r = metal::precise::rsqrt(simd_sum(squared) / static_cast<float>(C) + static_cast<float>(params[4]));
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

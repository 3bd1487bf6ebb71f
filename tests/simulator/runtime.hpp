// The meaning of Metal's words on a CPU: every thread of a threadgroup is a fiber, 32 of them a simdgroup.
#pragma once
#define ONE_ADDRESS_SPACE
#define UNROLL
#define STAY_PACKED(value)
#define RECIPROCAL(v) (1.0f / (v))
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

typedef unsigned int uint;
typedef unsigned short ushort;
struct uint3 {
  uint x, y, z;
};

struct bfloat {  // round to nearest even; conversions from float are explicit, as in Metal
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    bits = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
};
typedef bfloat bfloat16_t;
typedef _Float16 half;
typedef half float16_t;

namespace sim {

enum { RUNNING, AT_SIMD, AT_BARRIER, DONE };
struct Fiber {
  ucontext_t context;
  int state, line;
  uint tid;
  uint32_t value;
};
struct Group {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  ucontext_t main;
  Fiber* current = nullptr;
  uint threads = 0, group = 0, groups = 0;
  std::string error;
};
inline Group g;

inline void stop(int state, int line) {
  Fiber* me = g.current;
  me->state = state;
  me->line = line;
  swapcontext(&me->context, &g.main);
}
inline bool resume(Fiber& f) {
  if (f.state != RUNNING) return false;
  g.current = &f;
  swapcontext(&g.main, &f.context);
  return true;
}
inline bool fail(const char* what, const Fiber& a, const Fiber& b) {
  char text[256];
  std::snprintf(text, sizeof text, "%s: thread %u at line %d, thread %u at line %d, threadgroup %u", what, a.tid,
                a.line, b.tid, b.line, g.group);
  g.error = text;
  return false;
}
// Runs a simdgroup until its lanes stop, and releases them when all of them are at one simd operation.
inline bool step(uint s) {
  bool moved = false, all = true;
  const uint end = std::min(g.threads, s * 32 + 32);
  for (uint i = s * 32; i < end; ++i) moved |= resume(g.fibers[i]);
  for (uint i = s * 32; i < end; ++i) all &= g.fibers[i].state == AT_SIMD;
  if (!all) return moved;
  for (uint i = s * 32; i < end; ++i) {
    if (g.fibers[i].line != g.fibers[s * 32].line) return fail("lanes at different simd operations", g.fibers[s * 32], g.fibers[i]);
  }
  for (uint i = s * 32; i < end; ++i) g.fibers[i].state = RUNNING;
  return true;
}
// schedule 0: lock-step; 1: each simdgroup as far ahead as barriers allow; 2: likewise, last simdgroup first
inline bool run_group(int schedule) {
  const uint simds = (g.threads + 31) / 32;
  for (;;) {
    bool moved = false;
    for (uint q = 0; q < simds && g.error.empty(); ++q) {
      const uint s = schedule == 2 ? simds - 1 - q : q;
      if (schedule == 0) moved |= step(s);
      else while (step(s) && g.error.empty()) moved = true;
    }
    if (!g.error.empty()) return false;
    if (moved) continue;
    bool done = true;
    for (auto& f : g.fibers) done &= f.state == DONE;
    if (done) return true;
    for (auto& f : g.fibers) {
      if (f.state != AT_BARRIER || f.line != g.fibers[0].line)
        return fail("not all threads reach one barrier", g.fibers[0], f);
    }
    for (auto& f : g.fibers) f.state = RUNNING;
  }
}
template <typename T>
T exchange(T v, uint lane, int line) {
  static_assert(sizeof(T) == 4);
  std::memcpy(&g.current->value, &v, 4);
  const uint first = g.current->tid & ~31u;
  stop(AT_SIMD, line);
  std::memcpy(&v, &g.fibers[first + lane].value, 4);
  stop(AT_SIMD, -line);  // nobody overwrites a value before all have read it
  return v;
}

}  // namespace sim

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) { sim::stop(sim::AT_BARRIER, line); }
inline float simd_shuffle_xor(float v, ushort mask, int line = __builtin_LINE()) {
  return sim::exchange(v, (sim::g.current->tid & 31u) ^ mask, line);
}
inline float simd_shuffle(float v, ushort lane, int line = __builtin_LINE()) { return sim::exchange(v, lane, line); }
inline float simd_sum(float v, int line = __builtin_LINE()) {
  for (ushort o = 1; o < 32; o *= 2) v += sim::exchange(v, (sim::g.current->tid & 31u) ^ o, line);
  return v;
}
namespace metal {
inline float max(float a, float b) { return std::fmax(a, b); }
namespace precise {
inline float exp(float v) { return std::exp(v); }
inline float log(float v) { return std::log(v); }
inline float rsqrt(float v) { return 1.0f / std::sqrt(v); }
}  // namespace precise
}  // namespace metal
using namespace metal;

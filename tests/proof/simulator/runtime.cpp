// Executes a body: every thread of a threadgroup is a fiber, 32 of them a simdgroup; and sees every access to memory,
// because g++ calls __tsan_read and __tsan_write for each (-fsanitize=thread, with these functions for a runtime).
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

namespace {

typedef unsigned int uint;
enum { RUNNING, AT_SIMD, AT_BARRIER, DONE };

void thread_main();

// Where a fiber or the scheduler waits: start(c, ...) makes it the first line of thread_main, and switch_context(from, to)
// waits in `from` and goes on in `to`.
#ifdef __x86_64__  // glibc's jumps also save the signal mask and clean up threads: a fifth of a simulation
typedef void** Context;  // its stack, whose last words are the registers that a function keeps
extern "C" void switch_stacks(Context* from, Context to);
asm(R"(
switch_stacks:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
void start(Context& c, char* stack, size_t bytes) {
  c = reinterpret_cast<Context>(stack + bytes) - 8;  // six registers, where to return, and where thread_main never does
  c[6] = reinterpret_cast<void*>(thread_main);
}
void switch_context(Context& from, Context& to) { switch_stacks(&from, to); }
#else
struct Context {
  jmp_buf jump;
  char* stack;  // of a fiber that did not start yet
  size_t bytes;
};
void start(Context& c, char* stack, size_t bytes) { c.stack = stack, c.bytes = bytes; }
void switch_context(Context& from, Context& to) {
  from.stack = nullptr;
  if (_setjmp(from.jump)) return;
  if (!to.stack) _longjmp(to.jump, 1);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = to.stack;
  context.uc_stack.ss_size = to.bytes;
  makecontext(&context, thread_main, 0);
  setcontext(&context);
}
#endif

struct Copy {
  uint to;
  const void* from;
  void* where;
};

struct Fiber {
  Context context;
  int state, line, flags;
  const char* file;
  uint tid, arrays, turn;
  bool sync;  // its simd operation is one that orders memory in the simdgroup
  std::vector<Copy> copies;  // asked for, oldest first
  std::vector<size_t> commits;  // copies in each
};

struct Buffer {  // filled in by __init__.py
  char* data;
  size_t bytes, element;
  const char* name;
  int output;  // 1; 2 where the thread that wrote an element may write it again
  uint32_t* loads;     // per element
  uint32_t* stores;    // per element
  uint32_t* writer;    // thread of the grid that stored it
  uint64_t* where;     // from this instruction
};

struct Touch {  // last write and read of an element of threadgroup memory; an epoch ends at a barrier
  uint write_epoch, read_epoch;
  int writer, reader, other_reader;  // threads; -1 is none; the other of another simdgroup, if one reads
  uint write_turn, read_turn, other_turn;  // of their simdgroup's memory
};

struct Array {
  const char* name;
  char* data;
  size_t bytes, element;
  std::vector<Touch> touches;
};

constexpr uint MAX_THREADS = 1024;
constexpr size_t STACK = 128 << 10, RED_ZONE = 4096, LIMIT = 32 << 10, CUDA_LIMIT = 227 << 10;
constexpr int MEM_THREADGROUP = 2;

typedef float Values[8];  // numbers or bits that a thread published at a simd operation
alignas(64) Values published[2][MAX_THREADS];  // at this operation and at the one before
std::vector<Fiber> fibers;
char* stacks;             // one for each of MAX_THREADS fibers, reserved once
std::vector<char> arena;
std::vector<Array> arrays;
Array dynamic;            // what the launch gives
uint turns[32];           // of each simdgroup's memory
int order;                // schedule
std::vector<Buffer*> buffers;
Fiber* current;
Context scheduler;
uint threads, group, groups, epoch, first_epoch;
uint skipped;             // threadgroups before the first that runs
void (*kernel)();
std::string error;
void* error_at;

[[noreturn]] void leave() {
  switch_context(current->context, scheduler);
  __builtin_unreachable();
}

// The first error; __init__.py replaces the address by file and line.
bool fail(void* where, const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  error = text;
  error_at = where;
  return false;
}

void stop(int state, const char* file, int line) {
  current->state = state;
  current->file = file;
  current->line = line;
  switch_context(current->context, scheduler);
}

// Publishes to the simdgroup, waits for its lanes, and returns what they published. Who is at the next operation
// publishes in the other turn, so nobody overwrites a value before all have read it.
const Values* publish(const void* values, size_t bytes, const char* file, int line) {
  current->turn ^= 1;
  std::memcpy(published[current->turn][current->tid], values, bytes);
  stop(AT_SIMD, file, line);
  return &published[current->turn][current->tid & ~31u];
}

// What a fiber does in a threadgroup.
void thread_main() {
  kernel();
  current->state = DONE;
  current->line = 0;
  leave();
}

bool resume(Fiber& f) {
  if (f.state != RUNNING) return false;
  current = &f;
  switch_context(scheduler, f.context);
  current = nullptr;
  return true;
}

std::string words(const Fiber& f) {
  const char* what[] = {"runs", "is at the simd operation at", "is at the barrier at", "has returned"};
  std::string text = "thread " + std::to_string(f.tid) + " " + what[f.state];
  return f.line ? text + " " + f.file + ":" + std::to_string(f.line) : text;
}
bool apart(const Fiber& a, const Fiber& b, const char* what) {
  return fail(nullptr, "%s: %s, %s, threadgroup %u", what, words(a).c_str(), words(b).c_str(), group);
}

// Runs a simdgroup until its lanes stop, and releases them when all are at one simd operation.
bool step(uint s) {
  bool moved = false, all = true;
  const uint first = s * 32, end = std::min(threads, first + 32);
  for (uint i = first; i < end && error.empty(); ++i) moved |= resume(fibers[i]);
  for (uint i = first; i < end; ++i) all &= fibers[i].state == AT_SIMD;
  if (!all || !error.empty()) return moved && error.empty();
  for (uint i = first; i < end; ++i) {
    if (fibers[i].line != fibers[first].line || fibers[i].file != fibers[first].file)
      return apart(fibers[first], fibers[i], "lanes at different simd operations");
  }
  if (fibers[first].sync) ++turns[s];
  for (uint i = first; i < end; ++i) fibers[i].state = RUNNING, fibers[i].sync = false;
  return true;
}

// schedule 0: lock-step; 1: each simdgroup as far ahead as barriers allow; 2: likewise, last simdgroup first
bool run_group(int schedule) {
  const uint simds = (threads + 31) / 32;
  for (;;) {
    bool moved = false;
    for (uint q = 0; q < simds && error.empty(); ++q) {
      const uint s = schedule == 2 ? simds - 1 - q : q;
      if (schedule == 0) moved |= step(s);
      else while (step(s)) moved = true;
    }
    if (!error.empty()) return false;
    if (moved) continue;
    bool done = true;
    for (uint i = 0; i < threads; ++i) done &= fibers[i].state == DONE;
    if (done) return true;
    for (uint i = 0; i < threads; ++i) {
      const Fiber &f = fibers[i], &first = fibers[0];
      if (f.state != first.state || f.line != first.line || f.file != first.file)
        return apart(first, f, "not all threads reach one barrier");
    }
    for (uint i = 0; i < threads; ++i) fibers[i].state = RUNNING;
    if (fibers[0].flags & MEM_THREADGROUP) ++epoch;
  }
}

// Which element of `item` bytes lies at the offset: a shift where it can be one, since every access asks.
size_t element_at(size_t offset, size_t item) {
  return item & (item - 1) ? offset / item : offset >> __builtin_ctzll(item);
}

void threadgroup_access(Array& a, size_t offset, size_t size, bool write, void* where) {
  const size_t last = element_at(offset + size - 1, a.element);
  for (size_t e = element_at(offset, a.element); e <= last; ++e) {
    Touch& t = a.touches[e];
    const int me = int(current->tid);
    if (!write && t.write_epoch < first_epoch) {
      fail(where, "thread %d of threadgroup %u reads %s[%zu], which nobody wrote", me, group, a.name, e);
      leave();
    }
    const uint turn = turns[me / 32];  // what lanes of its simdgroup did in an earlier one is over
    auto before = [&](int thread, uint then) { return thread / 32 == me / 32 && then < turn; };
    const bool written = t.write_epoch == epoch && !before(t.writer, t.write_turn);
    const bool read = t.read_epoch == epoch;
    auto apart = [&](int thread, uint then) { return thread >= 0 && thread != me && !before(thread, then); };
    int other = written && t.writer != me ? t.writer : -1;
    if (other < 0 && write && read) {
      if (apart(t.reader, t.read_turn)) other = t.reader;
      else if (apart(t.other_reader, t.other_turn)) other = t.other_reader;
    }
    if (other >= 0) {
      fail(where, "race: thread %d of threadgroup %u %s %s[%zu], which thread %d %s, with no barrier between", me, group,
           write ? "writes" : "reads", a.name, e, other, written && other == t.writer ? "wrote" : "read");
      leave();
    }
    if (write) t.write_epoch = epoch, t.writer = me, t.write_turn = turn;
    else if (!read) t.read_epoch = epoch, t.reader = me, t.other_reader = -1, t.read_turn = turn;
    else if (!apart(t.reader, t.read_turn)) t.reader = me, t.read_turn = turn;
    else if (t.other_reader < 0 || t.other_reader / 32 == t.reader / 32) t.other_reader = me, t.other_turn = turn;
  }
}

void device_access(Buffer& b, size_t offset, size_t size, bool write, void* where) {
  const uint me = group * threads + current->tid;
  const size_t last = element_at(offset + size - 1, b.element);
  for (size_t e = element_at(offset, b.element); e <= last; ++e) {
    if (write) {
      if (!b.output) fail(where, "thread %u of threadgroup %u writes the input %s[%zu]", current->tid, group, b.name, e);
      else if (b.stores[e]++ && (b.output == 1 || b.writer[e] != me))
        fail(where, "thread %u of threadgroup %u writes %s[%zu], which thread %u of threadgroup %u wrote", current->tid,
             group, b.name, e, b.writer[e] % threads, b.writer[e] / threads);
      if (!error.empty()) leave();
      b.writer[e] = me;
      b.where[e] = uint64_t(where);
    } else {
      b.loads[e]++;
      if (b.output && (!b.stores[e] || b.writer[e] != me)) {
        fail(where, "thread %u of threadgroup %u reads the output %s[%zu], which %s", current->tid, group, b.name, e,
             b.stores[e] ? "another thread wrote" : "nobody wrote");
        leave();
      }
    }
  }
}

[[noreturn]] void out_of_bounds(const char* a, bool device, bool write, void* where) {
  const char* near = "no buffer";
  long element = 0;
  size_t distance = ~size_t(0);
  auto measure = [&](const char* name, const char* data, size_t bytes, size_t item) {
    const size_t away = a < data ? data - a : a - data - bytes;
    if (away < distance) distance = away, near = name, element = long((a < data ? a - data - long(item) + 1 : a - data) / long(item));
  };
  if (dynamic.bytes) measure(dynamic.name, dynamic.data, dynamic.bytes, dynamic.element);
  if (device) {
    for (auto* b : buffers) measure(b->name, b->data, b->bytes, b->element);
  } else {
    for (auto& array : arrays) measure(array.name, array.data, array.bytes, array.element);
  }
  fail(where, "thread %u of threadgroup %u %s out of bounds: %s[%ld]", current->tid, group, write ? "writes" : "reads", near, element);
  leave();
}

void access(void* p, size_t size, size_t alignment, bool write, void* where) {
  if (!current) return;
  const char* a = static_cast<char*>(p);
  if (a >= stacks && a < stacks + MAX_THREADS * STACK) return;  // registers
  if (uintptr_t(p) & (alignment - 1)) {
    fail(where, "thread %u of threadgroup %u: misaligned %zu bytes", current->tid, group, size);
    leave();
  }
  auto within = [&](const auto& array) { return a >= array.data && a + size <= array.data + array.bytes; };
  if (dynamic.bytes && within(dynamic)) return threadgroup_access(dynamic, a - dynamic.data, size, write, where);
  const bool device = a < arena.data() || a >= arena.data() + arena.size();
  if (device) {
    for (auto* b : buffers)
      if (within(*b)) return device_access(*b, a - b->data, size, write, where);
  } else {
    for (auto& array : arrays)
      if (within(array)) return threadgroup_access(array, a - array.data, size, write, where);
  }
  out_of_bounds(a, device, write, where);
}

}  // namespace

extern "C" {

uint sim_thread() { return current->tid; }
uint sim_group() { return group; }
uint sim_groups() { return groups; }
uint sim_threads() { return threads; }
void sim_skip(uint count) { skipped = count; }
void* sim_buffer(int k) { return buffers[k]->data; }

// Of an instruction in its library.
uint64_t sim_offset(uint64_t where) {
  Dl_info info;
  return where && dladdr(reinterpret_cast<void*>(where), &info) ? where - uint64_t(info.dli_fbase) : 0;
}

// The thread's next threadgroup array; the first thread that asks makes it.
void* sim_threadgroup(const char* name, size_t bytes, size_t element) {
  const uint k = current->arrays++;
  if (k == arrays.size()) {
    size_t total = bytes, offset = RED_ZONE;
    for (auto& a : arrays) total += a.bytes, offset += a.bytes + RED_ZONE;
    offset += -reinterpret_cast<uintptr_t>(arena.data() + offset) % 64;
    const size_t limit = dynamic.bytes ? CUDA_LIMIT - dynamic.bytes : LIMIT;
    if (total > limit) {
      fail(nullptr, "%zu bytes of threadgroup memory with %s: %s has %zu", total, name, dynamic.bytes ? "CUDA" : "Metal", limit);
      leave();
    }
    arrays.push_back({name, arena.data() + offset, bytes, element, std::vector<Touch>(bytes / element)});
  }
  return arrays[k].data;
}

void sim_barrier(int flags, const char* file, int line) {
  current->flags = flags;
  stop(AT_BARRIER, file, line);
}

float sim_exchange(float v, uint lane, const char* file, int line) {
  return publish(&v, sizeof v, file, line)[lane][0];
}

// Lanes add in pairs, then pairs of these, as by simd_shuffle_xor of 1, 2, 4, 8, 16.
float sim_sum(float v, const char* file, int line) {
  const Values* lanes = publish(&v, sizeof v, file, line);
  float sums[32];
  for (uint i = 0; i < 32; ++i) sums[i] = lanes[i][0];
  for (uint o = 1; o < 32; o *= 2)
    for (uint i = 0; i < 32; i += 2 * o) sums[i] += sums[i + o];
  return sums[0];
}
void sim_simdgroup_sync(const char* file, int line) {
  current->sync = true;
  publish(nullptr, 0, file, line);
}

uint sim_address(const void* p) { return uint(static_cast<const char*>(p) - arena.data()); }
static void* sim_pointer(uint address) { return arena.data() + address; }

// What another lane published of a matrix in registers
static uint word(const Values* lanes, uint lane, uint k) { return __builtin_bit_cast(uint, lanes[lane][k]); }

// d += a b, 16 x K by K x 8, of four and two words a lane, in each one number, tf32, or two, bfloat16.
// Products are exact, the sum is rounded at its end.
static inline void multiply(float* d, const uint* factors, uint K, uint per_word, const char* file, int line) {
  const Values* lanes = publish(factors, 6 * sizeof(uint), file, line);
  const uint g = current->tid % 32 / 4, q = current->tid % 4;
  auto value = [&](uint first, uint row, uint k) {
    const uint w = word(lanes, row * 4 + k / per_word % 4, first + k / (4 * per_word) * (first < 4 ? 2 : 1));
    return double(__builtin_bit_cast(float, per_word == 1 ? w & 0xffffe000u : k % 2 ? w & 0xffff0000u : w << 16));
  };
  double sums[] = {d[0], d[1], d[2], d[3]};
  for (uint k = 0; k < K; ++k) {
    const double a[] = {value(0, g, k), value(1, g, k)}, b[] = {value(4, 2 * q, k), value(4, 2 * q + 1, k)};
    for (uint i = 0; i < 4; ++i) sums[i] += a[i / 2] * b[i % 2];
  }
  for (uint i = 0; i < 4; ++i) d[i] = float(sums[i]);
}
void sim_multiply_tf32(float* d, const uint* factors, const char* file, int line) { multiply(d, factors, 8, 1, file, line); }
void sim_multiply_16(float* d, const uint* factors, uint K, const char* file, int line) { multiply(d, factors, K, 2, file, line); }

// 8 x 8 matrices of 16 bits, whose row m of the k-th is at the address of lane 8 k + m
void sim_load_matrices(uint* w, uint address, uint count, bool transposed, const char* file, int line) {
  void* where = __builtin_return_address(0);
  const Values* lanes = publish(&address, sizeof address, file, line);
  const uint g = current->tid % 32 / 4, q = current->tid % 4;
  for (uint m = 0; m < count; ++m) {
    w[m] = 0;
    for (uint e = 0; e < 2; ++e) {
      const uint row = transposed ? 2 * q + e : g, column = transposed ? g : 2 * q + e;
      char* p = static_cast<char*>(sim_pointer(word(lanes, 8 * m + row, 0))) + 2 * column;
      access(p, 2, 2, false, where);
      uint16_t number;
      std::memcpy(&number, p, 2);
      w[m] |= uint(number) << 16 * e;
    }
  }
}
// Numbers of 16 bits, of a matrix whose rows become columns
uint sim_transposed(uint w, const char* file, int line) {
  const Values* lanes = publish(&w, sizeof w, file, line);
  const uint g = current->tid % 32 / 4, q = current->tid % 4;
  uint v[2];
  for (uint e = 0; e < 2; ++e) v[e] = word(lanes, (2 * q + e) * 4 + g / 2, 0) >> g % 2 * 16 & 0xffffu;
  return v[0] | v[1] << 16;
}

// Copies land at once, or, in the schedules that run ahead, as late as they may.
void* sim_dynamic() { return dynamic.data; }
static void land(const Copy& c) {
  access(const_cast<void*>(c.from), 16, 16, false, c.where);
  access(sim_pointer(c.to), 16, 16, true, c.where);
  std::memcpy(sim_pointer(c.to), c.from, 16);
}
void sim_copy(uint to, const void* from) {
  const Copy c = {to, from, __builtin_return_address(0)};
  if (order == 0) land(c);
  else current->copies.push_back(c);
}
void sim_commit() {
  size_t before = 0;
  for (size_t count : current->commits) before += count;
  current->commits.push_back(current->copies.size() - before);
}
void sim_wait(int left) {
  while (current->commits.size() > size_t(left)) {
    for (size_t count = current->commits.front(); count > 0; --count) {
      land(current->copies.front());
      current->copies.erase(current->copies.begin());
    }
    current->commits.erase(current->commits.begin());
  }
}

// A lane holds two elements of an 8 x 8 matrix: [row][column] and [row][column + 1].
uint sim_row() { return current->tid / 16 % 2 * 4 + current->tid / 2 % 4; }
uint sim_column() { return current->tid / 8 % 2 * 4 + current->tid % 2 * 2; }

// d = a * b + c, fused, in ascending order of the columns of a
void sim_matrix(float* d, const float* a, const float* b, const float* c, const char* file, int line) {
  const float words[] = {a[0], a[1], b[0], b[1]};
  const Values* lanes = publish(words, sizeof words, file, line);
  auto factor = [&](int matrix, uint row, uint column) {
    const uint lane = row / 4 * 16 + column / 4 * 8 + row % 4 * 2 + column / 2 % 2;
    return lanes[lane][matrix * 2 + column % 2];
  };
  for (uint e = 0; e < 2; ++e) {
    d[e] = c[e];
    for (uint k = 0; k < 8; ++k)
      d[e] = __builtin_fmaf(factor(0, sim_row(), k), factor(1, k, sim_column() + e), d[e]);
  }
}

// Runs the grid, or its last threadgroups, which may leave outputs unwritten. Returns an error or null; *where becomes the instruction's offset in its library, 0 if there is none.
const char* simulate(void (*entry)(), Buffer* list, int count, uint group_count, uint thread_count, int schedule,
                     size_t dynamic_bytes, uint64_t* where) {
  kernel = entry;
  threads = thread_count;
  groups = group_count;
  error.clear();
  error_at = nullptr;
  buffers.clear();
  for (int k = 0; k < count; ++k) buffers.push_back(list + k);
  arrays.clear();
  order = schedule;
  arena.resize(LIMIT + 33 * (RED_ZONE + 64) + dynamic_bytes);
  dynamic = {"dynamic_threadgroup", nullptr, dynamic_bytes, 16, std::vector<Touch>(dynamic_bytes / 16)};
  dynamic.data = arena.data() + arena.size() - dynamic_bytes - 64;
  dynamic.data += -reinterpret_cast<uintptr_t>(dynamic.data) % 64;
  if (!stacks) {
    stacks = new char[MAX_THREADS * STACK];
    fibers.resize(MAX_THREADS);
  }
  for (group = skipped; group < groups && error.empty(); ++group) {
    first_epoch = ++epoch;
    for (uint i = 0; i < threads; ++i) {
      Fiber& f = fibers[i];
      start(f.context, stacks + i * STACK, STACK - i % 64 * 832);  // else all stacks end in one set of a cache
      f.state = RUNNING;
      f.tid = i;
      f.arrays = f.turn = 0;
      f.sync = false;
      f.copies.clear();
      f.commits.clear();
    }
    run_group(schedule);
  }
  current = nullptr;
  for (int k = 0; k < count && !skipped && error.empty(); ++k) {
    for (size_t e = 0; list[k].output && e < list[k].bytes / list[k].element && error.empty(); ++e)
      if (!list[k].stores[e]) fail(nullptr, "nobody writes %s[%zu]", list[k].name, e);
  }
  *where = sim_offset(uint64_t(error_at));
  return error.empty() ? nullptr : error.c_str();
}

// What g++ calls for every access, and for undefined behaviour.
#define HERE __builtin_return_address(0)
#define HOOKS(size)                                                                        \
  void __tsan_read##size(void* p) { access(p, size, size, false, HERE); }                  \
  void __tsan_write##size(void* p) { access(p, size, size, true, HERE); }                  \
  void __tsan_unaligned_read##size(void* p) { access(p, size, 1, false, HERE); }           \
  void __tsan_unaligned_write##size(void* p) { access(p, size, 1, true, HERE); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_read_range(void* p, size_t size) { access(p, size, 1, false, HERE); }
void __tsan_write_range(void* p, size_t size) { access(p, size, 1, true, HERE); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

struct Place {
  const char* file;
  uint32_t line, column;
};
#define UNDEFINED(name, what)                                                                                       \
  void __ubsan_handle_##name(Place* place) {                                                                        \
    fail(nullptr, "%s:%u: thread %u of threadgroup %u: " what, place->file, place->line, current->tid, group);      \
    leave();                                                                                                        \
  }
UNDEFINED(out_of_bounds, "index out of the bounds of an array")
UNDEFINED(type_mismatch_v1, "misaligned access")
UNDEFINED(shift_out_of_bounds, "shift by more than the width")
UNDEFINED(add_overflow, "signed overflow")
UNDEFINED(sub_overflow, "signed overflow")
UNDEFINED(mul_overflow, "signed overflow")
UNDEFINED(negate_overflow, "signed overflow")
UNDEFINED(divrem_overflow, "division by zero or signed overflow")
}

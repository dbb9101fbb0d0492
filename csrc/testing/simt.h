// Host SIMT harness: runs device code on a CPU and proves it free of a class of bugs that a GPU hides.
//
// One fiber per CUDA thread; a CTA's fibers take turns, CTAs run one after another. Warp collectives (ldmatrix, mma.sync, shuffles) are a rendezvous of
// 32 lanes; __syncthreads opens a new epoch. What a launch reports as failures, beside wrong values:
//   races          two threads touch a word of shared memory in one epoch and at least one writes it
//   uninitialised  a read of shared memory that nothing has written since the CTA began, or of a cp.async destination before its wait (it lands there only)
//   out_of_range   shared memory beyond the launch's size, global memory outside the ranges named with allow()
//   misaligned     an address that is not a multiple of its access
//   deadlocks      a barrier or collective that some thread never reaches
// It says nothing about speed; its instruction counts feed the counter model (benchmarks/roofline.py).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

constexpr int kMaxThreads = 1024;
constexpr int kMaxShared = 232448;       // 227 KB, the most a CTA may have on sm_90 and sm_100
constexpr size_t kStack = 128 * 1024;

struct Report {  // all long: the test reads it as an array
  long races, uninitialised, out_of_range, misaligned, deadlocks;
  long mma, ldmatrix, lds128, sts32, cp_async, barriers, shuffles;  // warp instructions, except barriers (CTA)
};

struct Word {  // shadow of four bytes of shared memory
  unsigned write_epoch, read_epoch, alive;
  short writer, reader;  // reader -1: several threads
};
struct Copy { uint32_t to; const void* from; };
struct Range { const char* begin; const char* end; bool writable; };
struct Warp {
  int arrived;
  unsigned generation;
  uint32_t u[32][6], out[32][4];
  float f[32][4];
};

#if defined(__x86_64__)
extern "C" void rf_simt_swap(void** save, void* load);
#endif

struct State {
  int threads, current, cta, ctas, live, waiting, stride;
  int shared_bytes;
  unsigned epoch, serial;                // serial: number of CTAs run so far, names the CTA that wrote a word
  long spins;
  bool stuck;
  Report report;
  bool done[kMaxThreads];
  char* stack[kMaxThreads];
#if defined(__x86_64__)
  void *main_sp, *sp[kMaxThreads];
#else
  ucontext_t main_context, context[kMaxThreads];
#endif
  Warp warp[kMaxThreads / 32];
  std::vector<Copy> copies[kMaxThreads];
  std::vector<size_t> groups[kMaxThreads];
  std::vector<Range> ranges;
  alignas(128) unsigned char shared[kMaxShared];
  Word words[kMaxShared / 4];
  void (*kernel)(void*);
  void* argument;
};
inline State& state() { static State s; return s; }

#if defined(__x86_64__)
// Saves the callee-saved registers on the running fiber's stack and takes those of the next.
asm(".text\n.weak rf_simt_swap\nrf_simt_swap:\n push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
inline void swap_fibers(int from, int to) { State& s = state(); rf_simt_swap(&s.sp[from], s.sp[to]); }
inline void to_main(int from) { State& s = state(); rf_simt_swap(&s.sp[from], s.main_sp); }
#else
inline void swap_fibers(int from, int to) { State& s = state(); swapcontext(&s.context[from], &s.context[to]); }
inline void to_main(int from) { State& s = state(); swapcontext(&s.context[from], &s.main_context); }
#endif

// Hand over to the next live fiber. `stride` is coprime to the number of threads, so that tests can vary the order in which threads run.
inline void yield() {
  State& s = state();
  int from = s.current, to = from;
  do to = (to + s.stride) % s.threads; while (s.done[to] && to != from);
  if (to == from) return;
  s.current = to;
  swap_fibers(from, to);
}
inline void spin() {  // called by whoever waits; nothing can move any more once every live thread has waited many times in a row
  State& s = state();
  if (++s.spins > 64L * s.threads) { s.report.deadlocks++; s.stuck = true; to_main(s.current); }
  yield();
}
inline void fiber_entry() {
  State& s = state();
  s.kernel(s.argument);
  int self = s.current;
  s.done[self] = true;
  s.spins = 0;
  if (--s.live == 0) to_main(self);
  if (s.waiting && s.waiting == s.live) { s.waiting = 0; s.epoch++; s.report.barriers++; }  // the rest were waiting at a barrier
  yield();
  abort();
}
inline void launch(int ctas, int threads, int shared_bytes, int stride, void (*kernel)(void*), void* argument) {
  State& s = state();
  for (int cta = 0; cta < ctas; cta++) {
    s.threads = s.live = threads; s.cta = cta; s.ctas = ctas; s.waiting = 0; s.stride = stride; s.shared_bytes = shared_bytes; s.spins = 0; s.stuck = false;
    s.epoch++; s.serial++; s.kernel = kernel; s.argument = argument;
    memset(s.shared, 0xFF, sizeof s.shared);  // NaN in fp16, bf16 and fp32
    memset(s.warp, 0, sizeof s.warp);
    for (int t = 0; t < threads; t++) {
      s.done[t] = false; s.copies[t].clear(); s.groups[t].clear();
      if (!s.stack[t]) s.stack[t] = static_cast<char*>(aligned_alloc(64, kStack));
#if defined(__x86_64__)
      void** top = reinterpret_cast<void**>(s.stack[t] + kStack - 64);
      top[0] = reinterpret_cast<void*>(fiber_entry);
      s.sp[t] = top - 6;
#else
      getcontext(&s.context[t]);
      s.context[t].uc_stack.ss_sp = s.stack[t]; s.context[t].uc_stack.ss_size = kStack; s.context[t].uc_link = nullptr;
      makecontext(&s.context[t], fiber_entry, 0);
#endif
    }
    s.current = 0;
#if defined(__x86_64__)
    rf_simt_swap(&s.main_sp, s.sp[0]);
#else
    swapcontext(&s.main_context, &s.context[0]);
#endif
    if (s.stuck) return;
  }
}

// --- shared memory -----------------------------------------------------------------------------------------------------------------------------------
inline void complain(long& counter, const char* what, uint32_t address) {
  if (counter++ < 4 && getenv("RF_SIMT_VERBOSE"))
    fprintf(stderr, "simt: %s at shared+%u, thread %d, epoch %u\n", what, address, state().current, state().epoch);
}
inline bool in_shared(uint32_t address, int bytes, int align) {
  State& s = state();
  if (address % align) { complain(s.report.misaligned, "misaligned", address); return false; }
  if (address + bytes > static_cast<uint32_t>(s.shared_bytes)) { complain(s.report.out_of_range, "out of range", address); return false; }
  return true;
}
inline bool check_write(uint32_t address, int bytes, int align, bool lands = true) {
  if (!in_shared(address, bytes, align)) return false;
  State& s = state();
  for (uint32_t i = address / 4; i < (address + bytes) / 4; i++) {
    Word& w = s.words[i];
    if (w.write_epoch == s.epoch && w.writer != s.current) complain(s.report.races, "write-write race", i * 4);
    if (w.read_epoch == s.epoch && w.reader != s.current) complain(s.report.races, "read-write race", i * 4);
    w.write_epoch = s.epoch;
    w.writer = static_cast<short>(s.current);
    w.alive = lands ? s.serial : 0;
  }
  return true;
}
inline bool check_read(uint32_t address, int bytes, int align) {
  if (!in_shared(address, bytes, align)) return false;
  State& s = state();
  for (uint32_t i = address / 4; i < (address + bytes) / 4; i++) {
    Word& w = s.words[i];
    if (w.alive != s.serial) complain(s.report.uninitialised, "read of uninitialised memory", i * 4);
    if (w.write_epoch == s.epoch && w.writer != s.current) complain(s.report.races, "write-read race", i * 4);
    if (w.read_epoch == s.epoch && w.reader != s.current) w.reader = -1;
    else { w.read_epoch = s.epoch; w.reader = static_cast<short>(s.current); }
  }
  return true;
}

// --- global memory -----------------------------------------------------------------------------------------------------------------------------------
inline void allow(const void* p, size_t bytes, bool writable) {
  const char* b = static_cast<const char*>(p);
  if (bytes) state().ranges.push_back({b, b + bytes, writable});
}
inline bool check_global(const void* p, size_t bytes, size_t align, bool write) {
  State& s = state();
  const char* b = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % align) { s.report.misaligned++; return false; }
  for (const Range& r : s.ranges)
    if (b >= r.begin && b + bytes <= r.end && (r.writable || !write)) return true;
  s.report.out_of_range++;
  return false;
}

// --- collectives -------------------------------------------------------------------------------------------------------------------------------------
inline void barrier() {
  State& s = state();
  unsigned epoch = s.epoch;
  if (++s.waiting == s.live) { s.waiting = 0; s.epoch++; s.report.barriers++; s.spins = 0; }
  else while (s.epoch == epoch) spin();
}
template <class F> inline void collective(F compute) {  // the lane that arrives last computes for all 32
  State& s = state();
  Warp& w = s.warp[s.current >> 5];
  unsigned generation = w.generation;
  if (++w.arrived == 32) { compute(w); w.arrived = 0; w.generation++; s.spins = 0; }
  else while (w.generation == generation) spin();
}
inline int lane() { return state().current & 31; }
inline Warp& warp() { return state().warp[state().current >> 5]; }
inline bool first_lane() { return lane() == 0; }

inline float round_trip_f16(uint16_t h) { _Float16 x; memcpy(&x, &h, 2); return static_cast<float>(x); }
inline uint16_t to_f16(float f) { if (f != f) return 0x7fff; _Float16 x = static_cast<_Float16>(f); uint16_t h; memcpy(&h, &x, 2); return h; }
inline float round_trip_bf16(uint16_t h) { uint32_t u = static_cast<uint32_t>(h) << 16; float f; memcpy(&f, &u, 4); return f; }
inline uint16_t to_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
}  // namespace simt

// Runs the CUDA kernels on the host, for tests on machines without a GPU. The threads of a block are fibers that take turns; one
// that waits at a barrier hands over to the next. This checks addresses, arithmetic and missing waits, but not speed, launch limits
// or races between two barriers. A block in which no thread can go on aborts. The tensor-core instructions follow the tables of the
// PTX manual, and asynchronous copies happen as late as the program allows. Read next: common.cuh, machine.cuh.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace quant_ops::emulation {

constexpr size_t kSlotBytes = 64;  // the most that a thread tells its warp at once

struct Barrier {
  size_t arrived = 0;
  uint64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Thread {
  ucontext_t start;
  jmp_buf fiber;
  bool started = false;
  std::vector<char> stack = std::vector<char>(size_t{1} << 17);
  bool done = false;
  const Barrier* barrier = nullptr;  // waited for, until its generation changes
  uint64_t generation = 0;
  std::vector<Copy> copies;  // issued, not yet committed
  std::deque<std::vector<Copy>> groups;
  uint64_t exchanges = 0;
  alignas(16) char slot[2][kSlotBytes];
};

struct Block {
  std::deque<Thread> threads;
  size_t count = 0, alive = 0, current = 0;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<uint64_t> shared;
  jmp_buf scheduler;
  const void* call = nullptr;
  void (*enter)(const void*) = nullptr;
};
inline Block block;

inline Thread& self() { return block.threads[block.current]; }

// Fibers start by a context and then change over by _longjmp, which, unlike swapcontext, makes no system call: a kernel changes
// over millions of times. They outlive their block and take part in the next one.
inline void pass_on() {
  if (_setjmp(self().fiber) == 0) _longjmp(block.scheduler, 1);
}
inline void resume(Thread& thread) {
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.fiber, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline void release(Barrier* b) {
  b->arrived = 0;
  ++b->generation;
}

inline void wait_at(Barrier* b, size_t members) {
  if (++b->arrived == members) return release(b);
  self().barrier = b;
  self().generation = b->generation;
  pass_on();
}

inline void fiber_main() {
  for (;; pass_on()) {
    block.enter(block.call);
    self().done = true;
    --block.alive;
    if (block.barrier.arrived > 0 && block.barrier.arrived == block.alive) release(&block.barrier);
  }
}

inline void add_thread() {
  Thread& thread = block.threads.emplace_back();
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.data();
  thread.start.uc_stack.ss_size = thread.stack.size();
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, fiber_main, 0);
}

inline int64_t launches = 0;  // so far

// Without barriers the threads simply run one after the other.
template <class Call>
void run(const Call& call, int64_t blocks, dim3 threads, bool barriers, size_t shared_bytes) {
  ++launches;
  const size_t count = size_t{threads.x} * threads.y;
  const auto be_thread = [&](size_t t) {
    threadIdx = dim3(static_cast<unsigned>(t % threads.x), static_cast<unsigned>(t / threads.x));
  };
  blockDim = threads;
  gridDim = dim3(static_cast<unsigned>(blocks));
  block.shared.resize(shared_bytes / 8 + 2);
  if (!barriers) {
    for (int64_t b = 0; b < blocks; ++b) {
      blockIdx = dim3(static_cast<unsigned>(b));
      for (size_t t = 0; t < count; ++t) {
        be_thread(t);
        call();
      }
    }
    return;
  }
  while (block.threads.size() < count) add_thread();
  block.count = count;
  block.call = &call;
  block.enter = [](const void* c) { (*static_cast<const Call*>(c))(); };
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx = dim3(static_cast<unsigned>(b));
    std::fill(block.shared.begin(), block.shared.end(), 0x5a5a5a5a5a5a5a5aULL);
    block.barrier = {};
    block.warps.assign((count + 31) / 32, {});
    block.alive = count;
    for (size_t t = 0; t < count; ++t) {
      Thread& thread = block.threads[t];
      thread.done = false;
      thread.barrier = nullptr;
      thread.exchanges = 0;
      thread.copies.clear();
      thread.groups.clear();
    }
    while (block.alive > 0) {
      bool progress = false;
      for (size_t t = 0; t < count; ++t) {
        Thread& thread = block.threads[t];
        if (thread.done || (thread.barrier && thread.barrier->generation == thread.generation)) continue;
        thread.barrier = nullptr;
        progress = true;
        block.current = t;
        be_thread(t);
        resume(thread);
      }
      if (!progress) {
        std::fprintf(stderr, "emulated kernel: its threads wait at different barriers\n");
        std::abort();
      }
    }
  }
}

// Tells the warp a message, and gives those of all lanes once all have told theirs. Two slots take turns, so that one barrier is
// enough.
template <class Message>
const Message* tell_warp(const Message& message) {
  static_assert(sizeof(Message) <= kSlotBytes);
  Thread& me = self();
  const size_t turn = me.exchanges++ % 2, warp = block.current / 32;
  std::memcpy(me.slot[turn], &message, sizeof(Message));
  wait_at(&block.warps[warp], std::min<size_t>(32, block.count - warp * 32));
  thread_local Message heard[32];
  for (size_t lane = 0; lane < 32 && warp * 32 + lane < block.count; ++lane)
    std::memcpy(&heard[lane], block.threads[warp * 32 + lane].slot[turn], sizeof(Message));
  return heard;
}

inline void expect_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  std::fprintf(stderr, "emulated kernel: an access of %zu bytes is not aligned\n", bytes);
  std::abort();
}

// ---- asynchronous copies, as late as allowed ------------------------------------------------------------------------

inline void copy_async(void* to, const void* from, size_t bytes, bool valid) {
  expect_aligned(to, bytes);
  if (valid) expect_aligned(from, bytes);
  self().copies.push_back({to, from, bytes, valid ? bytes : 0});
}
inline void copy_commit() {
  self().groups.push_back(std::move(self().copies));
  self().copies.clear();
}
inline void copy_wait(size_t pending) {
  auto& groups = self().groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const Copy& c : groups.front()) {
      if (c.valid) std::memcpy(c.to, c.from, c.valid);
      std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
    }
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// ldmatrix.x4: lane 8 i + r says where row r of matrix i is; lane l gets 32-bit word l % 4 of row l / 4 of each.
inline void load_matrices(const void* row, uint32_t (&words)[4]) {
  expect_aligned(row, 16);
  const void* const* rows = tell_warp(row);
  const size_t lane = block.current % 32;
  for (size_t i = 0; i < 4; ++i) std::memcpy(&words[i], static_cast<const char*>(rows[i * 8 + lane / 4]) + lane % 4 * 4, 4);
}

struct Fragments {
  uint32_t a[4], b[2];
};

// mma.m16n8k32 of s8: element (i, k) of A is byte k % 4 of register (i / 8) + 2 (k / 16) of lane 4 (i % 8) + k % 16 / 4; element
// (k, j) of B byte k % 4 of register k / 16 of lane 4 j + k % 16 / 4; (i, j) of C register j % 2 + 2 (i / 8) of lane 4 (i % 8) + j
// / 2.
inline void multiply(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const Fragments* of = tell_warp(mine);
  const int lane = static_cast<int>(block.current % 32);
  const auto byte = [](uint32_t word, int i) { return static_cast<int32_t>(static_cast<int8_t>(word >> (8 * i))); };
  for (int r = 0; r < 4; ++r) {
    const int i = lane / 4 + r / 2 * 8, j = lane % 4 * 2 + r % 2;
    for (int k = 0; k < 32; ++k)
      c[r] += byte(of[i % 8 * 4 + k % 16 / 4].a[i / 8 + k / 16 * 2], k % 4) * byte(of[j * 4 + k % 16 / 4].b[k / 16], k % 4);
  }
}

// mma.m16n8k16 of 16-bit floats: the same with pairs in place of bytes, two to a register. The sum is cut to float32, which is the
// worst that tensor cores do to it.
template <class Widen>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Widen& widen) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const Fragments* of = tell_warp(mine);
  const int lane = static_cast<int>(block.current % 32);
  const auto element = [&](uint32_t word, int i) { return double{widen(static_cast<uint16_t>(word >> (16 * i)))}; };
  for (int r = 0; r < 4; ++r) {
    const int i = lane / 4 + r / 2 * 8, j = lane % 4 * 2 + r % 2;
    double sum = c[r];
    for (int k = 0; k < 16; ++k)
      sum += element(of[i % 8 * 4 + k % 8 / 2].a[i / 8 + k / 8 * 2], k % 2) * element(of[j * 4 + k % 8 / 2].b[k / 8], k % 2);
    const float rounded = static_cast<float>(sum);
    c[r] = std::isfinite(sum) && std::fabs(double{rounded}) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
  }
}

}  // namespace quant_ops::emulation

inline void __syncthreads() {
  quant_ops::emulation::wait_at(&quant_ops::emulation::block.barrier, quant_ops::emulation::block.alive);
}
inline void __syncwarp(unsigned = 0xffffffffu) { quant_ops::emulation::tell_warp(char{}); }

inline int32_t atomicAdd(int32_t* at, int32_t value) {
  const int32_t before = *at;
  *at = static_cast<int32_t>(static_cast<uint32_t>(before) + static_cast<uint32_t>(value));
  return before;
}

// Lanes outside the block do not exist: blocks are whole warps.
template <class T>
T emulated_exchange(T value, size_t source) {
  return quant_ops::emulation::tell_warp(value)[source % 32];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated_exchange(value, quant_ops::emulation::block.current ^ static_cast<size_t>(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated_exchange(value, static_cast<size_t>(lane));
}
inline bool __any_sync(unsigned, bool condition) {
  const bool* const all = quant_ops::emulation::tell_warp(condition);
  return std::any_of(all, all + 32, [](bool holds) { return holds; });
}

// Runs the kernels of this folder on the host, for tests on machines without a GPU: a block's threads are fibers, taken in turn;
// a barrier or a shuffle hands over to the next one. Checks addresses and arithmetic, not speed, races or launch limits.
// Assumes that all threads of a block (of a warp, for shuffles) reach the same barriers. Read next: common.cuh.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
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

struct Block {
  std::vector<ucontext_t> fiber;
  std::vector<std::vector<char>> stack;
  std::vector<bool> done;
  std::vector<double> exchange;
  ucontext_t scheduler;
  size_t current = 0;
  const void* call = nullptr;
  void (*enter)(const void*) = nullptr;
};
inline Block block;

inline void pass_on() { swapcontext(&block.fiber[block.current], &block.scheduler); }

inline void fiber_main() {
  block.enter(block.call);
  block.done[block.current] = true;
  pass_on();
}

// Without barriers the threads simply run one after the other.
template <class Call>
void run(const Call& call, int64_t blocks, dim3 threads, bool barriers) {
  const size_t count = size_t{threads.x} * threads.y;
  const auto be_thread = [&](size_t t) {
    threadIdx = dim3(static_cast<unsigned>(t % threads.x), static_cast<unsigned>(t / threads.x));
  };
  blockDim = threads;
  gridDim = dim3(static_cast<unsigned>(blocks));
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
  block.fiber.resize(count);
  block.stack.resize(std::max(block.stack.size(), count), std::vector<char>(size_t{1} << 16));
  block.exchange.assign(count, 0.0);
  block.call = &call;
  block.enter = [](const void* c) { (*static_cast<const Call*>(c))(); };
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx = dim3(static_cast<unsigned>(b));
    block.done.assign(count, false);
    for (size_t t = 0; t < count; ++t) {
      getcontext(&block.fiber[t]);
      block.fiber[t].uc_stack.ss_sp = block.stack[t].data();
      block.fiber[t].uc_stack.ss_size = block.stack[t].size();
      block.fiber[t].uc_link = nullptr;
      makecontext(&block.fiber[t], fiber_main, 0);
    }
    for (size_t left = count; left > 0;)
      for (size_t t = 0; t < count; ++t) {
        if (block.done[t]) continue;
        block.current = t;
        be_thread(t);
        swapcontext(&block.scheduler, &block.fiber[t]);
        if (block.done[t]) --left;
      }
  }
}

}  // namespace quant_ops::emulation

inline void __syncthreads() { quant_ops::emulation::pass_on(); }

// Lanes outside the block do not exist: blocks are whole warps.
template <class T>
T emulated_exchange(T value, size_t source) {
  auto& block = quant_ops::emulation::block;
  block.exchange[block.current] = static_cast<double>(value);
  quant_ops::emulation::pass_on();
  const T result = static_cast<T>(block.exchange[source]);
  quant_ops::emulation::pass_on();
  return result;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated_exchange(value, quant_ops::emulation::block.current ^ static_cast<size_t>(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated_exchange(value, quant_ops::emulation::block.current / 32 * 32 + static_cast<size_t>(lane));
}

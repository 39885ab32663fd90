// Strided elements as contiguous ones, for the vector kernels: gathered on the stack, at most kStage at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "contract/dtypes.h"
#include "contract/iteration.h"

namespace quant_ops {

constexpr int64_t kStage = kReduceChunk;

// Slices that are neighbours in memory are computed together, down the rows of a matrix, unless they are fewer: then they are
// gathered one by one, since vectors across them would be mostly empty.
constexpr int64_t kFewestColumns = 8;

// The steps of scales and zero points that kernels take.
inline bool is_step(int64_t stride) { return stride == 0 || stride == 1; }

inline const void* element(const void* p, DType dtype, int64_t offset) {
  return static_cast<const char*>(p) + offset * dtype_bytes(dtype);
}
inline void* element(void* p, DType dtype, int64_t offset) { return static_cast<char*>(p) + offset * dtype_bytes(dtype); }

// memcpy, without the call where a few vectors are copied.
inline void copy_bytes(void* to, const void* from, int64_t bytes) {
  constexpr int64_t kVector = 16;
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  if (bytes < kVector || bytes > 16 * kVector) {
    std::memcpy(t, f, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t i = 0; i < bytes - kVector; i += kVector) std::memcpy(t + i, f + i, kVector);
  std::memcpy(t + bytes - kVector, f + bytes - kVector, kVector);
}

template <class T>
void gather(const T* from, int64_t step, int64_t n, T* to) {
  if (step == 1) return copy_bytes(to, from, n * static_cast<int64_t>(sizeof(T)));
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * step];
}

template <class T>
void scatter(const T* from, int64_t step, int64_t n, T* to) {
  if (step == 1) return copy_bytes(to, from, n * static_cast<int64_t>(sizeof(T)));
  for (int64_t i = 0; i < n; ++i) to[i * step] = from[i];
}

// Each function takes n <= kStage elements from `from` on that step by `step`. What it returns is valid until the next call.
template <class T>
class Stage {
 public:
  const T* contiguous(const T* from, int64_t step, int64_t n) { return step == 1 ? from : gathered(from, step, n); }

  // Of scales and zero points: one for all of a run stays one.
  const T* stepping(const T* from, int64_t step, int64_t n) { return is_step(step) ? from : gathered(from, step, n); }

  // Puts them behind the `at` elements that are there.
  void append(const T* from, int64_t step, int64_t n, int64_t at) { gather(from, step, n, elements_ + at); }

  T* data() { return elements_; }

 private:
  const T* gathered(const T* from, int64_t step, int64_t n) {
    gather(from, step, n, elements_);
    return elements_;
  }

  T elements_[kStage];
};

}  // namespace quant_ops

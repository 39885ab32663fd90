// One allocation per operator call, cut into 64-byte aligned pieces. Made before the parallel region, never inside it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace quant_ops {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // First add() every piece, then allocate(), then at<T>(handle).
  int64_t add(int64_t bytes) {
    const int64_t offset = size_;
    size_ += (bytes + 63) / 64 * 64;
    return offset;
  }
  void allocate() {
    memory_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size_ > 0 ? size_ : 64)));
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(memory_ + offset);
  }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace quant_ops

// Where an operator's work goes. A plan lays the workspace out, the caller allocates its bytes once, and the run finds every part
// again by its slot. Plain host code.
#pragma once

#include <cstdint>

namespace quant_ops {

struct Launch {
  const char* op;  // for error messages
  void* memory;    // the workspace, aligned to 64 bytes; null if the plan needs none
  void* stream;    // a cudaStream_t of the current device
};

// A part of a workspace. Without an offset it does not exist, and its address is null.
template <class T>
struct Slot {
  int64_t offset = -1;

  explicit operator bool() const { return offset >= 0; }
  T* in(void* memory) const { return offset < 0 ? nullptr : reinterpret_cast<T*>(static_cast<char*>(memory) + offset); }
};

// Hands out slots one after the other. Each starts at a multiple of 256 bytes.
class WorkspaceLayout {
 public:
  template <class T>
  Slot<T> add(int64_t count) {
    const Slot<T> slot{bytes_};
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return slot;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;
  int64_t bytes_ = 0;
};

}  // namespace quant_ops

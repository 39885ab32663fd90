// One piece of memory per operator call, cut into 64-byte aligned parts. A plan adds up the parts (ScratchLayout); the call makes
// the memory (Scratch) before its parallel regions, never inside one.
//
// A thread keeps its memory for the next call, up to kKept bytes, because fresh pages cost more than a small layer: the system
// clears them, four kilobytes at a time. Larger memory is given back at once. The values of a chain are kept apart from the scratch
// of the operators that compute them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <utility>

#include "contract/memory.h"

namespace quant_ops {

struct ScratchLayout {
  int64_t bytes = 0;

  // The offset of a new part.
  int64_t add(int64_t part) {
    const int64_t offset = bytes;
    bytes += (part + 63) / 64 * 64;
    return offset;
  }
};

class Scratch {
 public:
  static constexpr int64_t kKept = int64_t{16} << 20;
  enum class Keeper { kOperator, kChain };

  explicit Scratch(int64_t bytes, Keeper keeper = Keeper::kOperator) : keeper_(keeper) {
    std::swap(memory_, kept());  // a second Scratch of this thread and keeper finds none meanwhile, and allocates
    if (memory_.size >= bytes && memory_.data != nullptr) return;
    memory_ = Memory(bytes > 0 ? bytes : 64);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (memory_.size <= kKept && memory_.size >= kept().size) std::swap(memory_, kept());
  }

  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(memory_.data + offset);
  }

 private:
  struct Memory {
    char* data = nullptr;
    int64_t size = 0;

    Memory() = default;
    explicit Memory(int64_t bytes) : data(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes)))), size(bytes) {
      if (data == nullptr) throw OutOfMemory(bytes);
    }
    Memory(Memory&& other) noexcept : data(std::exchange(other.data, nullptr)), size(std::exchange(other.size, 0)) {}
    Memory& operator=(Memory&& other) noexcept {
      std::swap(data, other.data);
      std::swap(size, other.size);
      return *this;
    }
    ~Memory() { std::free(data); }
  };

  Memory& kept() const {
    thread_local Memory memory[2];
    return memory[static_cast<size_t>(keeper_)];
  }

  const Keeper keeper_;
  Memory memory_;
};

}  // namespace quant_ops

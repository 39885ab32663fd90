// Choices between kernels and tiles, remembered: a model takes some microseconds, and a layer asks for the same sizes again and
// again. Plain host code.
#pragma once

#include <array>
#include <cstdint>

namespace quant_ops {

// make(), or what it gave for the same key before. The key is all that the result depends on, and is not all zeros. Every caller
// has a table of its own, since every lambda has a type of its own; so has every thread.
template <size_t kCount, class Make>
auto remembered(const std::array<int64_t, kCount>& key, const Make& make) {
  struct Entry {
    std::array<int64_t, kCount> key{};
    decltype(make()) value{};
  };
  thread_local Entry entries[256];
  uint64_t hash = 0;
  for (const int64_t part : key) hash = (hash ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15ULL;
  Entry& entry = entries[hash >> 56];
  if (entry.key != key) entry = {key, make()};
  return entry.value;
}

}  // namespace quant_ops

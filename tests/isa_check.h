// What isa_check.cpp draws its cases with and keeps their results in.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "contract/dtypes.h"
#include "cpu/parallel.h"
#include "kernels/table.h"

namespace quant_ops {

// ---- inputs ---------------------------------------------------------------------------------------------------------

// splitmix64: integers only, so that every machine draws the same cases.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1)); }
  bool one_in(int64_t n) { return between(1, n) == 1; }

  // Mostly of magnitude 2^-span .. 2^span; one in `odd` is zero, subnormal, huge, infinite or NaN.
  float real(int span, int64_t odd) {
    static const uint32_t kOdd[] = {0x00000000u, 0x00000001u, 0x007fffffu, 0x00800000u, 0x00003a5bu, 0x7f7fffffu,
                                    0x7f800000u, 0x7fffffffu, 0x7fd23456u, 0x7f812345u, 0x33800000u, 0x387fc000u};
    const uint32_t sign = static_cast<uint32_t>(bits() >> 63) << 31;
    if (odd > 0 && one_in(odd)) return bits_float(sign | kOdd[between(0, 11)]);
    const uint32_t exponent = static_cast<uint32_t>(between(127 - span, 127 + span));
    return bits_float(sign | exponent << 23 | static_cast<uint32_t>(bits() & 0x7fffffu));
  }

 private:
  uint64_t state_;
};

// An array that ends where a page ends; the next page cannot be touched.
template <class T>
class Edge {
 public:
  explicit Edge(int64_t n) : n_(n) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    bytes_ = round_up(std::max<int64_t>(bytes(), 1), page) + page;
    void* p = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(static_cast<char*>(p) + bytes_ - page, static_cast<size_t>(page), PROT_NONE) != 0) {
      std::perror("isa_check: mmap");
      std::exit(2);
    }
    map_ = static_cast<char*>(p);
    data_ = reinterpret_cast<T*>(map_ + bytes_ - page - bytes());
  }
  Edge(const Edge&) = delete;
  Edge& operator=(const Edge&) = delete;
  ~Edge() { munmap(map_, static_cast<size_t>(bytes_)); }

  template <class Draw>
  Edge(int64_t n, const Draw& draw) : Edge(n) {
    for (int64_t i = 0; i < n; ++i) data_[i] = draw(i);
  }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t bytes() const { return n_ * static_cast<int64_t>(sizeof(T)); }

 private:
  int64_t n_, bytes_;
  char* map_;
  T* data_;
};

using Bytes = Edge<uint8_t>;

// n elements of a dtype, integers of any bits.
inline void fill(const Bytes& to, DType dtype, Random* random, int span, int64_t odd) {
  const int64_t n = to.bytes() / dtype_bytes(dtype);
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16) {
      const float v = random->real(span, odd);
      with_float_type(dtype, [&](auto* type) {
        std::remove_pointer_t<decltype(type)> x;
        from_compute(static_cast<Compute<decltype(x)>>(v), &x);
        if constexpr (sizeof(x) == 2)  // from_compute makes quiet NaNs only
          if (v != v) x.bits &= dtype == DType::kFloat16 ? 0xfdffu : 0xffbfu;
        std::memcpy(to.data() + i * dtype_bytes(dtype), &x, sizeof(x));
      });
    } else {
      to[i] = static_cast<uint8_t>(random->bits());
    }
  }
}

// ---- results --------------------------------------------------------------------------------------------------------

template <class T>
void make_nans_alike(uint8_t* p, int64_t bytes, T infinity, T nan) {
  for (int64_t i = 0; i + static_cast<int64_t>(sizeof(T)) <= bytes; i += sizeof(T)) {
    T v;
    std::memcpy(&v, p + i, sizeof(T));
    if (static_cast<T>(v & static_cast<T>(~(T(1) << (8 * sizeof(T) - 1)))) > infinity) std::memcpy(p + i, &nan, sizeof(T));
  }
}

// The results of one table, in order. Arithmetic makes NaNs of different sign and payload on different machines, so all NaNs are
// made alike; where NaN is only passed on (`exact`), its bits are compared too.
struct Log {
  struct Entry {
    std::string name;
    size_t begin;
  };
  std::vector<Entry> entries;
  std::vector<uint8_t> bytes;

  void add(const std::string& name, const void* data, int64_t n, DType dtype, bool exact = false) {
    entries.push_back({name, bytes.size()});
    const uint8_t* from = static_cast<const uint8_t*>(data);
    bytes.insert(bytes.end(), from, from + n);
    uint8_t* p = bytes.data() + entries.back().begin;
    if (exact) return;
    if (dtype == DType::kFloat32) make_nans_alike<uint32_t>(p, n, 0x7f800000u, 0x7fc00000u);
    if (dtype == DType::kFloat16) make_nans_alike<uint16_t>(p, n, 0x7c00u, 0x7e00u);
    if (dtype == DType::kBFloat16) make_nans_alike<uint16_t>(p, n, 0x7f80u, 0x7fc0u);
  }

  uint64_t hash() const {  // FNV-1a
    uint64_t h = 0xcbf29ce484222325u;
    for (const uint8_t b : bytes) h = (h ^ b) * 0x100000001b3u;
    return h;
  }

  bool same(const Log& other, const char* isa) const {
    for (size_t i = 0; i < entries.size() && i < other.entries.size(); ++i) {
      const size_t begin = entries[i].begin, end = i + 1 < entries.size() ? entries[i + 1].begin : bytes.size();
      for (size_t j = begin; j < end; ++j)
        if (j >= other.bytes.size() || bytes[j] != other.bytes[j]) {
          std::fprintf(stderr, "isa_check: %s differs from scalar in %s, byte %zu of %zu\n", isa, entries[i].name.c_str(),
                       j - begin, end - begin);
          return false;
        }
    }
    if (bytes.size() == other.bytes.size()) return true;
    std::fprintf(stderr, "isa_check: %s has %zu bytes of results, expected %zu\n", isa, bytes.size(), other.bytes.size());
    return false;
  }
};

inline std::string named(const char* what, std::initializer_list<int64_t> values) {
  std::string name = what;
  for (const int64_t v : values) name += ' ' + std::to_string(v);
  return name;
}

constexpr DType kOutputs[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8, DType::kUInt8, DType::kInt32};
constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

inline float out_scale_of(Random* random) { return std::fabs(random->real(8, 20)); }
inline int32_t out_zero_of(DType dtype, Random* random) {
  return static_cast<int32_t>(dtype == DType::kUInt8 ? random->between(0, 255) : random->between(-128, 127));
}

}  // namespace quant_ops

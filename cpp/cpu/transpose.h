// Transposition of matrices of 1, 2 or 4 byte elements: NCHW images to NHWC codes and results back. Blocks are 16 bytes wide, since
// every machine has vectors of at least sixteen bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace quant_ops {

template <class T>
struct Transposition {
  static constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
  typedef T V __attribute__((vector_size(16)));

  // The elements of a and b in turn, from the first (`low`) or the second halves of both.
  template <size_t... I>
  static V interleave(V a, V b, bool low, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return low ? __builtin_shufflevector(a, b, (I / 2 + I % 2 * kLanes)...)
               : __builtin_shufflevector(a, b, (I / 2 + kLanes / 2 + I % 2 * kLanes)...);
#else
    const V first = {static_cast<T>(I / 2 + I % 2 * kLanes)...}, second = {static_cast<T>(I / 2 + kLanes / 2 + I % 2 * kLanes)...};
    return __builtin_shuffle(a, b, low ? first : second);
#endif
  }

  // kLanes x kLanes elements. Each step interleaves rows i and i + kLanes / 2, and so doubles how many neighbours come from one
  // column.
  static void block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    V v[2][kLanes];
    for (int i = 0; i < kLanes; ++i) std::memcpy(&v[0][i], from + i * from_stride, sizeof(V));
    int now = 0;
    for (int runs = 1; runs < kLanes; runs *= 2, now ^= 1)
      for (int i = 0; i < kLanes / 2; ++i) {
        const V a = v[now][i], b = v[now][i + kLanes / 2];
        v[now ^ 1][2 * i] = interleave(a, b, true, std::make_index_sequence<kLanes>());
        v[now ^ 1][2 * i + 1] = interleave(a, b, false, std::make_index_sequence<kLanes>());
      }
    for (int i = 0; i < kLanes; ++i) std::memcpy(to + i * to_stride, &v[now][i], sizeof(V));
  }
};

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns
template <class T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int64_t kLanes = Transposition<T>::kLanes;
  const auto plain = [&](int64_t r, int64_t r_end, int64_t c, int64_t c_end) {
    for (int64_t i = r; i < r_end; ++i)
      for (int64_t j = c; j < c_end; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  };
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  for (int64_t c = 0; c < whole_columns; c += kLanes)
    for (int64_t r = 0; r < whole_rows; r += kLanes)
      Transposition<T>::block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  plain(whole_rows, rows, 0, columns);
  plain(0, whole_rows, whole_columns, columns);
}

}  // namespace quant_ops

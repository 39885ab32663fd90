// The largest code of windows, and the sums of codes. A window is `rows` rows of `taps` pixels, and a pixel is n neighbouring
// codes.
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

// kVectors vectors of 4 N codes of one window, from x on.
template <class T, int kVectors>
QO_INLINE void max_of_window(const MaxRun& p, const T* x, T* y) {
  constexpr int64_t kCodes = 4 * Simd::N;
  typename Simd::I most[kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA { most[v.value] = Simd::load_codes(x + v.value * kCodes); });
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* from = x + r * p.row;
    for (int64_t t = 0; t < p.taps; ++t, from += p.tap)
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        most[v.value] = Simd::max_bytes(most[v.value], Simd::load_codes(from + v.value * kCodes), T{});
      });
  }
  unroll<kVectors>([&](auto v) QO_LAMBDA { Simd::store_codes(y + v.value * kCodes, most[v.value]); });
}

template <class T>
QO_INLINE void max_typed(const MaxRun& p) {
  constexpr int64_t kCodes = 4 * Simd::N;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  for (int64_t pixel = 0; pixel < p.pixels; ++pixel, x += p.x_pixel, y += p.y_pixel) {
    int64_t i = 0;
    for (; i + 4 * kCodes <= p.n; i += 4 * kCodes) max_of_window<T, 4>(p, x + i, y + i);
    for (; i + kCodes <= p.n; i += kCodes) max_of_window<T, 1>(p, x + i, y + i);
    if (i == p.n) continue;
    if (p.n >= kCodes) {  // codes that are computed twice are the same
      max_of_window<T, 1>(p, x + p.n - kCodes, y + p.n - kCodes);
      continue;
    }
    for (; i < p.n; ++i) {
      T most = x[i];
      for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t t = 0; t < p.taps; ++t) {
          const T code = x[r * p.row + t * p.tap + i];
          most = code > most ? code : most;
        }
      y[i] = most;
    }
  }
}

void max_pool(const MaxRun& p) { p.dtype == DType::kInt8 ? max_typed<int8_t>(p) : max_typed<uint8_t>(p); }

template <class T>
QO_INLINE void sum_typed(const SumRun& p) {
  constexpr int64_t N = Simd::N;
  const T* const x = static_cast<const T*>(p.x);
  const auto vectors = [&](auto count, int64_t i) QO_LAMBDA {
    typename Simd::I sum[count.value];
    unroll<count.value>([&](auto v) QO_LAMBDA { sum[v.value] = Simd::set_int(0); });
    for (int64_t r = 0; r < p.rows; ++r) {
      const T* from = x + r * p.row + i;
      for (int64_t t = 0; t < p.taps; ++t, from += p.tap)
        unroll<count.value>([&](auto v) QO_LAMBDA { sum[v.value] = Simd::add(sum[v.value], Simd::load_int(from + v.value * N)); });
    }
    unroll<count.value>([&](auto v) QO_LAMBDA { Simd::store(p.sums + i + v.value * N, sum[v.value]); });
  };
  int64_t i = 0;
  for (; i + 4 * N <= p.n; i += 4 * N) vectors(Int<4>{}, i);
  for (; i + N <= p.n; i += N) vectors(Int<1>{}, i);
  if (i == p.n) return;
  if (p.n >= N) return vectors(Int<1>{}, p.n - N);
  for (; i < p.n; ++i) {
    int32_t sum = 0;
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t t = 0; t < p.taps; ++t) sum += x[r * p.row + t * p.tap + i];
    p.sums[i] = sum;
  }
}

void sum_pool(const SumRun& p) { p.dtype == DType::kInt8 ? sum_typed<int8_t>(p) : sum_typed<uint8_t>(p); }

}  // namespace
}  // namespace quant_ops::QO_ISA

// Columns of a matrix added up, and rows less one value a column: what int8_attention does to q, k and v before it quantizes them.
#pragma once

#include "kernels/generic/partial.h"

namespace quant_ops::QO_ISA {
namespace {

// kVectors vectors of columns, which stay in registers; the last ends with column n.
template <int kVectors, class X>
QO_INLINE void sum_columns(const ColumnSumRun& r, int64_t first, int64_t n) {
  typename Simd::F sum[kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA { sum[v.value] = Simd::set(0.0f); });
  const X* x = static_cast<const X*>(r.x) + first;
  for (int64_t row = 0; row < r.rows; ++row, x += r.x_row)
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      constexpr int64_t at = v.value * Simd::N;
      sum[v.value] = Simd::add(sum[v.value], load_part(x + at, n - first - at));
    });
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    constexpr int64_t at = v.value * Simd::N;
    store_part(r.sums + first + at, sum[v.value], n - first - at);
  });
}

template <class X>
void column_sums_typed(const ColumnSumRun& r) {
  constexpr int64_t N = Simd::N;
  int64_t c = 0;
  for (; c + 4 * N <= r.columns; c += 4 * N) sum_columns<4, X>(r, c, c + 4 * N);
  for (; c + 2 * N <= r.columns; c += 2 * N) sum_columns<2, X>(r, c, c + 2 * N);
  for (; c < r.columns; c += N) sum_columns<1, X>(r, c, r.columns);
}

void column_sums(const ColumnSumRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return column_sums_typed<float>(r);
    case DType::kFloat16: return column_sums_typed<Half>(r);
    default: return column_sums_typed<BFloat16>(r);
  }
}

// Several rows at a time, whose magnitudes take long to get out of their lanes.
template <int kRows, class X>
QO_INLINE void center_rows(const CenterRun& r, int64_t row) {
  const X* x = static_cast<const X*>(r.x) + row * r.x_row;
  typename Simd::I magnitude[kRows];
  unroll<kRows>([&](auto i) QO_LAMBDA { magnitude[i.value] = Simd::set_int(0); });
  const auto vector = [&](int64_t c, int64_t n) QO_LAMBDA {
    const auto less = r.less == nullptr ? Simd::set(0.0f) : load_part(r.less + c, n);
    unroll<kRows>([&](auto i) QO_LAMBDA {
      auto v = load_part(x + i.value * r.x_row + c, n);
      if (r.less != nullptr) {
        v = Simd::sub(v, less);
        store_part(r.y + (row + i.value) * r.columns + c, v, n);
      }
      magnitude[i.value] = Simd::max_unsigned(magnitude[i.value], Simd::abs_bits(v));
    });
  };
  int64_t c = 0;
  for (; c + Simd::N <= r.columns; c += Simd::N) vector(c, Simd::N);
  if (c < r.columns) vector(c, r.columns - c);
  unroll<kRows>([&](auto i) QO_LAMBDA { r.abs_bits[row + i.value] = Simd::reduce_max_unsigned(magnitude[i.value]); });
}

template <class X>
void center_typed(const CenterRun& r) {
  int64_t row = 0;
  for (; row + 4 <= r.rows; row += 4) center_rows<4, X>(r, row);
  for (; row < r.rows; ++row) center_rows<1, X>(r, row);
}

void center(const CenterRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return center_typed<float>(r);
    case DType::kFloat16: return center_typed<Half>(r);
    default: return center_typed<BFloat16>(r);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

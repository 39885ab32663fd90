// Minimum, maximum and largest magnitude of runs and of columns. NaN is ignored by minimum and maximum alone.
#pragma once

#include "kernels/generic/partial.h"

namespace quant_ops::QO_ISA {
namespace {

// N lanes of minimum, maximum and magnitude.
template <bool kOnlyMagnitude>
struct RangeLanes {
  typename Simd::F min, max;
  typename Simd::I magnitude;

  QO_INLINE void set(const Range& range) {
    min = Simd::set(range.min);
    max = Simd::set(range.max);
    magnitude = Simd::set_int(static_cast<int32_t>(range.abs_bits));
  }
  QO_INLINE void include(typename Simd::F v) {
    if constexpr (!kOnlyMagnitude) {
      min = Simd::min(v, min);
      max = Simd::max(v, max);
    }
    magnitude = Simd::max_unsigned(magnitude, Simd::abs_bits(v));
  }
  QO_INLINE void merge(const RangeLanes& other) {
    min = Simd::min(other.min, min);
    max = Simd::max(other.max, max);
    magnitude = Simd::max_unsigned(magnitude, other.magnitude);
  }
};

template <bool kOnlyMagnitude, class X>
void range_typed(const X* x, int64_t count, Range* range) {
  constexpr int64_t N = Simd::N;
  constexpr int kChains = 4;  // independent chains hide the latency of min and max
  if (count < N) {
    for (int64_t j = 0; j < count; ++j) {
      const float v = to_compute(x[j]);
      if (!kOnlyMagnitude && v < range->min) range->min = v;
      if (!kOnlyMagnitude && v > range->max) range->max = v;
      const uint32_t bits = float_bits(v) & 0x7fffffffu;
      if (bits > range->abs_bits) range->abs_bits = bits;
    }
    return;
  }
  RangeLanes<kOnlyMagnitude> lanes[kChains];
  lanes[0].set(*range);
  int64_t i = 0;
  if (count >= kChains * N) {
    unroll<kChains>([&](auto c) QO_LAMBDA { lanes[c.value].set(*range); });
    for (; i + kChains * N <= count; i += kChains * N)
      unroll<kChains>([&](auto c) QO_LAMBDA { lanes[c.value].include(Simd::load(x + i + c.value * N)); });
    lanes[0].merge(lanes[1]);
    lanes[2].merge(lanes[3]);
    lanes[0].merge(lanes[2]);
  }
  for (; i + N <= count; i += N) lanes[0].include(Simd::load(x + i));
  if (i < count) lanes[0].include(Simd::load(x + count - N));  // elements that are included twice change nothing
  if constexpr (!kOnlyMagnitude) {
    range->min = Simd::reduce_min(lanes[0].min);
    range->max = Simd::reduce_max(lanes[0].max);
  }
  range->abs_bits = Simd::reduce_max_unsigned(lanes[0].magnitude);
}

template <bool kOnlyMagnitude>
void range_of(const void* x, DType dtype, int64_t n, Range* range) {
  switch (dtype) {
    case DType::kFloat32: return range_typed<kOnlyMagnitude>(static_cast<const float*>(x), n, range);
    case DType::kFloat16: return range_typed<kOnlyMagnitude>(static_cast<const Half*>(x), n, range);
    default: return range_typed<kOnlyMagnitude>(static_cast<const BFloat16*>(x), n, range);
  }
}

void range(const void* x, DType dtype, int64_t n, bool only_magnitude, Range* into) {
  only_magnitude ? range_of<true>(x, dtype, n, into) : range_of<false>(x, dtype, n, into);
}

// Several rows at a time: the arrays over columns are read and written once for all of them.
template <class X, int kRows>
QO_INLINE void range_rows(const RangeColumnsRun& r, const X* x) {
  constexpr int64_t N = Simd::N;
  const auto vectors = [&](int64_t c, int64_t n) QO_LAMBDA {
    RangeLanes<false> lanes;
    int32_t* const magnitude = reinterpret_cast<int32_t*>(r.abs_bits) + c;
    lanes.min = load_part(r.min + c, n);
    lanes.max = load_part(r.max + c, n);
    lanes.magnitude = load_int_part(magnitude, n);
    unroll<kRows>([&](auto row) QO_LAMBDA { lanes.include(load_part(x + row.value * r.x_row + c, n)); });
    store_part(r.min + c, lanes.min, n);
    store_part(r.max + c, lanes.max, n);
    store_part(magnitude, lanes.magnitude, n);
  };
  int64_t c = 0;
  for (; c + N <= r.columns; c += N) vectors(c, N);
  if (c < r.columns)
    r.columns >= N ? vectors(r.columns - N, N) : vectors(0, r.columns);  // elements that are included twice change nothing
}

template <class X>
void range_columns_typed(const RangeColumnsRun& r) {
  const X* x = static_cast<const X*>(r.x);
  int64_t row = 0;
  for (; row + 4 <= r.rows; row += 4) range_rows<X, 4>(r, x + row * r.x_row);
  for (; row < r.rows; ++row) range_rows<X, 1>(r, x + row * r.x_row);
}

void range_columns(const RangeColumnsRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return range_columns_typed<float>(r);
    case DType::kFloat16: return range_columns_typed<Half>(r);
    default: return range_columns_typed<BFloat16>(r);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

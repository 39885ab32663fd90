// The epilogue of arithmetic.h, which every integer kernel ends with: y = (acc - row_zero * column_sum) * scale + bias, ReLU, and
// the conversion to the output's type. finish_tile takes sums from registers, finish_sums from memory.
#pragma once

#include "kernels/generic/partial.h"

namespace quant_ops::QO_ISA {
namespace {

// Calls f with a null pointer of the output's type.
template <class F>
QO_INLINE void with_output_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat16: return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::kInt8: return f(static_cast<int8_t*>(nullptr));
    case DType::kUInt8: return f(static_cast<uint8_t*>(nullptr));
    default: return f(static_cast<int32_t*>(nullptr));
  }
}

// Per-column operands of the epilogue, one vector. kShared: row_step is 0, all rows have the same scale and zero point (the pixels
// of a sample).
template <bool kShared>
struct ColumnVector {
  typename Simd::I sum, correction;  // correction: kShared
  typename Simd::F scale, bias;      // kShared: scale is the product of both

  ColumnVector() = default;
  QO_INLINE ColumnVector(const TileOutput& o, int64_t column) {
    sum = Simd::load_int(o.column_sum + column);
    scale = Simd::load(o.column_scale + column);
    if constexpr (kShared) {
      correction = Simd::mul(Simd::set_int(o.row_zero[0]), sum);
      scale = Simd::mul(Simd::set(o.row_scale[0]), scale);
    }
    bias = Simd::load(o.bias + column);
  }

  QO_INLINE typename Simd::I corrected(const TileOutput& o, int64_t row, typename Simd::I acc) const {
    return Simd::sub(acc, kShared ? correction : Simd::mul(Simd::set_int(o.row_zero[row]), sum));
  }

  QO_INLINE typename Simd::F value(const TileOutput& o, int64_t row, typename Simd::I acc) const {
    const auto product = kShared ? scale : Simd::mul(Simd::set(o.row_scale[row]), scale);
    return Simd::fma(Simd::to_float(corrected(o, row, acc)), product, bias);
  }
};

// float32 results -> codes of eight bits, as in arithmetic.h but without a division: v * (1 / scale) rounds like the quotient
// unless it lies close to a tie n + 1/2 (tie_for). If one of 64 values does, about once in 250 times, all 64 are divided.
//
// That is valid only for products that are finite and fit an int32 (TileOutput::bounded); otherwise everything is divided.
template <class Y>
struct Requantize {
  typename Simd::F scale, reciprocal;
  typename Simd::I tie, least;
  typename Simd::Words zero_point;
  bool divide;

  QO_INLINE explicit Requantize(const TileOutput& o)
      : scale(Simd::set(o.out_scale)),
        reciprocal(Simd::set(1.0f / o.out_scale)),
        tie(Simd::set_int(static_cast<int32_t>(float_bits(tie_for(farthest(o.out_zero_point)))))),
        // ReLU: values below 0 become the code of 0
        least(Simd::set_bytes(o.floor == 0.0f ? static_cast<Y>(o.out_zero_point) : std::numeric_limits<Y>::min())),
        zero_point(Simd::set_words(static_cast<int16_t>(o.out_zero_point))),
        divide(!o.bounded) {}

  // The largest distance of a code from the zero point.
  static int64_t farthest(int64_t zero) {
    const int64_t below = zero - std::numeric_limits<Y>::min(), above = std::numeric_limits<Y>::max() - zero;
    return below > above ? below : above;
  }

  // value(i), i from Int<0> to Int<3>, gives four vectors -> their codes, in order.
  template <class Value>
  QO_INLINE typename Simd::I operator()(const Value& value) const {
    typename Simd::I q[4];
    auto distance = Simd::set(0.0f);
    unroll<4>([&](auto i) QO_LAMBDA {
      const auto steps = Simd::mul(value(i), reciprocal);
      distance = Simd::max_magnitude(distance, Simd::fraction(steps));
      q[i.value] = Simd::to_int(steps);
    });
    if (__builtin_expect(divide || Simd::any_above(Simd::bits(distance), tie), 0)) {
      const auto most = Simd::set(1024.0f), fewest = Simd::set(-1024.0f);  // beyond every code; NaN stays NaN
      unroll<4>([&](auto i) QO_LAMBDA {                                    // computed again: to keep them would take four registers
        const auto steps = Simd::min(most, Simd::max(fewest, Simd::round_even(Simd::div(value(i), scale))));
        q[i.value] = Simd::to_int(Simd::nan_to_zero(steps));
      });
    }
    return Simd::max_bytes(Simd::template pack<Y>(q[0], q[1], q[2], q[3], zero_point), least, Y{});
  }
};

// Codes of vector `kQuarter` of four; the first n of them.
template <int kQuarter, bool kWhole, class Y, class S = Simd>
QO_INLINE void store_codes(Y* y, typename S::I codes, int64_t n) {
  if (kWhole || n >= S::N) {
    S::template store_quarter<kQuarter>(y, codes);
  } else if constexpr (S::kMasks) {
    S::template store_quarter<kQuarter>(y, codes, n > 0 ? n : 0);
  } else if (n > 0) {
    Y part[S::N];
    S::template store_quarter<kQuarter>(part, codes);
    __builtin_memcpy(y, part, static_cast<size_t>(n));
  }
}

struct Nothing {
  QO_INLINE explicit Nothing(const TileOutput&) {}
};
template <class Y>
using Rounding = std::conditional_t<sizeof(Y) == 1, Requantize<Y>, Nothing>;

// kRows rows of kVectors vectors, the first element at y. sum(r, v) gives the sums of a vector; both arguments are Int<>. `row` is
// the place of the first one in row_scale and row_zero. kWhole: all columns are valid, else the first `valid` of them.
template <class Y, int kRows, int kVectors, bool kShared, bool kWhole, class Sum>
QO_INLINE void finish_block(const TileOutput& o, const Rounding<Y>& rounding, const ColumnVector<kShared> (&columns)[kVectors],
                            Y* y, int64_t row, int64_t valid, const Sum& sum) {
  constexpr int64_t N = Simd::N;
  const auto value = [&](auto r, auto v) QO_LAMBDA { return columns[v.value].value(o, row + r.value, sum(r, v)); };
  if constexpr (sizeof(Y) == 1) {
    constexpr int kLast = kRows * kVectors - 1;
    static_assert(kLast < 4, "codes are made four vectors at a time");
    const auto codes = rounding([&](auto i) QO_LAMBDA {
      constexpr int at = i.value < kLast ? i.value : kLast;
      return value(Int<at / kVectors>{}, Int<at % kVectors>{});
    });
    if constexpr (kWhole && kVectors == 4) {
      Simd::store_codes(y, codes);
    } else {
      unroll<kLast + 1>([&](auto i) QO_LAMBDA {
        constexpr int64_t column = i.value % kVectors * N;
        store_codes<i.value, kWhole>(y + i.value / kVectors * o.y_stride + column, codes, valid - column);
      });
    }
  } else {
    unroll<kRows>([&](auto r) QO_LAMBDA {
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        Y* const to = y + r.value * o.y_stride + v.value * N;
        const int64_t n = kWhole ? N : valid - v.value * N;
        if constexpr (std::is_same_v<Y, int32_t>)  // the sum itself
          store_part(to, columns[v.value].corrected(o, row + r.value, sum(r, v)), n);
        else
          store_part(to, Simd::max(Simd::set(o.floor), value(r, v)), n);  // a NaN passes
      });
    });
  }
}

// kVectors vectors from column n on, of all rows: several rows at a time, so that there are four vectors of codes.
template <class Y, int kVectors, bool kShared, bool kWhole>
QO_INLINE void finish_columns(const TileOutput& o, const Rounding<Y>& rounding, int64_t n, const int32_t* sums, int64_t rows,
                              int64_t stride) {
  ColumnVector<kShared> columns[kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA { columns[v.value] = ColumnVector<kShared>(o, n + v.value * Simd::N); });
  const auto block = [&](auto count, int64_t row) QO_LAMBDA {
    const int32_t* from = sums + row * stride + n;
    finish_block<Y, count.value, kVectors, kShared, kWhole>(
        o, rounding, columns, static_cast<Y*>(o.y) + row * o.y_stride + n, row, o.columns - n,
        [&](auto r, auto v) QO_LAMBDA { return Simd::load_int(from + r.value * stride + v.value * Simd::N); });
  };
  constexpr int kTogether = 4 / kVectors;
  if (rows < kTogether)
    for (int64_t r = 0; r < rows; ++r) block(Int<1>{}, r);
  else
    for (int64_t r = 0; r < rows; r += kTogether) block(Int<kTogether>{}, r < rows - kTogether ? r : rows - kTogether);
}

template <class Y, bool kShared>
void finish_typed(const TileOutput& o, const int32_t* sums, int64_t rows, int64_t stride) {
  constexpr int64_t N = Simd::N;
  const Rounding<Y> rounding(o);
  int64_t n = 0;
  for (; n + 4 * N <= o.columns; n += 4 * N) finish_columns<Y, 4, kShared, true>(o, rounding, n, sums, rows, stride);
  for (; n + 2 * N <= o.columns; n += 2 * N) finish_columns<Y, 2, kShared, true>(o, rounding, n, sums, rows, stride);
  for (; n + N <= o.columns; n += N) finish_columns<Y, 1, kShared, true>(o, rounding, n, sums, rows, stride);
  if (n < o.columns) finish_columns<Y, 1, kShared, false>(o, rounding, n, sums, rows, stride);
}

// A tile whose sums are in memory: [rows][stride]. Not inlined: the accumulators of a tile leave no registers for it, and the code
// of the tiles stays small.
__attribute__((noinline)) void finish_sums(const TileOutput& o, const int32_t* sums, int64_t rows, int64_t stride) {
  with_output_type(o.dtype, [&](auto* type) QO_LAMBDA {
    using Y = std::remove_pointer_t<decltype(type)>;
    o.row_step == 0 ? finish_typed<Y, true>(o, sums, rows, stride) : finish_typed<Y, false>(o, sums, rows, stride);
  });
}

// A tile in registers. A whole tile of float32 is finished there, columns in the outer loop and rows in the inner one, which needs
// few more registers; everything else goes through memory.
template <int kRows, int kVectors, class Sum>
QO_INLINE void finish_tile(const TileOutput& o, const Sum& sum) {
  constexpr int64_t N = Simd::N;
  if (o.dtype == DType::kFloat32 && o.columns >= kVectors * N) {
    const auto columns = [&](auto shared) QO_LAMBDA {
      using Column = ColumnVector<shared.value != 0>;
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        const Column column[1] = {Column(o, v.value * N)};
        finish_block<float, kRows, 1, shared.value != 0, true>(o, Nothing(o), column, static_cast<float*>(o.y) + v.value * N, 0, N,
                                                               [&](auto r, auto) QO_LAMBDA { return sum(r, v); });
      });
    };
    return o.row_step == 0 ? columns(Int<1>{}) : columns(Int<0>{});
  }
  alignas(64) int32_t sums[kRows * kVectors * N];
  unroll<kRows>([&](auto r) QO_LAMBDA {
    unroll<kVectors>([&](auto v) QO_LAMBDA { Simd::store(sums + (r.value * kVectors + v.value) * N, sum(r, v)); });
  });
  TileOutput mine = o;  // clipped to this sweep's columns: later sweeps write the rest
  mine.columns = o.columns < kVectors * N ? o.columns : kVectors * N;
  finish_sums(mine, sums, kRows, kVectors * N);
}

}  // namespace
}  // namespace quant_ops::QO_ISA

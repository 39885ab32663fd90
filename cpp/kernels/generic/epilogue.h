// The epilogue of OutputParams (contract/ops.h), which every integer kernel ends with: y = (acc - row_zero * column_sum) * scale +
// bias, a residual, a function, and the conversion to the output's type. finish_tile takes sums from registers, finish_sums from
// memory. ReLU, and ReLU6 of codes, are a floor and a ceiling; a residual of codes that becomes codes is added on the way; what
// else TileExtras asks for is done to float32 values in memory, a pass for each step (finish_values).
#pragma once

#include "kernels/generic/functions.h"

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
  using From = int32_t;  // what the epilogue starts from: sums
  using Exact = ColumnVector;
  static QO_INLINE typename Simd::I load(const int32_t* p) { return Simd::load_int(p); }

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

// What is added to the steps of a value.
QO_INLINE float steps_offset(const TileOutput& o) {
  return static_cast<float>(o.codes.zero_point) + (Simd::kFractions ? 0.0f : o.codes.slack);
}

// The same in steps of the output's scale and plus its zero point: what is rounded to the code, but for an error below the slack,
// which is added where CodeRounding wants it. `Exact` is the vector of the values.
template <bool kShared>
struct StepsVector {
  using From = int32_t;
  using Exact = ColumnVector<kShared>;
  static QO_INLINE typename Simd::I load(const int32_t* p) { return Simd::load_int(p); }

  typename Simd::I sum;          // kShared: what is added to the sums, else the sums of the columns
  typename Simd::F scale, bias;  // kShared: scale is the product of all

  StepsVector() = default;
  QO_INLINE StepsVector(const TileOutput& o, int64_t column) {
    const auto reciprocal = Simd::set(o.codes.reciprocal);
    sum = Simd::load_int(o.column_sum + column);
    scale = Simd::load(o.column_scale + column);
    if constexpr (kShared) {
      sum = Simd::mul(Simd::set_int(-o.row_zero[0]), sum);
      scale = Simd::mul(Simd::mul(Simd::set(o.row_scale[0]), scale), reciprocal);
    }
    bias = Simd::add(Simd::mul(Simd::load(o.bias + column), reciprocal), Simd::set(steps_offset(o)));
  }

  QO_INLINE typename Simd::F value(const TileOutput& o, int64_t row, typename Simd::I acc) const {
    if constexpr (kShared) return Simd::fma(Simd::to_float(Simd::add(sum, acc)), scale, bias);
    const auto product = Simd::mul(Simd::mul(Simd::set(o.row_scale[row]), scale), Simd::set(o.codes.reciprocal));
    const auto corrected = Simd::sub(acc, Simd::mul(Simd::set_int(o.row_zero[row]), sum));
    return Simd::fma(Simd::to_float(corrected), product, bias);
  }
};

// Values, or with `Steps` steps, and a residual of codes R. kWhole: all columns of the vector are valid.
template <class Base, class R, bool kWhole>
struct ResidualVector : Base {
  using Exact = ResidualVector<typename Base::Exact, R, kWhole>;
  static constexpr bool kSteps = !std::is_same_v<Base, typename Base::Exact>;
  const R* residual;
  int64_t valid;
  typename Simd::F residual_scale;
  typename Simd::I residual_zero;

  ResidualVector() = default;
  QO_INLINE ResidualVector(const TileOutput& o, int64_t column)
      : Base(o, column),
        residual(static_cast<const R*>(o.residual) + column),
        valid(o.columns - column),
        residual_scale(Simd::set(kSteps ? o.extras->residual_scale * o.codes.reciprocal : o.extras->residual_scale)),
        residual_zero(Simd::set_int(o.extras->residual_zero)) {}

  QO_INLINE typename Simd::F value(const TileOutput& o, int64_t row, typename Simd::I acc) const {
    const R* from = residual + row * o.residual_stride;
    const auto r = kWhole ? Simd::load_int(from) : load_int_part(from, valid);
    return Simd::fma(Simd::to_float(Simd::sub(r, residual_zero)), residual_scale, Base::value(o, row, acc));
  }
};

// Values that only need to be converted.
struct FinishedVector {
  using From = float;
  static QO_INLINE typename Simd::F load(const float* p) { return Simd::load(p); }

  FinishedVector() = default;
  QO_INLINE FinishedVector(const TileOutput&, int64_t) {}
  QO_INLINE typename Simd::F value(const TileOutput&, int64_t, typename Simd::F v) const { return v; }
};
struct FinishedSteps : FinishedVector {
  using Exact = FinishedVector;
  FinishedSteps() = default;
  QO_INLINE FinishedSteps(const TileOutput& o, int64_t)
      : reciprocal(Simd::set(o.codes.reciprocal)), bias(Simd::set(steps_offset(o))) {}
  QO_INLINE typename Simd::F value(const TileOutput&, int64_t, typename Simd::F v) const { return Simd::fma(v, reciprocal, bias); }
  typename Simd::F reciprocal, bias;
};

// float32 results -> codes of eight bits, as in arithmetic.h but without a division where it does not matter (CodeOutput). Whether
// an integer and a half is close is asked once for four vectors: about once in 100 times it is, and all four are divided. Fractions
// tell where one instruction gives them; else the steps are rounded twice, with the slack and without it, and both make the same
// codes.
template <class Y>
struct Requantize {
  typename Simd::F width;
  typename Simd::I tie, least, most;
  bool divide;

  QO_INLINE explicit Requantize(const TileOutput& o)
      : width(Simd::set(2.0f * o.codes.slack)),
        tie(Simd::bits(Simd::set(0.5f - o.codes.slack))),
        least(Simd::set_bytes(o.codes.least)),
        most(Simd::set_bytes(o.codes.most)),
        divide(o.codes.divide) {}

  // steps(i), i from Int<0> to Int<3>, gives four vectors -> their codes, in order. exact(use) calls use(i, the values of vector
  // i).
  template <class Steps, class Exact>
  QO_INLINE typename Simd::I operator()(const TileOutput& o, const Steps& steps, const Exact& exact) const {
    typename Simd::I q[4], below[4];
    auto distance = Simd::set(0.0f);
    unroll<4>([&](auto i) QO_LAMBDA {
      const auto t = steps(i);
      q[i.value] = Simd::to_int(t);
      if constexpr (Simd::kFractions)
        distance = Simd::max_magnitude(distance, Simd::fraction(t));
      else
        below[i.value] = Simd::to_int(Simd::sub(t, width));
    });
    auto codes = Simd::template pack_lanes<Y>(q[0], q[1], q[2], q[3]);
    bool close;
    if constexpr (Simd::kFractions)
      close = Simd::any_above(Simd::bits(distance), tie);
    else
      close = Simd::differ(codes, Simd::template pack_lanes<Y>(below[0], below[1], below[2], below[3]));
    if (__builtin_expect(divide || close, 0)) {
      const auto scale = Simd::set(o.codes.scale), most_steps = Simd::set(1024.0f), fewest = Simd::set(-1024.0f);
      const auto zero = Simd::set_int(o.codes.zero_point);
      exact([&](auto i, auto value) QO_LAMBDA {  // the bounds are beyond every code, and NaN becomes 0
        const auto rounded = Simd::min(most_steps, Simd::max(fewest, Simd::round_even(Simd::div(value, scale))));
        q[i.value] = Simd::add(Simd::to_int(Simd::nan_to_zero(rounded)), zero);
      });
      codes = Simd::template pack_lanes<Y>(q[0], q[1], q[2], q[3]);
    }
    return Simd::min_bytes(Simd::max_bytes(Simd::order_lanes(codes), least, Y{}), most, Y{});
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
template <class Y, bool kShared>
using ColumnOf = std::conditional_t<sizeof(Y) == 1, StepsVector<kShared>, ColumnVector<kShared>>;
template <class Y>
using Rounding = std::conditional_t<sizeof(Y) == 1, Requantize<Y>, Nothing>;

// kRows rows of kVectors vectors, the first element at y. sum(r, v) gives what a vector of Column starts from; both arguments are
// Int<>. `row` is the place of the first one in row_scale and row_zero, `column` that of the first column in the tile. kWhole: all
// columns are valid, else the first `valid` of them.
template <class Y, int kRows, int kVectors, bool kWhole, class Column, class Sum>
QO_INLINE void finish_block(const TileOutput& o, const Rounding<Y>& rounding, const Column (&columns)[kVectors], int64_t column,
                            Y* y, int64_t row, int64_t valid, const Sum& sum) {
  constexpr int64_t N = Simd::N;
  const auto value = [&](auto r, auto v) QO_LAMBDA { return columns[v.value].value(o, row + r.value, sum(r, v)); };
  if constexpr (sizeof(Y) == 1) {
    constexpr int kLast = kRows * kVectors - 1;
    static_assert(kLast < 4, "codes are made four vectors at a time");
    const auto codes = rounding(
        o,
        [&](auto i) QO_LAMBDA {
          constexpr int at = i.value < kLast ? i.value : kLast;
          return value(Int<at / kVectors>{}, Int<at % kVectors>{});
        },
        [&](const auto& use) QO_LAMBDA {
          typename Column::Exact exact[kVectors];
          unroll<kVectors>([&](auto v) QO_LAMBDA { exact[v.value] = typename Column::Exact(o, column + v.value * N); });
          unroll<4>([&](auto i) QO_LAMBDA {
            constexpr int at = i.value < kLast ? i.value : kLast;
            constexpr Int<at / kVectors> r{};
            constexpr Int<at % kVectors> v{};
            use(i, exact[v.value].value(o, row + r.value, sum(r, v)));
          });
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
template <class Y, int kVectors, bool kWhole, class Column>
QO_INLINE void finish_columns(const TileOutput& o, const Rounding<Y>& rounding, int64_t n, const typename Column::From* sums,
                              int64_t rows, int64_t stride) {
  Column columns[kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA { columns[v.value] = Column(o, n + v.value * Simd::N); });
  const auto block = [&](auto count, int64_t row) QO_LAMBDA {
    const auto* from = sums + row * stride + n;
    finish_block<Y, count.value, kVectors, kWhole>(
        o, rounding, columns, n, static_cast<Y*>(o.y) + row * o.y_stride + n, row, o.columns - n,
        [&](auto r, auto v) QO_LAMBDA { return Column::load(from + r.value * stride + v.value * Simd::N); });
  };
  constexpr int kTogether = 4 / kVectors;
  if (rows < kTogether)
    for (int64_t r = 0; r < rows; ++r) block(Int<1>{}, r);
  else
    for (int64_t r = 0; r < rows; r += kTogether) block(Int<kTogether>{}, r < rows - kTogether ? r : rows - kTogether);
}

// Whole, Part: the vectors of columns, all of them valid or not.
template <class Y, class Whole, class Part = Whole>
void finish_typed(const TileOutput& o, const typename Whole::From* sums, int64_t rows, int64_t stride) {
  constexpr int64_t N = Simd::N;
  const Rounding<Y> rounding(o);
  int64_t n = 0;
  for (; n + 4 * N <= o.columns; n += 4 * N) finish_columns<Y, 4, true, Whole>(o, rounding, n, sums, rows, stride);
  for (; n + 2 * N <= o.columns; n += 2 * N) finish_columns<Y, 2, true, Whole>(o, rounding, n, sums, rows, stride);
  for (; n + N <= o.columns; n += N) finish_columns<Y, 1, true, Whole>(o, rounding, n, sums, rows, stride);
  if (n < o.columns) finish_columns<Y, 1, false, Part>(o, rounding, n, sums, rows, stride);
}

// ---- residuals and functions ------------------------------------------------------------------------------------------

template <class R>
void add_residual_of(const TileOutput& o, float* values, int64_t rows, int64_t stride) {
  const auto scale = Simd::set(o.extras->residual_scale);
  const auto zero = Simd::set_int(o.extras->residual_zero);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < o.columns; n += Simd::N) {
      float* at = values + row * stride + n;
      const R* r = static_cast<const R*>(o.residual) + row * o.residual_stride + n;
      if constexpr (sizeof(R) == 1)
        Simd::store(at, Simd::fma(Simd::to_float(Simd::sub(load_int_part(r, o.columns - n), zero)), scale, Simd::load(at)));
      else
        Simd::store(at, Simd::add(Simd::load(at), load_part(r, o.columns - n)));
    }
}

// What comes after scale and bias, for values in memory that may be overwritten: [rows][stride], the stride a multiple of Simd::N.
// What lies behind the columns in a vector may be anything: it is computed with and not stored.
__attribute__((noinline)) void finish_values(const TileOutput& o, float* values, int64_t rows, int64_t stride) {
  if (o.residual != nullptr)
    with_output_type(o.extras->residual_dtype, [&](auto* type) QO_LAMBDA {
      using R = std::remove_pointer_t<decltype(type)>;
      if constexpr (!std::is_same_v<R, int32_t>) add_residual_of<R>(o, values, rows, stride);
    });
  if (o.extras->function != Function::kNone)
    for (int64_t row = 0; row < rows; ++row)
      apply_functions(o.extras->function, values + row * stride, (o.columns + Simd::N - 1) / Simd::N * Simd::N);
  with_output_type(o.dtype, [&](auto* type) QO_LAMBDA {
    using Y = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<Y, int32_t>)
      finish_typed<Y, std::conditional_t<sizeof(Y) == 1, FinishedSteps, FinishedVector>>(o, values, rows, stride);
  });
}

// The values before a residual and a function: float32, without them.
QO_INLINE TileOutput plain_output(const TileOutput& o, float* values, int64_t stride) {
  TileOutput plain = o;
  plain.y = values;
  plain.y_stride = stride;
  plain.dtype = DType::kFloat32;
  plain.floor = -INFINITY;
  plain.extras = nullptr;
  plain.residual = nullptr;
  return plain;
}

template <class Y, class R>
void add_codes(const TileOutput& o, const int32_t* sums, int64_t rows, int64_t stride) {
  o.row_step == 0 ? finish_typed<Y, ResidualVector<StepsVector<true>, R, true>, ResidualVector<StepsVector<true>, R, false>>(
                        o, sums, rows, stride)
                  : finish_typed<Y, ResidualVector<StepsVector<false>, R, true>, ResidualVector<StepsVector<false>, R, false>>(
                        o, sums, rows, stride);
}

__attribute__((noinline)) void finish_extras(const TileOutput& o, const int32_t* sums, int64_t rows, int64_t stride) {
  if (o.extras->function == Function::kNone && dtype_bytes(o.dtype) == 1 && dtype_bytes(o.extras->residual_dtype) == 1) {
    const bool from_signed = o.extras->residual_dtype == DType::kInt8;
    if (o.dtype == DType::kInt8)
      return from_signed ? add_codes<int8_t, int8_t>(o, sums, rows, stride) : add_codes<int8_t, uint8_t>(o, sums, rows, stride);
    return from_signed ? add_codes<uint8_t, int8_t>(o, sums, rows, stride) : add_codes<uint8_t, uint8_t>(o, sums, rows, stride);
  }
  alignas(64) float values[kMaxGemmRows * kPanel];
  const TileOutput plain = plain_output(o, values, kPanel);
  o.row_step == 0 ? finish_typed<float, ColumnVector<true>>(plain, sums, rows, stride)
                  : finish_typed<float, ColumnVector<false>>(plain, sums, rows, stride);
  finish_values(o, values, rows, kPanel);
}

// A tile whose sums are in memory: [rows][stride]. Not inlined: the accumulators of a tile leave no registers for it, and the code
// of the tiles stays small.
__attribute__((noinline)) void finish_sums(const TileOutput& o, const int32_t* sums, int64_t rows, int64_t stride) {
  if (o.extras != nullptr) return finish_extras(o, sums, rows, stride);
  with_output_type(o.dtype, [&](auto* type) QO_LAMBDA {
    using Y = std::remove_pointer_t<decltype(type)>;
    o.row_step == 0 ? finish_typed<Y, ColumnOf<Y, true>>(o, sums, rows, stride)
                    : finish_typed<Y, ColumnOf<Y, false>>(o, sums, rows, stride);
  });
}

// A tile in registers. A whole tile of float32 is finished there, columns in the outer loop and rows in the inner one, which needs
// few more registers; everything else goes through memory.
template <int kRows, int kVectors, class Sum>
QO_INLINE void finish_tile(const TileOutput& o, const Sum& sum) {
  constexpr int64_t N = Simd::N;
  if (o.dtype == DType::kFloat32 && o.extras == nullptr && o.columns >= kVectors * N) {
    const auto columns = [&](auto shared) QO_LAMBDA {
      using Column = ColumnVector<shared.value != 0>;
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        const Column column[1] = {Column(o, v.value * N)};
        finish_block<float, kRows, 1, true>(o, Nothing(o), column, 0, static_cast<float*>(o.y) + v.value * N, 0, N,
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

// The epilogue of OutputParams (contract/ops.h), which every integer kernel ends with: y = (acc - row_zero * column_sum) * scale +
// bias, a residual, a function, and the conversion to the output's type. finish_tile takes sums from registers, finish_sums from
// memory. ReLU, and ReLU6 of codes, are a floor and a ceiling; a residual of codes that becomes codes is added on the way; four
// vectors at a time pass through any other function (AnyFunctionVector). A residual and a function, or a residual of another type,
// are done to float32 values in memory, a pass for each step (finish_values).
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

// Fetches the lines that kRows rows from `row` on will be written to: a store that waits for its line holds up those behind it.
template <int kRows>
QO_INLINE void prefetch_results(const TileOutput& o, int64_t row) {
  if (!o.far) return;
  const int64_t bytes = dtype_bytes(o.dtype), row_bytes = o.columns * bytes;
  unroll<kRows>([&](auto r) QO_LAMBDA {
    const char* to = static_cast<const char*>(o.y) + (row + r.value) * o.y_stride * bytes;
    for (int64_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(to + at, 1);
  });
}

// A result of eight bits, of either sign (CodeOutput).
using Code = uint8_t;
template <class Y>
using Result = std::conditional_t<sizeof(Y) == 1, Code, Y>;

// The same; codes of eight bits are Code.
template <class F>
QO_INLINE void with_result_type(DType dtype, const F& f) {
  with_output_type(dtype, [&](auto* type) QO_LAMBDA { f(static_cast<Result<std::remove_pointer_t<decltype(type)>>*>(nullptr)); });
}

// Per-column operands of the epilogue, one vector; kShared: of a tile that is `shared`. `Exact` is the vector of the values.
template <bool kShared>
struct ColumnVector {
  using From = int32_t;  // what the epilogue starts from: sums
  using Exact = ColumnVector;
  static QO_INLINE typename Simd::I load(const int32_t* p) { return Simd::load_int(p); }
  static QO_INLINE void store(int32_t* p, typename Simd::I v) { Simd::store(p, v); }

  typename Simd::I sum;  // kShared: not used
  typename Simd::F scale, bias;

  ColumnVector() = default;
  QO_INLINE ColumnVector(const TileOutput& o, int64_t column)
      : scale(Simd::load(o.column_scale + column)), bias(Simd::load(o.bias + column)) {
    if constexpr (!kShared) sum = Simd::load_int(o.column_sum + column);
  }

  QO_INLINE typename Simd::I corrected(const TileOutput& o, int64_t row, typename Simd::I acc) const {
    return kShared ? acc : Simd::sub(acc, Simd::mul(Simd::set_int(o.row_zero[row * o.row_step]), sum));
  }

  QO_INLINE typename Simd::F value(const TileOutput& o, int64_t row, typename Simd::I acc) const {
    const auto product = kShared ? scale : Simd::mul(Simd::set(o.row_scale[row * o.row_step]), scale);
    return Simd::fma(Simd::to_float(corrected(o, row, acc)), product, bias);
  }
};

// The same in steps of the output's scale and plus its zero point: what is rounded to the code, but for an error below the slack,
// and that slack more.
template <bool kShared>
struct StepsVector : ColumnVector<kShared> {
  using Exact = ColumnVector<kShared>;

  StepsVector() = default;
  QO_INLINE StepsVector(const TileOutput& o, int64_t column) {
    if constexpr (kShared) {
      this->scale = Simd::load(o.steps_scale + column);
      this->bias = Simd::load(o.steps_bias + column);
    } else {
      const auto reciprocal = Simd::set(o.codes.reciprocal);
      this->sum = Simd::load_int(o.column_sum + column);
      this->scale = Simd::mul(Simd::load(o.column_scale + column), reciprocal);
      this->bias = Simd::add(Simd::mul(Simd::load(o.bias + column), reciprocal), Simd::set(o.codes.offset()));
    }
  }
};

// Values, or steps, and a residual: codes R, or to values also float32. kWhole: all columns of the vector are valid.
template <class Base, class R, bool kWhole>
struct ResidualVector : Base {
  using Exact = ResidualVector<typename Base::Exact, R, kWhole>;
  static constexpr bool kCodes = sizeof(R) == 1, kSteps = !std::is_same_v<Base, typename Base::Exact>;
  static_assert(kCodes || !kSteps);
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
    const auto base = Base::value(o, row, acc);
    if constexpr (kCodes) {
      const auto r = kWhole ? Simd::load_int(from) : load_int_part(from, valid);
      return Simd::fma(Simd::to_float(Simd::sub(r, residual_zero)), residual_scale, base);
    } else {
      return Simd::add(base, kWhole ? Simd::load(from) : load_part(from, valid));
    }
  }
};

// Values in steps, by one more fused multiply-add. Values that are not kBounded may be infinite, NaN or beyond what an int32 holds:
// they are brought between bounds beyond every code.
template <class Values, bool kBounded = true>
struct InSteps : Values {
  using Exact = Values;
  InSteps() = default;
  QO_INLINE InSteps(const TileOutput& o, int64_t column)
      : Values(o, column), reciprocal(Simd::set(o.codes.reciprocal)), offset(Simd::set(o.codes.offset())) {}
  QO_INLINE typename Simd::F value(const TileOutput& o, int64_t row, auto from) const {
    const auto y = Values::value(o, row, from);
    if constexpr (kBounded) {
      return Simd::fma(y, reciprocal, offset);
    } else {
      const auto steps = Simd::fma(Simd::nan_to_zero(y), reciprocal, offset);
      return Simd::min(Simd::set(1024.0f), Simd::max(Simd::set(-1024.0f), steps));
    }
  }
  typename Simd::F reciprocal, offset;
};

// One function, known to the compiler, of values in a register; and the same in steps. AnyFunctionVector is for the others.
template <Function kFunction>
struct OneFunctionVector : ColumnVector<true> {
  using Exact = OneFunctionVector;

  OneFunctionVector() = default;
  QO_INLINE OneFunctionVector(const TileOutput& o, int64_t column) : ColumnVector<true>(o, column) {}
  QO_INLINE typename Simd::F value(const TileOutput& o, int64_t row, typename Simd::I acc) const {
    return apply_function<kFunction>(ColumnVector<true>::value(o, row, acc));
  }
};
template <Function kFunction>
using OneFunctionSteps = InSteps<OneFunctionVector<kFunction>>;

// Values that only need to be converted.
struct FinishedVector {
  using From = float;
  static QO_INLINE typename Simd::F load(const float* p) { return Simd::load(p); }
  static QO_INLINE void store(float* p, typename Simd::F v) { Simd::store(p, v); }

  FinishedVector() = default;
  QO_INLINE FinishedVector(const TileOutput&, int64_t) {}
  QO_INLINE typename Simd::F value(const TileOutput&, int64_t, typename Simd::F v) const { return v; }
};

// Sums whose values (`before`) a function that the run names is applied to, four vectors in memory at a time (finish_columns),
// before they are Finished.
template <bool kShared, class Finished>
struct AnyFunctionVector : Finished {
  using From = int32_t;
  static QO_INLINE typename Simd::I load(const int32_t* p) { return Simd::load_int(p); }
  ColumnVector<kShared> before;

  AnyFunctionVector() = default;
  QO_INLINE AnyFunctionVector(const TileOutput& o, int64_t column) : Finished(o, column), before(o, column) {}
};

// The codes of kRows rows of kVectors vectors by the formula, from row `row` and column `column` on; values[4][N], of which those
// beyond are the last one.
template <class Exact, int kVectors, int kRows>
__attribute__((noinline)) typename Simd::I divided_codes(const TileOutput& o, int64_t column, int64_t row,
                                                         const typename Exact::From* values) {
  const auto scale = Simd::set(o.codes.scale), most = Simd::set(1024.0f), fewest = Simd::set(-1024.0f);
  const auto zero = Simd::set_int(o.codes.zero_point);
  typename Simd::I q[4];
  unroll<4>([&](auto i) QO_LAMBDA {
    constexpr int kLast = kRows * kVectors - 1, at = i.value < kLast ? i.value : kLast;
    const Exact exact(o, column + at % kVectors * Simd::N);
    const auto y = exact.value(o, row + at / kVectors, Exact::load(values + i.value * Simd::N));
    // the bounds are beyond every code, and NaN becomes 0
    const auto rounded = Simd::min(most, Simd::max(fewest, Simd::round_even(Simd::div(y, scale))));
    q[i.value] = Simd::add(Simd::to_int(Simd::nan_to_zero(rounded)), zero);
  });
  return Simd::template pack_lanes<Code>(q[0], q[1], q[2], q[3]);
}

// float32 results -> codes of eight bits, as in arithmetic.h but without a division where it does not matter (CodeOutput): the
// steps are rounded twice, with the slack and without it, and both make the same codes unless an integer and a half is close. That
// is asked once for four vectors: about once in 100 times it is, and all four are divided.
struct Requantize {
  typename Simd::F less;
  typename Simd::I least, most, flip;
  bool divide;

  QO_INLINE explicit Requantize(const TileOutput& o)
      : less(Simd::set(-2.0f * o.codes.slack)),
        least(Simd::set_bytes(o.codes.least)),
        most(Simd::set_bytes(o.codes.most)),
        flip(Simd::set_bytes(o.codes.flip)),
        divide(o.codes.divide) {}

  struct Rounded {
    typename Simd::I codes;  // in packed lanes
    typename Simd::I apart;  // not 0 where both roundings differ
  };

  // Four vectors of steps, steps(i) with i from Int<0> to Int<3>.
  template <class Steps>
  QO_INLINE Rounded round(const Steps& steps) const {
    typename Simd::I q[4], apart = Simd::set_int(0);
    unroll<4>([&](auto i) QO_LAMBDA {
      const auto t = steps(i);
      q[i.value] = Simd::to_int(t);
      apart = Simd::or_bits(apart, Simd::xor_bits(q[i.value], Simd::to_int(Simd::add(t, less))));
    });
    return {Simd::template pack_lanes<Code>(q[0], q[1], q[2], q[3]), apart};
  }

  // Their codes, in order; divided() gives those of divided_codes.
  template <class Divided>
  QO_INLINE typename Simd::I codes(const Rounded& rounded, const Divided& divided) const {
    auto codes = rounded.codes;
    if (__builtin_expect(divide || Simd::differ(rounded.apart, Simd::set_int(0)), 0)) codes = divided();
    codes = Simd::min_bytes(Simd::max_bytes(Simd::order_lanes(codes), least, Code{}), most, Code{});
    return Simd::xor_bits(codes, flip);
  }
};

// Codes of vector `kQuarter` of four; the first n of them.
template <int kQuarter, bool kWhole, class S = Simd>
QO_INLINE void store_codes(Code* y, typename S::I codes, int64_t n) {
  if (kWhole || n >= S::N) {
    S::template store_quarter<kQuarter>(y, codes);
  } else if constexpr (S::kMasks) {
    S::template store_quarter<kQuarter>(y, codes, n > 0 ? n : 0);
  } else if (n > 0) {
    Code part[S::N];
    S::template store_quarter<kQuarter>(part, codes);
    __builtin_memcpy(y, part, static_cast<size_t>(n));
  }
}

struct Nothing {
  Nothing() = default;
  QO_INLINE explicit Nothing(const TileOutput&) {}
};
template <class Y, bool kShared>
using ColumnOf = std::conditional_t<sizeof(Y) == 1, StepsVector<kShared>, ColumnVector<kShared>>;
template <class Y>
using Rounding = std::conditional_t<sizeof(Y) == 1, Requantize, Nothing>;

// A block is kRows rows of kVectors vectors. sum(r, v) gives what a vector of Column starts from; both arguments are Int<>. `row`
// is the place of the first row in the tile, `column` that of the first column.

// Vector i of a block; the last one stands in for those beyond, of four.
template <int kRows, int kVectors, class Sum>
QO_INLINE auto vector_of(const Sum& sum, auto i) {
  constexpr int kLast = kRows * kVectors - 1, at = i.value < kLast ? i.value : kLast;
  static_assert(kLast < 4, "codes are made four vectors at a time");
  return sum(Int<at / kVectors>{}, Int<at % kVectors>{});
}

// The first half of the work for codes, whose results the second one needs only later.
template <int kRows, int kVectors, class Column, class Sum>
QO_INLINE Requantize::Rounded round_block(const TileOutput& o, const Requantize& rounding, const Column (&columns)[kVectors],
                                          int64_t row, const Sum& sum) {
  const auto value = [&](auto r, auto v) QO_LAMBDA { return columns[v.value].value(o, row + r.value, sum(r, v)); };
  return rounding.round([&](auto i) QO_LAMBDA { return vector_of<kRows, kVectors>(value, i); });
}

// The second half: stores them at y, rows y_stride apart. kWhole: all columns are valid, else the first `valid` of them.
template <int kRows, int kVectors, bool kWhole, class Column, class Sum>
QO_INLINE void store_block(const TileOutput& o, const Requantize& rounding, const Requantize::Rounded& rounded, int64_t column,
                           Code* y, int64_t y_stride, int64_t row, int64_t valid, const Sum& sum) {
  constexpr int64_t N = Simd::N;
  const auto codes = rounding.codes(rounded, [&]() QO_LAMBDA {
    using Exact = typename Column::Exact;
    alignas(64) typename Exact::From sums[4 * N];
    unroll<4>([&](auto i) QO_LAMBDA { Exact::store(sums + i.value * N, vector_of<kRows, kVectors>(sum, i)); });
    return divided_codes<Exact, kVectors, kRows>(o, column, row, sums);
  });
  if constexpr (kWhole && kVectors == 4) {
    Simd::store_codes(y, codes);
  } else {
    unroll<kRows * kVectors>([&](auto i) QO_LAMBDA {
      constexpr int64_t at = i.value % kVectors * N;
      store_codes<i.value, kWhole>(y + i.value / kVectors * y_stride + at, codes, valid - at);
    });
  }
}

template <class Y, int kRows, int kVectors, bool kWhole, class Column, class Sum>
QO_INLINE void finish_block(const TileOutput& o, const Rounding<Y>& rounding, const Column (&columns)[kVectors], int64_t column,
                            Y* y, int64_t y_stride, int64_t row, int64_t valid, const Sum& sum) {
  constexpr int64_t N = Simd::N;
  if constexpr (sizeof(Y) == 1) {
    const auto rounded = round_block<kRows, kVectors>(o, rounding, columns, row, sum);
    store_block<kRows, kVectors, kWhole, Column>(o, rounding, rounded, column, y, y_stride, row, valid, sum);
  } else {
    unroll<kRows>([&](auto r) QO_LAMBDA {
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        Y* const to = y + r.value * y_stride + v.value * N;
        const int64_t n = kWhole ? N : valid - v.value * N;
        if constexpr (std::is_same_v<Y, int32_t>)  // the sum itself
          store_part(to, columns[v.value].corrected(o, row + r.value, sum(r, v)), n);
        else  // a NaN passes
          store_part(to, Simd::max(Simd::set(o.floor), columns[v.value].value(o, row + r.value, sum(r, v))), n);
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
    const auto finish = [&](const auto& sum) QO_LAMBDA {
      finish_block<Y, count.value, kVectors, kWhole>(o, rounding, columns, n, static_cast<Y*>(o.y) + row * o.y_stride + n,
                                                     o.y_stride, row, o.columns - n, sum);
    };
    const auto sum = [&](auto r, auto v) QO_LAMBDA { return Column::load(from + r.value * stride + v.value * Simd::N); };
    if constexpr (requires { columns[0].before; }) {
      alignas(64) float values[4 * Simd::N];
      const auto value = [&](auto r, auto v) QO_LAMBDA { return columns[v.value].before.value(o, row + r.value, sum(r, v)); };
      unroll<4>([&](auto i) QO_LAMBDA { Simd::store(values + i.value * Simd::N, vector_of<count.value, kVectors>(value, i)); });
      apply_four(o.extras->function, values);
      finish([&](auto r, auto v) QO_LAMBDA { return Simd::load(values + (r.value * kVectors + v.value) * Simd::N); });
    } else {
      finish(sum);
    }
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
  with_result_type(o.dtype, [&](auto* type) QO_LAMBDA {
    using Y = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<Y, int32_t>)
      finish_typed<Y, std::conditional_t<sizeof(Y) == 1, InSteps<FinishedVector, false>, FinishedVector>>(o, values, rows, stride);
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
void add_residual(const TileOutput& o, const int32_t* sums, int64_t rows, int64_t stride) {
  const auto run = [&](auto shared) QO_LAMBDA {
    if constexpr (sizeof(Y) == 1 && sizeof(R) > 1) {
      using Column = ColumnVector<shared.value != 0>;
      using Whole = InSteps<ResidualVector<Column, R, true>, false>;
      finish_typed<Y, Whole, InSteps<ResidualVector<Column, R, false>, false>>(o, sums, rows, stride);
    } else {
      using Column = ColumnOf<Y, shared.value != 0>;
      finish_typed<Y, ResidualVector<Column, R, true>, ResidualVector<Column, R, false>>(o, sums, rows, stride);
    }
  };
  return o.shared ? run(Int<1>{}) : run(Int<0>{});
}

QO_INLINE void finish_functions(const TileOutput& o, const int32_t* sums, int64_t rows, int64_t stride) {
  with_result_type(o.dtype, [&](auto* type) QO_LAMBDA {
    using Y = std::remove_pointer_t<decltype(type)>;
    using Finished = std::conditional_t<sizeof(Y) == 1, InSteps<FinishedVector>, FinishedVector>;
    if constexpr (!std::is_same_v<Y, int32_t>)
      o.shared ? finish_typed<Y, AnyFunctionVector<true, Finished>>(o, sums, rows, stride)
               : finish_typed<Y, AnyFunctionVector<false, Finished>>(o, sums, rows, stride);
  });
}

__attribute__((noinline)) void finish_extras(const TileOutput& o, const int32_t* sums, int64_t rows, int64_t stride) {
  if (o.residual == nullptr) return finish_functions(o, sums, rows, stride);
  const DType residual = o.extras->residual_dtype;
  if (o.extras->function == Function::kNone) {
    if (dtype_bytes(o.dtype) == 1 && residual == DType::kInt8) return add_residual<Code, int8_t>(o, sums, rows, stride);
    if (dtype_bytes(o.dtype) == 1 && residual == DType::kUInt8) return add_residual<Code, uint8_t>(o, sums, rows, stride);
    if (dtype_bytes(o.dtype) == 1 && residual == DType::kFloat32) return add_residual<Code, float>(o, sums, rows, stride);
    if (o.dtype == DType::kFloat32 && residual == DType::kFloat32) return add_residual<float, float>(o, sums, rows, stride);
  }
  alignas(64) float values[kMaxGemmRows * kPanel];
  const TileOutput plain = plain_output(o, values, kPanel);
  o.shared ? finish_typed<float, ColumnVector<true>>(plain, sums, rows, stride)
           : finish_typed<float, ColumnVector<false>>(plain, sums, rows, stride);
  finish_values(o, values, rows, kPanel);
}

// A tile whose sums are in memory: [rows][stride]. Not inlined: the accumulators of a tile leave no registers for it, and the code
// of the tiles stays small.
__attribute__((noinline)) void finish_sums(const TileOutput& o, const int32_t* sums, int64_t rows, int64_t stride) {
  if (o.extras != nullptr) return finish_extras(o, sums, rows, stride);
  with_result_type(o.dtype, [&](auto* type) QO_LAMBDA {
    using Y = std::remove_pointer_t<decltype(type)>;
    o.shared ? finish_typed<Y, ColumnOf<Y, true>>(o, sums, rows, stride)
             : finish_typed<Y, ColumnOf<Y, false>>(o, sums, rows, stride);
  });
}

// Codes of a whole tile in registers whose rows share their scale: several rows at a time, so that there are four vectors.
template <int kRows, int kVectors, class Sum>
QO_INLINE void finish_codes(const TileOutput& o, const Sum& sum) {
  constexpr int64_t N = Simd::N;
  constexpr int kMost = 4 / kVectors, kTogether = kMost < kRows ? kMost : kRows;
  const Requantize rounding(o);
  StepsVector<true> columns[kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA { columns[v.value] = StepsVector<true>(o, v.value * N); });
  unroll<(kRows + kTogether - 1) / kTogether>([&](auto i) QO_LAMBDA {
    constexpr int kBehind = kRows - kTogether, first = i.value * kTogether < kBehind ? i.value * kTogether : kBehind;
    finish_block<Code, kTogether, kVectors, true>(o, rounding, columns, 0, static_cast<Code*>(o.y) + first * o.y_stride, o.y_stride,
                                                  first, kVectors * N,
                                                  [&](auto r, auto v) QO_LAMBDA { return sum(Int<first + r.value>{}, v); });
  });
}

// A tile in registers. A whole tile of float32 is finished there, columns in the outer loop and rows in the inner one, which needs
// few more registers, and if there are 32 of them one of codes; everything else goes through memory.
template <int kRows, int kVectors, class Sum>
QO_INLINE void finish_tile(const TileOutput& o, const Sum& sum) {
  constexpr int64_t N = Simd::N;
  const bool whole = o.extras == nullptr && o.columns >= kVectors * N;
  if (o.dtype == DType::kFloat32 && whole) {
    const auto columns = [&](auto shared) QO_LAMBDA {
      using Column = ColumnVector<shared.value != 0>;
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        const Column column[1] = {Column(o, v.value * N)};
        finish_block<float, kRows, 1, true>(o, Nothing(o), column, 0, static_cast<float*>(o.y) + v.value * N, o.y_stride, 0, N,
                                            [&](auto r, auto) QO_LAMBDA { return sum(r, v); });
      });
    };
    return o.shared ? columns(Int<1>{}) : columns(Int<0>{});
  }
  if constexpr (Simd::kRegisters >= 32 && kVectors <= 4)
    if (dtype_bytes(o.dtype) == 1 && whole && o.shared) return finish_codes<kRows, kVectors>(o, sum);
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

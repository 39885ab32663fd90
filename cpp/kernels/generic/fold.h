// What becomes of the exact sum of a group (GroupFold in table.h): corrected by zero points in int32, then one fused multiply-add.
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

// Which corrections there are. Of four bits every sum has one, since the unsigned nibble is the code plus 8.
enum class Folds {
  kNibbles,         // 8 times the sum of the row's codes
  kShiftedNibbles,  // and the row's zero point times the sum of the weight's codes
  kAny,             // what is not null
};

inline Folds nibble_folds(const GroupFold& f) {
  if (f.zero != nullptr || f.float_zero != nullptr) return Folds::kAny;
  return f.code_sum != nullptr ? Folds::kShiftedNibbles : Folds::kNibbles;
}

// Vector at column n of row r and group g.
template <Folds kFolds = Folds::kAny>
QO_INLINE typename Simd::F fold_sum(const GroupFold& f, int64_t g, int64_t r, int64_t n, typename Simd::I sum, typename Simd::F y) {
  const int64_t at = g * f.stride + n;
  const auto row_scale = Simd::set(f.row_scale[r]);
  auto row_sum = Simd::set_int(0);
  if constexpr (kFolds != Folds::kAny) {
    sum = Simd::sub(sum, Simd::shift_left(Simd::set_int(f.row_sum[r * f.groups + g]), 3));
  } else if (f.row_sum != nullptr) {
    row_sum = Simd::set_int(f.row_sum[r * f.groups + g]);
    auto zero = Simd::set_int(f.offset);
    if (f.zero != nullptr) zero = Simd::add(zero, Simd::load_int(f.zero + at));
    sum = Simd::sub(sum, Simd::mul(zero, row_sum));
  }
  if (kFolds == Folds::kShiftedNibbles || (kFolds == Folds::kAny && f.code_sum != nullptr))
    sum = Simd::sub(sum, Simd::mul(Simd::set_int(f.row_zero[r]), Simd::load_int(f.code_sum + at)));
  y = Simd::fma(Simd::to_float(sum), Simd::mul(row_scale, Simd::load(f.scale + at)), y);
  if (kFolds == Folds::kAny && f.float_zero != nullptr)
    y = Simd::fma(Simd::to_float(row_sum), Simd::mul(row_scale, Simd::load(f.float_zero + at)), y);
  return y;
}

}  // namespace
}  // namespace quant_ops::QO_ISA

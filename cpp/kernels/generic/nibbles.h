// Rows of signed codes by 16 columns of a weight of four bits (NibbleTile in table.h), written once. Nibbles become bytes in
// registers: they are unsigned, the code plus 8, so that the instruction multiplies unsigned by signed bytes, and 8 times the sum
// of the row's codes is subtracted with the zero points, a group at a time. `Dot` gives
//   I add(I sum, const int8_t* a, const I (&w)[4])   adds sixteen k to every column: w[i] holds four of them, of which lane n has
//                                                    those of column n, and belongs to a[4 i .. 4 i + 3]
#pragma once

#include "kernels/generic/fold.h"
#include "kernels/generic/unroll.h"

namespace quant_ops::QO_ISA {
namespace {

constexpr int64_t kNibblesAhead = 4096;  // bytes of the weight fetched ahead: a few rows are bound by memory
constexpr int kFewSums = 4;              // with so few, each sixteen k start a chain of additions of their own

// kVectors vectors of columns from column n on.
template <class Dot, int kRows, int kVectors, Folds kFolds>
QO_INLINE void nibble_sweep(const NibbleTile& t, int64_t n) {
  using I = typename Simd::I;
  using F = typename Simd::F;
  constexpr bool kFew = kRows * kVectors <= kFewSums;  // the results stay in registers
  const auto each = [&](const auto& f) QO_LAMBDA {
    unroll<kRows>([&](auto r) QO_LAMBDA { unroll<kVectors>([&](auto v) QO_LAMBDA { f(r, v); }); });
  };
  const auto result = [&](auto r, auto v) QO_LAMBDA { return t.y + r.value * t.y_stride + n + v.value * Simd::N; };
  constexpr int64_t kOctetBytes = kNibbleColumns * kQuad;
  const I low = Simd::set_bytes(0x0f);
  const int8_t* b = t.b + n * kQuad;
  const int8_t* a[kRows];
  unroll<kRows>([&](auto r) QO_LAMBDA { a[r.value] = t.a + r.value * t.a_stride; });
  F y[kRows][kVectors];
  if constexpr (kFew) each([&](auto r, auto v) QO_LAMBDA { y[r.value][v.value] = Simd::load(result(r, v)); });
  int64_t k = 0;
  for (int64_t g = 0; g < t.fold.groups; ++g) {
    const int64_t end = t.k - k < t.group ? t.k : k + t.group;
    I sum[kRows][kVectors];
    each([&](auto r, auto v) QO_LAMBDA { sum[r.value][v.value] = Simd::set_int(0); });
    for (; k < end; k += kNibbleStep, b += 2 * kOctetBytes) {
      I w[kVectors][4];
      unroll<2>([&](auto octet) QO_LAMBDA { __builtin_prefetch(b + octet.value * kOctetBytes + kNibblesAhead); });
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        unroll<2>([&](auto octet) QO_LAMBDA {
          const I both =
              Simd::load_int(reinterpret_cast<const int32_t*>(b + octet.value * kOctetBytes + v.value * Simd::N * kQuad));
          w[v.value][2 * octet.value] = Simd::and_bits(both, low);
          w[v.value][2 * octet.value + 1] = Simd::and_bits(Simd::shift_right(both, 4), low);
        });
      });
      each([&](auto r, auto v) QO_LAMBDA {
        I& to = sum[r.value][v.value];
        if constexpr (kFew)
          to = Simd::add(to, Dot::add(Simd::set_int(0), a[r.value] + k, w[v.value]));
        else
          to = Dot::add(to, a[r.value] + k, w[v.value]);
      });
    }
    each([&](auto r, auto v) QO_LAMBDA {
      const F before = kFew ? y[r.value][v.value] : Simd::load(result(r, v));
      const F after = fold_sum<kFolds>(t.fold, g, r.value, n + v.value * Simd::N, sum[r.value][v.value], before);
      if constexpr (kFew)
        y[r.value][v.value] = after;
      else
        Simd::store(result(r, v), after);
    });
  }
  if constexpr (kFew) each([&](auto r, auto v) QO_LAMBDA { Simd::store(result(r, v), y[r.value][v.value]); });
}

template <class Dot, int kRows, int kVectors, Folds kFolds>
QO_INLINE void nibble_sweeps(const NibbleTile& t) {
  for (int64_t n = 0; n < kNibbleColumns; n += kVectors * Simd::N) nibble_sweep<Dot, kRows, kVectors, kFolds>(t, n);
}

template <class Dot, int kRows, int kVectors>
QO_INLINE void nibble_tile(const NibbleTile& t) {
  switch (nibble_folds(t.fold)) {
    case Folds::kNibbles: return nibble_sweeps<Dot, kRows, kVectors, Folds::kNibbles>(t);
    case Folds::kShiftedNibbles: return nibble_sweeps<Dot, kRows, kVectors, Folds::kShiftedNibbles>(t);
    case Folds::kAny: return nibble_sweeps<Dot, kRows, kVectors, Folds::kAny>(t);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

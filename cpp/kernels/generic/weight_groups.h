// Weights in groups: sums of a group folded into float32, weights dequantized a chunk at a time and multiplied in float32, and rows
// of floats stored as the result's dtype.
#pragma once

#include "kernels/generic/fold.h"
#include "kernels/generic/partial.h"
#include "kernels/generic/unroll.h"

namespace quant_ops::QO_ISA {
namespace {

void fold(const FoldRun& t) {
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t n = 0; n < t.columns; n += Simd::N) {
      float* y = t.y + r * t.stride + n;
      Simd::store(y, fold_sum(t.fold, t.group, r, n, Simd::load_int(t.sums + r * t.stride + n), Simd::load(y)));
    }
}

int32_t sum_codes(uint8_t* codes, int64_t n, bool flip) {
  const auto sign = Simd::set_bytes(0x80), kept = flip ? sign : Simd::set_int(0);
  auto sum = Simd::set_int(0);
  int64_t k = 0;
  for (; k + Simd::N * kQuad <= n; k += Simd::N * kQuad) {
    int32_t lanes[Simd::N];
    __builtin_memcpy(lanes, codes + k, sizeof(lanes));
    const auto v = Simd::load_int(lanes);
    sum = Simd::add(sum, Simd::sum_bytes(Simd::xor_bits(v, sign)));
    Simd::store_codes(codes + k, Simd::xor_bits(v, kept));
  }
  int32_t lanes[Simd::N], total = static_cast<int32_t>(128 * k);
  Simd::store(lanes, sum);
  for (int32_t lane : lanes) total += lane;
  for (; k < n; ++k) {
    total += codes[k];
    if (flip) codes[k] ^= 0x80u;
  }
  return total;
}

// ---- float32 ----------------------------------------------------------------------------------------------------------

template <class T>
QO_INLINE void widen_typed(const T* x, int64_t n, float* to) {
  for (int64_t k = 0; k < n; k += Simd::N) store_part(to + k, load_part(x + k, n - k), n - k);
}

void widen(const void* x, DType dtype, int64_t n, float* to) {
  dtype == DType::kFloat16 ? widen_typed(static_cast<const Half*>(x), n, to) : widen_typed(static_cast<const BFloat16*>(x), n, to);
}

// A lane for every column holds the unsigned codes of k to k + 7 (4 bits) or k + 3 (8 bits). bits<i>() is that of k + i, times
// 2 ^ few_shift.
template <int kBits>
struct Octet {
  typename Simd::I low, high;  // the lane, and its upper half shifted down

  QO_INLINE Octet(const WeightChunk& t, int64_t n, int64_t k) {
    const int8_t* b = t.octet(n, k);
    low = Simd::load_int(reinterpret_cast<const int32_t*>(b));
    if constexpr (kBits == 8) low = Simd::xor_bits(low, Simd::set_bytes(0x80));
    high = Simd::shift_right(low, 16);
  }

  template <int kK>
  QO_INLINE typename Simd::I bits() const {
    const auto mask = Simd::set_int((kBits == 4 ? 0x0f : 0xff) << few_shift(kBits, kK));
    return Simd::and_bits(kK % 4 < 2 ? low : high, mask);
  }
};

// The unsigned code that stands for 0, or, with float_zero, for q = 0.
template <int kBits>
QO_INLINE typename Simd::F code_of_zero(const WeightChunk& t, int64_t n) {
  const auto offset = Simd::set_int(kBits == 4 ? 8 : 128);
  return Simd::to_float(t.zero != nullptr ? Simd::add(offset, Simd::load_int(t.zero + n)) : offset);
}

// k of a vector of columns that are unpacked at once.
template <int kBits>
constexpr int kUnpacked = 32 / kBits;

template <int kBits, bool kFloatZero>
QO_INLINE void expand_typed(const WeightChunk& t, float* w) {
  for (int64_t n = 0; n < kNibbleColumns; n += Simd::N) {
    const auto zero = code_of_zero<kBits>(t, n), scale = Simd::load(t.scale + n);
    const auto float_zero = Simd::load((kFloatZero ? t.float_zero : t.scale) + n);
    for (int64_t k = t.first; k < t.last; k += kUnpacked<kBits>) {  // beyond `last` into the padding of w
      const Octet<kBits> octet(t, n, k);
      float* to = w + (k - t.first) * kNibbleColumns + n;
      unroll<kUnpacked<kBits>>([&](auto i) QO_LAMBDA {
        constexpr float kFactor = few_factor(kBits, i.value);
        const auto code = Simd::mul(Simd::to_float(octet.template bits<i.value>()), Simd::set(kFactor));
        const auto steps = Simd::sub(code, zero);
        Simd::store(to + i.value * kNibbleColumns, kFloatZero ? Simd::fma(steps, scale, float_zero) : steps);
      });
    }
  }
}

void expand(const WeightChunk& t, float* w) {
  if (t.bits == 4)
    t.float_zero ? expand_typed<4, true>(t, w) : expand_typed<4, false>(t, w);
  else
    t.float_zero ? expand_typed<8, true>(t, w) : expand_typed<8, false>(t, w);
}

constexpr int64_t kFewAhead = 2048;  // bytes of the weight fetched ahead

// kVectors vectors of columns from column n on. The order of the sums is that of float_tile.
template <int kBits, bool kFloatZero, int kRows, int kVectors>
QO_INLINE void few_columns(const FewRows& t, int64_t n) {
  constexpr int64_t N = Simd::N;
  const WeightChunk& c = t.weight;
  typename Simd::F sum[kRows][kVectors];
  unroll<kRows>([&](auto r) QO_LAMBDA { unroll<kVectors>([&](auto v) QO_LAMBDA { sum[r.value][v.value] = Simd::set(0.0f); }); });
  constexpr int kShifts = kBits == 4 ? 4 : 2;
  alignas(64) float zeros[kVectors][kShifts][N];  // times 2 ^ shift
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    const auto zero = code_of_zero<kBits>(c, n + v.value * N);
    unroll<kShifts>([&](auto s) QO_LAMBDA {
      Simd::store(zeros[v.value][s.value], Simd::mul(zero, Simd::set(static_cast<float>(1 << s.value * 16 / kShifts))));
    });
  });
  for (int64_t k = c.first; k < c.last; k += kUnpacked<kBits>)  // beyond `last` a is zero
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      const Octet<kBits> octet(c, n + v.value * N, k);
      __builtin_prefetch(c.octet(n + v.value * N, k) + kFewAhead);
      unroll<kUnpacked<kBits>>([&](auto i) QO_LAMBDA {
        constexpr int kShift = few_shift(kBits, i.value);
        auto w = Simd::sub(Simd::to_float(octet.template bits<i.value>()), Simd::load(zeros[v.value][kShift * kShifts / 16]));
        if constexpr (kFloatZero) {
          const auto float_zero = Simd::load(c.float_zero + n + v.value * N);
          w = Simd::fma(w, Simd::load(c.scale + n + v.value * N),
                        Simd::mul(float_zero, Simd::set(static_cast<float>(1 << kShift))));
        }
        unroll<kRows>([&](auto r) QO_LAMBDA {
          sum[r.value][v.value] = Simd::fma(Simd::set(t.a[r.value * t.a_stride + k + i.value]), w, sum[r.value][v.value]);
        });
      });
    });
  unroll<kRows>([&](auto r) QO_LAMBDA {
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      const int64_t column = n + v.value * N;
      float* y = t.y + r.value * t.y_stride + column;
      const auto scale = kFloatZero ? Simd::set(1.0f) : Simd::load(c.scale + column);
      Simd::store(y, Simd::fma(sum[r.value][v.value], scale, Simd::load(y)));
    });
  });
}

// One or two rows take more vectors of columns at once, so that enough sums are independent.
template <int kBits, bool kFloatZero>
void few_typed(const FewRows& t, int64_t rows) {
  constexpr int kBlock = Simd::N == 1 ? 1 : kNibbleColumns / Simd::N;
  constexpr int kWide = Simd::N == 1 ? 1 : Simd::N == 4 ? 8 : 4;
  with_rows<kFewRows>(rows, [&](auto r) QO_LAMBDA {
    int64_t n = 0;
    if constexpr (r.value <= 2 && kWide > kBlock)
      for (; n + kWide * Simd::N <= t.weight.columns; n += kWide * Simd::N) few_columns<kBits, kFloatZero, r.value, kWide>(t, n);
    for (; n < t.weight.columns; n += kBlock * Simd::N) few_columns<kBits, kFloatZero, r.value, kBlock>(t, n);
  });
}

void few_rows(const FewRows& t, int64_t rows) {
  if (t.weight.bits == 4)
    t.weight.float_zero ? few_typed<4, true>(t, rows) : few_typed<4, false>(t, rows);
  else
    t.weight.float_zero ? few_typed<8, true>(t, rows) : few_typed<8, false>(t, rows);
}

template <int kRows>
QO_INLINE void float_rows(const FloatTile& t) {
  constexpr int kVectors = kNibbleColumns / Simd::N;
  typename Simd::F sum[kRows][kVectors];
  unroll<kRows>([&](auto r) QO_LAMBDA { unroll<kVectors>([&](auto v) QO_LAMBDA { sum[r.value][v.value] = Simd::set(0.0f); }); });
  const float* w = t.w;
  for (int64_t k = 0; k < t.k; ++k, w += kNibbleColumns) {
    typename Simd::F wv[kVectors];
    unroll<kVectors>([&](auto v) QO_LAMBDA { wv[v.value] = Simd::load(w + v.value * Simd::N); });
    unroll<kRows>([&](auto r) QO_LAMBDA {
      const auto a = Simd::set(t.a[r.value * t.a_stride + k]);
      unroll<kVectors>([&](auto v) QO_LAMBDA { sum[r.value][v.value] = Simd::fma(a, wv[v.value], sum[r.value][v.value]); });
    });
  }
  unroll<kRows>([&](auto r) QO_LAMBDA {
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      float* y = t.y + r.value * t.y_stride + v.value * Simd::N;
      Simd::store(y, Simd::fma(sum[r.value][v.value], Simd::load(t.column_scale + v.value * Simd::N), Simd::load(y)));
    });
  });
}

void float_tile(const FloatTile& t, int64_t rows) {
  with_rows<kFloatRows>(rows, [&](auto r) QO_LAMBDA { float_rows<r.value>(t); });
}

// ---- the result -------------------------------------------------------------------------------------------------------

template <class Y>
QO_INLINE void store_rows(const StoreRun& t) {
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t n = 0; n < t.columns; n += Simd::N)
      store_part(static_cast<Y*>(t.y) + r * t.y_stride + n, Simd::load(t.from + r * t.from_stride + n), t.columns - n);
}

void store(const StoreRun& t) {
  switch (t.dtype) {
    case DType::kFloat32: return store_rows<float>(t);
    case DType::kFloat16: return store_rows<Half>(t);
    default: return store_rows<BFloat16>(t);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

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

// ---- float32 ----------------------------------------------------------------------------------------------------------

template <class T>
QO_INLINE void widen_typed(const T* x, int64_t n, float* to) {
  for (int64_t k = 0; k < n; k += Simd::N) store_part(to + k, load_part(x + k, n - k), n - k);
}

void widen(const void* x, DType dtype, int64_t n, float* to) {
  dtype == DType::kFloat16 ? widen_typed(static_cast<const Half*>(x), n, to)
                           : widen_typed(static_cast<const BFloat16*>(x), n, to);
}

// Four bytes of a lane, k = 0 .. 3, each an unsigned code that is too large by `offset`, to four vectors of floats.
struct Dequantizer {
  typename Simd::F scale, shift;
  bool zero_is_float;

  // One fused multiply-add where the zero point is a float, else an exact difference and one product.
  QO_INLINE Dequantizer(const ExpandRun& t, int64_t n, int32_t offset) : scale(Simd::load(t.scale + n)) {
    zero_is_float = t.float_zero != nullptr;
    shift = Simd::to_float(t.zero ? Simd::add(Simd::set_int(offset), Simd::load_int(t.zero + n)) : Simd::set_int(offset));
    float_zero = zero_is_float ? Simd::load(t.float_zero + n) : scale;
  }

  QO_INLINE typename Simd::F operator()(typename Simd::I code) const {
    const auto steps = Simd::sub(Simd::to_float(code), shift);
    return zero_is_float ? Simd::fma(steps, scale, float_zero) : Simd::mul(steps, scale);
  }

 private:
  typename Simd::F float_zero;
};

QO_INLINE void expand_columns(const ExpandRun& t, int64_t n) {
  const auto load = [&](const int8_t* p) QO_LAMBDA { return Simd::load_int(reinterpret_cast<const int32_t*>(p)); };
  const auto store = [&](int64_t k, auto value) QO_LAMBDA {
    if (k < t.last) Simd::store(t.w + (k - t.first) * kNibbleColumns + n, value);
  };
  if (t.bits == 4) {
    const Dequantizer value(t, n, 8);
    const auto low = Simd::set_int(0x0f);
    for (int64_t k = t.first; k < t.last; k += 2 * kQuad) {
      const auto bytes = load(t.b + (k / 8 * kNibbleColumns + n) * kQuad);
      unroll<4>([&](auto i) QO_LAMBDA {
        store(k + i.value, value(Simd::and_bits(Simd::shift_right(bytes, 8 * i.value), low)));
        store(k + i.value + 4, value(Simd::and_bits(Simd::shift_right(bytes, 8 * i.value + 4), low)));
      });
    }
  } else {
    const Dequantizer value(t, n, 128);
    const auto low = Simd::set_int(0xff), sign = Simd::set_int(static_cast<int32_t>(0x80808080u));
    for (int64_t k = t.first; k < t.last; k += kQuad) {
      const auto bytes = Simd::xor_bits(load(t.b + k / kQuad * t.quad_step + n * kQuad), sign);
      unroll<4>([&](auto i)
                    QO_LAMBDA { store(k + i.value, value(Simd::and_bits(Simd::shift_right(bytes, 8 * i.value), low))); });
    }
  }
}

void expand(const ExpandRun& t) {
  for (int64_t n = 0; n < kNibbleColumns; n += Simd::N) expand_columns(t, n);
}

template <int kRows>
QO_INLINE void float_rows(const FloatTile& t) {
  constexpr int kVectors = kNibbleColumns / Simd::N;
  typename Simd::F sum[kRows][kVectors];
  unroll<kRows>([&](auto r)
                    QO_LAMBDA { unroll<kVectors>([&](auto v) QO_LAMBDA { sum[r.value][v.value] = Simd::set(0.0f); }); });
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
      float* y = t.y + r.value * kNibbleColumns + v.value * Simd::N;
      Simd::store(y, Simd::add(Simd::load(y), sum[r.value][v.value]));
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

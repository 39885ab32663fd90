// The elements of quantize_affine and dequantize_affine (contract/affine.h), where all dtypes are of float32 or narrower. A result
// that torch holds in a narrower dtype is rounded to it before the next operation.
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

// The nearest number of T. A NaN of these kernels has zeros in its low half (AffineRun), so that adding to its bits leaves it NaN.
template <class T>
QO_INLINE typename Simd::F rounded_to(typename Simd::F v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = Simd::bits(v), odd = Simd::and_bits(Simd::shift_right(bits, 16), Simd::set_int(1));
    const auto sum = Simd::add(bits, Simd::add(odd, Simd::set_int(0x7fff)));
    return Simd::as_float(Simd::and_bits(sum, Simd::set_int(static_cast<int32_t>(0xffff0000u))));
  } else {
    T narrow[Simd::N];
    Simd::store(narrow, v);
    return Simd::load(narrow);
  }
}

// The factors and offsets of a row's elements: one for all, or (kVary) one each.
template <bool kVary>
struct BlockParameters {
  const float* factors;
  const float* offsets;
  typename Simd::F factor_of_row, offset_of_row;

  QO_INLINE BlockParameters(const AffineRun& r, int64_t row)
      : factors(r.factor + row * r.block_row),
        offsets(r.offset + row * r.block_row),
        factor_of_row(Simd::set(*factors)),
        offset_of_row(Simd::set(*offsets)) {}
  QO_INLINE typename Simd::F factor(int64_t i) const { return kVary ? Simd::load(factors + i) : factor_of_row; }
  QO_INLINE typename Simd::F offset(int64_t i) const { return kVary ? Simd::load(offsets + i) : offset_of_row; }
};

// Calls vectors(from, to, i, parameters, Int<k>) for k vectors at a time, the first of which begins with element i of a row. The
// end of a row is a last vector that overlaps the one before; a row shorter than a vector passes through one on the stack.
template <bool kVary, class From, class To, class Vectors>
QO_INLINE void for_each_affine_row(const AffineRun& r, const Vectors& vectors) {
  constexpr int64_t N = Simd::N;
  for (int64_t row = 0; row < r.rows; ++row) {
    const From* const from = static_cast<const From*>(r.from) + row * r.from_row;
    To* const to = static_cast<To*>(r.to) + row * r.to_row;
    if (r.n >= N) {
      const BlockParameters<kVary> parameters(r, row);
      int64_t i = 0;
      for (; i + 4 * N <= r.n; i += 4 * N) vectors(from + i, to + i, i, parameters, Int<4>{});
      for (; i < r.n; i += N) {
        const int64_t at = i < r.n - N ? i : r.n - N;
        vectors(from + at, to + at, at, parameters, Int<1>{});
      }
      continue;
    }
    From from_part[N] = {};
    To to_part[N];
    float factors[N] = {}, offsets[N] = {};
    AffineRun part = r;
    for (int64_t i = 0; i < r.n; ++i) from_part[i] = from[i];
    if constexpr (kVary) {
      for (int64_t i = 0; i < r.n; ++i) {
        factors[i] = r.factor[row * r.block_row + i];
        offsets[i] = r.offset[row * r.block_row + i];
      }
      part.factor = factors;
      part.offset = offsets;
      part.block_row = 0;
    }
    vectors(from_part, to_part, 0, BlockParameters<kVary>(part, row), Int<1>{});
    for (int64_t i = 0; i < r.n; ++i) to[i] = to_part[i];
  }
}

// T: the dtype of the operations.
template <class X, class Q, class T, bool kFloatDomain, bool kVary>
void quantize_affine_rows(const AffineRun& r) {
  using F = typename Simd::F;
  const F lo = Simd::set(r.lo), hi = Simd::set(r.hi), too_large = Simd::set(0x1p31f), least_int = Simd::set(-0x1p31f);
  for_each_affine_row<kVary, X, Q>(
      r, [&](const X* x, Q* q, int64_t i, const BlockParameters<kVary>& parameters, auto count) QO_LAMBDA {
        typename Simd::I codes[count.value];
        unroll<count.value>([&](auto v) QO_LAMBDA {
          constexpr int64_t at = v.value * Simd::N;
          const F factor = parameters.factor(i + at), offset = parameters.offset(i + at);
          F steps = Simd::load(x + at);
          if constexpr (kFloatDomain)
            steps = Simd::round_even(rounded_to<T>(Simd::div(rounded_to<T>(Simd::sub(steps, offset)), factor)));
          else
            steps = rounded_to<T>(Simd::add(Simd::round_even(rounded_to<T>(Simd::mul(steps, factor))), offset));
          steps = Simd::min(hi, Simd::max(lo, steps));  // NaN stays NaN
          if constexpr (std::is_same_v<Q, int32_t>)
            steps = Simd::if_less(steps, too_large, steps, least_int);  // wrapped_int32
          else
            steps = Simd::nan_to_zero(steps);
          codes[v.value] = Simd::to_int(steps);
        });
        if constexpr (count.value == 4 && sizeof(Q) == 1)
          Simd::store_bytes(q, codes[0], codes[1], codes[2], codes[3]);
        else
          unroll<count.value>([&](auto v) QO_LAMBDA { Simd::store(q + v.value * Simd::N, codes[v.value]); });
      });
}

template <class Q, class Y, bool kFloatDomain, bool kVary>
void dequantize_affine_rows(const AffineRun& r) {
  using F = typename Simd::F;
  const F mid = Simd::set(r.mid);
  for_each_affine_row<kVary, Q, Y>(
      r, [&](const Q* q, Y* y, int64_t i, const BlockParameters<kVary>& parameters, auto count) QO_LAMBDA {
        unroll<count.value>([&](auto v) QO_LAMBDA {
          constexpr int64_t at = v.value * Simd::N;
          const F factor = parameters.factor(i + at), offset = parameters.offset(i + at);
          const F code = Simd::to_float(Simd::load_int(q + at));
          F value;
          if constexpr (kFloatDomain) {
            value = Simd::add(rounded_to<Y>(Simd::mul(rounded_to<Y>(Simd::sub(code, mid)), factor)), offset);
          } else {
            // float16 and bfloat16 have all codes of 8 bits
            using Codes = std::conditional_t<sizeof(Q) == 1, float, Y>;
            value = Simd::mul(rounded_to<Y>(Simd::sub(rounded_to<Codes>(code), offset)), factor);
          }
          Simd::store(y + at, value);
        });
      });
}

template <class X, class Q, class T>
void quantize_affine_typed(const AffineRun& r) {
  if (r.domain == ZeroPointDomain::kFloat)
    return r.step ? quantize_affine_rows<X, Q, T, true, true>(r) : quantize_affine_rows<X, Q, T, true, false>(r);
  r.step ? quantize_affine_rows<X, Q, T, false, true>(r) : quantize_affine_rows<X, Q, T, false, false>(r);
}

template <class X, class T>
void quantize_affine_to(const AffineRun& r) {
  switch (r.to_dtype) {
    case DType::kInt8: return quantize_affine_typed<X, int8_t, T>(r);
    case DType::kUInt8: return quantize_affine_typed<X, uint8_t, T>(r);
    case DType::kInt16: return quantize_affine_typed<X, int16_t, T>(r);
    default: return quantize_affine_typed<X, int32_t, T>(r);
  }
}

void quantize_affine(const AffineRun& r) {
  switch (r.from_dtype) {
    case DType::kFloat32: return quantize_affine_to<float, float>(r);
    case DType::kFloat16: return r.narrow ? quantize_affine_to<Half, Half>(r) : quantize_affine_to<Half, float>(r);
    default: return r.narrow ? quantize_affine_to<BFloat16, BFloat16>(r) : quantize_affine_to<BFloat16, float>(r);
  }
}

template <class Q, class Y>
void dequantize_affine_typed(const AffineRun& r) {
  if (r.domain == ZeroPointDomain::kFloat)
    return r.step ? dequantize_affine_rows<Q, Y, true, true>(r) : dequantize_affine_rows<Q, Y, true, false>(r);
  r.step ? dequantize_affine_rows<Q, Y, false, true>(r) : dequantize_affine_rows<Q, Y, false, false>(r);
}

template <class Q>
void dequantize_affine_from(const AffineRun& r) {
  switch (r.to_dtype) {
    case DType::kFloat32: return dequantize_affine_typed<Q, float>(r);
    case DType::kFloat16: return dequantize_affine_typed<Q, Half>(r);
    default: return dequantize_affine_typed<Q, BFloat16>(r);
  }
}

void dequantize_affine(const AffineRun& r) {
  switch (r.from_dtype) {
    case DType::kInt8: return dequantize_affine_from<int8_t>(r);
    case DType::kUInt8: return dequantize_affine_from<uint8_t>(r);
    case DType::kInt16: return dequantize_affine_from<int16_t>(r);
    default: return dequantize_affine_from<int32_t>(r);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

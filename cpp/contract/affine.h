// The arithmetic of torchao's affine primitives, for host and device. torch rounds the result of every operation to a dtype, that
// of the operands or the wider one, and these functions round where it does, so that all bits are torchao's on a CPU.
//
// What torch casts to integers without a definition is defined here, as x86 does it: a code that its dtype does not hold keeps its
// low bits, and NaN is the smallest integer of 64 bits (of 32 for int32), whose low bits are 0. Read next: cpu/affine.cpp.
#pragma once

#include "contract/ops.h"

namespace quant_ops {

// The nearest number of a dtype. `v` is the result of one operation on numbers of float32, or narrower, that was computed in
// double: rounding it twice is rounding it once, as a double has more than twice the bits.
QO_HD double rounded(double v, DType dtype) {
  if (dtype == DType::kFloat64) return v;
  const float f = static_cast<float>(v);
  if (dtype == DType::kFloat32) return f;
  if (dtype == DType::kBFloat16) {
    BFloat16 b;
    from_compute(f, &b);
    return to_compute(b);
  }
  Half h;
  from_compute(f, &h);
  return to_compute(h);
}

template <class X>
QO_HD float rounded_as(float v) {
  X y;
  from_compute(v, &y);
  return to_compute(y);
}

// The dtype of an operation on two floating tensors.
QO_HD constexpr DType promote(DType a, DType b) {
  if (a == b) return a;
  return a == DType::kFloat64 || b == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// (qmax + qmin + 1) / 2, which torchao calls mid_point: the code at the zero point of the FLOAT domain.
QO_HD double mid_point(int64_t qmin, int64_t qmax) { return static_cast<double>(qmin + qmax + 1) / 2; }

// ---- integers -------------------------------------------------------------------------------------------------------

QO_HD int64_t wrapped_int64(double v) {
  return v >= -0x1p63 && v < 0x1p63 ? static_cast<int64_t>(v) : static_cast<int64_t>(uint64_t{1} << 63);
}
QO_HD int32_t wrapped_int32(double v) { return v >= -0x1p31 && v < 0x1p31 ? static_cast<int32_t>(v) : INT32_MIN; }

QO_HD void store_wrapped(void* to, int64_t at, DType dtype, bool is_int64, double v) {
  const uint64_t bits = static_cast<uint64_t>(wrapped_int64(v));
  if (is_int64)
    static_cast<int64_t*>(to)[at] = wrapped_int64(v);
  else if (dtype == DType::kInt32)
    static_cast<int32_t*>(to)[at] = wrapped_int32(v);
  else if (dtype == DType::kInt16)
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(bits);
  else
    static_cast<uint8_t*>(to)[at] = static_cast<uint8_t>(bits);
}

QO_HD void store_rounded(void* to, int64_t at, DType dtype, double v) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(to)[at] = v; return;
    case DType::kFloat32: static_cast<float*>(to)[at] = static_cast<float>(v); return;
    case DType::kBFloat16: from_compute(static_cast<float>(v), static_cast<BFloat16*>(to) + at); return;
    default: from_compute(static_cast<float>(v), static_cast<Half*>(to) + at); return;
  }
}

QO_HD double load_number(const void* from, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(from)[at];
    case DType::kFloat32: return static_cast<const float*>(from)[at];
    case DType::kBFloat16: return to_compute(static_cast<const BFloat16*>(from)[at]);
    case DType::kFloat16: return to_compute(static_cast<const Half*>(from)[at]);
    case DType::kInt32: return static_cast<const int32_t*>(from)[at];
    case DType::kInt16: return static_cast<const int16_t*>(from)[at];
    case DType::kInt8: return static_cast<const int8_t*>(from)[at];
    default: return static_cast<const uint8_t*>(from)[at];
  }
}

// ---- choosing -------------------------------------------------------------------------------------------------------

struct AffineQParams {
  float scale, zero_point;
};

// From the smallest and the largest element of a block (both NaN if it holds NaN), each operation rounded to X.
template <class X>
QO_HD AffineQParams affine_qparams_of(float min, float max, const AffineChoice& p) {
  const float steps = static_cast<float>(static_cast<double>(static_cast<int64_t>(p.qmax) - p.qmin));
  const float half_steps = static_cast<float>(static_cast<double>(static_cast<int64_t>(p.qmax) - p.qmin) / 2);
  const float lo = p.preserve_zero && min > 0.0f ? 0.0f : min, hi = p.preserve_zero && max < 0.0f ? 0.0f : max;
  float scale;
  if (p.mapping == Mapping::kSymmetric) {
    scale = rounded_as<X>((-lo > hi ? -lo : hi) / half_steps);
  } else if (p.mapping == Mapping::kSymmetricNoClipping) {
    const float below = rounded_as<X>(lo / static_cast<float>(p.qmin)), above = rounded_as<X>(hi / static_cast<float>(p.qmax));
    scale = below > above ? below : above;
  } else {
    scale = rounded_as<X>(rounded_as<X>(hi - lo) / steps);
  }
  if (scale < p.eps) scale = p.eps;  // NaN stays
  if (p.mapping != Mapping::kAsymmetric)
    return {scale, rounded_as<X>(static_cast<float>((static_cast<int64_t>(p.qmin) + p.qmax + 1) / 2))};
  if (p.domain == ZeroPointDomain::kFloat)
    return {scale, rounded_as<X>(lo + rounded_as<X>(scale * static_cast<float>(mid_point(p.qmin, p.qmax))))};
  const float least = rounded_as<X>(static_cast<float>(p.qmin)), most = rounded_as<X>(static_cast<float>(p.qmax));
  float zero_point = rounded_as<X>(least - round_even(rounded_as<X>(lo / scale)));
  if (zero_point < least) zero_point = least;
  if (zero_point > most) zero_point = most;
  return {scale, zero_point};
}

template <class X>
QO_HD void store_affine_qparams(float min, float max, const AffineChoice& p, int64_t block) {
  const AffineQParams q = affine_qparams_of<X>(min, max, p);
  store_rounded(p.scale, block, p.scale_dtype, q.scale);
  if (p.zero_is_floating)
    store_rounded(p.zero_point, block, p.zero_dtype, q.zero_point);
  else
    store_wrapped(p.zero_point, block, p.zero_dtype, p.zero_is_int64, q.zero_point);
}

// ---- quantizing and dequantizing ------------------------------------------------------------------------------------

// What the elements of a block are multiplied (or divided) by, and what is added (or subtracted).
struct AffineBlock {
  double factor, offset;
};

// The dtypes of the operations on elements.
struct AffineDTypes {
  DType product, sum;
};

QO_HD AffineDTypes quantize_affine_dtypes(const AffineParams& p) {
  const DType product = promote(p.from_dtype, p.scale_dtype);
  const DType sum = p.zero_is_integer ? product : promote(product, p.zero_dtype);
  return p.domain == ZeroPointDomain::kFloat ? AffineDTypes{sum, sum} : AffineDTypes{product, sum};
}

QO_HD AffineDTypes dequantize_affine_dtypes(const AffineParams& p) {
  const bool adopts = p.zero_is_integer || p.domain != ZeroPointDomain::kFloat;
  return {promote(p.to_dtype, p.scale_dtype), adopts ? p.to_dtype : promote(p.to_dtype, p.zero_dtype)};
}

// INT: q = rne(x * (1 / scale)) + zero_point.  FLOAT: q = rne((x - (zero_point - scale * mid_point)) / scale).
QO_HD AffineBlock quantize_affine_block(const AffineParams& p, int64_t block) {
  const double scale = load_number(p.scale, block, p.scale_dtype);
  const double zero = p.zero_point == nullptr ? 0.0 : load_number(p.zero_point, block, p.zero_dtype);
  if (p.domain != ZeroPointDomain::kFloat)
    return {rounded(1.0 / scale, p.scale_dtype), p.zero_is_integer ? rounded(zero, quantize_affine_dtypes(p).sum) : zero};
  const double mid = mid_point(p.qmin, p.qmax), step = p.scale_dtype == DType::kFloat64 ? mid : static_cast<float>(mid);
  const double below = rounded(scale * step, p.scale_dtype);
  const double least = (p.zero_is_integer ? rounded(zero, p.scale_dtype) : zero) - below;
  return {scale, rounded(least, p.zero_is_integer ? p.scale_dtype : promote(p.scale_dtype, p.zero_dtype))};
}

QO_HD double quantize_affine_element(double x, const AffineBlock& b, const AffineParams& p, const AffineDTypes& t) {
  double v;
  if (p.domain == ZeroPointDomain::kFloat)
    v = round_even(rounded(rounded(x - b.offset, t.product) / b.factor, t.product));
  else
    v = rounded(round_even(rounded(x * b.factor, t.product)) + b.offset, t.sum);
  const double lo = rounded(p.qmin, t.sum), hi = rounded(p.qmax, t.sum);
  return v < lo ? lo : v > hi ? hi : v;  // NaN stays
}

// INT: x^ = (q - zero_point) * scale.  FLOAT: x^ = (q - mid_point) * scale + zero_point. Both in the result's dtype.
QO_HD AffineBlock dequantize_affine_block(const AffineParams& p, int64_t block) {
  const double scale = load_number(p.scale, block, p.scale_dtype);
  const bool is_float = p.domain == ZeroPointDomain::kFloat;
  if (p.zero_point == nullptr) return {scale, is_float ? -0.0 : 0.0};
  const double zero = load_number(p.zero_point, block, p.zero_dtype);
  return {scale, is_float && !p.zero_is_integer ? zero : rounded(zero, p.to_dtype)};
}

QO_HD double dequantize_affine_element(double q, const AffineBlock& b, const AffineParams& p, const AffineDTypes& t) {
  if (p.domain != ZeroPointDomain::kFloat)
    return rounded(rounded(rounded(rounded(q, p.to_dtype) - b.offset, p.to_dtype) * b.factor, t.product), p.to_dtype);
  const float centred = static_cast<float>(q) - static_cast<float>(mid_point(p.qmin, p.qmax));
  const double product = rounded(rounded(rounded(centred, p.to_dtype) * b.factor, t.product), p.to_dtype);
  return rounded(rounded(product + b.offset, t.sum), p.to_dtype);
}

}  // namespace quant_ops

// rne(x / scale) without dividing, and codes from it: x times the reciprocal, mended by two fused steps to the IEEE quotient. Exact
// by Markstein's theorem (a faithful quotient plus remainder times the correctly rounded reciprocal rounds correctly):
//
//   q0 = x r (error below 2 ulp)   q1 = fma(fma(-q0, s, x), r, q0) (faithful)   q2 = fma(fma(-q1, s, x), r, q1) = x / s
//
// Assumes a scale of ordinary size, so that no remainder that matters underflows; for other scales the kernels divide. Host and
// device code: the tests compare it with true division on the host. Read next: quantize.cu.
#pragma once

#include "device/layout.cuh"

namespace quant_ops {

// 1 / scale, or 0 for a scale by which one must divide. The bounds are safe: below |x / s| = 1/4 every estimate rounds to 0, from
// there on the remainders are multiples of 2^-112 or more, and up to 2^25 nothing overflows. Above 2^25, q0 is an integer beyond
// every clamp, and is used as it is.
QO_HD float safe_reciprocal(float scale) {
  const float smallest = 8.67361737988403547e-19f, largest = 1.15292150460684698e18f;  // 2^-60, 2^60
#if defined(__CUDA_ARCH__)
  return scale >= smallest && scale <= largest ? __frcp_rn(scale) : 0.0f;
#else
  return scale >= smallest && scale <= largest ? 1.0f / scale : 0.0f;
#endif
}

// The zero point at an offset; null: 0.
QO_HD int32_t zero_at(const int32_t* zero_point, int64_t offset) { return zero_point ? zero_point[offset] : 0; }

QO_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// A value whose rounding to an integer, clamped to bounds within 2^24, is that of the IEEE quotient x / scale. NaN stays NaN.
QO_HD float mended_quotient(float x, float scale, float reciprocal) {
  const float q0 = x * reciprocal;
  const float q1 = fused(fused(-q0, scale, x), reciprocal, q0);
  const float q2 = fused(fused(-q1, scale, x), reciprocal, q1);
  return __builtin_fabsf(q0) < 33554432.0f ? q2 : q0;
}

// The nearest integer, ties to even; NaN gives 0, large values saturate.
QO_HD int32_t nearest_int(float x) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(x);
#else
  if (!(x == x)) return 0;
  const float r = round_even(x);
  return r >= 2147483648.0f ? INT32_MAX : r < -2147483648.0f ? INT32_MIN : static_cast<int32_t>(r);
#endif
}

// Turns values into codes, q = clamp(rne(x / scale) + zero_point, qmin, qmax), by one scale and zero point. Assumes that
// qmin - zero_point and qmax - zero_point lie within 2^24.
struct Quantizer {
  float scale;
  float reciprocal;  // from safe_reciprocal
  int32_t zero_point, qmin, qmax;

  QO_HD_MEMBER static Quantizer of(float scale, int32_t zero_point, int32_t qmin, int32_t qmax) {
    return {scale, safe_reciprocal(scale), zero_point, qmin, qmax};
  }
  QO_HD_MEMBER bool is_fast() const { return reciprocal != 0.0f; }
  // Needs is_fast().
  QO_HD_MEMBER int32_t fast(float x) const { return code(nearest_int(mended_quotient(x, scale, reciprocal))); }
  QO_HD_MEMBER int32_t divided(float x) const { return code(nearest_int(quantize_steps(x, scale))); }
  // The faster one of both.
  QO_HD_MEMBER int32_t operator()(float x) const {
    return code(nearest_int(is_fast() ? mended_quotient(x, scale, reciprocal) : quantize_steps(x, scale)));
  }

 private:
  // Clamps before it adds, since `steps` may be as large as any int32.
  QO_HD_MEMBER int32_t code(int32_t steps) const {
    const int32_t lo = qmin - zero_point, hi = qmax - zero_point;
    return (steps < lo ? lo : steps > hi ? hi : steps) + zero_point;
  }
};

}  // namespace quant_ops

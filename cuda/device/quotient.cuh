// rne(x / scale) without dividing: x times the reciprocal, mended by two fused steps to the IEEE quotient. Exact by Markstein's
// theorem (a faithful quotient plus remainder times the correctly rounded reciprocal rounds correctly):
//
//   q0 = x r (error below 2 ulp)   q1 = fma(fma(-q0, s, x), r, q0) (faithful)   q2 = fma(fma(-q1, s, x), r, q1) = x / s
//
// Assumes a scale of ordinary size, so that no remainder that matters underflows; every other scale is divided by. Host and
// device; the tests compare it with true division on the host. Read next: quantize.cu.
#pragma once

#include "contract/arithmetic.h"

namespace quant_ops {

// 1 / scale, or 0 for a scale that must be divided by. Bounds: where |x / s| >= 1/4 (below, every estimate rounds to 0), the
// remainders are multiples of 2^-112 or more; up to 2^25 (above, q0 is used: it is an integer beyond every clamp) nothing
// overflows.
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

}  // namespace quant_ops

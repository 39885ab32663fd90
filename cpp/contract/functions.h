// The functions after the sum of an integer product, for host and device: float32 in, float32 out, IEEE operations in this order
// and no others, so that every instruction set and every GPU gives the same bits. kernels/generic/functions.h is the same for
// vectors. NaN stays NaN, and limits are those of torch, where hardswish, silu and gelu_tanh give NaN for -Inf, by Inf * 0.
//
// Largest error against float64 (tests/test_epilogue.py):
//   exp_of       1.1 ulp
//   relu, relu6  none
//   hardswish    2 ulp; the operations are torch's: x * clamp(x + 3, 0, 6), then divided by 6
//   silu         2.1 ulp down to -88.37; below, where the value is smaller than 2^-121, it is -0
//   sigmoid      2.1 ulp down to -88.37; below, where the value is smaller than 2^-127, it is 0
//   hardsigmoid  2 ulp; the operations are torch's: clamp(x + 3, 0, 6), then divided by 6
//   gelu         3 ulp down to -1; below, 2^-24.4, and from -10 on it stays at about -2^-116
//   gelu_tanh    3 ulp down to -1; below, 2^-24.5, and -0 in the end
// Read next: arithmetic.h for the rest of the epilogue.
#pragma once

#include "contract/arithmetic.h"

namespace quant_ops {

// The numbers are those of the operators' `activation`.
enum class Function : int32_t { kNone, kRelu, kRelu6, kHardswish, kSilu, kGelu, kGeluTanh, kSigmoid, kHardsigmoid };
constexpr int kFunctions = 9;

// ---- 2^y --------------------------------------------------------------------------------------------------------------
// A float y is n - f with an integer n and |f| <= 1/2; 2^-f = 1 + f * (c0 + f * (c1 + ...)), relative error 2^-28.9.

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: added and removed it rounds to an integer, which its low bits hold
constexpr float kLog2E = 0x1.715476p+0f;    // log2(e), and what it lacks
constexpr float kLog2ERest = 0x1.4ae0cp-26f;
constexpr float kExp2[6] = {-0x1.62e43p-1f, 0x1.ebfbdcp-3f, -0x1.c6aee6p-5f, 0x1.3b2d5p-7f, -0x1.5f3f3p-10f, 0x1.41fb2cp-13f};

// ---- gelu -------------------------------------------------------------------------------------------------------------
// gelu(x) = x * Phi(x) = max(x, 0) - t * Phi(-t) with t = |x|, and the normal distribution's tail Phi(-t) is
// 2^(-1 + t * (g0 + t * (g1 + ...))). The fit is for t <= 5.75; further on the exponent falls faster than it should, and t ends at
// 10, where it is -119.

constexpr float kGeluTail[8] = {-0x1.26aee4p+0f,  -0x1.d63828p-2f,  -0x1.ae50dcp-5f, 0x1.d24c2ap-8f,
                                -0x1.79a026p-13f, -0x1.5de876p-13f, 0x1.25a20ep-15f, -0x1.4830a6p-19f};
constexpr float kGeluFar = 10.0f;

// gelu_tanh(x) = x / (1 + e^-z), z = x * (2 a + 2 a b x^2) with a = sqrt(2 / pi) and b = 0.044715
constexpr float kGeluTanhLinear = 0x1.988454p+0f;  // 2 a
constexpr float kGeluTanhCubic = 0x1.2444f2p-4f;   // 2 a b

// e^z of a logistic function is computed between these bounds: 2^-126 is less than half an ulp of 1, and from 2^128 on it is Inf.
constexpr float kLogisticLow = -87.0f, kLogisticHigh = 89.0f;

// Bounds of exp_of's argument: below, the value rounds to 0, above to Inf.
constexpr float kExpLow = -104.0f, kExpHigh = 89.0f;

QO_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

QO_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// The second operand if either is NaN, as Simd::min and Simd::max.
QO_HD float least_of(float a, float b) { return a < b ? a : b; }
QO_HD float most_of(float a, float b) { return a > b ? a : b; }

// 2^-f for |f| <= 1/2.
QO_HD float exp2_fraction(float f) {
  constexpr float c[] = {kExp2[0], kExp2[1], kExp2[2], kExp2[3], kExp2[4], kExp2[5]};  // device code cannot read the host's tables
  float p = c[5];
  for (int i = 4; i >= 0; --i) p = fused(p, f, c[i]);
  return fused(p, f, 1.0f);
}

// 2^(n + by) for -127 <= n + by <= 128, where `rounded` is kRoundMagic + n; 0 for -127 and Inf for 128. Anything for NaN.
QO_HD float power_of_two(float rounded, int32_t by) {
  return bits_float((float_bits(rounded) << 23) + (static_cast<uint32_t>(by + 127) << 23));
}

// e^x = 2^n * 2^-f; `rounded` receives kRoundMagic + n, the result is 2^-f. For |x| < 2^20.
QO_HD float exp_fraction(float x, float* rounded) {
  *rounded = fused(x, kLog2E, kRoundMagic);
  const float n = *rounded - kRoundMagic;
  return exp2_fraction(fused(-x, kLog2ERest, fused(-x, kLog2E, n)));
}

// e^x of any float. The power of two is applied in two steps, the second of which rounds where the result is subnormal.
QO_HD float exp_of(float x) {
  const float bounded = least_of(kExpHigh, most_of(kExpLow, x));
  float rounded;
  const float p = exp_fraction(bounded, &rounded);
  const bool small = bounded < 0.0f;
  return p * power_of_two(rounded, small ? 64 : -64) * (small ? 0x1p-64f : 0x1p64f);
}

// x / (1 + e^-z)
QO_HD float logistic(float x, float z) {
  float rounded;
  const float p = exp_fraction(least_of(kLogisticHigh, most_of(kLogisticLow, -z)), &rounded);
  return quotient(x, fused(p, power_of_two(rounded, 0), 1.0f));
}

QO_HD float gelu_of(float x) {
  const float magnitude = bits_float(float_bits(x) & 0x7fffffffu), t = magnitude < kGeluFar ? magnitude : kGeluFar;
  constexpr float c[] = {kGeluTail[0], kGeluTail[1], kGeluTail[2], kGeluTail[3],
                         kGeluTail[4], kGeluTail[5], kGeluTail[6], kGeluTail[7]};
  float y = c[7];
  for (int i = 6; i >= 0; --i) y = fused(y, t, c[i]);
  y = fused(y, t, -1.0f);
  const float rounded = y + kRoundMagic;
  const float tail = exp2_fraction((rounded - kRoundMagic) - y) * power_of_two(rounded, 0);
  return fused(-t, tail, x < 0.0f ? 0.0f : x);
}

QO_HD float apply_function(Function function, float x) {
  switch (function) {
    case Function::kRelu: return x < 0.0f ? 0.0f : x;
    case Function::kRelu6: return least_of(6.0f, most_of(0.0f, x));
    case Function::kHardswish: return quotient(x * least_of(6.0f, most_of(0.0f, x + 3.0f)), 6.0f);
    case Function::kSilu: return logistic(x, x);
    case Function::kGelu: return gelu_of(x);
    case Function::kGeluTanh: return logistic(x, x * fused(x * x, kGeluTanhCubic, kGeluTanhLinear));
    case Function::kSigmoid: return logistic(1.0f, x);
    case Function::kHardsigmoid: return quotient(least_of(6.0f, most_of(0.0f, x + 3.0f)), 6.0f);
    default: return x;
  }
}

}  // namespace quant_ops

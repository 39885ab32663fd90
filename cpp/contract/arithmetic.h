// The arithmetic of quant_ops, one element at a time, for host and device.
//
//   q  = clamp(rne(x / scale) + zero_point, qmin, qmax)      integer code
//   x^ = (q - zero_point) * scale                            simulated value
//
// Every kernel of cpp/ and cuda/ either calls these functions or computes the same IEEE operations in vector form; nothing here
// depends on compiler flags (-ffp-contract=off, no fast-math). Functions have internal linkage so that a copy compiled for one
// instruction set can never be linked into code for another. Read next: ops.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define QO_HD __host__ __device__ __forceinline__ static
#else
#define QO_HD static inline __attribute__((always_inline, unused))
#endif

namespace quant_ops {

// IEEE binary16 and bfloat16 as bit patterns; arithmetic on them is done in float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

QO_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

QO_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// ---- storage types <-> compute types --------------------------------------------------------------------------------

QO_HD float to_compute(float x) { return x; }
QO_HD double to_compute(double x) { return x; }
QO_HD float to_compute(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

QO_HD float to_compute(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 1023u;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  // subnormal half: mantissa * 2^-24, exact in float32
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  return bits_float(sign | float_bits(magnitude));
}

QO_HD void from_compute(float x, float* y) { *y = x; }
QO_HD void from_compute(double x, double* y) { *y = x; }

// Rounds to nearest even by integer arithmetic, so that subnormals are kept whatever the floating-point environment is.
QO_HD void from_compute(float x, BFloat16* y) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    y->bits = static_cast<uint16_t>((u >> 16) | 0x40u);  // quiet NaN, sign and payload kept
    return;
  }
  y->bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

QO_HD void from_compute(float x, Half* y) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u | ((a >> 13) & 0x3ffu);
  } else if (a >= 0x477ff000u) {  // 65520 and above rounds to infinity
    h = 0x7c00u;
  } else if (a >= 0x38800000u) {  // normal half: rebias the exponent, round the 13 dropped bits
    h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  } else if (a > 0x33000000u) {  // subnormal half: shift the full significand right, round to even
    const uint32_t shift = 126u - (a >> 23), significand = (a & 0x7fffffu) | 0x800000u;
    const uint32_t half_ulp = 1u << (shift - 1), kept = significand >> shift;
    const uint32_t rest = significand & ((1u << shift) - 1u);
    h = kept + (rest > half_ulp || (rest == half_ulp && (kept & 1u)) ? 1u : 0u);
  } else {  // up to half of the smallest subnormal: zero
    h = 0;
  }
  y->bits = static_cast<uint16_t>(sign | h);
}

// ---- quantization ---------------------------------------------------------------------------------------------------

// Round to nearest, ties to even. Adding and removing 2^23 (2^52) rounds in hardware; rintf would be a library call where the
// baseline has no rounding instruction. Larger values are integers already, and NaN fails the comparison.
QO_HD float round_even(float x) {
#if defined(__CUDA_ARCH__)
  return rintf(x);
#else
  const float magic = x < 0.0f ? -8388608.0f : 8388608.0f;
  return __builtin_fabsf(x) < 8388608.0f ? (x + magic) - magic : x;
#endif
}

QO_HD double round_even(double x) {
#if defined(__CUDA_ARCH__)
  return rint(x);
#else
  const double magic = x < 0.0 ? -4503599627370496.0 : 4503599627370496.0;
  return __builtin_fabs(x) < 4503599627370496.0 ? (x + magic) - magic : x;
#endif
}

// rne(x / scale) as a floating-point integer, never -0; NaN stays NaN. The quotient is the IEEE one (ONNX QuantizeLinear).
template <class T>
QO_HD T quantize_steps(T x, T scale) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) return round_even(__fdiv_rn(x, scale)) + T(0);
#endif
  return round_even(x / scale) + T(0);
}

// clamp(steps, lo, hi) for lo = qmin - zero_point, hi = qmax - zero_point: the code relative to its zero point.
// NaN stays NaN: the comparisons are false for it.
template <class T>
QO_HD T clamp_steps(T steps, T lo, T hi) {
  if (steps < lo) return lo;
  if (steps > hi) return hi;
  return steps;
}

// The integer code from clamped steps. NaN has the code of zero, clamp(zero_point).
template <class T>
QO_HD int64_t steps_to_code(T steps, int64_t zero_point, int64_t qmin, int64_t qmax) {
  const int64_t q = (steps == steps ? static_cast<int64_t>(steps) : 0) + zero_point;
  return q < qmin ? qmin : (q > qmax ? qmax : q);
}

// A learned (floating) zero point is rounded and clamped before use; NaN counts as 0.
QO_HD int64_t round_zero_point(double zero_point, int64_t qmin, int64_t qmax) {
  const double z = round_even(zero_point);
  if (!(z == z)) return qmin > 0 ? qmin : (qmax < 0 ? qmax : 0);
  if (z < static_cast<double>(qmin)) return qmin;
  if (z > static_cast<double>(qmax)) return qmax;
  return static_cast<int64_t>(z);
}

// (q - zero_point) * scale. The difference is exact; it is rounded only where it does not fit T's significand.
template <class T>
QO_HD T dequantize_code(int64_t q, int64_t zero_point, T scale) {
  return static_cast<T>(q - zero_point) * scale;
}

// ---- straight-through gradients (NaN inputs contribute nothing) -----------------------------------------------------

// LSQ factors of one element (arXiv 1902.08153): dscale += g * scale_factor, dzero_point += g * zero_factor.
// `steps` is the rounded, unclamped quotient; both branches are evaluated in T.
template <class T>
struct StraightThrough {
  bool pass;       // gradient reaches x
  T scale_factor;  // (q - zero_point) - x / scale inside, q - zero_point outside
  T zero_factor;   // 0 inside, -scale outside
};

template <class T>
QO_HD StraightThrough<T> straight_through(T x, T scale, T lo, T hi) {
#if defined(__CUDA_ARCH__)
  T quotient;
  if constexpr (sizeof(T) == 4)
    quotient = __fdiv_rn(x, scale);
  else
    quotient = x / scale;
#else
  const T quotient = x / scale;
#endif
  const T steps = round_even(quotient) + T(0);
  StraightThrough<T> r;
  r.pass = steps >= lo && steps <= hi;
  if (r.pass) {
    r.scale_factor = steps - quotient;
    r.zero_factor = T(0);
  } else if (steps == steps) {
    r.scale_factor = clamp_steps(steps, lo, hi);
    r.zero_factor = -scale;
  } else {
    r.scale_factor = T(0);
    r.zero_factor = T(0);
  }
  return r;
}

// ---- choosing scales ------------------------------------------------------------------------------------------------

template <class T>
struct QParams {
  T scale;
  int32_t zero_point;
};

// From the minimum and maximum of a slice (`finite` = it holds neither NaN nor Inf) to its scale and zero point.
// Symmetric: absmax / qmax. Asymmetric: the range is widened to contain 0, then (max - min) / (qmax - qmin).
// A slice of zeros gets scale 1; a scale that would be subnormal becomes the smallest normal number, whose reciprocal is finite;
// a slice that is not finite gets a NaN scale, so that its outputs are NaN.
template <class T>
QO_HD QParams<T> choose_qparams_of(T min, T max, bool finite, int32_t qmin, int32_t qmax, bool asymmetric) {
  const T smallest_normal = sizeof(T) == 4 ? static_cast<T>(1.17549435082228750797e-38) : static_cast<T>(2.2250738585072014e-308);
  QParams<T> p;
  p.zero_point = 0;
  const T absmax = max > -min ? max : -min;
  const T lo = min < T(0) ? min : T(0), hi = max > T(0) ? max : T(0);
  if (!finite) {
    p.scale = absmax - absmax;  // 0
    p.scale = p.scale / p.scale;
  } else if (asymmetric) {
    const T range = hi - lo, steps = static_cast<T>(static_cast<int64_t>(qmax) - qmin);
    p.scale = range - range == T(0) ? range / steps : hi / steps - lo / steps;  // the second form where hi - lo overflows
  } else {
    p.scale = absmax / static_cast<T>(qmax);
  }
  if (finite) {
    if (hi == T(0) && lo == T(0)) {
      p.scale = T(1);
    } else if (p.scale < smallest_normal) {
      p.scale = smallest_normal;
    }
  }
  if (asymmetric) {
    if (finite) {
      // In int64, where it is exact for every int32 range. The steps fit: lo / scale is within the 2^32 steps of the range.
      const int64_t z = static_cast<int64_t>(qmin) - static_cast<int64_t>(quantize_steps(lo, p.scale));
      p.zero_point = z < qmin ? qmin : (z > qmax ? qmax : static_cast<int32_t>(z));
    } else {
      p.zero_point = qmin > 0 ? qmin : (qmax < 0 ? qmax : 0);
    }
  }
  return p;
}

// ---- integer GEMM epilogue ------------------------------------------------------------------------------------------

// y = fma(acc, scale_a * scale_b, bias): the product of the scales is rounded once, then one fused multiply-add.
// "No bias" is bias = -0: adding -0 changes no value and no sign.
QO_HD float epilogue(int32_t acc, float scale_a, float scale_b, float bias) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(__int2float_rn(acc), __fmul_rn(scale_a, scale_b), bias);
#else
  return __builtin_fmaf(static_cast<float>(acc), scale_a * scale_b, bias);
#endif
}

}  // namespace quant_ops

// rne(x / scale) without dividing, and codes from it: x times the reciprocal, mended by two fused steps to the IEEE quotient. Exact
// by Markstein's theorem (a faithful quotient plus remainder times the correctly rounded reciprocal rounds correctly):
//
//   q0 = x r (error below 2 ulp)   q1 = fma(fma(-q0, s, x), r, q0) (faithful)   q2 = fma(fma(-q1, s, x), r, q1) = x / s
//
// Elements of 16 bits need even less (VectorQuotient): a reciprocal of two floats, r + c = 1 / s but for 2^-46 of it, and
//
//   q = fma(x, r, x c) rounds to the same integer as the IEEE quotient, ties included.
//
// An error could only arise where x / s lies next to the middle between a tie n + 1/2 and its neighbours among the floats. For n, x
// of 8 or 11 significant bits and either middle this leaves the few s next to x / middle, all of which the tests go through.
//
// Both assume a scale of ordinary size, so that no remainder that matters underflows; for other scales the kernels divide. Host and
// device code: the tests compare it with true division on the host. Read next: quantize_rows.cu.
#pragma once

#include "contract/functions.h"
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

// The lesser and greater of two numbers; NaN if one of them is NaN.
QO_HD float lesser(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a || a < b ? a : b;
#endif
}
QO_HD float greater(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a || a > b ? a : b;
#endif
}

// The IEEE quotient x / scale of less than 2^25, or a value that rounds to the same integer.
QO_HD float small_quotient(float x, float scale, float reciprocal) {
  const float q0 = x * reciprocal;
  const float q1 = fused(fused(-q0, scale, x), reciprocal, q0);
  return fused(fused(-q1, scale, x), reciprocal, q1);
}

// A value whose rounding to an integer, clamped to bounds within 2^24, is that of the IEEE quotient x / scale. NaN stays NaN.
QO_HD float mended_quotient(float x, float scale, float reciprocal) {
  const float q0 = x * reciprocal;
  return __builtin_fabsf(q0) < 33554432.0f ? small_quotient(x, scale, reciprocal) : q0;
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

// ---- vectors of int8 codes ------------------------------------------------------------------------------------------

// Adding 1.5 * 2^23 rounds a float of less than 2^22 to an integer, which the low bits of the sum then hold.
constexpr float kMagic = 12582912.0f;

// The lowest bytes of four words as one word.
QO_HD uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
#else
  return (a & 0xffu) | (b & 0xffu) << 8 | (c & 0xffu) << 16 | d << 24;
#endif
}

// Bytes 0 and 2 of two words as one word.
QO_HD uint32_t even_bytes(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, 0x6420);
#else
  return low_bytes(a, a >> 16, b, b >> 16);
#endif
}

// rne(x / scale) of elements of 11 significant bits at most (kShort) or any, for codes of whole vectors without branches.
struct VectorQuotient {
  float scale, reciprocal;
  float correction;  // 1 / scale - reciprocal

  QO_HD_MEMBER static VectorQuotient of(const Quantizer& q) {
    const float error = fused(-q.scale, q.reciprocal, 1.0f), first = error * q.reciprocal;
    return {q.scale, q.reciprocal, fused(error, first, first)};
  }
  // kMagic + rne(x / scale), for a quotient of less than 2^22.
  template <bool kShort>
  QO_HD_MEMBER float sum(float x) const {
    return (kShort ? fused(x, reciprocal, x * correction) : small_quotient(x, scale, reciprocal)) + kMagic;
  }
};

// int8 codes of any elements.
struct Int8Codes {
  Quantizer quantizer;
  VectorQuotient quotient;
  float zero_point;       // of quantizer
  float lowest, highest;  // of x: from there on codes are qmin and qmax. NaN, which no vector survives, if codes need quantizer

  QO_HD_MEMBER static Int8Codes of(const Quantizer& q) {
    const bool usable = q.is_fast() && q.zero_point >= -128 && q.zero_point <= 127;
    const float zero = static_cast<float>(q.zero_point);
    return {q, VectorQuotient::of(q), zero, usable ? (static_cast<float>(q.qmin) - zero) * q.scale : NAN,
            (static_cast<float>(q.qmax) - zero) * q.scale};
  }

  // The lowest byte of a sum becomes the code, if the result is true. It is false if an element is NaN or codes need quantizer.
  // kShort: the quotients of the bounds lie next to integers, so that the bounds may have more bits.
  template <bool kShort, int V>
  QO_HD_MEMBER bool make(const float (&x)[V], uint32_t (&sums)[V]) const {
    float total = 0.0f;  // NaN if an element is, and bounded otherwise
    QO_UNROLL
    for (int i = 0; i < V; ++i) {
      const float value = lesser(greater(x[i], lowest), highest);
      total += value;
      sums[i] = float_bits(quotient.sum<kShort>(value) + zero_point);  // in this order, for ties are those of the quotient
    }
    return total == total;
  }
};

// int8 codes of elements of the range from which scale and zero point were chosen: no quotient exceeds 256, and no code is below
// qmin. A code may exceed qmax by one, where both ends of the range are ties but for rounding errors and both round away from zero,
// as in every row whose ends are opposite numbers, 127.5 steps each. Such rows are frequent among 16-bit ones.
struct RangeCodes {
  Quantizer quantizer;
  VectorQuotient quotient;

  QO_HD_MEMBER static RangeCodes of(const Quantizer& q) { return {q, VectorQuotient::of(q)}; }
  QO_HD_MEMBER bool is_usable() const { return quantizer.is_fast(); }

  // Four codes a word. Symmetric codes have the zero point 0, and never exceed qmax. Needs is_usable().
  template <bool kShort, bool kAsymmetric, int V>
  QO_HD_MEMBER void make(const float (&x)[V], uint32_t (&words)[V / 4]) const {
    QO_UNROLL
    for (int w = 0; w < V / 4; ++w) {
      uint32_t sums[4];
      QO_UNROLL
      for (int i = 0; i < 4; ++i) sums[i] = float_bits(quotient.sum<kShort>(x[4 * w + i]));
      if (kAsymmetric) {
        const uint32_t low = moved_pair(sums[0], sums[1]), high = moved_pair(sums[2], sums[3]);
        words[w] = even_bytes(low, high);
      } else {
        words[w] = low_bytes(sums[0], sums[1], sums[2], sums[3]);
      }
    }
  }

 private:
  // min(n + zero_point, qmax) of two integers n that the low halves of two sums hold, as a pair of 16-bit integers.
  QO_HD_MEMBER uint32_t moved_pair(uint32_t a, uint32_t b) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const uint32_t zero = __byte_perm(static_cast<uint32_t>(quantizer.zero_point), 0u, 0x1010);
    const uint32_t most = __byte_perm(static_cast<uint32_t>(quantizer.qmax), 0u, 0x1010);
    uint32_t pair = __byte_perm(a, b, 0x5410);
    asm("add.s16x2 %0, %0, %1;" : "+r"(pair) : "r"(zero));
    asm("min.s16x2 %0, %0, %1;" : "+r"(pair) : "r"(most));
    return pair;
#else
    const auto moved = [this](uint32_t sum) {
      const int32_t code = static_cast<int32_t>(sum - float_bits(kMagic)) + quantizer.zero_point;
      return static_cast<uint32_t>(code < quantizer.qmax ? code : quantizer.qmax);
    };
    return (moved(a) & 0xffffu) | moved(b) << 16;
#endif
  }
};

// ---- codes by one multiplication ------------------------------------------------------------------------------------

// The float n = fused(x, r, base), with base = kMagic + zero_point, is the nearest integer to x r plus base, ties to even,
// since floats of this size are integers. Its low byte is the code before the clamp.

// Factors r for the rows of which x are elements. Both give the code of the IEEE quotient wherever they give the same; they are
// equal where every code is right without a comparison.
struct CodeFactors {
  float lower, upper;
};

// For |x / scale| <= 256 and a reciprocal that is not 0. The product with the reciprocal is within 2^-23, relatively, of the
// quotient and of the rounded quotient, and 2^-22 between the factors and the reciprocal cover both.
QO_HD CodeFactors checked_factors(float reciprocal) {
  const float step = reciprocal * 2.384185791015625e-07f;  // 2^-22
  return {reciprocal - step, reciprocal + step};
}

// For symmetric codes of elements of 16 bits, whose significands a are below 2^11: scale is absmax / 127, rounded. With absmax of
// the significand b the quotient without any rounding is 127 a 2^e / b. It differs relatively from a tie n + 1/2, if at all, by
//
//   |254 a 2^e - (2n + 1) b| / (254 a 2^e) >= 1 / (254 * 2^12)  (e < 0: multiply by 2^-e)
//
// or 9.6e-7, more than roundings and a factor that is up to 3 ulp away together. It is a tie if 127 divides 2n + 1, which is
// |x| = absmax / 2 alone: the factor is the one of those that gives its code. Or if 127 divides b: then the scale is exact, and so
// is a factor of a power of two; any other one is checked.
QO_HD CodeFactors symmetric_factors(float absmax, float scale, float reciprocal) {
  uint32_t bits;
  memcpy(&bits, &scale, sizeof(bits));
  if (fused(scale, 127.0f, -absmax) == 0.0f && (bits & 0x7fffffu) != 0) return checked_factors(reciprocal);
  const float half = 0.5f * absmax;
  const int32_t code = nearest_int(mended_quotient(half, scale, reciprocal));
  const int32_t product = static_cast<int32_t>(fused(half, reciprocal, kMagic) - kMagic);
  memcpy(&bits, &reciprocal, sizeof(bits));
  bits += static_cast<uint32_t>(3 * (code - product));
  memcpy(&reciprocal, &bits, sizeof(bits));
  return {reciprocal, reciprocal};
}

}  // namespace quant_ops

// Simulated floating formats, one element at a time, for host and device: the definition of a format, rounding to it, and the scale
// of a block of elements.
//
//   y = round_to_format(x / scale) * scale
//
// A format has values m * 2^(e - mantissa_bits) with integers m: for normal numbers 2^mantissa_bits <= m < 2^(mantissa_bits + 1)
// and e >= least_exponent, for subnormal ones e = least_exponent and a smaller m. The distance of neighbours, 2^(e -
// mantissa_bits), is called a quantum. round_to_format defines the result for every format; vector kernels and CUDA compute the
// same by fewer instructions for all formats in use (FloatFormat::method). Read next: kernels/generic/quantize_float.h.
#pragma once

#include <algorithm>
#include <limits>

#include "contract/arithmetic.h"

namespace quant_ops {

// What the codes with the highest exponent are: numbers like the others (OCP FP4, FP6), numbers but for the last, which is NaN (OCP
// FP8 E4M3), or infinity and NaN (IEEE 754, OCP FP8 E5M2).
enum class SpecialCodes : int32_t { kNone, kNan, kIeee };

// Stochastic: away from zero with the probability of the distance that was rounded off.
enum class Rounding : int32_t { kNearestEven, kNearestAway, kTowardZero, kStochastic };

// How kernels compute round_to_format: by float32 additions, by integer additions (formats with float32's own exponents), or by
// calling it for every element.
enum class RoundingMethod : int32_t { kFloats, kIntegers, kElements };

struct FloatFormat {
  int32_t mantissa_bits;
  int32_t least_exponent;  // that of the smallest normal number, 1 - bias
  float largest;
  float overflow;  // what rounds beyond the largest value becomes: that value (saturating), infinity or NaN
  bool subnormals;
  Rounding rounding;
  RoundingMethod method;
};

QO_HD float power_of_two(int exponent) {  // -149 .. 127
  return bits_float(exponent >= -126 ? static_cast<uint32_t>(exponent + 127) << 23 : 1u << (exponent + 149));
}

// floor(log2(x)) of a positive finite number.
QO_HD int exponent_of(float x) {
  const uint32_t bits = float_bits(x);
  if (bits >= 0x00800000u) return static_cast<int>(bits >> 23) - 127;
  return static_cast<int>(float_bits(static_cast<float>(bits)) >> 23) - 127 - 149;  // subnormal: bits * 2^-149
}

// The distance between the largest value and the next one, if the exponents went on.
QO_HD float last_quantum(const FloatFormat& f) {
  const int e = exponent_of(f.largest);
  return power_of_two((e > f.least_exponent ? e : f.least_exponent) - f.mantissa_bits);
}

// ---- the definition -------------------------------------------------------------------------------------------------

// The layout of T's bits.
template <class T>
struct Layout;
template <>
struct Layout<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct Layout<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
};

// Whether the part of a significand that is rounded off, rest * 2^-drop in [0, 1), makes the `kept` part one larger.
QO_HD bool rounds_up(uint64_t kept, uint64_t rest, int drop, Rounding rounding, uint32_t random) {
  if (drop == 0) return false;
  if (rounding == Rounding::kTowardZero) return false;
  if (rounding == Rounding::kStochastic) {  // random / 2 < rne(2^31 * rest * 2^-drop): the probability is exact to 2^-32
    uint64_t threshold = rest;
    if (drop <= 31) {
      threshold <<= 31 - drop;
    } else {
      const int shift = drop - 31;
      if (shift > 62) return false;
      const uint64_t half = uint64_t{1} << (shift - 1), part = rest & (2 * half - 1);
      threshold = rest >> shift;
      threshold += part > half || (part == half && (threshold & 1)) ? 1 : 0;
    }
    return (random >> 1) < threshold;
  }
  if (drop > 62) return false;
  const uint64_t half = uint64_t{1} << (drop - 1);
  return rest > half || (rest == half && (rounding == Rounding::kNearestAway || (kept & 1)));
}

// x rounded to the format. NaN stays NaN, the sign of zero is kept. `random` is read for stochastic rounding only.
template <class T>
QO_HD T round_to_format(T x, const FloatFormat& f, uint32_t random) {
  using Bits = typename Layout<T>::Bits;
  constexpr int kMantissa = Layout<T>::kMantissa, kBias = Layout<T>::kBias;
  constexpr Bits kOne = 1, kSign = kOne << (8 * sizeof(T) - 1), kInfinity = kSign - (kOne << kMantissa);
  Bits bits;
  memcpy(&bits, &x, sizeof(bits));
  const Bits sign = bits & kSign, magnitude = bits & ~kSign;
  if (magnitude > kInfinity) {
    bits |= kOne << (kMantissa - 1);  // quiet
    memcpy(&x, &bits, sizeof(bits));
    return x;
  }
  const T largest = static_cast<T>(f.largest);
  const T beyond = static_cast<T>(f.rounding == Rounding::kTowardZero && magnitude != kInfinity ? f.largest : f.overflow);
  const int field = static_cast<int>(magnitude >> kMantissa), e = (field > 0 ? field : 1) - kBias;
  T rounded;
  if (e >= 128) {  // infinity, or a float64 beyond every format
    rounded = beyond;
  } else {
    const uint64_t significand = (magnitude & ((kOne << kMantissa) - 1)) | (field > 0 ? kOne << kMantissa : 0);
    // the exponent of a quantum: the number is significand * 2^(e - kMantissa) = (kept + rest * 2^-drop) * 2^quantum
    const bool normal = field > 0 && e >= f.least_exponent;
    const int quantum = normal ? e - f.mantissa_bits : f.least_exponent - (f.subnormals ? f.mantissa_bits : 0);
    const int drop = quantum - (e - kMantissa);
    const uint64_t kept = drop < 64 ? significand >> drop : 0, rest = drop < 64 ? significand - (kept << drop) : significand;
    const uint64_t steps = kept + (rounds_up(kept, rest, drop, f.rounding, random) ? 1 : 0);
    const int part = quantum / 2;  // as a whole it can be beyond float32 where x is a float64
    rounded = static_cast<T>(steps) * static_cast<T>(power_of_two(quantum - part)) * static_cast<T>(power_of_two(part));
    if (rounded > largest) rounded = beyond;
  }
  memcpy(&bits, &rounded, sizeof(bits));
  bits |= sign;
  memcpy(&rounded, &bits, sizeof(bits));
  return rounded;
}

// Whether the straight-through gradient passes: x is within the range of the format.
template <class T>
QO_HD bool in_range(T x, const FloatFormat& f) {
  return (x < T(0) ? -x : x) <= static_cast<T>(f.largest);
}

// ---- the same by float32 additions ----------------------------------------------------------------------------------

// The constants of round_by_floats, for formats with RoundingMethod::kFloats.
struct FloatGrid {
  float limit;            // magnitudes are clamped to it first: it rounds to itself, and beyond the largest value unless saturating
  float smallest_normal;  // 2^least_exponent
  float quantum;          // that of 1: 2^-mantissa_bits
  float flush_below;      // smallest_normal without subnormals, else 0
};

QO_HD FloatGrid float_grid(const FloatFormat& f) {
  FloatGrid g;
  g.limit = f.overflow == f.largest ? f.largest : f.largest + last_quantum(f);
  g.smallest_normal = power_of_two(f.least_exponent);
  g.quantum = power_of_two(-f.mantissa_bits);
  g.flush_below = f.subnormals ? 0.0f : g.smallest_normal;
  return g;
}

// Adding 2^23 quanta to a magnitude rounds it, to nearest even, to a whole number of quanta.
QO_HD float round_by_floats(float x, const FloatFormat& f, const FloatGrid& g, uint32_t random) {
  const uint32_t bits = float_bits(x), sign = bits & 0x80000000u;
  const float whole = bits_float(bits & 0x7fffffffu), m = g.limit < whole ? g.limit : whole;  // NaN stays
  const float binade = bits_float(float_bits(m) & 0x7f800000u);
  float quantum = (binade > g.smallest_normal ? binade : g.smallest_normal) * g.quantum;
  if (m < g.flush_below) quantum = g.smallest_normal;
  const float magic = quantum * 8388608.0f;
  float rounded = (m + magic) - magic;
  if (f.rounding == Rounding::kNearestAway) {
    if (m - rounded >= 0.5f * quantum) rounded = rounded + quantum;
  } else if (f.rounding != Rounding::kNearestEven) {
    if (rounded > m) rounded = rounded - quantum;
    if (f.rounding == Rounding::kStochastic) {
      const float per_quantum = bits_float((254u << 23) - float_bits(quantum));
      const float threshold = round_even((m - rounded) * per_quantum * 2147483648.0f);  // below 2^31
      if (static_cast<int32_t>(random >> 1) < static_cast<int32_t>(threshold)) rounded = rounded + quantum;
    }
  }
  if (rounded > f.largest)
    rounded = f.rounding == Rounding::kTowardZero && whole < bits_float(0x7f800000u) ? f.largest : f.overflow;
  return bits_float(float_bits(rounded) | sign);
}

// ---- blocks that share a scale --------------------------------------------------------------------------------------

// From the largest magnitude of a block (amax) to its scale. The first four are powers of two (E8M0, OCP Microscaling v1.0), from
// the exponents of amax and of the format's largest value: 2^(floor(log2(amax)) - emax); the same of amax rounded to the format's
// mantissa bits (kEven); with ceil(log2(amax)) for the floor (kCeil); 2^ceil(log2(amax / largest)) (kRoundUp). The others are
// amax / divisor: rounded to E4M3 and within [2^-6, 448] (kE4m3, NVFP4), with amax rounded to bfloat16 before (kBFloat16), or as it
// is (kFloat32).
enum class ScaleRule : int32_t { kFloor, kEven, kCeil, kRoundUp, kE4m3, kBFloat16, kFloat32 };

QO_HD bool is_power_of_two_rule(ScaleRule rule) { return rule < ScaleRule::kE4m3; }

// The OCP E4M3 format.
QO_HD FloatFormat e4m3_format() { return {3, -6, 448.0f, 448.0f, true, Rounding::kNearestEven, RoundingMethod::kFloats}; }

struct BlockFormat {
  FloatFormat element;
  ScaleRule rule;
  float divisor;
};

// `amax_bits` are the bits of the largest magnitude in the order of integers, so that NaN and infinity show: they give NaN.
// `tensor_scale` is 1 but for the two-level form of kE4m3, whose scale is a multiple of it.
QO_HD float block_scale(uint32_t amax_bits, const BlockFormat& f, float tensor_scale) {
  const float nan = bits_float(0x7fc00000u);
  if (amax_bits >= 0x7f800000u) return nan;
  const float amax = bits_float(amax_bits);
  if (is_power_of_two_rule(f.rule)) {
    if (amax_bits == 0) return power_of_two(-127);
    const int top = exponent_of(f.element.largest);
    int exponent;
    if (f.rule == ScaleRule::kRoundUp) {
      const float ratio = amax / f.element.largest;
      exponent = ratio > 0.0f ? exponent_of(ratio) : -149;
      if (ratio > 0.0f && ratio > power_of_two(exponent)) ++exponent;
    } else {
      exponent = exponent_of(amax);
      const float significand = exponent >= -126 ? amax / power_of_two(exponent) : amax * 8388608.0f / power_of_two(exponent + 23);
      if (f.rule == ScaleRule::kEven && significand >= 2.0f - power_of_two(-f.element.mantissa_bits - 1)) ++exponent;
      if (f.rule == ScaleRule::kCeil && significand > 1.0f) ++exponent;
      exponent -= top;
    }
    return exponent > 127 ? nan : power_of_two(exponent < -127 ? -127 : exponent);
  }
  if (f.rule == ScaleRule::kE4m3) {
    const float scale = round_to_format(amax / f.divisor / tensor_scale, e4m3_format(), 0);
    return (scale < 0.015625f ? 0.015625f : scale) * tensor_scale;
  }
  BFloat16 rounded;
  from_compute(amax, &rounded);
  const float scale = (f.rule == ScaleRule::kBFloat16 ? to_compute(rounded) : amax) / f.divisor;
  const float smallest_normal = power_of_two(-126);
  return amax_bits == 0 ? 1.0f : scale < smallest_normal ? smallest_normal : scale;
}

// ---- making a format ------------------------------------------------------------------------------------------------

// A format with widths within [1, 8] and [0, 23] whose numbers float32 holds (torch/quantize_float.h checks).
inline FloatFormat float_format(int exponent_bits, int mantissa_bits, int bias, SpecialCodes special, bool saturate,
                                bool subnormals, Rounding rounding) {
  const int codes = 1 << (exponent_bits + mantissa_bits), reserved = special == SpecialCodes::kIeee  ? 1 << mantissa_bits
                                                                     : special == SpecialCodes::kNan ? 1
                                                                                                     : 0;
  const int last = codes - 1 - reserved, field = last >> mantissa_bits, mantissa = last & ((1 << mantissa_bits) - 1);
  FloatFormat f;
  f.mantissa_bits = mantissa_bits;
  f.least_exponent = 1 - bias;
  f.largest = static_cast<float>(std::ldexp(field > 0    ? (1 << mantissa_bits) + mantissa
                                            : subnormals ? mantissa
                                                         : 0,
                                            (field > 0 ? field : 1) - bias - mantissa_bits));
  f.overflow = saturate                         ? f.largest
               : special == SpecialCodes::kIeee ? std::numeric_limits<float>::infinity()
                                                : std::numeric_limits<float>::quiet_NaN();
  f.subnormals = subnormals;
  f.rounding = rounding;
  const bool widest = f.least_exponent == -126;
  const int top = std::ilogb(f.largest);
  // 2^23 times the greatest quantum is finite; below the smallest normal number it is that number where there are no subnormal ones
  const int greatest_quantum = std::max(top + 1 - mantissa_bits, subnormals ? f.least_exponent - mantissa_bits : f.least_exponent);
  if (mantissa_bits <= 22 && greatest_quantum + 23 <= 126 && f.least_exponent - mantissa_bits - 1 >= -126)
    f.method = RoundingMethod::kFloats;
  else if (mantissa_bits >= 1 && mantissa_bits <= 22 && widest && subnormals)
    f.method = RoundingMethod::kIntegers;
  else
    f.method = RoundingMethod::kElements;
  return f;
}

}  // namespace quant_ops

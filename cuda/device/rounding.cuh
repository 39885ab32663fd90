// Rounding to simulated floating formats on the GPU: the bits of float_format.h by fewer instructions.
//
//   y = round_to_format(x / scale) * scale
//
// Rounding is symmetric, so kernels round magnitudes and give the result the sign of x. The quotient is the IEEE one: a product
// with the reciprocal, mended (small_quotient in quotient.cuh), for scales within the bounds below; a division for others. Host and
// device; the tests compare it with float_format.h on the host. Read next: quantize_float.cu.
#pragma once

#include "device/common.cuh"

namespace quant_ops {

// What a kernel does to elements. Plain formats are those that float32 additions round to, with subnormals, saturating.
enum class Path {
  kPlain,     // a plain format, to nearest even
  kRandom,    // a plain format, stochastically
  kOther,     // any format but those with RoundingMethod::kElements
  kGradient,  // the straight-through gradient
};

inline Path path_of(const FloatFormat& f, bool gradient) {
  if (gradient) return Path::kGradient;
  const bool plain = f.method == RoundingMethod::kFloats && f.subnormals && f.overflow == f.largest;
  if (plain && f.rounding == Rounding::kNearestEven) return Path::kPlain;
  return plain && f.rounding == Rounding::kStochastic ? Path::kRandom : Path::kOther;
}

// The magnitude of one number with the sign of another one.
QO_HD float with_sign(float magnitude, float of) {
  return bits_float((float_bits(magnitude) & 0x7fffffffu) | (float_bits(of) & 0x80000000u));
}

QO_HD float reciprocal_of(float x) {
#if defined(__CUDA_ARCH__)
  return __frcp_rn(x);
#else
  return 1.0f / x;
#endif
}

// round_to_format for RoundingMethod::kIntegers: the exponents are those of float32, and so are the subnormal numbers.
QO_HD float round_by_integers(float x, const FloatFormat& f, uint32_t random) {
  const int drop = 23 - f.mantissa_bits;
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu, unit = 1u << drop, low = unit - 1;
  if (magnitude > 0x7f800000u) return bits_float(float_bits(x) | 0x00400000u);
  uint32_t bits = magnitude;
  if (f.rounding == Rounding::kNearestEven)
    bits += (low >> 1) + ((magnitude >> drop) & 1u);
  else if (f.rounding == Rounding::kNearestAway)
    bits += unit >> 1;
  else if (f.rounding == Rounding::kStochastic && (random >> 1) < (magnitude & low) << (31 - drop))
    bits += unit;
  float rounded = bits_float(bits & ~low);
  if (rounded > f.largest) rounded = f.rounding == Rounding::kTowardZero && magnitude != 0x7f800000u ? f.largest : f.overflow;
  return with_sign(rounded, x);
}

// The bounds of a mended quotient q = |x| / scale <= 2 limit that is rounded to a format whose least quantum is u. Whatever is
// below u / 2^33 rounds to 0, even stochastically, and from there on
//   scale * u / 2^34 >= 2^-100, so that remainders do not underflow;  u >= 2^-90, so that quotients are normal;
//   scale * 2 limit <= 2^126, so that nothing overflows.
// All quotients beyond the limit must become the same, which toward zero infinity and large numbers do not unless saturating.
struct Rounder {
  FloatFormat format;
  FloatGrid grid;
  float magic;                    // 2^23 quanta of 1
  float bound;                    // quotients are at most this: 2 limit
  float least_scale, most_scale;  // of a mended quotient

  static Rounder of(const FloatFormat& f) {
    const int quantum = f.least_exponent - f.mantissa_bits, top = exponent_of(f.largest);
    Rounder r;
    r.format = f;
    r.grid = float_grid(f);
    r.magic = r.grid.quantum * 8388608.0f;
    r.bound = 2.0f * r.grid.limit;
    r.least_scale = quantum < -90 ? INFINITY : power_of_two(std::max(-60, -66 - quantum));
    const bool same_beyond = f.rounding != Rounding::kTowardZero || f.overflow == f.largest;
    r.most_scale = top > 90 || !same_beyond ? 0.0f : power_of_two(std::min(60, 123 - top));
    return r;
  }

  // Of a scale whose quotients are mended; 0 for others.
  QO_HD_MEMBER float reciprocal(float scale) const {
    return scale >= least_scale && scale <= most_scale ? reciprocal_of(scale) : 0.0f;
  }

  // The magnitude of x / scale; beyond grid.limit any number beyond it. Needs a reciprocal that is not 0.
  QO_HD_MEMBER float mended(float x, float scale, float reciprocal) const {
    return small_quotient(lesser(__builtin_fabsf(x), bound * scale), scale, reciprocal);
  }

  // The magnitude m of a number, rounded to the format.
  template <Path kPath>
  QO_HD_MEMBER float operator()(float m, uint32_t random) const {
    if constexpr (kPath == Path::kOther) {
      return format.method == RoundingMethod::kFloats ? round_by_floats(m, format, grid, random)
                                                      : round_by_integers(m, format, random);
    } else {
      m = lesser(m, grid.limit);
      const float binade = greater(bits_float(float_bits(m) & 0x7f800000u), grid.smallest_normal), spread = binade * magic;
      const float rounded = (m + spread) - spread;
      if constexpr (kPath == Path::kPlain) return rounded;
      const float quantum = binade * grid.quantum, down = rounded > m ? rounded - quantum : rounded;
      const float per_quantum = bits_float((254u << 23) - float_bits(quantum));
      const int32_t threshold = nearest_int((m - down) * per_quantum * 2147483648.0f);
      return static_cast<int32_t>(random >> 1) < threshold ? down + quantum : down;
    }
  }
};

// ---- random words ---------------------------------------------------------------------------------------------------

template <Path kPath>
QO_HD bool wants_words(const FloatFormat& f) {
  return kPath == Path::kRandom || (kPath == Path::kOther && f.rounding == Rounding::kStochastic);
}

__device__ __forceinline__ uint64_t value_of(const Seed& seed) {
  return seed.memory != nullptr ? static_cast<uint64_t>(*seed.memory) : seed.value;
}

// random_word of philox.h without an address of a register.
QO_HD uint32_t random_word_at(int64_t index, uint64_t seed) {
  const Random4 r = philox(static_cast<uint64_t>(index) / 4, seed);
  const uint32_t low = index & 1 ? r.word[1] : r.word[0], high = index & 1 ? r.word[3] : r.word[2];
  return index & 2 ? high : low;
}

// The words of V indices from a multiple of V on.
template <int V>
QO_HD void random_words_at(int64_t index, uint64_t seed, uint32_t (&words)[V]) {
  if constexpr (V % 4 == 0) {
    QO_UNROLL
    for (int i = 0; i < V; i += 4) {
      const Random4 r = philox(static_cast<uint64_t>(index + i) / 4, seed);
      QO_UNROLL
      for (int j = 0; j < 4; ++j) words[i + j] = r.word[j];
    }
  } else if constexpr (V == 2) {
    const Random4 r = philox(static_cast<uint64_t>(index) / 4, seed);
    words[0] = index & 2 ? r.word[2] : r.word[0];
    words[1] = index & 2 ? r.word[3] : r.word[1];
  } else {
    static_assert(V == 1);
    words[0] = random_word_at(index, seed);
  }
}

// ---- scales of blocks -----------------------------------------------------------------------------------------------

// block_scale of float_format.h. The rules of powers of two add 1 to the exponent of amax or not, which depends on its mantissa
// alone: `carry` is what makes it reach the exponent. (kRoundUp: amax / largest > 2^k, and so its rounded value, if and only if the
// significand of amax is the greater one, for both have at most 24 bits.) Where exponents are near their limits, block_scale
// decides.
struct BlockScales {
  BlockFormat format;
  bool powers;               // of two
  uint32_t carry, top;       // top: the exponent of the largest value, at its place in a float
  uint32_t lowest, highest;  // bits of amax between which `carry` is enough

  static BlockScales of(const BlockFormat& f) {
    const int m = f.element.mantissa_bits, top = exponent_of(f.element.largest);
    BlockScales s{.format = f,
                  .powers = is_power_of_two_rule(f.rule),
                  .carry = 0,
                  .top = static_cast<uint32_t>(top) << 23,
                  .lowest = static_cast<uint32_t>(std::max(-126, top - 124) + 127) << 23,
                  .highest = static_cast<uint32_t>(std::min(127, top + 124) + 127) << 23 | 0x7fffffu};
    if (f.rule == ScaleRule::kEven && m < 23) s.carry = 1u << (22 - m);
    if (f.rule == ScaleRule::kCeil) s.carry = 0x7fffffu;
    if (f.rule == ScaleRule::kRoundUp) s.carry = 0x7fffffu - (float_bits(f.element.largest) & 0x7fffffu);
    if (top < -126) s.lowest = s.highest + 1;
    return s;
  }

  QO_HD_MEMBER float scale(float amax, float tensor_scale) const {
    const uint32_t bits = float_bits(amax) & 0x7fffffffu;
    if (powers) {
      if (bits >= lowest && bits <= highest) return bits_float(((bits + carry) & 0x7f800000u) - top);
    } else if (format.rule == ScaleRule::kE4m3 && bits < 0x7f800000u) {
      const FloatFormat e4m3 = e4m3_format();
      const float rounded = round_by_floats(amax / format.divisor / tensor_scale, e4m3, float_grid(e4m3), 0);
      return (rounded < 0.015625f ? 0.015625f : rounded) * tensor_scale;
    }
    return block_scale(bits, format, tensor_scale);
  }
};

}  // namespace quant_ops

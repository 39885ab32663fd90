// y = round_to_format(x / scale) * scale for runs of contiguous elements, and the straight-through gradient.
#pragma once

#include "kernels/generic/partial.h"
#include "kernels/generic/unroll.h"

namespace quant_ops::QO_ISA {
namespace {

// round_to_format of float_format.h for vectors, by the two methods that vectors have. kPlain: the most frequent case, nearest even
// by float32 additions with subnormals, saturating.
template <bool kPlain>
struct Rounder {
  using F = typename Simd::F;
  using I = typename Simd::I;
  FloatFormat format;
  FloatGrid grid;
  F limit, smallest_normal, quantum, magic;
  I magnitude_mask, exponent_mask, sign_mask;

  QO_INLINE explicit Rounder(const FloatFormat& f) : format(f), grid(float_grid(f)) {
    limit = Simd::set(grid.limit);
    smallest_normal = Simd::set(grid.smallest_normal);
    quantum = Simd::set(grid.quantum);
    magic = Simd::set(grid.quantum * 8388608.0f);
    magnitude_mask = Simd::set_int(0x7fffffff);
    exponent_mask = Simd::set_int(0x7f800000);
    sign_mask = Simd::set_int(INT32_MIN);
  }

  static bool takes(const FloatFormat& f) {
    return f.method == RoundingMethod::kFloats && f.rounding == Rounding::kNearestEven && f.subnormals && f.overflow == f.largest;
  }

  QO_INLINE F magnitude(F x) const { return Simd::as_float(Simd::and_bits(Simd::bits(x), magnitude_mask)); }

  // Plain rounding to the format whose limit and smallest normal number are these: to a multiple of the format by a power of two.
  QO_INLINE F plain(F x, F limit, F smallest_normal) const {
    const F m = Simd::min(limit, magnitude(x));  // NaN stays
    const F spread = Simd::mul(Simd::max(Simd::as_float(Simd::and_bits(Simd::bits(m), exponent_mask)), smallest_normal), magic);
    const F rounded = Simd::sub(Simd::add(m, spread), spread);
    return Simd::as_float(Simd::or_bits(Simd::bits(rounded), Simd::and_bits(Simd::bits(x), sign_mask)));
  }

  QO_INLINE F operator()(F x, I random) const {
    if constexpr (kPlain) return plain(x, limit, smallest_normal);
    const F whole = magnitude(x);
    const I sign = Simd::and_bits(Simd::bits(x), sign_mask);
    F rounded = format.method == RoundingMethod::kIntegers ? by_integers(whole, random) : by_floats(whole, random);
    const F largest = Simd::set(format.largest);
    F beyond = Simd::set(format.overflow);
    if (format.rounding == Rounding::kTowardZero) beyond = Simd::if_less(whole, Simd::set(INFINITY), largest, beyond);
    rounded = Simd::if_less(largest, rounded, beyond, rounded);
    return Simd::as_float(Simd::or_bits(Simd::bits(rounded), sign));
  }

  // round_by_floats of float_format.h
  QO_INLINE F by_floats(F whole, I random) const {
    const F m = Simd::min(limit, whole);
    const F binade = Simd::as_float(Simd::and_bits(Simd::bits(m), exponent_mask));
    F q = Simd::mul(Simd::max(binade, smallest_normal), quantum);
    q = Simd::if_less(m, Simd::set(grid.flush_below), smallest_normal, q);
    const F spread = Simd::mul(q, Simd::set(8388608.0f));
    F rounded = Simd::sub(Simd::add(m, spread), spread);
    if (format.rounding == Rounding::kNearestEven) return rounded;
    if (format.rounding == Rounding::kNearestAway)
      return Simd::if_less(Simd::sub(m, rounded), Simd::mul(Simd::set(0.5f), q), rounded, Simd::add(rounded, q));
    rounded = Simd::if_less(m, rounded, Simd::sub(rounded, q), rounded);
    if (format.rounding == Rounding::kTowardZero) return rounded;
    const F per_quantum = Simd::as_float(Simd::sub(Simd::set_int(254 << 23), Simd::bits(q)));
    const F threshold = Simd::mul(Simd::mul(Simd::sub(m, rounded), per_quantum), Simd::set(2147483648.0f));
    return up(rounded, Simd::add(rounded, q), Simd::to_int(threshold), random);
  }

  // Where the exponents are those of float32, so are the subnormal numbers: rounding is an addition to the bits.
  QO_INLINE F by_integers(F whole, I random) const {
    const int drop = 23 - format.mantissa_bits;  // low bits that are rounded off
    const I bits = Simd::bits(whole), low = Simd::set_int((1 << drop) - 1);
    const I down = Simd::sub(bits, Simd::and_bits(bits, low));
    I rounded = down;
    if (format.rounding == Rounding::kNearestEven) {
      const I odd = Simd::and_bits(Simd::shift_right(bits, drop), Simd::set_int(1));
      const I sum = Simd::add(Simd::add(bits, Simd::set_int((1 << (drop - 1)) - 1)), odd);
      rounded = Simd::sub(sum, Simd::and_bits(sum, low));
    } else if (format.rounding == Rounding::kNearestAway) {
      const I sum = Simd::add(bits, Simd::set_int(1 << (drop - 1)));
      rounded = Simd::sub(sum, Simd::and_bits(sum, low));
    } else if (format.rounding == Rounding::kStochastic) {
      const I threshold = Simd::shift_left(Simd::and_bits(bits, low), 31 - drop);
      rounded = Simd::bits(up(Simd::as_float(down), Simd::as_float(Simd::add(down, Simd::set_int(1 << drop))), threshold, random));
    }
    // NaN, whose bits the additions may have changed to anything
    return Simd::if_less(whole, Simd::set(INFINITY), Simd::as_float(rounded), Simd::mul(whole, Simd::set(1.0f)));
  }

  // rounds_up of float_format.h for the stochastic case
  QO_INLINE static F up(F down, F up, I threshold, I random) {
    return Simd::if_greater(threshold, Simd::shift_right(random, 1), up, down);
  }
};

// For formats that no vector method is for.
template <class X>
void round_elements(const FloatRun& r) {
  const X* x = static_cast<const X*>(r.x);
  X* y = static_cast<X*>(r.y);
  for (int64_t i = 0; i < r.n; ++i) {
    const float scale = r.scale ? r.scale[i * r.scale_step] : 1.0f;
    from_compute(round_to_format(to_compute(x[i]) / scale, r.format, r.random ? r.random[i] : 0) * scale, &y[i]);
  }
}

// Calls vectors(i, Int<k>, n) for k vectors from element i on; n < Simd::N elements are left at the end.
template <class Body>
QO_INLINE void for_each_part_of(int64_t n, const Body& body) {
  constexpr int64_t N = Simd::N;
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N) unroll<4>([&](auto v) QO_LAMBDA { body(i + v.value * N, N); });
  for (; i < n; i += N) body(i, n - i < N ? n - i : N);
}

// y = round(x) for n neighbours, whose results are numbers of X already.
template <class X, class Round>
QO_INLINE void round_exactly(const X* x, X* y, int64_t n, const Round& round) {
  constexpr int64_t N = Simd::N;
  int64_t i = 0;
  if constexpr (std::is_same_v<X, BFloat16>) {
    const auto pair = [=](int64_t at) QO_LAMBDA {
      typename Simd::F even, odd;
      Simd::load_pair(x + at, &even, &odd);
      Simd::store_pair(y + at, round(even), round(odd));
    };
    for (; i + 4 * N <= n; i += 4 * N) unroll<2>([=](auto v) QO_LAMBDA { pair(i + v.value * 2 * N); });
  }
  for_each_part_of(n - i, [=](int64_t j, int64_t part) QO_LAMBDA {
    const auto rounded = round(load_part(x + i + j, part));
    if (part == N) return Simd::store_exact(y + i + j, rounded);
    store_part(y + i + j, rounded, part);
  });
}

// Whether every number of a format is one of X as well.
template <class X>
bool holds(const FloatFormat& f) {
  if constexpr (std::is_same_v<X, BFloat16>)
    return f.mantissa_bits <= 7;
  else
    return std::is_same_v<X, float>;
}

template <class X, bool kPlain, bool kScaled>
void quantize_float_typed(const FloatRun& r) {
  const Rounder<kPlain> round(r.format);
  const X* x = static_cast<const X*>(r.x);
  X* y = static_cast<X*>(r.y);
  const auto one_scale = Simd::set(kScaled ? *r.scale : 1.0f);
  for_each_part_of(r.n, [&](int64_t i, int64_t n) QO_LAMBDA {
    auto v = load_part(x + i, n);
    auto scale = one_scale, random = Simd::set(0.0f);
    if constexpr (kScaled) {
      if (r.scale_step) scale = load_part(r.scale + i, n);
      v = Simd::div(v, scale);
    }
    auto bits = Simd::bits(random);
    if constexpr (!kPlain)
      if (r.random) bits = load_int_part(reinterpret_cast<const int32_t*>(r.random) + i, n);
    v = round(v, bits);
    if constexpr (kScaled) v = Simd::mul(v, scale);
    store_part(y + i, v, n);
  });
}

// grad where |x / scale| <= largest
template <class X>
void pass_gradient(const FloatRun& r) {
  const X* x = static_cast<const X*>(r.x);
  const X* grad = static_cast<const X*>(r.grad);
  X* y = static_cast<X*>(r.y);
  const auto largest = Simd::set(r.format.largest), smallest = Simd::set(-r.format.largest);
  for_each_part_of(r.n, [&](int64_t i, int64_t n) QO_LAMBDA {
    auto v = load_part(x + i, n);
    if (r.scale) v = Simd::div(v, r.scale_step ? load_part(r.scale + i, n) : Simd::set(*r.scale));
    store_part(y + i, Simd::keep_between(load_part(grad + i, n), v, smallest, largest), n);
  });
}

template <class X>
void quantize_float_of(const FloatRun& r) {
  if (r.grad) return pass_gradient<X>(r);
  if (r.format.method == RoundingMethod::kElements) return round_elements<X>(r);
  if (!Rounder<true>::takes(r.format))
    return r.scale ? quantize_float_typed<X, false, true>(r) : quantize_float_typed<X, false, false>(r);
  if (r.scale) return quantize_float_typed<X, true, true>(r);
  if (!holds<X>(r.format)) return quantize_float_typed<X, true, false>(r);
  const Rounder<true> round(r.format);
  round_exactly(static_cast<const X*>(r.x), static_cast<X*>(r.y), r.n,
                [=](auto v) QO_LAMBDA { return round.plain(v, round.limit, round.smallest_normal); });
}

void quantize_float(const FloatRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return quantize_float_of<float>(r);
    case DType::kFloat16: return quantize_float_of<Half>(r);
    default: return quantize_float_of<BFloat16>(r);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

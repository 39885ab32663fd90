// q = clamp(rne(x / scale) + zero_point, qmin, qmax), or its simulated value (q - zero_point) * scale; and the unsigned codes that
// the integer products read.
#pragma once

#include "kernels/generic/runs.h"

namespace quant_ops::QO_ISA {
namespace {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23

// How the elements of a row are scaled and clamped: all with one scale and one zero point, kept in registers. `i` is the element
// that a vector begins with, counted from p's; this policy needs neither.
struct OneScale {
  using F = typename Simd::F;
  using I = typename Simd::I;
  I qmin, qmax, magic_bits;
  F scale_of_row, reciprocal_of_row, lo, hi;
  I zero_of_row, lo_bits, hi_bits, back;

  QO_INLINE OneScale(const QuantizeRun& r, const RowParameters& p)
      : qmin(Simd::set_int(r.qmin)),
        qmax(Simd::set_int(r.qmax)),
        magic_bits(Simd::bits(Simd::set(kMagic))),
        scale_of_row(Simd::set(*p.scale)),
        reciprocal_of_row(Simd::set(*p.reciprocal)),
        zero_of_row(Simd::set_int(*p.zero_point)) {
    lo = Simd::to_float(Simd::sub(qmin, zero_of_row));
    hi = Simd::to_float(Simd::sub(qmax, zero_of_row));
    lo_bits = Simd::add(Simd::sub(qmin, zero_of_row), magic_bits);
    hi_bits = Simd::add(Simd::sub(qmax, zero_of_row), magic_bits);
    back = Simd::sub(zero_of_row, magic_bits);
  }
  QO_INLINE F scale(const RowParameters&, int64_t) const { return scale_of_row; }
  QO_INLINE F reciprocal(const RowParameters&, int64_t) const { return reciprocal_of_row; }
  QO_INLINE I zero(const RowParameters&, int64_t) const { return zero_of_row; }
  QO_INLINE F clamp(const RowParameters&, int64_t, F steps) const { return Simd::min(hi, Simd::max(lo, steps)); }  // NaN stays NaN
  // The code of a value whose rounded steps + kMagic are `sum`.
  QO_INLINE I code(const RowParameters&, int64_t, F sum) const {
    return Simd::add(Simd::min(hi_bits, Simd::max(lo_bits, Simd::bits(sum))), back);
  }
};

// The same for rows whose elements have a scale or a zero point of their own.
struct ScalePerElement : OneScale {
  QO_INLINE ScalePerElement(const QuantizeRun& r, const RowParameters& p) : OneScale(r, p) {}
  QO_INLINE F scale(const RowParameters& p, int64_t i) const { return p.scale_step ? Simd::load(p.scale + i) : scale_of_row; }
  QO_INLINE F reciprocal(const RowParameters& p, int64_t i) const {
    return p.scale_step ? Simd::load(p.reciprocal + i) : reciprocal_of_row;
  }
  QO_INLINE I zero(const RowParameters& p, int64_t i) const { return p.zero_step ? Simd::load_int(p.zero_point + i) : zero_of_row; }
  QO_INLINE F clamp(const RowParameters& p, int64_t i, F steps) const {
    if (!p.zero_step) return OneScale::clamp(p, i, steps);
    const I z = zero(p, i);
    return Simd::min(Simd::to_float(Simd::sub(qmax, z)), Simd::max(Simd::to_float(Simd::sub(qmin, z)), steps));
  }
  QO_INLINE I code(const RowParameters& p, int64_t i, F sum) const {
    if (!p.zero_step) return OneScale::code(p, i, sum);
    const I z = zero(p, i);
    const I least = Simd::add(Simd::sub(qmin, z), magic_bits), most = Simd::add(Simd::sub(qmax, z), magic_bits);
    return Simd::add(Simd::min(most, Simd::max(least, Simd::bits(sum))), Simd::sub(z, magic_bits));
  }
};

// kVectors vectors. Adding 1.5 * 2^23 to x * (1 / scale) rounds it to an integer, which the low bits of the mantissa then hold. Out
// of the codes' range only the order of the bits survives, which is all that clamping needs.
//
// The product rounds like the quotient unless it lies close to a tie n + 1/2 (tie_for). If one of the values does, about once in
// 200 times for 64 eight-bit codes, all of them are divided. NaN, infinities and products with a NaN reciprocal count as close to a
// tie.
template <bool kSimulate, int kVectors, class X, class Y, class Policy>
QO_INLINE void quantize_vectors(const X* from, Y* to, const RowParameters& p, const Policy& policy, typename Simd::I tie) {
  using F = typename Simd::F;
  using I = typename Simd::I;
  const F magic = Simd::set(kMagic);
  F steps[kVectors];
  I q[kVectors], distance = Simd::set_int(0);
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    constexpr int64_t i = v.value * Simd::N;
    const F element = Simd::load(from + i), reciprocal = policy.reciprocal(p, i);
    const F sum = Simd::fma(element, reciprocal, magic), rounded = Simd::sub(sum, magic);
    distance = Simd::max_unsigned(distance, Simd::abs_bits(Simd::fnma(element, reciprocal, rounded)));
    if constexpr (kSimulate)
      steps[v.value] = policy.clamp(p, i, rounded);  // never -0
    else
      q[v.value] = policy.code(p, i, sum);
  });
  if (__builtin_expect(Simd::any_above(distance, tie), 0))
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      constexpr int64_t i = v.value * Simd::N;
      const F quotient = Simd::round_even(Simd::div(Simd::load(from + i), policy.scale(p, i)));
      if constexpr (kSimulate)
        steps[v.value] = policy.clamp(p, i, Simd::add(quotient, Simd::set(0.0f)));  // + 0: no -0
      else
        q[v.value] = Simd::add(Simd::to_int(policy.clamp(p, i, Simd::nan_to_zero(quotient))), policy.zero(p, i));
    });
  if constexpr (kSimulate)
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      Simd::store(to + v.value * Simd::N, Simd::mul(steps[v.value], policy.scale(p, v.value * Simd::N)));
    });
  else if constexpr (kVectors == 4 && sizeof(Y) == 1)
    Simd::store_bytes(to, q[0], q[1], q[2], q[3]);
  else
    unroll<kVectors>([&](auto v) QO_LAMBDA { Simd::store(to + v.value * Simd::N, q[v.value]); });
}

template <class X, class Y, bool kSimulate>
void quantize_typed(const QuantizeRun& r) {
  // without reciprocals everything counts as close to a tie
  const auto tie = Simd::set_int(r.reciprocal ? static_cast<int32_t>(float_bits(r.tie)) : -1);
  for_each_row(r, r.reciprocal ? r.reciprocal : r.scale,
               [&](int64_t from, int64_t to, int64_t n, const RowParameters& row, auto vary) QO_LAMBDA {
                 const std::conditional_t<vary.value != 0, ScalePerElement, OneScale> policy(r, row);
                 for_each_vector(static_cast<const X*>(r.x) + from, static_cast<Y*>(r.y) + to, n, row,
                                 [&](const X* x, Y* y, const RowParameters& p, auto count)
                                     QO_LAMBDA { quantize_vectors<kSimulate, count.value>(x, y, p, policy, tie); });
               });
}

template <class X>
void quantize_from(const QuantizeRun& r) {
  if (r.simulate) return quantize_typed<X, X, true>(r);
  switch (r.y_dtype) {
    case DType::kInt8: return quantize_typed<X, int8_t, false>(r);
    case DType::kUInt8: return quantize_typed<X, uint8_t, false>(r);
    case DType::kInt16: return quantize_typed<X, int16_t, false>(r);
    default: return quantize_typed<X, int32_t, false>(r);
  }
}

void quantize(const QuantizeRun& r) {
  switch (r.x_dtype) {
    case DType::kFloat32: return quantize_from<float>(r);
    case DType::kFloat16: return quantize_from<Half>(r);
    default: return quantize_from<BFloat16>(r);
  }
}

void codes(const void* x, DType dtype, int64_t n, float scale, int32_t zero_point, uint8_t* to) {
  const float reciprocal = reciprocal_of(scale);
  QuantizeRun run;
  run.x = x;
  run.y = to;
  run.n = n;
  run.scale = &scale;
  run.reciprocal = &reciprocal;
  run.tie = tie_for(255);
  run.zero_point = &zero_point;
  run.scale_step = run.zero_step = 0;
  run.qmin = 0;
  run.qmax = 255;
  run.x_dtype = dtype;
  run.y_dtype = DType::kUInt8;
  run.simulate = false;
  quantize(run);
}

}  // namespace
}  // namespace quant_ops::QO_ISA

// q = clamp(rne(x / scale) + zero_point, qmin, qmax), or its simulated value (q - zero_point) * scale; and the unsigned codes that
// the integer products read.
#pragma once

#include "kernels/generic/runs.h"

namespace quant_ops::QO_ISA {
namespace {

// One row. Adding 1.5 * 2^23 to x * (1 / scale) rounds it to an integer, which the low bits of the mantissa then hold. Out of the
// codes' range only the order of the bits survives, which is all that clamping needs.
//
// The product rounds like the quotient unless it lies close to a tie n + 1/2 (tie_for). If one of the values of a step does, about
// once in 200 times for 64 eight-bit codes, all of them are divided. NaN, infinities and products with a NaN reciprocal count as
// close to a tie.
template <class X, class Y, bool kSimulate, bool kVary>
QO_INLINE void quantize_row(const QuantizeRun& r, const X* x, Y* y, int64_t n, const RowParameters& row, int32_t tie_bits) {
  using F = typename Simd::F;
  using I = typename Simd::I;
  constexpr float kMagic = 12582912.0f;
  const F magic = Simd::set(kMagic), scale1 = Simd::set(*row.scale), reciprocal1 = Simd::set(*row.reciprocal);
  const I magic_bits = Simd::bits(magic), tie = Simd::set_int(tie_bits), zero1 = Simd::set_int(*row.zero_point);
  const I qmin = Simd::set_int(r.qmin), qmax = Simd::set_int(r.qmax);
  const I lo1 = Simd::sub(qmin, zero1), hi1 = Simd::sub(qmax, zero1);
  const F lo_float1 = Simd::to_float(lo1), hi_float1 = Simd::to_float(hi1);
  const I lo_bits1 = Simd::add(lo1, magic_bits), hi_bits1 = Simd::add(hi1, magic_bits), back1 = Simd::sub(zero1, magic_bits);
  for_each_vector(x, y, n, row, [&](const X* from, Y* to, const RowParameters& p, auto count) QO_LAMBDA {
    constexpr int kVectors = count.value;
    F steps[kVectors];
    I q[kVectors], distance = Simd::set_int(0);
    const auto scale = [&](auto v) QO_LAMBDA {
      if constexpr (kVary)
        if (p.scale_step) return Simd::load(p.scale + v.value * Simd::N);
      return scale1;
    };
    const auto zero = [&](auto v) QO_LAMBDA {
      if constexpr (kVary)
        if (p.zero_step) return Simd::load_int(p.zero_point + v.value * Simd::N);
      return zero1;
    };
    const auto clamped = [&](auto v, F value) QO_LAMBDA {  // NaN passes
      if constexpr (kVary)
        if (p.zero_step)
          return Simd::min(Simd::to_float(Simd::sub(qmax, zero(v))), Simd::max(Simd::to_float(Simd::sub(qmin, zero(v))), value));
      return Simd::min(hi_float1, Simd::max(lo_float1, value));
    };
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      constexpr int64_t i = v.value * Simd::N;
      F reciprocal = reciprocal1;
      if constexpr (kVary)
        if (p.scale_step) reciprocal = Simd::load(p.reciprocal + i);
      const F element = Simd::load(from + i), sum = Simd::fma(element, reciprocal, magic), rounded = Simd::sub(sum, magic);
      distance = Simd::max_unsigned(distance, Simd::abs_bits(Simd::fnma(element, reciprocal, rounded)));
      if constexpr (kSimulate) {
        steps[v.value] = clamped(v, rounded);  // never -0
      } else {
        I lo = lo_bits1, hi = hi_bits1, back = back1;
        if constexpr (kVary)
          if (p.zero_step) {
            const I z = zero(v);
            lo = Simd::add(Simd::sub(qmin, z), magic_bits), hi = Simd::add(Simd::sub(qmax, z), magic_bits);
            back = Simd::sub(z, magic_bits);
          }
        q[v.value] = Simd::add(Simd::min(hi, Simd::max(lo, Simd::bits(sum))), back);
      }
    });
    if (__builtin_expect(Simd::any_above(distance, tie), 0))
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        const F quotient = Simd::round_even(Simd::div(Simd::load(from + v.value * Simd::N), scale(v)));
        if constexpr (kSimulate)
          steps[v.value] = clamped(v, Simd::add(quotient, Simd::set(0.0f)));  // + 0: no -0
        else
          q[v.value] = Simd::add(Simd::to_int(clamped(v, Simd::nan_to_zero(quotient))), zero(v));
      });
    if constexpr (kSimulate)
      unroll<kVectors>([&](auto v) QO_LAMBDA { Simd::store(to + v.value * Simd::N, Simd::mul(steps[v.value], scale(v))); });
    else if constexpr (kVectors == 4 && sizeof(Y) == 1)
      Simd::store_bytes(to, q[0], q[1], q[2], q[3]);
    else
      unroll<kVectors>([&](auto v) QO_LAMBDA { Simd::store(to + v.value * Simd::N, q[v.value]); });
  });
}

template <class X, class Y, bool kSimulate>
void quantize_typed(const QuantizeRun& r) {
  // without reciprocals everything counts as close to a tie
  const int32_t tie = r.reciprocal ? static_cast<int32_t>(float_bits(r.tie)) : -1;
  for_each_row(r, r.reciprocal ? r.reciprocal : r.scale,
               [&](int64_t from, int64_t to, int64_t n, const RowParameters& p, auto vary) QO_LAMBDA {
                 quantize_row<X, Y, kSimulate, vary.value != 0>(r, static_cast<const X*>(r.x) + from, static_cast<Y*>(r.y) + to, n,
                                                                p, tie);
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

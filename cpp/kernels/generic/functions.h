// The functions of contract/functions.h on vectors: the same operations in the same order, so the same bits.
#pragma once

#include "kernels/generic/partial.h"

namespace quant_ops::QO_ISA {
namespace {

QO_INLINE typename Simd::F negative(typename Simd::F x) {
  return Simd::as_float(Simd::xor_bits(Simd::bits(x), Simd::set_int(INT32_MIN)));
}

QO_INLINE typename Simd::F exp2_fraction(typename Simd::F f) {
  auto p = Simd::set(kExp2[5]);
  unroll<5>([&](auto i) QO_LAMBDA { p = Simd::fma(p, f, Simd::set(kExp2[4 - i.value])); });
  return Simd::fma(p, f, Simd::set(1.0f));
}

// 2^n times what `bias` holds, (127 + the power) << 23.
QO_INLINE typename Simd::F power_of_two(typename Simd::F rounded, typename Simd::I bias) {
  return Simd::as_float(Simd::add(Simd::shift_left(Simd::bits(rounded), 23), bias));
}

QO_INLINE typename Simd::F exp_fraction(typename Simd::F x, typename Simd::F* rounded) {
  *rounded = Simd::fma(x, Simd::set(kLog2E), Simd::set(kRoundMagic));
  const auto n = Simd::sub(*rounded, Simd::set(kRoundMagic));
  return exp2_fraction(Simd::fnma(x, Simd::set(kLog2ERest), Simd::fnma(x, Simd::set(kLog2E), n)));
}

QO_INLINE typename Simd::F exp_of(typename Simd::F x) {
  const auto bounded = Simd::min(Simd::set(kExpHigh), Simd::max(Simd::set(kExpLow), x)), zero = Simd::set(0.0f);
  typename Simd::F rounded;
  const auto p = exp_fraction(bounded, &rounded);
  const auto bias = Simd::if_less(bounded, zero, Simd::as_float(Simd::set_int((127 + 64) << 23)),
                                  Simd::as_float(Simd::set_int((127 - 64) << 23)));
  const auto rest = Simd::if_less(bounded, zero, Simd::set(0x1p-64f), Simd::set(0x1p64f));
  return Simd::mul(Simd::mul(p, power_of_two(rounded, Simd::bits(bias))), rest);
}

// x / (1 + e^minus_z)
QO_INLINE typename Simd::F logistic(typename Simd::F x, typename Simd::F minus_z) {
  typename Simd::F rounded;
  const auto p = exp_fraction(Simd::min(Simd::set(kLogisticHigh), Simd::max(Simd::set(kLogisticLow), minus_z)), &rounded);
  return Simd::div(x, Simd::fma(p, power_of_two(rounded, Simd::set_int(127 << 23)), Simd::set(1.0f)));
}

QO_INLINE typename Simd::F gelu_of(typename Simd::F x) {
  const auto t = Simd::as_float(Simd::abs_bits(x)), one = Simd::set(1.0f), magic = Simd::set(kRoundMagic);
  auto y = Simd::set(kGeluTail[9]);
  unroll<9>([&](auto i) QO_LAMBDA { y = Simd::fma(y, t, Simd::set(kGeluTail[8 - i.value])); });
  y = Simd::max(Simd::set(-127.0f), Simd::fma(y, t, Simd::set(-1.0f)));
  const auto rounded = Simd::add(y, magic);
  const auto tail =
      Simd::mul(exp2_fraction(Simd::sub(Simd::sub(rounded, magic), y)), power_of_two(rounded, Simd::set_int(127 << 23)));
  return Simd::mul(x, Simd::if_less(x, Simd::set(0.0f), tail, Simd::sub(one, tail)));
}

template <Function kFunction>
QO_INLINE typename Simd::F apply_function(typename Simd::F x) {
  const auto zero = Simd::set(0.0f), six = Simd::set(6.0f);
  if constexpr (kFunction == Function::kRelu) {
    return Simd::max(zero, x);
  } else if constexpr (kFunction == Function::kRelu6) {
    return Simd::min(six, Simd::max(zero, x));
  } else if constexpr (kFunction == Function::kHardswish) {
    return Simd::div(Simd::mul(x, Simd::min(six, Simd::max(zero, Simd::add(x, Simd::set(3.0f))))), six);
  } else if constexpr (kFunction == Function::kSilu) {
    return logistic(x, negative(x));
  } else if constexpr (kFunction == Function::kGelu) {
    return gelu_of(x);
  } else if constexpr (kFunction == Function::kGeluTanh) {
    const auto z = Simd::mul(x, Simd::fma(Simd::mul(x, x), Simd::set(kGeluTanhCubic), Simd::set(kGeluTanhLinear)));
    return logistic(x, negative(z));
  } else {
    return x;
  }
}

// Calls f(a constant whose value is the function).
template <class F>
QO_INLINE void with_function(Function function, const F& f) {
  switch (function) {
    case Function::kNone: return f(std::integral_constant<Function, Function::kNone>{});
    case Function::kRelu: return f(std::integral_constant<Function, Function::kRelu>{});
    case Function::kRelu6: return f(std::integral_constant<Function, Function::kRelu6>{});
    case Function::kHardswish: return f(std::integral_constant<Function, Function::kHardswish>{});
    case Function::kSilu: return f(std::integral_constant<Function, Function::kSilu>{});
    case Function::kGelu: return f(std::integral_constant<Function, Function::kGelu>{});
    case Function::kGeluTanh: return f(std::integral_constant<Function, Function::kGeluTanh>{});
  }
}

// x[i] = the function of x[i]; vectors four at a time, so that their long chains of operations overlap.
__attribute__((noinline, unused)) void apply_functions(Function function, float* x, int64_t n) {
  with_function(function, [&](auto constant) QO_LAMBDA {
    constexpr int64_t N = Simd::N;
    if constexpr (constant.value != Function::kNone) {
      int64_t i = 0;
      for (; i + 4 * N <= n; i += 4 * N)
        unroll<4>([&](auto v) QO_LAMBDA {
          float* at = x + i + v.value * N;
          Simd::store(at, apply_function<constant.value>(Simd::load(at)));
        });
      for (; i < n; i += N) store_part(x + i, apply_function<constant.value>(load_part(x + i, n - i)), n - i);
    }
  });
}

}  // namespace
}  // namespace quant_ops::QO_ISA

// The functions of contract/functions.h on vectors: the same operations in the same order, so the same bits.
#pragma once

#include "kernels/generic/partial.h"

namespace quant_ops::QO_ISA {
namespace {

// Some vectors, on which each operation is done in turn: the functions are long chains of operations, and the processor sees few of
// them at a time.
template <int K>
struct Vectors {
  typename Simd::F v[K];

  // Vector i is f(Int<i>{}).
  template <class F>
  static QO_INLINE Vectors of(const F& f) {
    Vectors made;
    unroll<K>([&](auto i) QO_LAMBDA { made.v[i.value] = f(i); });
    return made;
  }
  // Vector i becomes f(itself, Int<i>{}).
  template <class F>
  QO_INLINE void each(const F& f) {
    unroll<K>([&](auto i) QO_LAMBDA { v[i.value] = f(v[i.value], i); });
  }
};

QO_INLINE typename Simd::F negative(typename Simd::F x) {
  return Simd::as_float(Simd::xor_bits(Simd::bits(x), Simd::set_int(INT32_MIN)));
}

// 2^-f
template <int K>
QO_INLINE Vectors<K> exp2_fraction(const Vectors<K>& f) {
  auto p = Vectors<K>::of([](auto) QO_LAMBDA { return Simd::set(kExp2[5]); });
  unroll<5>([&](auto i) QO_LAMBDA {
    const auto coefficient = Simd::set(kExp2[4 - i.value]);
    p.each([&](auto sum, auto v) QO_LAMBDA { return Simd::fma(sum, f.v[v.value], coefficient); });
  });
  p.each([&](auto sum, auto v) QO_LAMBDA { return Simd::fma(sum, f.v[v.value], Simd::set(1.0f)); });
  return p;
}

// 2^n times what `bias` holds, (127 + the power) << 23.
QO_INLINE typename Simd::F power_of_two(typename Simd::F rounded, typename Simd::I bias) {
  return Simd::as_float(Simd::add(Simd::shift_left(Simd::bits(rounded), 23), bias));
}

template <int K>
QO_INLINE Vectors<K> exp_fraction(const Vectors<K>& x, Vectors<K>* rounded) {
  const auto magic = Simd::set(kRoundMagic);
  *rounded = Vectors<K>::of([&](auto v) QO_LAMBDA { return Simd::fma(x.v[v.value], Simd::set(kLog2E), magic); });
  auto f = Vectors<K>::of([&](auto v) QO_LAMBDA { return Simd::sub(rounded->v[v.value], magic); });
  f.each([&](auto n, auto v) QO_LAMBDA { return Simd::fnma(x.v[v.value], Simd::set(kLog2E), n); });
  f.each([&](auto n, auto v) QO_LAMBDA { return Simd::fnma(x.v[v.value], Simd::set(kLog2ERest), n); });
  return exp2_fraction(f);
}

QO_INLINE typename Simd::F exp_of(typename Simd::F x) {
  const auto bounded = Simd::min(Simd::set(kExpHigh), Simd::max(Simd::set(kExpLow), x)), zero = Simd::set(0.0f);
  Vectors<1> rounded;
  const auto p = exp_fraction(Vectors<1>{{bounded}}, &rounded);
  const auto bias = Simd::if_less(bounded, zero, Simd::as_float(Simd::set_int((127 + 64) << 23)),
                                  Simd::as_float(Simd::set_int((127 - 64) << 23)));
  const auto rest = Simd::if_less(bounded, zero, Simd::set(0x1p-64f), Simd::set(0x1p64f));
  return Simd::mul(Simd::mul(p.v[0], power_of_two(rounded.v[0], Simd::bits(bias))), rest);
}

// x / (1 + e^minus_z)
template <int K>
QO_INLINE void logistic(Vectors<K>* x, Vectors<K> minus_z) {
  Vectors<K> rounded;
  minus_z.each([](auto z, auto) QO_LAMBDA { return Simd::min(Simd::set(kLogisticHigh), Simd::max(Simd::set(kLogisticLow), z)); });
  const Vectors<K> p = exp_fraction(minus_z, &rounded);
  const auto bias = Simd::set_int(127 << 23);
  x->each([&](auto above, auto v) QO_LAMBDA {
    return Simd::div(above, Simd::fma(p.v[v.value], power_of_two(rounded.v[v.value], bias), Simd::set(1.0f)));
  });
}

template <int K>
QO_INLINE void gelu_of(Vectors<K>* x) {
  const auto magic = Simd::set(kRoundMagic);
  const auto far = Simd::bits(Simd::set(kGeluFar));  // positive floats are in the order of their bits
  const auto t = Vectors<K>::of([&](auto v) QO_LAMBDA { return Simd::as_float(Simd::min(far, Simd::abs_bits(x->v[v.value]))); });
  auto y = Vectors<K>::of([](auto) QO_LAMBDA { return Simd::set(kGeluTail[7]); });
  unroll<7>([&](auto i) QO_LAMBDA {
    const auto coefficient = Simd::set(kGeluTail[6 - i.value]);
    y.each([&](auto sum, auto v) QO_LAMBDA { return Simd::fma(sum, t.v[v.value], coefficient); });
  });
  y.each([&](auto sum, auto v) QO_LAMBDA { return Simd::fma(sum, t.v[v.value], Simd::set(-1.0f)); });
  const auto rounded = Vectors<K>::of([&](auto v) QO_LAMBDA { return Simd::add(y.v[v.value], magic); });
  y.each([&](auto power, auto v) QO_LAMBDA { return Simd::sub(Simd::sub(rounded.v[v.value], magic), power); });
  const Vectors<K> p = exp2_fraction(y);
  x->each([&](auto a, auto v) QO_LAMBDA {
    const auto tail = Simd::mul(p.v[v.value], power_of_two(rounded.v[v.value], Simd::set_int(127 << 23)));
    return Simd::fnma(t.v[v.value], tail, Simd::max(Simd::set(0.0f), a));
  });
}

template <Function kFunction, int K>
QO_INLINE void apply_function(Vectors<K>* x) {
  const auto zero = Simd::set(0.0f), six = Simd::set(6.0f);
  if constexpr (kFunction == Function::kRelu) {
    x->each([&](auto a, auto) QO_LAMBDA { return Simd::max(zero, a); });
  } else if constexpr (kFunction == Function::kRelu6) {
    x->each([&](auto a, auto) QO_LAMBDA { return Simd::min(six, Simd::max(zero, a)); });
  } else if constexpr (kFunction == Function::kHardswish) {
    x->each([&](auto a, auto)
                QO_LAMBDA { return Simd::div(Simd::mul(a, Simd::min(six, Simd::max(zero, Simd::add(a, Simd::set(3.0f))))), six); });
  } else if constexpr (kFunction == Function::kHardsigmoid) {
    x->each([&](auto a, auto) QO_LAMBDA { return Simd::div(Simd::min(six, Simd::max(zero, Simd::add(a, Simd::set(3.0f)))), six); });
  } else if constexpr (kFunction == Function::kGelu) {
    gelu_of(x);
  } else if constexpr (kFunction == Function::kSilu || kFunction == Function::kGeluTanh || kFunction == Function::kSigmoid) {
    Vectors<K> minus_z = *x;
    if constexpr (kFunction == Function::kGeluTanh)
      minus_z.each([](auto a, auto) QO_LAMBDA {
        return Simd::mul(a, Simd::fma(Simd::mul(a, a), Simd::set(kGeluTanhCubic), Simd::set(kGeluTanhLinear)));
      });
    minus_z.each([](auto z, auto) QO_LAMBDA { return negative(z); });
    if constexpr (kFunction == Function::kSigmoid) x->each([](auto, auto) QO_LAMBDA { return Simd::set(1.0f); });
    logistic(x, minus_z);
  }
}

template <Function kFunction>
QO_INLINE typename Simd::F apply_function(typename Simd::F x) {
  Vectors<1> one{{x}};
  apply_function<kFunction>(&one);
  return one.v[0];
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
    case Function::kSigmoid: return f(std::integral_constant<Function, Function::kSigmoid>{});
    case Function::kHardsigmoid: return f(std::integral_constant<Function, Function::kHardsigmoid>{});
  }
}

// Four vectors in memory; a function of its own, because it takes all of the registers.
__attribute__((noinline, unused)) void apply_four(Function function, float* x) {
  with_function(function, [&](auto constant) QO_LAMBDA {
    auto four = Vectors<4>::of([&](auto v) QO_LAMBDA { return Simd::load(x + v.value * Simd::N); });
    apply_function<constant.value>(&four);
    unroll<4>([&](auto v) QO_LAMBDA { Simd::store(x + v.value * Simd::N, four.v[v.value]); });
  });
}

// x[i] = the function of x[i]
__attribute__((noinline, unused)) void apply_functions(Function function, float* x, int64_t n) {
  with_function(function, [&](auto constant) QO_LAMBDA {
    constexpr int64_t N = Simd::N;
    if constexpr (constant.value != Function::kNone) {
      int64_t i = 0;
      for (; i + 4 * N <= n; i += 4 * N) {
        auto four = Vectors<4>::of([&](auto v) QO_LAMBDA { return Simd::load(x + i + v.value * N); });
        apply_function<constant.value>(&four);
        unroll<4>([&](auto v) QO_LAMBDA { Simd::store(x + i + v.value * N, four.v[v.value]); });
      }
      for (; i < n; i += N) store_part(x + i, apply_function<constant.value>(load_part(x + i, n - i)), n - i);
    }
  });
}

}  // namespace
}  // namespace quant_ops::QO_ISA

// What follows a product, on its own: x to float32, plus the residual, the function, and the conversion to the result's dtype
// (PointwiseParams in ops.h). Codes to codes without a function, or with a ReLU, stay in registers; everything else goes through a
// buffer in the first cache, one step after the other.
#pragma once

#include "kernels/generic/functions.h"
#include "kernels/generic/partial.h"
#include "kernels/generic/quantize.h"

namespace quant_ops::QO_ISA {
namespace {

// ---- codes to codes -------------------------------------------------------------------------------------------------

// The conversion of float32 values to the codes of the result, between `least` and `most`. What lies outside their range is clamped
// there, so that bounds alone make the ReLUs of values with a positive scale.
struct ResultCodes {
  float reciprocal;
  QuantizeRun run;

  QO_INLINE explicit ResultCodes(const PointwiseRun& p) : reciprocal(reciprocal_of(p.out_scale)) {
    run.x_dtype = DType::kFloat32;
    run.y_dtype = p.y_dtype;
    run.scale = &p.out_scale;
    run.zero_point = &p.out_zero_point;
    run.scale_step = run.zero_step = 0;
    run.tie = tie_for(255);
    run.qmin = p.y_dtype == DType::kInt8 ? -128 : 0;
    run.qmax = run.qmin + 255;
    run.simulate = false;
  }

  // Whether the function is the bounds, which it makes them.
  QO_INLINE bool bound_by(Function function) {
    if (function == Function::kNone) return true;
    if ((function != Function::kRelu && function != Function::kRelu6) || !(*run.scale > 0.0f)) return false;
    const float steps = clamp_steps(quantize_steps(6.0f, *run.scale), 0.0f, static_cast<float>(run.qmax - *run.zero_point));
    if (function == Function::kRelu6) run.qmax = *run.zero_point + static_cast<int32_t>(steps);
    run.qmin = *run.zero_point;
    return true;
  }
};

// Four vectors of codes from value(Int<0>) to value(Int<3>), as quantize_vectors rounds.
template <class Y, class Value>
QO_INLINE void store_rounded(Y* y, const OneScale& policy, const RowParameters& row, typename Simd::I tie, const Value& value) {
  using F = typename Simd::F;
  typename Simd::I q[4], distance = Simd::set_int(0);
  const F magic = Simd::set(kMagic);
  unroll<4>([&](auto v) QO_LAMBDA {
    const F element = value(v), sum = Simd::fma(element, policy.reciprocal_of_row, magic);
    distance = Simd::max_unsigned(distance, Simd::abs_bits(Simd::fnma(element, policy.reciprocal_of_row, Simd::sub(sum, magic))));
    q[v.value] = policy.code(row, 0, sum);
  });
  if (__builtin_expect(Simd::any_above(distance, tie), 0))
    unroll<4>([&](auto v) QO_LAMBDA {
      const F quotient = Simd::round_even(Simd::div(value(v), policy.scale_of_row));
      q[v.value] = Simd::add(Simd::to_int(policy.clamp(row, 0, Simd::nan_to_zero(quotient))), policy.zero_of_row);
    });
  Simd::store_bytes(y, q[0], q[1], q[2], q[3]);
}

// R is void where there is no residual. The last elements, fewer than four vectors, pass through the stack.
template <class X, class R, class Y>
void codes_to_codes(const PointwiseRun& p, const ResultCodes& codes) {
  constexpr int64_t N = Simd::N, kBlock = 4 * N;
  constexpr bool kAdds = !std::is_void_v<R>;
  using Residual = std::conditional_t<kAdds, R, int8_t>;
  const RowParameters row{codes.run.scale, &codes.reciprocal, codes.run.zero_point, 0, 0};
  const OneScale policy(codes.run, row);
  const auto tie = Simd::set_int(static_cast<int32_t>(float_bits(codes.run.tie)));
  const auto x_zero = Simd::set_int(p.x_zero_point), r_zero = Simd::set_int(p.residual_zero_point);
  const auto x_scale = Simd::set(p.x_scale), r_scale = Simd::set(p.residual_scale);
  const auto block = [&](const X* x, const Residual* r, Y* y) QO_LAMBDA {
    store_rounded(y, policy, row, tie, [&](auto v) QO_LAMBDA {
      const auto value = Simd::mul(Simd::to_float(Simd::sub(Simd::load_int(x + v.value * N), x_zero)), x_scale);
      if constexpr (!kAdds)
        return value;
      else
        return Simd::fma(Simd::to_float(Simd::sub(Simd::load_int(r + v.value * N), r_zero)), r_scale, value);
    });
  };
  const X* const x = static_cast<const X*>(p.x);
  const Residual* const r = static_cast<const Residual*>(p.residual);
  Y* const y = static_cast<Y*>(p.y);
  int64_t i = 0;
  for (; i + kBlock <= p.n; i += kBlock) block(x + i, kAdds ? r + i : nullptr, y + i);
  if (i == p.n) return;
  X x_part[kBlock] = {};
  Residual r_part[kBlock] = {};
  Y y_part[kBlock];
  const size_t rest = static_cast<size_t>(p.n - i);
  __builtin_memcpy(x_part, x + i, rest);
  if constexpr (kAdds) __builtin_memcpy(r_part, r + i, rest);
  block(x_part, r_part, y_part);
  __builtin_memcpy(y + i, y_part, rest);
}

// ---- step by step ---------------------------------------------------------------------------------------------------

// Calls f with a null pointer of x's type.
template <class F>
QO_INLINE void with_value_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<const float*>(nullptr));
    case DType::kFloat16: return f(static_cast<const Half*>(nullptr));
    case DType::kBFloat16: return f(static_cast<const BFloat16*>(nullptr));
    case DType::kInt8: return f(static_cast<const int8_t*>(nullptr));
    case DType::kUInt8: return f(static_cast<const uint8_t*>(nullptr));
    default: return f(static_cast<const int32_t*>(nullptr));
  }
}

// to[i] = x[i], or the value of a code, plus (kAdd) what is there. `to` has room for whole vectors.
template <bool kAdd>
QO_INLINE void take_values(const void* from, DType dtype, int64_t first, int64_t n, float scale, int32_t zero_point, float* to) {
  constexpr int64_t N = Simd::N;
  const auto scales = Simd::set(scale);
  const auto zero = Simd::set_int(zero_point);
  with_value_type(dtype, [&](auto* type) QO_LAMBDA {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const X* const x = static_cast<const X*>(from) + first;
    for (int64_t i = 0; i < n; i += N) {
      if constexpr (std::is_integral_v<X>) {
        const auto steps = Simd::to_float(Simd::sub(load_int_part(x + i, n - i), zero));
        Simd::store(to + i, kAdd ? Simd::fma(steps, scales, Simd::load(to + i)) : Simd::mul(steps, scales));
      } else {
        const auto value = load_part(x + i, n - i);
        Simd::store(to + i, kAdd ? Simd::add(Simd::load(to + i), value) : value);
      }
    }
  });
}

// Values to the dtype of the result.
QO_INLINE void put_values(const PointwiseRun& p, int64_t first, int64_t n, const float* values, const ResultCodes& codes) {
  const auto put = [&](auto* y) QO_LAMBDA {
    for (int64_t i = 0; i < n; i += Simd::N) store_part(y + first + i, Simd::load(values + i), n - i);
  };
  switch (p.y_dtype) {
    case DType::kFloat32: return put(static_cast<float*>(p.y));
    case DType::kFloat16: return put(static_cast<Half*>(p.y));
    case DType::kBFloat16: return put(static_cast<BFloat16*>(p.y));
    default: break;
  }
  QuantizeRun run = codes.run;
  run.reciprocal = &codes.reciprocal;
  run.n = n;
  run.x = values;
  run.y = static_cast<char*>(p.y) + first;
  quantize(run);
}

__attribute__((noinline)) void step_by_step(const PointwiseRun& p, const ResultCodes& codes) {
  constexpr int64_t kChunk = 512;
  float values[kChunk + Simd::N];
  for (int64_t first = 0; first < p.n; first += kChunk) {
    const int64_t n = p.n - first < kChunk ? p.n - first : kChunk;
    take_values<false>(p.x, p.x_dtype, first, n, p.x_scale, p.x_zero_point, values);
    if (p.residual != nullptr)
      take_values<true>(p.residual, p.residual_dtype, first, n, p.residual_scale, p.residual_zero_point, values);
    apply_functions(p.function, values, n);
    put_values(p, first, n, values, codes);
  }
}

// ---- the entry ------------------------------------------------------------------------------------------------------

template <class X, class R>
QO_INLINE void codes_to(const PointwiseRun& p, const ResultCodes& codes) {
  p.y_dtype == DType::kInt8 ? codes_to_codes<X, R, int8_t>(p, codes) : codes_to_codes<X, R, uint8_t>(p, codes);
}

template <class X>
QO_INLINE void codes_from(const PointwiseRun& p, const ResultCodes& codes) {
  if (p.residual == nullptr) return codes_to<X, void>(p, codes);
  p.residual_dtype == DType::kInt8 ? codes_to<X, int8_t>(p, codes) : codes_to<X, uint8_t>(p, codes);
}

void pointwise(const PointwiseRun& p) {
  const auto is_code = [](DType dtype) { return dtype == DType::kInt8 || dtype == DType::kUInt8; };
  ResultCodes codes(p);
  if (is_code(p.x_dtype) && is_code(p.y_dtype) && (p.residual == nullptr || is_code(p.residual_dtype)) &&
      codes.bound_by(p.function))
    return p.x_dtype == DType::kInt8 ? codes_from<int8_t>(p, codes) : codes_from<uint8_t>(p, codes);
  step_by_step(p, codes);
}

}  // namespace
}  // namespace quant_ops::QO_ISA

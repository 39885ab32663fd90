// What follows a product, on its own: x to float32, plus or times the residual, the function, and the conversion to the result's
// dtype (PointwiseParams in ops.h). Codes to codes without a function, or with a ReLU, stay in registers; everything else goes
// through a buffer in the first cache, one step after the other.
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

// As a sum of products, a value in steps of the result's scale plus its zero point is x * x_step + r * r_step + offset, less than
// `slack` away from what the formula rounds: with A = |x_step| + |r_step| the formula and this sum each round terms of at most 256
// A and 256 A + 255 a few times, by 2^-24 of them. The offset contains the slack, so that t and t - 2 slack enclose the exact
// value. If both round to the same code it is the formula's; else, about once in 60 times for 32 codes, the formula is computed.
//
// With a factor it is (x - x_zero_point) * (r - zero_point) * x_step + offset: the product of the two differences is exact and at
// most 65025, and what the formula and this sum round is at most that many steps and 256.
struct CodeSteps {
  float x_step, r_step, offset, slack;
  bool usable;  // the slack is small, and nothing overflows or is NaN

  QO_INLINE CodeSteps(const PointwiseRun& p, float reciprocal) {
    if (p.multiplies) {
      x_step = p.x_scale * p.residual_scale * reciprocal;
      r_step = 0.0f;
      slack = 0x1p-24f * (12.0f * 65025.0f * __builtin_fabsf(x_step) + 1280.0f);
      offset = static_cast<float>(p.out_zero_point + double{slack});
    } else {
      x_step = p.x_scale * reciprocal;
      r_step = p.residual != nullptr ? p.residual_scale * reciprocal : 0.0f;
      slack = 0x1p-24f * (3072.0f * (__builtin_fabsf(x_step) + __builtin_fabsf(r_step)) + 1280.0f);
      offset = static_cast<float>(p.out_zero_point + double{slack} - double{x_step} * p.x_zero_point -
                                  double{r_step} * p.residual_zero_point);
    }
    usable = slack < 0.125f;
  }
};

// R is void where there is no residual, which is added or (kMultiplies) multiplied. The last elements, fewer than four vectors,
// pass through the stack.
template <class X, class R, class Y, bool kMultiplies>
class CodesToCodes {
 public:
  using F = typename Simd::F;
  using I = typename Simd::I;
  static constexpr int64_t N = Simd::N, kBlock = 4 * N;
  static constexpr bool kHasResidual = !std::is_void_v<R>;
  using Residual = std::conditional_t<kHasResidual, R, int8_t>;

  QO_INLINE CodesToCodes(const PointwiseRun& p, const ResultCodes& codes) : p_(p), codes_(codes), of_(p, codes.reciprocal) {}

  void run() const {
    const X* const x = static_cast<const X*>(p_.x);
    const Residual* const r = static_cast<const Residual*>(p_.residual);
    Y* const y = static_cast<Y*>(p_.y);
    const F x_step = Simd::set(of_.x_step), r_step = Simd::set(of_.r_step), offset = Simd::set(of_.offset);
    const F width = Simd::set(2.0f * of_.slack);
    const I x_zero = Simd::set_int(p_.x_zero_point), r_zero = Simd::set_int(p_.residual_zero_point);
    const I least = Simd::set_bytes(codes_.run.qmin), most = Simd::set_bytes(codes_.run.qmax);
    const auto block = [&](const X* from, const Residual* second, Y* to) QO_LAMBDA {
      I q[4], below[4];
      unroll<4>([&](auto v) QO_LAMBDA {
        const I code = Simd::load_int(from + v.value * N);
        F t = offset;
        if constexpr (kMultiplies) {
          const F factor = Simd::to_float(Simd::sub(Simd::load_int(second + v.value * N), r_zero));
          t = Simd::fma(Simd::mul(Simd::to_float(Simd::sub(code, x_zero)), factor), x_step, t);
        } else {
          if constexpr (kHasResidual) t = Simd::fma(Simd::to_float(Simd::load_int(second + v.value * N)), r_step, t);
          t = Simd::fma(Simd::to_float(code), x_step, t);
        }
        q[v.value] = Simd::to_int(t);
        below[v.value] = Simd::to_int(Simd::sub(t, width));
      });
      const I found = Simd::template pack_lanes<Y>(q[0], q[1], q[2], q[3]);
      if (__builtin_expect(!of_.usable || Simd::differ(found, Simd::template pack_lanes<Y>(below[0], below[1], below[2], below[3])),
                           0))
        return by_formula(from, second, to);
      Simd::store_codes(to, Simd::min_bytes(Simd::max_bytes(Simd::order_lanes(found), least, Y{}), most, Y{}));
    };
    int64_t i = 0;
    for (; i + kBlock <= p_.n; i += kBlock) block(x + i, kHasResidual ? r + i : nullptr, y + i);
    if (i == p_.n) return;
    X x_part[kBlock] = {};
    Residual r_part[kBlock] = {};
    Y y_part[kBlock];
    const size_t rest = static_cast<size_t>(p_.n - i);
    __builtin_memcpy(x_part, x + i, rest);
    if constexpr (kHasResidual) __builtin_memcpy(r_part, r + i, rest);
    block(x_part, r_part, y_part);
    __builtin_memcpy(y + i, y_part, rest);
  }

 private:
  __attribute__((noinline)) void by_formula(const X* x, const Residual* r, Y* y) const {
    const RowParameters row{codes_.run.scale, &codes_.reciprocal, codes_.run.zero_point, 0, 0};
    const OneScale policy(codes_.run, row);
    const I x_zero = Simd::set_int(p_.x_zero_point), r_zero = Simd::set_int(p_.residual_zero_point);
    I q[4];
    unroll<4>([&](auto v) QO_LAMBDA {
      F value = Simd::to_float(Simd::sub(Simd::load_int(x + v.value * N), x_zero));
      F second = value;
      if constexpr (kHasResidual) second = Simd::to_float(Simd::sub(Simd::load_int(r + v.value * N), r_zero));
      if constexpr (kMultiplies) {
        value = Simd::mul(Simd::mul(value, second), Simd::set(p_.x_scale * p_.residual_scale));
      } else {
        value = Simd::mul(value, Simd::set(p_.x_scale));
        if constexpr (kHasResidual) value = Simd::fma(second, Simd::set(p_.residual_scale), value);
      }
      const F steps = Simd::nan_to_zero(Simd::round_even(Simd::div(value, policy.scale_of_row)));
      q[v.value] = Simd::add(Simd::to_int(policy.clamp(row, 0, steps)), policy.zero_of_row);
    });
    Simd::store_bytes(y, q[0], q[1], q[2], q[3]);
  }

  const PointwiseRun p_;  // copies, which no store can change
  const ResultCodes& codes_;
  const CodeSteps of_;
};

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

enum class Taking { kFirst, kAdd, kMultiply };

// to[i] = x[i], or the value of a code; plus what is there, or for codes (q - zero_point) times what is there, times the scale.
// `to` has room for whole vectors.
template <Taking kTaking>
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
        if constexpr (kTaking == Taking::kAdd)
          Simd::store(to + i, Simd::fma(steps, scales, Simd::load(to + i)));
        else if constexpr (kTaking == Taking::kMultiply)
          Simd::store(to + i, Simd::mul(Simd::mul(Simd::load(to + i), steps), scales));
        else
          Simd::store(to + i, Simd::mul(steps, scales));
      } else {
        const auto value = load_part(x + i, n - i);
        Simd::store(to + i, kTaking == Taking::kAdd ? Simd::add(Simd::load(to + i), value) : value);
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
    take_values<Taking::kFirst>(p.x, p.x_dtype, first, n, p.multiplies ? 1.0f : p.x_scale, p.x_zero_point, values);
    if (p.multiplies)
      take_values<Taking::kMultiply>(p.residual, p.residual_dtype, first, n, p.x_scale * p.residual_scale, p.residual_zero_point,
                                     values);
    else if (p.residual != nullptr)
      take_values<Taking::kAdd>(p.residual, p.residual_dtype, first, n, p.residual_scale, p.residual_zero_point, values);
    apply_functions(p.function, values, n);
    put_values(p, first, n, values, codes);
  }
}

// ---- the entry ------------------------------------------------------------------------------------------------------

template <class X, class R, bool kMultiplies>
QO_INLINE void codes_to(const PointwiseRun& p, const ResultCodes& codes) {
  if (p.y_dtype == DType::kInt8) return CodesToCodes<X, R, int8_t, kMultiplies>(p, codes).run();
  CodesToCodes<X, R, uint8_t, kMultiplies>(p, codes).run();
}

template <class X, bool kMultiplies>
QO_INLINE void codes_with(const PointwiseRun& p, const ResultCodes& codes) {
  if (p.residual_dtype == DType::kInt8) return codes_to<X, int8_t, kMultiplies>(p, codes);
  codes_to<X, uint8_t, kMultiplies>(p, codes);
}

template <class X>
QO_INLINE void codes_from(const PointwiseRun& p, const ResultCodes& codes) {
  if (p.residual == nullptr) return codes_to<X, void, false>(p, codes);
  p.multiplies ? codes_with<X, true>(p, codes) : codes_with<X, false>(p, codes);
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

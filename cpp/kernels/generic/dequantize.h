// y = (q - zero_point) * scale in float32, rounded once to y's type.
#pragma once

#include "kernels/generic/runs.h"

namespace quant_ops::QO_ISA {
namespace {

template <class Q, class Y>
void dequantize_typed(const DequantizeRun& r) {
  for_each_row(r, nullptr, [&](int64_t from, int64_t to, int64_t n, const RowParameters& row, auto) QO_LAMBDA {
    const auto scale1 = Simd::set(*row.scale);
    const auto zero1 = Simd::set_int(*row.zero_point);
    for_each_vector(static_cast<const Q*>(r.q) + from, static_cast<Y*>(r.y) + to, n, row,
                    [&](const Q* q, Y* y, const RowParameters& p, auto count) QO_LAMBDA {
                      unroll<count.value>([&](auto v) QO_LAMBDA {
                        constexpr int64_t i = v.value * Simd::N;
                        const auto scale = p.scale_step ? Simd::load(p.scale + i) : scale1;
                        const auto zero = p.zero_step ? Simd::load_int(p.zero_point + i) : zero1;
                        Simd::store(y + i, Simd::mul(Simd::to_float(Simd::sub(Simd::load_int(q + i), zero)), scale));
                      });
                    });
  });
}

template <class Q>
void dequantize_to(const DequantizeRun& r) {
  switch (r.y_dtype) {
    case DType::kFloat32: return dequantize_typed<Q, float>(r);
    case DType::kFloat16: return dequantize_typed<Q, Half>(r);
    default: return dequantize_typed<Q, BFloat16>(r);
  }
}

void dequantize(const DequantizeRun& r) {
  switch (r.q_dtype) {
    case DType::kInt8: return dequantize_to<int8_t>(r);
    case DType::kUInt8: return dequantize_to<uint8_t>(r);
    default: return dequantize_to<int16_t>(r);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

// LayerNorm and RMSNorm of a row: KernelTable::normalize. The sums have the order that kSumLanes fixes.
#pragma once

#include "kernels/generic/partial.h"
#include "kernels/generic/sums.h"

namespace quant_ops::QO_ISA {
namespace {

// y = x + residual, and its sum. Elements beyond n are 0.
template <class X>
float add_residual(const NormalizeRun& r) {
  constexpr int64_t N = Simd::N;
  const X *x = static_cast<const X*>(r.x), *residual = static_cast<const X*>(r.residual);
  LaneSum sum;
  for (int64_t i = 0; i < r.n; i += kSumLanes)
    unroll<kLaneVectors>([&](auto v) QO_LAMBDA {
      const int64_t at = i + v.value * N, left = r.n - at, first = left > 0 ? at : 0, count = left > 0 ? left : 0;
      auto t = load_part(x + first, count);
      if (residual != nullptr) t = Simd::add(t, load_part(residual + first, count));
      Simd::store(r.y + at, t);
      sum.add<v.value>(t);
    });
  return sum.total();
}

float add_residual(const NormalizeRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return add_residual<float>(r);
    case DType::kFloat16: return add_residual<Half>(r);
    default: return add_residual<BFloat16>(r);
  }
}

void normalize(const NormalizeRun& r) {
  constexpr int64_t N = Simd::N;
  const float sum = add_residual(r), count = static_cast<float>(r.n), mean_of_row = r.rms ? 0.0f : sum / count;
  const int64_t padded = (r.n + kSumLanes - 1) / kSumLanes * kSumLanes;
  for (int64_t i = r.n; i < padded; ++i) r.y[i] = mean_of_row;
  const auto mean = Simd::set(mean_of_row);
  LaneSum squares;
  for (int64_t i = 0; i < padded; i += kSumLanes)
    unroll<kLaneVectors>([&](auto v) QO_LAMBDA {
      float* y = r.y + i + v.value * N;
      const auto d = r.rms ? Simd::load(y) : Simd::sub(Simd::load(y), mean);
      Simd::store(y, d);
      squares.add_square<v.value>(d);
    });
  const auto factor = Simd::set(1.0f / __builtin_sqrtf(squares.total() / count + r.eps));
  for (int64_t i = 0; i < r.n; i += N) {
    const auto weight = r.weight != nullptr ? load_part(r.weight + i, r.n - i) : Simd::set(1.0f);
    const auto bias = r.bias != nullptr ? load_part(r.bias + i, r.n - i) : Simd::set(-0.0f);  // adding -0 changes nothing
    Simd::store(r.y + i, Simd::fma(Simd::mul(Simd::load(r.y + i), factor), weight, bias));
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

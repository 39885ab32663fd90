// Sums over a row in float32, in the order that kSumLanes fixes (ops.h).
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

// Vectors that kSumLanes lanes are.
constexpr int kLaneVectors = kSumLanes / Simd::N;

// Lanes that are added as a butterfly.
struct LaneSum {
  typename Simd::F lanes[kLaneVectors];

  QO_INLINE LaneSum() {
    unroll<kLaneVectors>([&](auto v) QO_LAMBDA { lanes[v.value] = Simd::set(0.0f); });
  }
  // The vector of elements of these lanes, and its square.
  template <int kVector>
  QO_INLINE void add(typename Simd::F x) {
    lanes[kVector] = Simd::add(lanes[kVector], x);
  }
  template <int kVector>
  QO_INLINE void add_square(typename Simd::F x) {
    lanes[kVector] = Simd::fma(x, x, lanes[kVector]);
  }
  QO_INLINE float total() const {
    alignas(64) float sum[kSumLanes];
    unroll<kLaneVectors>([&](auto v) QO_LAMBDA { Simd::store(sum + v.value * Simd::N, lanes[v.value]); });
    for (int half = kSumLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
  }
};

}  // namespace
}  // namespace quant_ops::QO_ISA

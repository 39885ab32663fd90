// The softmax of a row of scores as codes of eight bits: KernelTable::softmax. The sum of the exponentials is in the order that
// AttentionParams fixes, so that every instruction set gives the same bits.
#pragma once

#include "kernels/generic/functions.h"
#include "kernels/generic/sums.h"

namespace quant_ops::QO_ISA {
namespace {

// exp_of(max(x, -87)) for x <= 0: without what exp_of does for results that are subnormal or above 1.
QO_INLINE typename Simd::F exp_below_zero(typename Simd::F x) {
  Vectors<1> rounded;
  const auto p = exp_fraction(Vectors<1>{{Simd::max(Simd::set(kLeastExponent), x)}}, &rounded);
  return Simd::mul(p.v[0], power_of_two(rounded.v[0], Simd::set_int(127 << 23)));
}

// The largest score, after the mask is added. NaN is ignored here; it reaches the sum.
template <bool kMask>
float masked_max(const SoftmaxRun& r, int64_t padded) {
  constexpr int64_t N = Simd::N;
  for (int64_t i = r.n; i < padded; ++i) r.scores[i] = -INFINITY;
  typename Simd::F max[kLaneVectors];
  unroll<kLaneVectors>([&](auto v) QO_LAMBDA { max[v.value] = Simd::set(-INFINITY); });
  for (int64_t i = 0; i < padded; i += kSumLanes)
    unroll<kLaneVectors>([&](auto v) QO_LAMBDA {
      const int64_t at = i + v.value * N;
      auto x = Simd::load(r.scores + at);
      if constexpr (kMask) {
        const int64_t left = r.n - at;
        x = Simd::add(x, load_part(r.mask + (left > 0 ? at : 0), left > 0 ? left : 0));
        Simd::store(r.scores + at, x);
      }
      max[v.value] = Simd::max(x, max[v.value]);
    });
  unroll<kLaneVectors - 1>([&](auto v) QO_LAMBDA { max[0] = Simd::max(max[v.value + 1], max[0]); });
  return Simd::reduce_max(max[0]);
}

float softmax(const SoftmaxRun& r) {
  constexpr int64_t N = Simd::N;
  const int64_t padded = (r.n + kSumLanes - 1) / kSumLanes * kSumLanes;
  const float largest = r.mask == nullptr ? masked_max<false>(r, padded) : masked_max<true>(r, padded);
  if (largest == -INFINITY) {
    bool nan = false;
    for (int64_t i = 0; i < r.n; ++i) nan = nan || r.scores[i] != r.scores[i];
    std::memset(r.codes, 0, static_cast<size_t>(padded));
    return nan ? NAN : 0.0f;
  }
  const auto max = Simd::set(largest), top = Simd::set(255.0f);
  LaneSum sum;
  // The codes of some vectors from element i on, which is of lane 0.
  const auto vectors = [&](auto count, int64_t i) QO_LAMBDA {
    typename Simd::I code[count.value];
    unroll<count.value>([&](auto v) QO_LAMBDA {
      const auto p = exp_below_zero(Simd::sub(Simd::load(r.scores + i + v.value * N), max));
      sum.add<v.value % kLaneVectors>(p);
      code[v.value] = Simd::to_int(Simd::mul(p, top));
    });
    if constexpr (count.value == 4)
      Simd::store_bytes(r.codes + i, code[0], code[1], code[2], code[3]);
    else
      unroll<count.value>([&](auto v) QO_LAMBDA { Simd::store(r.codes + i + v.value * N, code[v.value]); });
  };
  int64_t i = 0;
  if constexpr (kLaneVectors < 4)
    for (; i + 4 * N <= padded; i += 4 * N) vectors(Int<4>{}, i);
  for (; i < padded; i += kSumLanes) vectors(Int<kLaneVectors>{}, i);
  return sum.total();
}

}  // namespace
}  // namespace quant_ops::QO_ISA

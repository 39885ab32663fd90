// Blocks of elements that share a scale: the largest magnitude of a block, from it the scale (block_scale of float_format.h), then
// each element as in quantize_float.h. The second reading of a block is from the first cache.
#pragma once

#include "kernels/generic/quantize_float.h"

namespace quant_ops::QO_ISA {
namespace {

// What happens to the elements of a block once its scale is known.
template <class X, bool kPlain>
struct BlockElements {
  using F = typename Simd::F;
  const BlockRun& r;
  const Rounder<kPlain> round;
  const F largest, smallest;
  const bool exact_reciprocal;

  QO_INLINE explicit BlockElements(const BlockRun& run)
      : r(run),
        round(run.format.element),
        largest(Simd::set(run.format.element.largest)),
        smallest(Simd::set(-run.format.element.largest)),
        exact_reciprocal(is_power_of_two_rule(run.format.rule)) {}

  QO_INLINE const X* x() const { return static_cast<const X*>(r.x); }

  // The factor or the divisor that x is scaled by.
  QO_INLINE float factor(float scale) const { return exact_reciprocal ? 1.0f / scale : scale; }

  // n elements from `at` on; their random words from `random` on.
  QO_INLINE void operator()(int64_t at, int64_t random, int64_t n, F scale, F factor) const {
    F v = load_part(x() + at, n);
    v = exact_reciprocal ? Simd::mul(v, factor) : Simd::div(v, factor);
    X* y = static_cast<X*>(r.y) + at;
    if (r.grad) return store_part(y, Simd::keep_between(load_part(static_cast<const X*>(r.grad) + at, n), v, smallest, largest), n);
    auto bits = Simd::set_int(0);
    if constexpr (!kPlain) {
      if (r.format.element.method == RoundingMethod::kElements) return one_by_one(v, scale, random, n, y);
      if (r.random) bits = load_int_part(reinterpret_cast<const int32_t*>(r.random) + random, n);
    }
    store_part(y, Simd::mul(round(v, bits), scale), n);
  }

  void one_by_one(F v, F scale, int64_t random, int64_t n, X* y) const {
    float quotients[Simd::N], scales[Simd::N];
    Simd::store(quotients, v);
    Simd::store(scales, scale);
    for (int64_t i = 0; i < n; ++i)
      from_compute(round_to_format(quotients[i], r.format.element, r.random ? r.random[random + i] : 0) * scales[i], &y[i]);
  }
};

template <class X, bool kPlain>
void quantize_blocks_typed(const BlockRun& r) {
  const BlockElements<X, kPlain> elements(r);
  for (int64_t block = 0; block < r.columns; ++block) {
    const int64_t first = block * r.length;
    auto largest = Simd::set_int(0);
    for_each_part_of(r.length, [&](int64_t i, int64_t n) QO_LAMBDA {
      largest = Simd::max_unsigned(largest, Simd::abs_bits(load_part(elements.x() + first + i, n)));
    });
    const float one = block_scale(Simd::reduce_max_unsigned(largest), r.format, r.tensor_scale);
    const auto scale = Simd::set(one), factor = Simd::set(elements.factor(one));
    for_each_part_of(r.length, [&](int64_t i, int64_t n) QO_LAMBDA { elements(first + i, first + i, n, scale, factor); });
  }
}

// kVectors vectors of columns side by side, of which n elements exist.
template <class X, bool kPlain, int kVectors>
QO_INLINE void block_columns(const BlockRun& r, const BlockElements<X, kPlain>& elements, int64_t column, int64_t n) {
  constexpr int64_t N = Simd::N;
  typename Simd::I largest[kVectors];
  typename Simd::F scale[kVectors], factor[kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA { largest[v.value] = Simd::set_int(0); });
  for (int64_t i = 0; i < r.length; ++i)
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      const auto x = load_part(elements.x() + i * r.row + column + v.value * N, n);
      largest[v.value] = Simd::max_unsigned(largest[v.value], Simd::abs_bits(x));
    });
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    int32_t bits[N];
    float scales[N], factors[N];
    Simd::store(bits, largest[v.value]);
    for (int64_t i = 0; i < N; ++i) {
      scales[i] = block_scale(static_cast<uint32_t>(bits[i]), r.format, r.tensor_scale);
      factors[i] = elements.factor(scales[i]);
    }
    scale[v.value] = Simd::load(scales);
    factor[v.value] = Simd::load(factors);
  });
  for (int64_t i = 0; i < r.length; ++i)
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      const int64_t c = column + v.value * N;
      elements(i * r.row + c, i * r.columns + c, n, scale[v.value], factor[v.value]);
    });
}

template <class X, bool kPlain>
void quantize_block_columns_typed(const BlockRun& r) {
  constexpr int64_t N = Simd::N;
  const BlockElements<X, kPlain> elements(r);
  int64_t c = 0;
  for (; c + 4 * N <= r.columns; c += 4 * N) block_columns<X, kPlain, 4>(r, elements, c, N);
  for (; c < r.columns; c += N) block_columns<X, kPlain, 1>(r, elements, c, r.columns - c < N ? r.columns - c : N);
}

template <class X>
void quantize_block_of(const BlockRun& r, bool columns) {
  const bool plain = Rounder<true>::takes(r.format.element);
  if (columns) return plain ? quantize_block_columns_typed<X, true>(r) : quantize_block_columns_typed<X, false>(r);
  plain ? quantize_blocks_typed<X, true>(r) : quantize_blocks_typed<X, false>(r);
}

void quantize_block(const BlockRun& r, bool columns) {
  switch (r.dtype) {
    case DType::kFloat32: return quantize_block_of<float>(r, columns);
    case DType::kFloat16: return quantize_block_of<Half>(r, columns);
    default: return quantize_block_of<BFloat16>(r, columns);
  }
}

void quantize_blocks(const BlockRun& r) { quantize_block(r, false); }
void quantize_block_columns(const BlockRun& r) { quantize_block(r, true); }

}  // namespace
}  // namespace quant_ops::QO_ISA

// Blocks of elements that share a scale: the largest magnitude of a block, from it the scale (block_scale of float_format.h), then
// each element as in quantize_float.h. The second reading of a block is from the first cache.
#pragma once

#include "kernels/generic/quantize_float.h"

namespace quant_ops::QO_ISA {
namespace {

// block_scale of float_format.h for vectors of blocks, and what the elements are scaled by: multiplied by the reciprocal of a power
// of two, else divided by the scale.
struct BlockScales {
  using F = typename Simd::F;
  using I = typename Simd::I;
  const BlockFormat format;
  const float tensor_scale;
  const int32_t top;  // exponent of the largest value
  const Rounder<true> e4m3;

  QO_INLINE BlockScales(const BlockFormat& f, float of_tensor)
      : format(f), tensor_scale(of_tensor), top(exponent_of(f.element.largest)), e4m3(e4m3_format()) {}

  // Whether exponent_field is right, which it is for formats in use.
  QO_INLINE bool by_vectors() const {
    switch (format.rule) {
      case ScaleRule::kFloor: return top >= 0;
      case ScaleRule::kEven: return top >= 1 && format.element.mantissa_bits <= 22;
      case ScaleRule::kCeil: return top >= 1;
      default: return true;
    }
  }

  // Of magnitudes as integers, so that NaN and infinity show.
  QO_INLINE void operator()(I amax_bits, F* scale, F* factor) const {
    if (!by_vectors()) return one_by_one(amax_bits, scale, factor);
    const F finite_below = Simd::set(INFINITY), nan = Simd::set(__builtin_nanf("")), amax = Simd::as_float(amax_bits);
    if (is_power_of_two_rule(format.rule)) {
      const I field = Simd::max(exponent_field(amax_bits), Simd::set_int(0));
      const F beyond = Simd::if_greater(field, Simd::set_int(254), nan, power(field));
      *scale = Simd::if_less(amax, finite_below, beyond, nan);
      *factor = Simd::if_less(*scale, finite_below, power(Simd::sub(Simd::set_int(254), field)), nan);
      return;
    }
    F s = ratio(amax);
    if (format.rule == ScaleRule::kE4m3) {
      const F rounded = e4m3(Simd::div(s, Simd::set(tensor_scale)), amax_bits);
      s = Simd::mul(Simd::max(Simd::set(0x1p-6f), rounded), Simd::set(tensor_scale));  // the second one if it is NaN
    } else {
      s = Simd::if_less(Simd::set(0.0f), amax, Simd::max(s, Simd::set(0x1p-126f)), Simd::set(1.0f));
    }
    *scale = *factor = Simd::if_less(amax, finite_below, s, nan);
  }

 private:
  // 2^(field - 127); the field 0 stands for 2^-127, which is subnormal
  QO_INLINE static F power(I field) { return Simd::as_float(Simd::max(Simd::shift_left(field, 23), Simd::set_int(0x00400000))); }

  void one_by_one(I amax_bits, F* scale, F* factor) const {
    int32_t bits[Simd::N];
    float scales[Simd::N], factors[Simd::N];
    Simd::store(bits, amax_bits);
    for (int64_t i = 0; i < Simd::N; ++i) {
      scales[i] = block_scale(static_cast<uint32_t>(bits[i]), format, tensor_scale);
      factors[i] = 1.0f / scales[i];
    }
    *scale = Simd::load(scales);
    *factor = Simd::load(factors);
  }

  // The exponent of the scale + 127, from the bits of amax or of amax / largest. What is added first carries into the exponent
  // where the rule rounds it up. Where amax is subnormal the exponent is too large, but that of the scale below -127 anyway.
  QO_INLINE I exponent_field(I amax_bits) const {
    if (format.rule == ScaleRule::kRoundUp) {
      const I bits = Simd::bits(Simd::div(Simd::as_float(amax_bits), Simd::set(format.element.largest)));
      const I field = Simd::shift_right(Simd::add(bits, Simd::set_int(0x007fffff)), 23);
      return Simd::bits(Simd::if_greater(bits, Simd::set_int(0x00400000), Simd::as_float(field), Simd::set(0.0f)));
    }
    const int32_t carry = format.rule == ScaleRule::kFloor  ? 0
                          : format.rule == ScaleRule::kEven ? 1 << 22 >> format.element.mantissa_bits
                                                            : 0x007fffff;
    return Simd::sub(Simd::shift_right(Simd::add(amax_bits, Simd::set_int(carry)), 23), Simd::set_int(top));
  }

  QO_INLINE F ratio(F amax) const {
    if (format.rule == ScaleRule::kBFloat16) {  // rounded to bfloat16 by an addition to the bits
      const I bits = Simd::bits(amax), odd = Simd::and_bits(Simd::shift_right(bits, 16), Simd::set_int(1));
      const I sum = Simd::add(Simd::add(bits, Simd::set_int(0x7fff)), odd);
      amax = Simd::as_float(Simd::and_bits(sum, Simd::set_int(static_cast<int32_t>(0xffff0000u))));
    }
    return Simd::div(amax, Simd::set(format.divisor));
  }
};

// The largest magnitude of elements, as integers in their own width: a vector has the more of them the narrower they are.
template <class X>
struct Magnitudes {
  using Lane = uint16_t;
  static constexpr int kLanes = Simd::kWords;
  typename Simd::Words lanes;

  QO_INLINE void clear() {
    const Lane zeros[kLanes] = {};
    lanes = Simd::load_magnitudes(zeros);
  }
  QO_INLINE void include(const X* x, int64_t n) {
    Lane part[kLanes] = {};
    if (n < kLanes) __builtin_memcpy(part, x, static_cast<size_t>(n) * sizeof(X));
    lanes = Simd::max_magnitudes(lanes, Simd::load_magnitudes(n < kLanes ? part : reinterpret_cast<const Lane*>(x)));
  }
  QO_INLINE void store(Lane* to) const { Simd::store_magnitudes(to, lanes); }
  QO_INLINE Lane largest() const { return Simd::largest_magnitude(lanes); }
  QO_INLINE static typename Simd::I float_bits(const Lane* from) {
    return Simd::bits(Simd::load(reinterpret_cast<const X*>(from)));
  }
};
template <>
struct Magnitudes<float> {
  using Lane = int32_t;
  static constexpr int kLanes = Simd::N;
  typename Simd::I lanes;

  QO_INLINE void clear() { lanes = Simd::set_int(0); }
  QO_INLINE void include(const float* x, int64_t n) { lanes = Simd::max_unsigned(lanes, Simd::abs_bits(load_part(x, n))); }
  QO_INLINE void store(Lane* to) const { Simd::store(to, lanes); }
  QO_INLINE Lane largest() const { return static_cast<Lane>(Simd::reduce_max_unsigned(lanes)); }
  QO_INLINE static typename Simd::I float_bits(const Lane* from) { return Simd::load_int(from); }
};

// Of n neighbours.
template <class X>
QO_INLINE typename Magnitudes<X>::Lane largest_magnitude(const X* x, int64_t n) {
  constexpr int64_t kLanes = Magnitudes<X>::kLanes;
  Magnitudes<X> all;
  all.clear();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) all.include(x + i, kLanes);
  if (i < n)
    n >= kLanes ? all.include(x + n - kLanes, kLanes) : all.include(x, n);  // elements that are included twice change nothing
  return all.largest();
}

// What happens to the elements of a block once its scale is known.
template <class X, bool kPlain>
struct BlockElements {
  using F = typename Simd::F;
  const BlockRun& r;
  const Rounder<kPlain> round;
  const F largest, smallest;
  const bool multiply;
  const bool exact;                               // the results of folded rounding are numbers of X
  float least_folded = 1.0f, most_folded = 0.0f;  // no scale

  QO_INLINE explicit BlockElements(const BlockRun& run)
      : r(run),
        round(run.format.element),
        largest(Simd::set(run.format.element.largest)),
        smallest(Simd::set(-run.format.element.largest)),
        multiply(is_power_of_two_rule(run.format.rule)),
        exact(holds<X>(run.format.element)) {
    if (!kPlain || !multiply || run.grad) return;
    const FloatFormat& f = run.format.element;
    const int least = f.mantissa_bits - f.least_exponent - 125, most = 102 + f.mantissa_bits - exponent_of(f.largest);
    least_folded = quant_ops::power_of_two(least < -126 ? -126 : least);
    most_folded = quant_ops::power_of_two(most > 127 ? 127 : most);
  }

  // Whether rounding x to the format times the scale is the same: all numbers then are normal ones of float32. It is cheaper.
  QO_INLINE bool folds(float scale) const { return scale >= least_folded && scale <= most_folded; }
  QO_INLINE bool folds_all(F scale) const {
    return !Simd::any_above(Simd::bits(Simd::set(least_folded)), Simd::bits(scale)) &&
           !Simd::any_above(Simd::bits(scale), Simd::bits(Simd::set(most_folded)));
  }

  QO_INLINE const X* x() const { return static_cast<const X*>(r.x); }

  // n elements from `at` on; their random words from `random` on.
  QO_INLINE void operator()(int64_t at, int64_t random, int64_t n, F scale, F factor) const {
    F v = load_part(x() + at, n);
    v = multiply ? Simd::mul(v, factor) : Simd::div(v, factor);
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

// Many blocks in three sweeps, none of which waits for a result of its own: magnitudes, scales, elements.
template <class X, bool kPlain>
void quantize_blocks_typed(const BlockRun& r) {
  constexpr int64_t kBatch = 64, N = Simd::N;
  constexpr int64_t kUsual = 32;  // elements of a block of OCP's formats: a constant, so that loops over them are unrolled
  const BlockElements<X, kPlain> elements(r);
  const BlockScales scales_of(r.format, r.tensor_scale);
  const Rounder<kPlain> round = elements.round;  // a copy, which no store to y can change: it stays in registers
  const int64_t of_row = (r.length + r.block - 1) / r.block, last = r.length - (of_row - 1) * r.block;
  typename Magnitudes<X>::Lane amax[kBatch + N] = {};
  float scales[kBatch + N], factors[kBatch + N];
  int64_t at = 0, of_batch = r.first;  // the batch's first element, and its first block's number in the row
  for (int64_t done = 0; done < r.blocks; done += kBatch) {
    const int64_t blocks = r.blocks - done < kBatch ? r.blocks - done : kBatch;
    // Calls body(block of the batch, first element, elements) for each.
    const auto for_each_block = [&](const auto& body) QO_LAMBDA {
      int64_t first = at, number = of_batch;
      for (int64_t b = 0; b < blocks; ++b) {
        const bool ends = number == of_row - 1;
        const int64_t n = ends ? last : r.block;
        body(b, first, n);
        first += n;
        number = ends ? 0 : number + 1;
      }
    };
    for_each_block([&](int64_t b, int64_t first, int64_t count) QO_LAMBDA {
      const X* const x = elements.x() + first;
      amax[b] = count == kUsual ? largest_magnitude(x, kUsual) : largest_magnitude(x, count);
    });
    for (int64_t b = 0; b < blocks; b += N) {
      typename Simd::F scale, factor;
      scales_of(Magnitudes<X>::float_bits(amax + b), &scale, &factor);
      Simd::store(scales + b, scale);
      Simd::store(factors + b, factor);
    }
    for_each_block([&](int64_t b, int64_t first, int64_t count) QO_LAMBDA {
      const auto scale = Simd::set(scales[b]), factor = Simd::set(factors[b]);
      if (elements.folds(scales[b])) {
        const auto limit = Simd::mul(elements.round.limit, scale), least = Simd::mul(elements.round.smallest_normal, scale);
        const X* const x = elements.x() + first;
        X* const y = static_cast<X*>(r.y) + first;
        // of the next batch, whose magnitudes would wait for it
        for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(X))) __builtin_prefetch(x + kBatch * r.block + i);
        const auto rounded = [&round, limit, least](auto v) QO_LAMBDA { return round.plain(v, limit, least); };
        if (elements.exact)
          count == kUsual ? round_exactly(x, y, kUsual, rounded) : round_exactly(x, y, count, rounded);
        else
          for_each_part_of(count, [=](int64_t i, int64_t n) QO_LAMBDA { store_part(y + i, rounded(load_part(x + i, n)), n); });
      } else {
        for_each_part_of(count, [&](int64_t i, int64_t n) QO_LAMBDA { elements(first + i, first + i, n, scale, factor); });
      }
    });
    at += blocks / of_row * r.length;
    for (int64_t b = 0; b < blocks % of_row; ++b) {
      const bool ends = of_batch == of_row - 1;
      at += ends ? last : r.block;
      of_batch = ends ? 0 : of_batch + 1;
    }
  }
}

// Rounds to the format times the scales, or returns false where that is not the same. `scale` are those of kVectors vectors of
// columns, of which n elements exist; with kPairs of twice as many columns, of those with even numbers and with odd ones in turn.
template <class X, bool kPlain, int kVectors, bool kPairs = false>
QO_INLINE bool fold_columns(const BlockRun& r, const BlockElements<X, kPlain>& elements, const typename Simd::F (&scale)[kVectors],
                            int64_t column, int64_t n) {
  typename Simd::F limit[kVectors], least[kVectors];
  bool folds = true;
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    folds = folds && elements.folds_all(scale[v.value]);
    limit[v.value] = Simd::mul(elements.round.limit, scale[v.value]);
    least[v.value] = Simd::mul(elements.round.smallest_normal, scale[v.value]);
  });
  if (!folds) return false;
  const X* x = elements.x() + column;
  X* y = static_cast<X*>(r.y) + column;
  const auto round = elements.round;  // by value: stores could change what lies behind a reference
  const int64_t rows = r.length, row = r.row;
  for (int64_t i = 0; i < rows; ++i, x += row, y += row) {
    if constexpr (kPairs)
      unroll<kVectors / 2>([&](auto v) QO_LAMBDA {
        constexpr int e = 2 * v.value, o = e + 1, at = e * Simd::N;
        typename Simd::F even, odd;
        Simd::load_pair(x + at, &even, &odd);
        Simd::store_pair(y + at, round.plain(even, limit[e], least[e]), round.plain(odd, limit[o], least[o]));
      });
    else
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        constexpr int at = v.value * Simd::N;
        store_part(y + at, round.plain(load_part(x + at, n), limit[v.value], least[v.value]), n);
      });
  }
  return true;
}

// kVectors vectors of columns side by side, of which n elements exist.
template <class X, bool kPlain, int kVectors>
QO_INLINE void block_columns(const BlockRun& r, const BlockElements<X, kPlain>& elements, const BlockScales& scales_of,
                             int64_t column, int64_t n) {
  constexpr int64_t N = Simd::N;
  using M = Magnitudes<X>;
  constexpr int kParts = kVectors * N > M::kLanes ? kVectors * N / M::kLanes : 1;
  M largest[kParts];
  typename M::Lane amax[kParts * M::kLanes];
  typename Simd::F scale[kVectors], factor[kVectors];
  unroll<kParts>([&](auto v) QO_LAMBDA { largest[v.value].clear(); });
  for (int64_t i = 0; i < r.length; ++i) {
    // of the next columns: these are too many rows for the hardware prefetcher
    if constexpr (kVectors > 1)
      for (int64_t at = 0; at < kVectors * N; at += 64 / static_cast<int64_t>(sizeof(X)))
        __builtin_prefetch(elements.x() + i * r.row + column + kVectors * N + at);
    unroll<kParts>([&](auto v) QO_LAMBDA {
      largest[v.value].include(elements.x() + i * r.row + column + v.value * M::kLanes, kVectors > 1 ? M::kLanes : n);
    });
  }
  unroll<kParts>([&](auto v) QO_LAMBDA { largest[v.value].store(amax + v.value * M::kLanes); });
  if constexpr (std::is_same_v<X, BFloat16> && kPlain && kVectors > 1)
    if (elements.exact) {
      unroll<kVectors / 2>([&](auto v) QO_LAMBDA {
        constexpr int e = 2 * v.value, o = e + 1;
        typename Simd::F even, odd;
        Simd::load_pair(reinterpret_cast<const X*>(amax + e * N), &even, &odd);
        scales_of(Simd::bits(even), &scale[e], &factor[e]);
        scales_of(Simd::bits(odd), &scale[o], &factor[o]);
      });
      if (fold_columns<X, kPlain, kVectors, true>(r, elements, scale, column, n)) return;
    }
  unroll<kVectors>([&](auto v) QO_LAMBDA { scales_of(M::float_bits(amax + v.value * N), &scale[v.value], &factor[v.value]); });
  if (fold_columns<X, kPlain, kVectors>(r, elements, scale, column, n)) return;
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
  const BlockScales scales_of(r.format, r.tensor_scale);
  int64_t c = 0;
  for (; c + 4 * N <= r.columns; c += 4 * N) block_columns<X, kPlain, 4>(r, elements, scales_of, c, N);
  for (; c < r.columns; c += N) block_columns<X, kPlain, 1>(r, elements, scales_of, c, r.columns - c < N ? r.columns - c : N);
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

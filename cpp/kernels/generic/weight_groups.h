// Weights in groups: sums of a group folded into float32, weights dequantized a chunk at a time and multiplied in float32, and rows
// of floats stored as the result's dtype.
#pragma once

#include "kernels/generic/fold.h"
#include "kernels/generic/partial.h"
#include "kernels/generic/unroll.h"

namespace quant_ops::QO_ISA {
namespace {

void fold(const FoldRun& t) {
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t n = 0; n < t.columns; n += Simd::N) {
      float* y = t.y + r * t.stride + n;
      Simd::store(y, fold_sum(t.fold, t.group, r, n, Simd::load_int(t.sums + r * t.stride + n), Simd::load(y)));
    }
}

int32_t sum_codes(uint8_t* codes, int64_t n, bool flip) {
  const auto sign = Simd::set_bytes(0x80), kept = flip ? sign : Simd::set_int(0);
  auto sum = Simd::set_int(0);
  int64_t k = 0;
  for (; k + Simd::N * kQuad <= n; k += Simd::N * kQuad) {
    int32_t lanes[Simd::N];
    __builtin_memcpy(lanes, codes + k, sizeof(lanes));
    const auto v = Simd::load_int(lanes);
    sum = Simd::add(sum, Simd::sum_bytes(Simd::xor_bits(v, sign)));
    Simd::store_codes(codes + k, Simd::xor_bits(v, kept));
  }
  int32_t lanes[Simd::N], total = static_cast<int32_t>(128 * k);
  Simd::store(lanes, sum);
  for (int32_t lane : lanes) total += lane;
  for (; k < n; ++k) {
    total += codes[k];
    if (flip) codes[k] ^= 0x80u;
  }
  return total;
}

// ---- float32 ----------------------------------------------------------------------------------------------------------

template <class T>
QO_INLINE void widen_typed(const T* x, int64_t n, float* to) {
  for (int64_t k = 0; k < n; k += Simd::N) store_part(to + k, load_part(x + k, n - k), n - k);
}

void widen(const void* x, DType dtype, int64_t n, float* to) {
  dtype == DType::kFloat16 ? widen_typed(static_cast<const Half*>(x), n, to) : widen_typed(static_cast<const BFloat16*>(x), n, to);
}

template <class T>
QO_INLINE void multiply_typed(const T* x, const float* multiplier, int64_t n, float* to) {
  for (int64_t k = 0; k < n; k += Simd::N)
    store_part(to + k, Simd::mul(load_part(x + k, n - k), load_part(multiplier + k, n - k)), n - k);
}

void multiply(const void* x, DType dtype, const float* multiplier, int64_t n, float* to) {
  switch (dtype) {
    case DType::kFloat16: return multiply_typed(static_cast<const Half*>(x), multiplier, n, to);
    case DType::kBFloat16: return multiply_typed(static_cast<const BFloat16*>(x), multiplier, n, to);
    default: return multiply_typed(static_cast<const float*>(x), multiplier, n, to);
  }
}

// Where the zero points of a chunk are subtracted.
enum class Zeros {
  kBytes,     // from the codes, as bytes: there are none, or q - zero is a byte for all of them
  kIntegers,  // from the codes, as floats
  kFloats,    // floating zero points: added to the weights
};

// q - zero is a byte for every code q of four bits.
constexpr int32_t kLowestByteZero = 7 - 127, kHighestByteZero = -8 + 128;

Zeros zeros_of(const WeightChunk& t) {
  if (t.float_zero != nullptr) return Zeros::kFloats;
  if (t.zero == nullptr) return Zeros::kBytes;
  if (t.bits == 8) return Zeros::kIntegers;
  auto low = Simd::set_int(kLowestByteZero), high = Simd::set_int(kHighestByteZero);
  for (int64_t n = 0; n < t.columns; n += Simd::N) {
    const auto zero = Simd::load_int(t.zero + n);
    low = Simd::min(low, zero);
    high = Simd::max(high, zero);
  }
  int32_t lowest[Simd::N], highest[Simd::N];
  Simd::store(lowest, low);
  Simd::store(highest, high);
  bool bytes = true;
  for (int64_t i = 0; i < Simd::N; ++i) bytes = bytes && lowest[i] == kLowestByteZero && highest[i] == kHighestByteZero;
  return bytes ? Zeros::kBytes : Zeros::kIntegers;
}

// The weights of a vector of columns and kK = 32 / kBits of their k. Codes are converted from the top byte of a lane, where they
// are 2^24 times too large: a mask or a shuffle moves one there, sign included.
template <int kBits, Zeros kZeros>
struct Unpacked {
  static constexpr int kK = 32 / kBits;
  static constexpr float kUnit = 0x1p-24f;
  // what times<i>() is too large by, inverted
  static constexpr float kFactor = kZeros == Zeros::kFloats ? 1.0f : kUnit;

  typename Simd::I offset;     // bytes: subtracted from the codes
  typename Simd::F zero;       // kIntegers: times 2^24. kFloats: the floating ones
  typename Simd::F scale;      // kFloats
  typename Simd::I low, high;  // a lane has four k of a column

  QO_INLINE void take_zeros(const WeightChunk& t, int64_t n) {
    offset = Simd::set_bytes(8);
    if constexpr (kZeros == Zeros::kBytes && kBits == 4)
      if (t.zero != nullptr) {
        const auto byte = Simd::and_bits(Simd::add(Simd::load_int(t.zero + n), Simd::set_int(8)), Simd::set_int(0xff));
        offset = Simd::mul(byte, Simd::set_int(0x01010101));
      }
    if constexpr (kZeros == Zeros::kIntegers) zero = Simd::mul(Simd::to_float(Simd::load_int(t.zero + n)), Simd::set(1 / kUnit));
    if constexpr (kZeros == Zeros::kFloats) {
      zero = Simd::load(t.float_zero + n);
      scale = Simd::load(t.scale + n);
    }
  }

  QO_INLINE void load(const int8_t* b) {
    low = Simd::load_int(reinterpret_cast<const int32_t*>(b));
    if constexpr (kBits == 4) {
      const auto nibble = Simd::set_bytes(0x0f);
      high = Simd::sub_bytes(Simd::and_bits(Simd::shift_right(low, 4), nibble), offset);
      low = Simd::sub_bytes(Simd::and_bits(low, nibble), offset);
    }
  }

  // Weight kIndex of the loaded ones over kFactor.
  template <int kIndex>
  QO_INLINE typename Simd::F times() const {
    auto w = Simd::to_float(Simd::template top_byte<kIndex % 4>(kIndex < 4 ? low : high));
    if constexpr (kZeros == Zeros::kIntegers) w = Simd::sub(w, zero);
    if constexpr (kZeros == Zeros::kFloats) w = Simd::fma(Simd::mul(w, Simd::set(kUnit)), scale, zero);
    return w;
  }
};

// Calls f with the kernel's constants for a chunk.
template <class F>
QO_INLINE void with_zeros(const WeightChunk& t, const F& f) {
  using Bits4 = Int<4>;
  using Bits8 = Int<8>;
  const Zeros zeros = zeros_of(t);
  const auto with_bits = [&](auto bits) QO_LAMBDA {
    if (zeros == Zeros::kBytes) return f(bits, std::integral_constant<Zeros, Zeros::kBytes>{});
    if (zeros == Zeros::kIntegers) return f(bits, std::integral_constant<Zeros, Zeros::kIntegers>{});
    f(bits, std::integral_constant<Zeros, Zeros::kFloats>{});
  };
  t.bits == 4 ? with_bits(Bits4{}) : with_bits(Bits8{});
}

template <int kBits, Zeros kZeros>
void expand_typed(const WeightChunk& t, float* w) {
  using Weights = Unpacked<kBits, kZeros>;
  for (int64_t n = 0; n < kNibbleColumns; n += Simd::N) {
    Weights weights;
    weights.take_zeros(t, n);
    for (int64_t k = t.first; k < t.last; k += Weights::kK) {  // beyond `last` into the padding of w
      weights.load(t.octet(n, k));
      float* to = w + (k - t.first) * kNibbleColumns + n;
      unroll<Weights::kK>([&](auto i) QO_LAMBDA {
        Simd::store(to + i.value * kNibbleColumns, Simd::mul(weights.template times<i.value>(), Simd::set(Weights::kFactor)));
      });
    }
  }
}

void expand(const WeightChunk& t, float* w) {
  with_zeros(t, [&](auto bits, auto zeros) QO_LAMBDA { expand_typed<bits.value, zeros.value>(t, w); });
}

// Bytes of the weight fetched ahead. Of eight bits sixteen columns take a line of every fourth one, and so the next chunk.
template <int kBits>
constexpr int64_t kFewAhead = kBits == 4 ? 2048 : 8192;
// Chains of additions of a result: a few rows hide each other's latency so. The same for every instruction set, as are the bits.
constexpr int few_chains(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

// kVectors vectors of columns from column n on.
template <int kBits, Zeros kZeros, int kRows, int kVectors>
QO_INLINE void few_columns(const FewRows& t, int64_t n) {
  using F = typename Simd::F;
  using Weights = Unpacked<kBits, kZeros>;
  constexpr int64_t N = Simd::N;
  constexpr int kChains = few_chains(kRows);
  const WeightChunk& c = t.weight;
  F sum[kRows][kVectors][kChains];
  const auto each = [&](const auto& f) QO_LAMBDA {
    unroll<kRows>([&](auto r) QO_LAMBDA { unroll<kVectors>([&](auto v) QO_LAMBDA { f(r, v); }); });
  };
  each([&](auto r, auto v)
           QO_LAMBDA { unroll<kChains>([&](auto i) QO_LAMBDA { sum[r.value][v.value][i.value] = Simd::set(0.0f); }); });
  Weights weights[kVectors];
  const int8_t* b[kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    weights[v.value].take_zeros(c, n + v.value * N);
    b[v.value] = c.octet(n + v.value * N, c.first);
  });
  const int64_t step = c.step();
  const float* a = t.a + c.first;
  for (int64_t k = c.first; k < c.last; k += Weights::kK, a += Weights::kK) {  // beyond `last` a is zero
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      if constexpr (v.value * N * kQuad % 64 == 0) __builtin_prefetch(b[v.value] + kFewAhead<kBits>);  // a line of the cache
      weights[v.value].load(b[v.value]);
      b[v.value] += step;
    });
    unroll<Weights::kK>([&](auto i) QO_LAMBDA {
      F w[kVectors];
      unroll<kVectors>([&](auto v) QO_LAMBDA { w[v.value] = weights[v.value].template times<i.value>(); });
      unroll<kRows>([&](auto r) QO_LAMBDA {
        const F x = Simd::set(a[r.value * t.a_stride + i.value]);
        unroll<kVectors>([&](auto v) QO_LAMBDA {
          F& to = sum[r.value][v.value][i.value % kChains];
          to = Simd::fma(x, w[v.value], to);
        });
      });
    });
  }
  each([&](auto r, auto v) QO_LAMBDA {
    F(&chains)[kChains] = sum[r.value][v.value];
    F total = chains[0];
    for (int i = 1; i < kChains; ++i) total = Simd::add(total, chains[i]);
    const int64_t column = n + v.value * N;
    float* y = t.y + r.value * t.y_stride + column;
    const F scale = kZeros == Zeros::kFloats ? Simd::set(1.0f) : Simd::load(c.scale + column);
    Simd::store(y, Simd::fma(Simd::mul(total, Simd::set(Weights::kFactor)), scale, Simd::load(y)));
  });
}

// One or two rows take more vectors of columns at once where a vector has all sixteen: there are registers for them.
template <int kBits, Zeros kZeros>
void few_typed(const FewRows& t, int64_t rows) {
  constexpr int kBlock = Simd::N == 1 ? 1 : kNibbleColumns / Simd::N;
  constexpr int kWide = Simd::N == kNibbleColumns ? 4 : kBlock;
  with_rows<kFewRows>(rows, [&](auto r) QO_LAMBDA {
    int64_t n = 0;
    if constexpr (r.value <= 2 && kWide > kBlock)
      for (; n + kWide * Simd::N <= t.weight.columns; n += kWide * Simd::N) few_columns<kBits, kZeros, r.value, kWide>(t, n);
    for (; n < t.weight.columns; n += kBlock * Simd::N) few_columns<kBits, kZeros, r.value, kBlock>(t, n);
  });
}

void few_rows(const FewRows& t, int64_t rows) {
  with_zeros(t.weight, [&](auto bits, auto zeros) QO_LAMBDA { few_typed<bits.value, zeros.value>(t, rows); });
}

template <int kRows>
QO_INLINE void float_rows(const FloatTile& t) {
  constexpr int kVectors = kNibbleColumns / Simd::N;
  typename Simd::F sum[kRows][kVectors];
  unroll<kRows>([&](auto r) QO_LAMBDA { unroll<kVectors>([&](auto v) QO_LAMBDA { sum[r.value][v.value] = Simd::set(0.0f); }); });
  const float* w = t.w;
  for (int64_t k = 0; k < t.k; ++k, w += kNibbleColumns) {
    typename Simd::F wv[kVectors];
    unroll<kVectors>([&](auto v) QO_LAMBDA { wv[v.value] = Simd::load(w + v.value * Simd::N); });
    unroll<kRows>([&](auto r) QO_LAMBDA {
      const auto a = Simd::set(t.a[r.value * t.a_stride + k]);
      unroll<kVectors>([&](auto v) QO_LAMBDA { sum[r.value][v.value] = Simd::fma(a, wv[v.value], sum[r.value][v.value]); });
    });
  }
  unroll<kRows>([&](auto r) QO_LAMBDA {
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      float* y = t.y + r.value * t.y_stride + v.value * Simd::N;
      Simd::store(y, Simd::fma(sum[r.value][v.value], Simd::load(t.column_scale + v.value * Simd::N), Simd::load(y)));
    });
  });
}

void float_tile(const FloatTile& t, int64_t rows) {
  with_rows<kFloatRows>(rows, [&](auto r) QO_LAMBDA { float_rows<r.value>(t); });
}

// ---- the result -------------------------------------------------------------------------------------------------------

template <class Y>
QO_INLINE void store_rows(const StoreRun& t) {
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t n = 0; n < t.columns; n += Simd::N)
      store_part(static_cast<Y*>(t.y) + r * t.y_stride + n, Simd::load(t.from + r * t.from_stride + n), t.columns - n);
}

void store(const StoreRun& t) {
  switch (t.dtype) {
    case DType::kFloat32: return store_rows<float>(t);
    case DType::kFloat16: return store_rows<Half>(t);
    default: return store_rows<BFloat16>(t);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

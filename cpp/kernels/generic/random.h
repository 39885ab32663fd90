// The random words of stochastic rounding, a vector of counters at a time (philox.h).
#pragma once

#include "kernels/generic/unroll.h"

namespace quant_ops::QO_ISA {
namespace {

constexpr int kChains = 2;  // independent ones hide the latency of the multiplications

// The words of counters counter .. counter + kChains * N - 1, whose high halves are the same.
QO_INLINE void philox_vectors(uint64_t counter, uint64_t seed, uint32_t* words) {
  using I = typename Simd::I;
  constexpr int N = Simd::N;
  int32_t counters[kChains * N];
  for (int i = 0; i < kChains * N; ++i)
    counters[i] = static_cast<int32_t>(static_cast<uint32_t>(counter) + static_cast<uint32_t>(i));
  I a[kChains], b[kChains], c[kChains], d[kChains];
  unroll<kChains>([&](auto v) QO_LAMBDA {
    a[v.value] = Simd::load_int(counters + v.value * N);
    b[v.value] = Simd::set_int(static_cast<int32_t>(counter >> 32));
    c[v.value] = d[v.value] = Simd::set_int(0);
  });
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const I key0 = Simd::set_int(static_cast<int32_t>(key[0])), key1 = Simd::set_int(static_cast<int32_t>(key[1]));
    unroll<kChains>([&](auto v) QO_LAMBDA {
      I high_a, high_c;
      const I low_a = Simd::multiply_wide(a[v.value], kPhiloxMultiplier0, &high_a);
      const I low_c = Simd::multiply_wide(c[v.value], kPhiloxMultiplier1, &high_c);
      a[v.value] = Simd::xor_bits(Simd::xor_bits(high_c, b[v.value]), key0);
      c[v.value] = Simd::xor_bits(Simd::xor_bits(high_a, d[v.value]), key1);
      b[v.value] = low_c;
      d[v.value] = low_a;
    });
    key[0] += kPhiloxWeyl0;
    key[1] += kPhiloxWeyl1;
  }
  unroll<kChains>(
      [&](auto v) QO_LAMBDA { Simd::store_interleaved(words + v.value * 4 * N, a[v.value], b[v.value], c[v.value], d[v.value]); });
}

void random_words(uint64_t seed, uint64_t first, int64_t n, uint32_t* words) {
  constexpr int64_t kCounters = kChains * Simd::N, kWords = 4 * kCounters;
  int64_t i = 0;
  const auto index = [&] { return first + static_cast<uint64_t>(i); };
  for (; i < n && index() % 4 != 0; ++i) words[i] = random_word(index(), seed);
  while (i + kWords <= n) {
    const uint64_t counter = index() / 4;
    if (static_cast<uint32_t>(counter) > UINT32_MAX - static_cast<uint32_t>(kCounters)) {  // the high half changes here
      for (const int64_t end = i + kWords; i < end; ++i) words[i] = random_word(index(), seed);
      continue;
    }
    philox_vectors(counter, seed, words + i);
    i += kWords;
  }
  for (; i < n; ++i) words[i] = random_word(index(), seed);
}

}  // namespace
}  // namespace quant_ops::QO_ISA

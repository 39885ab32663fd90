// The random words of stochastic rounding, Simd::N counters at a time (philox.h).
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

// The words of counters counter .. counter + N - 1, whose high halves are the same.
QO_INLINE void philox_vector(uint64_t counter, uint64_t seed, uint32_t* words) {
  constexpr int N = Simd::N;
  int32_t counters[N];
  for (int i = 0; i < N; ++i) counters[i] = static_cast<int32_t>(static_cast<uint32_t>(counter) + static_cast<uint32_t>(i));
  auto a = Simd::load_int(counters), b = Simd::set_int(static_cast<int32_t>(counter >> 32)), c = Simd::set_int(0), d = c;
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    typename Simd::I high_a, high_c;
    const auto low_a = Simd::multiply_wide(a, kPhiloxMultiplier0, &high_a),
               low_c = Simd::multiply_wide(c, kPhiloxMultiplier1, &high_c);
    a = Simd::xor_bits(Simd::xor_bits(high_c, b), Simd::set_int(static_cast<int32_t>(key[0])));
    c = Simd::xor_bits(Simd::xor_bits(high_a, d), Simd::set_int(static_cast<int32_t>(key[1])));
    b = low_c;
    d = low_a;
    key[0] += kPhiloxWeyl0;
    key[1] += kPhiloxWeyl1;
  }
  Simd::store_interleaved(words, a, b, c, d);
}

void random_words(uint64_t seed, uint64_t first, int64_t n, uint32_t* words) {
  constexpr int64_t kWords = 4 * Simd::N;
  int64_t i = 0;
  const auto index = [&] { return first + static_cast<uint64_t>(i); };
  for (; i < n && index() % 4 != 0; ++i) words[i] = random_word(index(), seed);
  while (i + kWords <= n) {
    const uint64_t counter = index() / 4;
    if (static_cast<uint32_t>(counter) > UINT32_MAX - static_cast<uint32_t>(Simd::N)) {  // the high half changes here
      for (const int64_t end = i + kWords; i < end; ++i) words[i] = random_word(index(), seed);
      continue;
    }
    philox_vector(counter, seed, words + i);
    i += kWords;
  }
  for (; i < n; ++i) words[i] = random_word(index(), seed);
}

}  // namespace
}  // namespace quant_ops::QO_ISA

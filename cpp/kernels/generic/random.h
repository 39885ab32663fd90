// The random words of stochastic rounding, Simd::N counters at a time (philox.h).
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

void random_words(uint64_t seed, uint64_t first, int64_t n, uint32_t* words) {
  int64_t i = 0;
  for (; i < n && (first + static_cast<uint64_t>(i)) % 4 != 0; ++i) words[i] = random_word(first + static_cast<uint64_t>(i), seed);
  constexpr int kLanes = 8;  // counters; plain loops over them become vectors
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    const uint64_t counter = (first + static_cast<uint64_t>(i)) / 4;
    uint32_t a[kLanes], b[kLanes], c[kLanes], d[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      a[l] = static_cast<uint32_t>(counter + static_cast<uint64_t>(l));
      b[l] = static_cast<uint32_t>((counter + static_cast<uint64_t>(l)) >> 32);
      c[l] = d[l] = 0;
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int l = 0; l < kLanes; ++l) {
        const uint64_t p = static_cast<uint64_t>(a[l]) * kPhiloxMultiplier0, q = static_cast<uint64_t>(c[l]) * kPhiloxMultiplier1;
        a[l] = static_cast<uint32_t>(q >> 32) ^ b[l] ^ key0;
        b[l] = static_cast<uint32_t>(q);
        c[l] = static_cast<uint32_t>(p >> 32) ^ d[l] ^ key1;
        d[l] = static_cast<uint32_t>(p);
      }
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    for (int l = 0; l < kLanes; ++l) {
      words[i + 4 * l] = a[l];
      words[i + 4 * l + 1] = b[l];
      words[i + 4 * l + 2] = c[l];
      words[i + 4 * l + 3] = d[l];
    }
  }
  for (; i < n; ++i) words[i] = random_word(first + static_cast<uint64_t>(i), seed);
}

}  // namespace
}  // namespace quant_ops::QO_ISA

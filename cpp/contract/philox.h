// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random bits that depend on a seed and an
// index alone, for stochastic rounding. Element `index`, in row-major order of the tensor's shape, gets word index % 4 of the
// counter index / 4 under the key `seed`. So neither threads, instruction sets, devices nor memory layouts change a bit.
#pragma once

#include "contract/arithmetic.h"

namespace quant_ops {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Random4 {
  uint32_t word[4];
};

QO_HD Random4 philox(uint64_t counter, uint64_t seed) {
  Random4 r{{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = static_cast<uint64_t>(r.word[0]) * kPhiloxMultiplier0,
                   b = static_cast<uint64_t>(r.word[2]) * kPhiloxMultiplier1;
    r = {{static_cast<uint32_t>(b >> 32) ^ r.word[1] ^ key[0], static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ r.word[3] ^ key[1], static_cast<uint32_t>(a)}};
    key[0] += kPhiloxWeyl0;
    key[1] += kPhiloxWeyl1;
  }
  return r;
}

QO_HD uint32_t random_word(uint64_t index, uint64_t seed) { return philox(index / 4, seed).word[index % 4]; }

}  // namespace quant_ops

// The Taps of depthwise.h in plain C++.
#pragma once

#include "kernels/simd/scalar.h"

namespace quant_ops::QO_ISA {
namespace {

struct PlainTaps {
  static constexpr int kBlocks = 1;
  static constexpr int64_t kLineBytes = 64;
  static constexpr uint32_t kOnes = 0x01010101;

  struct W {
    int8_t w[kQuad];
  };

  template <int>
  static void interleave(const uint8_t* const (&row)[kQuad], uint8_t flip, uint8_t* to, int64_t) {
    for (int c = 0; c < kPanelStep; ++c)
      for (int r = 0; r < kQuad; ++r) to[c * kQuad + r] = row[r][c] ^ flip;
  }
  template <int kShift>
  static W weights(const int8_t* p) {
    W w{};
    for (int i = kShift; i < kQuad; ++i) w.w[i] = p[i - kShift];
    return w;
  }
  static int32_t dot(int32_t acc, const uint8_t* codes, const W& w) {
    for (int i = 0; i < kQuad; ++i) acc = Simd::add(acc, int32_t{codes[i]} * w.w[i]);
    return acc;
  }
};

}  // namespace
}  // namespace quant_ops::QO_ISA

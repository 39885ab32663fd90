// The Taps of depthwise.h in plain C++.
#pragma once

#include "kernels/simd/scalar.h"

namespace quant_ops::QO_ISA {
namespace {

struct PlainTaps {
  static constexpr int kBlocks = 1;
  template <int>
  static void interleave(const uint8_t* const (&row)[kQuad], uint8_t flip, uint8_t* to, int64_t) {
    for (int c = 0; c < kPanelStep; ++c)
      for (int r = 0; r < kQuad; ++r) to[c * kQuad + r] = row[r][c] ^ flip;
  }
  static const int8_t* weights(const int8_t* p) { return p; }
  static int32_t start(const int32_t*) { return 0; }
  static int32_t dot(int32_t acc, const uint8_t* codes, const int8_t* w) {
    for (int i = 0; i < kQuad; ++i) acc = Simd::add(acc, int32_t{codes[i]} * w[i]);
    return acc;
  }
};

}  // namespace
}  // namespace quant_ops::QO_ISA

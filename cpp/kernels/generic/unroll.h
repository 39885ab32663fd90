// Loops over constants: the index is a type, so that arrays of accumulators become registers. With plain loops g++ 12 keeps them on
// the stack, which costs half of the speed.
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

template <int I>
struct Int {
  static constexpr int value = I;
};

// Calls f(Int<0>{}) ... f(Int<N - 1>{}).
template <int N, int I = 0, class F>
QO_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f(Int<I>{});
    unroll<N, I + 1>(f);
  }
}

// Calls f(Int<rows>{}), 1 <= rows <= kRows.
template <int kRows, class F>
QO_INLINE void with_rows(int64_t rows, const F& f) {
  unroll<kRows>([&](auto r) QO_LAMBDA {
    if (rows == r.value + 1) f(Int<r.value + 1>{});
  });
}

// Calls f(Int<rows>{}, Int<width>{}): 1 <= rows <= kRows, and width is 16, 32, 48 or 64. The full tile is compared first.
template <int kRows, class F>
QO_INLINE void with_tile(int64_t rows, int64_t width, const F& f) {
  unroll<kRows>([&](auto r) QO_LAMBDA {
    if (rows != kRows - r.value) return;
    unroll<kPanel / kPanelStep>([&](auto w) QO_LAMBDA {
      if (width == kPanel - w.value * kPanelStep) f(Int<kRows - r.value>{}, Int<kPanel - w.value * kPanelStep>{});
    });
  });
}

}  // namespace
}  // namespace quant_ops::QO_ISA

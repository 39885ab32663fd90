// A panel of a weight whose k are contiguous, by transposition of vectors.
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

void pack(const PackRun& r) {
  constexpr int64_t kBytes = Simd::N * kQuad;
  const int64_t row = r.width * kQuad;
  for (int64_t n = 0; n < r.width; n += Simd::N) {
    auto sum = Simd::set_int(0);
    for (int64_t k = 0; k < r.k; k += kBytes) {
      typename Simd::I v[Simd::N];
      alignas(64) int8_t edge[Simd::N * kBytes];
      const int8_t* from = r.weight + n * r.column_step + k;
      int64_t step = r.column_step;
      if (n + Simd::N > r.columns || k + kBytes > r.k) {  // missing columns and k are zero
        std::memset(edge, 0, sizeof(edge));
        for (int64_t j = 0; j < Simd::N && n + j < r.columns; ++j)
          std::memcpy(edge + j * kBytes, from + j * step, static_cast<size_t>(r.k - k < kBytes ? r.k - k : kBytes));
        from = edge;
        step = kBytes;
      }
      unroll<Simd::N>([&](auto j) QO_LAMBDA {
        int32_t four[Simd::N];
        __builtin_memcpy(four, from + j.value * step, sizeof(four));
        v[j.value] = Simd::load_int(four);
        __builtin_prefetch(from + j.value * step + kPackAhead);
      });
      Simd::transpose(v);
      int8_t* to = r.packed + k / kQuad * row + n * kQuad;
      unroll<Simd::N>([&](auto g) QO_LAMBDA {
        if (k + g.value * kQuad < r.k) {
          Simd::store(reinterpret_cast<int32_t*>(to + g.value * row), v[g.value]);
          sum = Simd::add(sum, Simd::sum_bytes(v[g.value]));
        }
      });
    }
    Simd::store(r.column_sum + n, sum);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA

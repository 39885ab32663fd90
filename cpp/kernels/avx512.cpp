// AVX-512 kernels for processors without VNNI (Skylake-X): as avx2.cpp, with vectors of twice the length and twice as many of them.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/table.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace quant_ops {
namespace {

#include "kernels/simd/avx512.h"
//
#include "kernels/generic/unroll.h"
//
#include "kernels/generic/elementwise.h"
//
#include "kernels/simd/depthwise_avx512.h"
using FourTaps = PairsOfTaps;
#include "kernels/generic/depthwise.h"

struct Wide {
  using V = __m512i;
  static QO_INLINE V zero() { return _mm512_setzero_si512(); }
  static QO_INLINE V load_weights(const int8_t* p) { return _mm512_cvtepi8_epi16(Simd::load256(p)); }
  static QO_INLINE V broadcast(const uint16_t* p) {
    int64_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return _mm512_set1_epi64(four);
  }
  static QO_INLINE V multiply_add(V acc, V a, V b) {
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
    asm volatile("" : "+v"(acc));
    return acc;
  }
  static QO_INLINE Simd::I columns(V low, V high) {
    const V even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const V odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_add_epi32(_mm512_permutex2var_epi32(low, even, high), _mm512_permutex2var_epi32(low, odd, high));
  }
  static QO_INLINE void widen(const uint8_t* a, int64_t groups, uint16_t* wide) {
    for (int64_t g = 0; g < groups; g += 8) {
      const __mmask8 mask = static_cast<__mmask8>(groups - g >= 8 ? 0xff : (1 << (groups - g)) - 1);
      _mm512_storeu_si512(wide + g * kQuad, _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi32(mask, a + g * kQuad)));
    }
  }
};

#include "kernels/generic/widening.h"

// 12 rows x 16 columns: 24 accumulators, each eight columns of two partial sums, + 2 weights + 1 activation + 1 product = 28 of 32
// zmm. Few rows take more columns at a time instead, so that sums stay independent and the panel is read in whole lines.
template <int kRows>
void gemm_u8s8_12x16_avx512(const GemmTile& t, int64_t width) {
  widened_tile<kRows, kRows <= 3 ? 4 : kRows <= 6 ? 2 : 1>(t, width);
}

constexpr int64_t kRows = 12;

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  unroll<kRows>([&](auto r) QO_LAMBDA {
    if (rows == r.value + 1) gemm_u8s8_12x16_avx512<r.value + 1>(tile, width);
  });
}

int64_t peak(int64_t iterations) {
  constexpr int kChains = 24;
  __m512i acc[kChains];
  __m512i a = _mm512_set1_epi16(3);
  const __m512i b = _mm512_set1_epi16(5);
  unroll<kChains>([&](auto c) QO_LAMBDA { acc[c.value] = _mm512_setzero_si512(); });
  for (int64_t i = 0; i < iterations; ++i)
    unroll<kChains>([&](auto c) QO_LAMBDA {
      asm volatile("" : "+v"(a));  // or the product would be moved out of the loop
      acc[c.value] = Wide::multiply_add(acc[c.value], a, b);
    });
  unroll<kChains>([&](auto c) QO_LAMBDA { asm volatile("" ::"v"(acc[c.value])); });
  return iterations * kChains * 32;
}

}  // namespace

const KernelTable kAvx512Kernels = {
    "avx512",
    "gemm_u8s8_12x16_avx512",
    kRows,
    kRows,
    false,
    gemm,
    depthwise_run,
    quantize_run,
    dequantize_run,
    ste_run,
    ste_columns_run,
    range_run,
    range_columns_run,
    codes_run,
    pack_run,
    nullptr,
    peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif

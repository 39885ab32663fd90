// AVX-512 kernels for processors without VNNI (Skylake-X): as avx2.cpp, with vectors of twice the length and twice as many of them.
#if defined(__x86_64__)
#define QO_ISA avx512
#define QO_SIMD "kernels/simd/avx512.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "kernels/generic/depthwise.h"
#include "kernels/generic/nibbles.h"
#include "kernels/generic/widening.h"
#include "kernels/simd/depthwise_avx512.h"

namespace quant_ops {
namespace avx512 {
namespace {

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
  static QO_INLINE void widen(const uint8_t* a, int64_t groups, uint32_t flip, uint16_t* wide) {
    const __m256i bits = _mm256_set1_epi32(static_cast<int>(flip));
    for (int64_t g = 0; g < groups; g += 8) {
      const __mmask8 mask = static_cast<__mmask8>(groups - g >= 8 ? 0xff : (1 << (groups - g)) - 1);
      const __m256i bytes = _mm256_xor_si256(_mm256_maskz_loadu_epi32(mask, a + g * kQuad), bits);
      _mm512_storeu_si512(wide + g * kQuad, _mm512_cvtepu8_epi16(bytes));
    }
  }
};

// 12 rows x 16 columns: 24 accumulators, each eight columns of two partial sums, + 2 weights + 1 activation + 1 product = 28 of 32
// zmm. Few rows take more columns at a time instead, so that sums stay independent and the panel is read in whole lines.
constexpr int64_t kRows = 12;
constexpr int vectors_of(int64_t rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

template <int kTileRows>
void gemm_u8s8_12x16_avx512(const GemmTile& t, int64_t width) {
  widened_tile<Wide, kTileRows, vectors_of(kTileRows)>(t, width);
}

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  with_rows<kRows>(rows, [&](auto r) QO_LAMBDA { gemm_u8s8_12x16_avx512<r.value>(tile, width); });
}

GemmShape gemm_shape(int64_t rows, int64_t width) {
  return swept_shape("avx512", rows, width, vectors_of(rows) * Simd::N, Simd::N);
}

// Exact, as in avx2.cpp: the pairs of products with a nibble, and the sums of four of them, stay within int16.
struct Dot {
  static QO_INLINE Simd::I add(Simd::I sum, const int8_t* a, const Simd::I (&w)[4]) {
    const auto pairs = [&](auto i) QO_LAMBDA {
      int32_t four;
      __builtin_memcpy(&four, a + i.value * kQuad, sizeof(four));
      return _mm512_maddubs_epi16(w[i.value], _mm512_set1_epi32(four));
    };
    const Simd::I eight = _mm512_add_epi16(pairs(Int<0>{}), pairs(Int<1>{}));
    const Simd::I sixteen = _mm512_add_epi16(eight, _mm512_add_epi16(pairs(Int<2>{}), pairs(Int<3>{})));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(sixteen, _mm512_set1_epi16(1)));
  }
};

constexpr int64_t kNibbleRows = 16;  // 16 sums, 4 weights

void nibbles(const NibbleTile& tile, int64_t rows) {
  with_rows<kNibbleRows>(rows, [&](auto r) QO_LAMBDA { nibble_tile<Dot, r.value, 1>(tile); });
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
}  // namespace avx512

constinit const ProductKernels kAvx512Products = {
    .isa = "avx512",
    .gemm_rows = avx512::kRows,
    .slim_rows = avx512::kRows,
    .flips = true,
    .gemm = avx512::gemm,
    .gemm_shape = avx512::gemm_shape,
    .depthwise = avx512::depthwise<avx512::PairsOfTaps>,
    .nibble_rows = avx512::kNibbleRows,
    .nibbles = avx512::nibbles,
    .peak = avx512::peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif

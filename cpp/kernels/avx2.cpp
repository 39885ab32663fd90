// AVX2 + FMA + F16C kernels. The product is exact: bytes are widened to int16 and multiplied with vpmaddwd, never with vpmaddubsw,
// whose int16 sums saturate (255 * 127 * 2 > 32767).
#if defined(__x86_64__)
#define QO_ISA avx2
#define QO_SIMD "kernels/simd/avx2.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("avx2,fma,f16c")
#include "kernels/generic/depthwise.h"
#include "kernels/generic/nibbles.h"
#include "kernels/generic/widening.h"
#include "kernels/simd/depthwise_avx2.h"

namespace quant_ops {
namespace avx2 {
namespace {

struct Wide {
  using V = __m256i;
  static QO_INLINE V zero() { return _mm256_setzero_si256(); }
  static QO_INLINE V load_weights(const int8_t* p) { return _mm256_cvtepi8_epi16(Simd::load128(p)); }
  static QO_INLINE V broadcast(const uint16_t* p) {
    int64_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return _mm256_set1_epi64x(four);
  }
  static QO_INLINE V multiply_add(V acc, V a, V b) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
    asm volatile("" : "+x"(acc));
    return acc;
  }
  static QO_INLINE Simd::I columns(V low, V high) {
    const V pairs = _mm256_hadd_epi32(low, high);  // columns 0 1 4 5 | 2 3 6 7
    return _mm256_permute4x64_epi64(pairs, 0xd8);
  }
  static QO_INLINE void widen(const uint8_t* a, int64_t groups, uint32_t flip, uint16_t* wide) {
    const __m128i bits = _mm_set1_epi32(static_cast<int>(flip));
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4)
      store(wide + g * kQuad, _mm256_cvtepu8_epi16(_mm_xor_si128(Simd::load128(a + g * kQuad), bits)));
    for (; g < groups; ++g) {  // by value: nothing after the row's last byte is read
      uint32_t four;
      __builtin_memcpy(&four, a + g * kQuad, sizeof(four));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(wide + g * kQuad),
                       _mm_cvtepu8_epi16(_mm_cvtsi32_si128(static_cast<int>(four ^ flip))));
    }
  }
  static QO_INLINE void store(uint16_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};

// 6 rows x 8 columns: 12 accumulators, each four columns of two partial sums, + 2 weights + 1 activation + 1 product = 16 ymm. Few
// rows take more columns at a time instead.
constexpr int64_t kRows = 6;
constexpr int vectors_of(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

template <int kTileRows, int kWidth>
void gemm_u8s8_6x8_avx2(const GemmTile& t) {
  widened_tile<Wide, kTileRows, vectors_of(kTileRows)>(t, kWidth);
}

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  with_tile<kRows>(rows, width, [&](auto r, auto w) QO_LAMBDA { gemm_u8s8_6x8_avx2<r.value, w.value>(tile); });
}

GemmShape gemm_shape(int64_t rows, int64_t width) { return swept_shape("avx2", rows, width, vectors_of(rows) * Simd::N, Simd::N); }

// Here vpmaddubsw is exact: a nibble is at most 15, so a pair of products is at most 2 * 15 * 128 = 3840, and the four of them that
// are added before the sums are widened stay within int16.
struct Dot {
  static QO_INLINE Simd::I add(Simd::I sum, const int8_t* a, const Simd::I (&w)[4]) {
    const auto pairs = [&](auto i) QO_LAMBDA {
      int32_t four;
      __builtin_memcpy(&four, a + i.value * kQuad, sizeof(four));
      return _mm256_maddubs_epi16(w[i.value], _mm256_set1_epi32(four));
    };
    const Simd::I eight = _mm256_add_epi16(pairs(Int<0>{}), pairs(Int<1>{}));
    const Simd::I sixteen = _mm256_add_epi16(eight, _mm256_add_epi16(pairs(Int<2>{}), pairs(Int<3>{})));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(sixteen, _mm256_set1_epi16(1)));
  }
};

// 8 rows x 8 columns: 8 sums, 4 weights, the ones, and two for products. One or two rows take all 16 columns at a time.
constexpr int64_t kNibbleRows = 8;

void nibbles(const NibbleTile& tile, int64_t rows) {
  with_rows<kNibbleRows>(rows, [&](auto r) QO_LAMBDA { nibble_tile<Dot, r.value, r.value <= 2 ? 2 : 1>(tile); });
}

int64_t peak(int64_t iterations) {
  constexpr int kChains = 12;
  __m256i acc[kChains];
  __m256i a = _mm256_set1_epi16(3);
  const __m256i b = _mm256_set1_epi16(5);
  unroll<kChains>([&](auto c) QO_LAMBDA { acc[c.value] = _mm256_setzero_si256(); });
  for (int64_t i = 0; i < iterations; ++i)
    unroll<kChains>([&](auto c) QO_LAMBDA {
      asm volatile("" : "+x"(a));  // or the product would be moved out of the loop
      acc[c.value] = Wide::multiply_add(acc[c.value], a, b);
    });
  unroll<kChains>([&](auto c) QO_LAMBDA { asm volatile("" ::"x"(acc[c.value])); });
  return iterations * kChains * 16;
}

}  // namespace
}  // namespace avx2

constinit const ProductKernels kAvx2Products = {
    .isa = "avx2",
    .gemm_rows = avx2::kRows,
    .slim_rows = avx2::kRows,
    .flips = true,
    .gemm = avx2::gemm,
    .gemm_shape = avx2::gemm_shape,
    .depthwise = avx2::depthwise<avx2::PairsOfTaps>,
    .nibble_rows = avx2::kNibbleRows,
    .nibbles = avx2::nibbles,
    .peak = avx2::peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif

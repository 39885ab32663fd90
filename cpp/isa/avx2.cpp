// AVX2 + FMA + F16C kernels. The product is exact: bytes are widened to int16 and multiplied with vpmaddwd, never with vpmaddubsw,
// whose int16 sums saturate (255 * 127 * 2 > 32767).
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "target.h"

#if defined(__x86_64__)
QO_TARGET_BEGIN("avx2,fma,f16c")
namespace quant_ops {
namespace {

struct Simd {
  static constexpr int N = 8;
  using F = __m256;
  using I = __m256i;

  static QO_INLINE F set(float v) { return _mm256_set1_ps(v); }
  static QO_INLINE I set_int(int32_t v) { return _mm256_set1_epi32(v); }

  static QO_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static QO_INLINE __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  static QO_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static QO_INLINE F load(const Half* p) { return _mm256_cvtph_ps(load128(p)); }
  static QO_INLINE F load(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
  }
  static QO_INLINE I load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static QO_INLINE I load_int(const int8_t* p) { return _mm256_cvtepi8_epi32(load64(p)); }
  static QO_INLINE I load_int(const uint8_t* p) { return _mm256_cvtepu8_epi32(load64(p)); }

  static QO_INLINE __m128i narrow16(I v) {  // values fit: packing does not saturate
    return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  }
  static QO_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static QO_INLINE void store(Half* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static QO_INLINE void store(BFloat16* p, F v) {  // by integers: the same bits as from_compute, subnormals kept
    const I u = _mm256_castps_si256(v), top = _mm256_srli_epi32(u, 16);
    const I odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I q = _mm256_blendv_epi8(rounded, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
  }
  static QO_INLINE void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static QO_INLINE void store(int16_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow16(v)); }
  static QO_INLINE void store(int8_t* p, I v) {
    const __m128i h = narrow16(v);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(h, h));
  }
  static QO_INLINE void store(uint8_t* p, I v) {
    const __m128i h = narrow16(v);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(h, h));
  }

  static QO_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static QO_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static QO_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static QO_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static QO_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static QO_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static QO_INLINE F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static QO_INLINE F keep_between(F v, F steps, F lo, F hi) {
    return _mm256_and_ps(v, _mm256_and_ps(_mm256_cmp_ps(steps, lo, _CMP_GE_OQ), _mm256_cmp_ps(steps, hi, _CMP_LE_OQ)));
  }
  static QO_INLINE F nan_to_zero(F a) { return _mm256_and_ps(a, _mm256_cmp_ps(a, a, _CMP_ORD_Q)); }
  static QO_INLINE I abs_bits(F a) { return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)); }

  static QO_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static QO_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static QO_INLINE I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static QO_INLINE I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static QO_INLINE I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static QO_INLINE I max_unsigned(I a, I b) { return _mm256_max_epu32(a, b); }
  static QO_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static QO_INLINE I to_int(F a) { return _mm256_cvtps_epi32(a); }
};

#include "unroll.inl"
//
#include "elementwise.inl"

// 6 rows x 8 columns: 12 accumulators, each four columns of two partial sums, + 2 weights + 1 activation of 16 ymm. The panel is
// swept eight columns at a time.
template <int kRows, int kWidth>
void gemm_u8s8_6x8_avx2(const GemmTile& t) {
  for (int64_t n = 0; n < kWidth && n < t.out.columns; n += 8) {
    __m256i acc[kRows][2];
    unroll<kRows>([&](auto r) QO_LAMBDA { acc[r.value][0] = acc[r.value][1] = _mm256_setzero_si256(); });
    const int8_t* b = t.b + n * kGroupK;
    const int64_t* offset = t.a_offset;
    for (int64_t tap = 0; tap < t.taps; ++tap, offset += kRows) {
      const uint8_t* a[kRows];
      unroll<kRows>([&](auto r) QO_LAMBDA { a[r.value] = t.a + offset[r.value]; });
      for (int64_t k = 0; k < t.k4 * kGroupK; k += kGroupK, b += kWidth * kGroupK) {
        const __m256i b0 = _mm256_cvtepi8_epi16(Simd::load128(b)), b1 = _mm256_cvtepi8_epi16(Simd::load128(b + 16));
        unroll<kRows>([&](auto r) QO_LAMBDA {
          int32_t four;
          __builtin_memcpy(&four, a[r.value] + k, 4);
          const __m256i av = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
          acc[r.value][0] = _mm256_add_epi32(acc[r.value][0], _mm256_madd_epi16(av, b0));
          acc[r.value][1] = _mm256_add_epi32(acc[r.value][1], _mm256_madd_epi16(av, b1));
        });
      }
    }
    finish_tile<kRows, 1>(t.out.from_column(n), [&](auto r, auto) QO_LAMBDA {
      const __m256i pairs = _mm256_hadd_epi32(acc[r.value][0], acc[r.value][1]);  // columns 0 1 4 5 | 2 3 6 7
      return _mm256_permute4x64_epi64(pairs, 0xd8);
    });
  }
}

constexpr int64_t kRows = 6;

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  with_tile<kRows>(rows, width, [&](auto r, auto w) QO_LAMBDA { gemm_u8s8_6x8_avx2<r.value, w.value>(tile); });
}

int64_t peak(int64_t iterations) {
  constexpr int kChains = 12;
  __m256i acc[kChains];
  const __m256i a = _mm256_set1_epi16(3), b = _mm256_set1_epi16(5);
  unroll<kChains>([&](auto c) QO_LAMBDA { acc[c.value] = _mm256_setzero_si256(); });
  for (int64_t i = 0; i < iterations; ++i)
    unroll<kChains>([&](auto c) QO_LAMBDA {
      __m256i product = _mm256_madd_epi16(a, b);
      asm volatile("" : "+x"(product));
      acc[c.value] = _mm256_add_epi32(acc[c.value], product);
    });
  unroll<kChains>([&](auto c) QO_LAMBDA { asm volatile("" ::"x"(acc[c.value])); });
  return iterations * kChains * 16;
}

}  // namespace

const KernelTable kAvx2Kernels = {
    "avx2", "gemm_u8s8_6x8_avx2", kRows, gemm, depthwise_pixel, quantize_run, dequantize_run, ste_run, range_run, codes_run, peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif

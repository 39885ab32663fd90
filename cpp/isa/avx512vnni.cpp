// AVX-512 VNNI kernels: vpdpbusd adds four u8 x s8 products to an int32 lane, exactly (its saturating twin vpdpbusds is not used).
// Lanes are output columns, so no sum ever crosses lanes.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "target.h"

#if defined(__x86_64__)
QO_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace quant_ops {
namespace {

struct Simd {
  static constexpr int N = 16;
  using F = __m512;
  using I = __m512i;

  static QO_INLINE F set(float v) { return _mm512_set1_ps(v); }
  static QO_INLINE I set_int(int32_t v) { return _mm512_set1_epi32(v); }

  static QO_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static QO_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static QO_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static QO_INLINE F load(const Half* p) { return _mm512_cvtph_ps(load256(p)); }
  static QO_INLINE F load(const BFloat16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
  }
  static QO_INLINE I load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
  static QO_INLINE I load_int(const int8_t* p) { return _mm512_cvtepi8_epi32(load128(p)); }
  static QO_INLINE I load_int(const uint8_t* p) { return _mm512_cvtepu8_epi32(load128(p)); }

  static QO_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static QO_INLINE void store(Half* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static QO_INLINE void store(BFloat16* p, F v) {  // by integers: vcvtneps2bf16 flushes subnormals
    const I u = _mm512_castps_si512(v), top = _mm512_srli_epi32(u, 16);
    const I odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const I q = _mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(q));
  }
  static QO_INLINE void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static QO_INLINE void store(int16_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v)); }
  static QO_INLINE void store(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static QO_INLINE void store(uint8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }

  static QO_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static QO_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static QO_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static QO_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static QO_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static QO_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static QO_INLINE F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static QO_INLINE F keep_between(F v, F steps, F lo, F hi) {
    const __mmask16 above = _mm512_cmp_ps_mask(steps, lo, _CMP_GE_OQ);
    return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, steps, hi, _CMP_LE_OQ), v);
  }
  static QO_INLINE F nan_to_zero(F a) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a); }
  static QO_INLINE I abs_bits(F a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }

  static QO_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static QO_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static QO_INLINE I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static QO_INLINE I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static QO_INLINE I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static QO_INLINE I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
  static QO_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static QO_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }
};

#include "unroll.inl"
//
#include "elementwise.inl"
//
#include "codes_avx512.inl"

// 6 rows x 64 columns: 24 accumulators + 4 weights + 1 broadcast activation = 29 of 32 zmm. A vpdpbusd takes 4 to 5 cycles and one
// or two start per cycle, so ten or more independent ones are needed: tiles of three rows and more run at full speed.
template <int kRows, int kWidth>
void gemm_u8s8_6x64_avx512vnni(const GemmTile& t) {
  constexpr int kVectors = kWidth / 16;
  __m512i acc[kRows][kVectors];
  unroll<kRows>([&](auto r)
                    QO_LAMBDA { unroll<kVectors>([&](auto v) QO_LAMBDA { acc[r.value][v.value] = _mm512_setzero_si512(); }); });
  const int8_t* b = t.b;
  const int8_t* ahead = t.ahead;
  const int64_t* offset = t.a_offset;
  const int64_t k_end = t.k4 * kGroupK;
  for (int64_t tap = 0; tap < t.taps; ++tap, offset += kRows) {
    const uint8_t* a[kRows];
    unroll<kRows>([&](auto r) QO_LAMBDA { a[r.value] = t.a + offset[r.value]; });
    for (int64_t k = 0; k < k_end; k += kGroupK, b += kWidth * kGroupK) {
      __m512i bv[kVectors];
      _mm_prefetch(ahead, _MM_HINT_T1);
      ahead += kWidth;
      unroll<kVectors>([&](auto v) QO_LAMBDA { bv[v.value] = _mm512_loadu_si512(b + v.value * 64); });
      unroll<kRows>([&](auto r) QO_LAMBDA {
        int32_t four;
        __builtin_memcpy(&four, a[r.value] + k, 4);
        const __m512i av = _mm512_set1_epi32(four);
        unroll<kVectors>([&](auto v)
                             QO_LAMBDA { acc[r.value][v.value] = _mm512_dpbusd_epi32(acc[r.value][v.value], av, bv[v.value]); });
      });
    }
  }
  finish_tile<kRows, kVectors>(t.out, [&](auto r, auto v) QO_LAMBDA { return acc[r.value][v.value]; });
}

constexpr int64_t kRows = 6;

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  with_tile<kRows>(rows, width, [&](auto r, auto w) QO_LAMBDA { gemm_u8s8_6x64_avx512vnni<r.value, w.value>(tile); });
}

int64_t peak(int64_t iterations) {
  constexpr int kChains = 24;
  __m512i acc[kChains];
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  unroll<kChains>([&](auto c) QO_LAMBDA { acc[c.value] = _mm512_setzero_si512(); });
  for (int64_t i = 0; i < iterations; ++i)
    unroll<kChains>([&](auto c) QO_LAMBDA {
      acc[c.value] = _mm512_dpbusd_epi32(acc[c.value], a, b);
      asm volatile("" : "+v"(acc[c.value]));
    });
  return iterations * kChains * 64;
}

}  // namespace

const KernelTable kAvx512VnniKernels = {
    "avx512vnni",
    "gemm_u8s8_6x64_avx512vnni",
    kRows,
    gemm,
    depthwise_pixel,
    quantize_run,
    dequantize_run,
    ste_run,
    range_run,
    codes_avx512,
    peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif

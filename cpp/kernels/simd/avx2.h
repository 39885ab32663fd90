// The operations of scalar.h by AVX2, FMA and F16C.
#pragma once

#if defined(__x86_64__)
#include "kernels/target.h"

#if !defined(QO_ISA)  // opened alone
#define QO_ISA avx2
#define QO_SIMD "kernels/simd/avx2.h"
#endif

namespace quant_ops::QO_ISA {
namespace {

struct Simd {
  static constexpr int N = 8;
  static constexpr bool kMasks = false;
  static constexpr int kRegisters = 16;
  using F = __m256;
  using I = __m256i;
  using Words = __m256i;  // int16
  struct D {              // N float64
    __m256d low, high;
  };

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
  static QO_INLINE I load_int(const int16_t* p) { return _mm256_cvtepi16_epi32(load128(p)); }
  static QO_INLINE D load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }

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
  static QO_INLINE void store(double* p, D v) {
    _mm256_storeu_pd(p, v.low);
    _mm256_storeu_pd(p + 4, v.high);
  }
  // 4 N bytes; packing works in 128-bit lanes, which are put in order afterwards
  static QO_INLINE void store_bytes(int8_t* p, I a, I b, I c, I d) {
    store_words(p, _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)));
  }
  static QO_INLINE void store_bytes(uint8_t* p, I a, I b, I c, I d) {
    store_words(p, _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)));
  }
  static QO_INLINE void store_words(void* p, I v) {
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(v, order));
  }

  // Saturating: 4 N codes as bytes, whose order order_lanes mends; vector q of the four is then their quarter q.
  static QO_INLINE I set_bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  template <class Y>
  static QO_INLINE I pack_lanes(I a, I b, I c, I d) {
    const I ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
    return std::is_same_v<Y, int8_t> ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
  }
  static QO_INLINE I order_lanes(I codes) { return _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
  static QO_INLINE bool differ(I a, I b) {
    const I c = _mm256_xor_si256(a, b);
    return !_mm256_testz_si256(c, c);
  }
  static QO_INLINE I max_bytes(I a, I b, int8_t) { return _mm256_max_epi8(a, b); }
  static QO_INLINE I max_bytes(I a, I b, uint8_t) { return _mm256_max_epu8(a, b); }
  static QO_INLINE I min_bytes(I a, I b, int8_t) { return _mm256_min_epi8(a, b); }
  static QO_INLINE I min_bytes(I a, I b, uint8_t) { return _mm256_min_epu8(a, b); }
  static QO_INLINE I load_codes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static QO_INLINE void store_codes(void* p, I codes) { _mm256_storeu_si256(static_cast<__m256i*>(p), codes); }
  template <int kQuarter>
  static QO_INLINE void store_quarter(void* p, I codes) {
    const int64_t eight = _mm256_extract_epi64(codes, kQuarter);
    __builtin_memcpy(p, &eight, sizeof(eight));
  }

  static QO_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static QO_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static QO_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static QO_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static QO_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static QO_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
  static QO_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static QO_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static QO_INLINE F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static QO_INLINE F keep_between(F v, F steps, F lo, F hi) {
    return _mm256_and_ps(v, _mm256_and_ps(_mm256_cmp_ps(steps, lo, _CMP_GE_OQ), _mm256_cmp_ps(steps, hi, _CMP_LE_OQ)));
  }
  static QO_INLINE F keep_outside(F v, F steps, F lo, F hi) {
    return _mm256_and_ps(v, _mm256_or_ps(_mm256_cmp_ps(steps, lo, _CMP_LT_OQ), _mm256_cmp_ps(steps, hi, _CMP_GT_OQ)));
  }
  static QO_INLINE F nan_to_zero(F a) { return _mm256_and_ps(a, _mm256_cmp_ps(a, a, _CMP_ORD_Q)); }
  static QO_INLINE I and_bits(I a, I b) { return _mm256_and_si256(a, b); }
  static QO_INLINE I or_bits(I a, I b) { return _mm256_or_si256(a, b); }
  static QO_INLINE I xor_bits(I a, I b) { return _mm256_xor_si256(a, b); }
  static QO_INLINE I shift_left(I a, int by) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(by)); }
  static QO_INLINE I shift_right(I a, int by) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(by)); }
  static QO_INLINE I sub_bytes(I a, I b) { return _mm256_sub_epi8(a, b); }
  template <int kByte>  // of every lane, signed, times 2^24: at the top of its lane
  static QO_INLINE I top_byte(I a) {
    if constexpr (kByte == 0) return _mm256_slli_epi32(a, 24);
    if constexpr (kByte == 3) return _mm256_and_si256(a, _mm256_set1_epi32(static_cast<int32_t>(0xff000000)));
    const auto from = [](int lane) { return static_cast<int>(0x00808080u | static_cast<unsigned>(4 * lane + kByte) << 24); };
    return _mm256_shuffle_epi8(a, _mm256_setr_epi32(from(0), from(1), from(2), from(3), from(0), from(1), from(2), from(3)));
  }
  static QO_INLINE F as_float(I a) { return _mm256_castsi256_ps(a); }
  static QO_INLINE F if_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static QO_INLINE F if_greater(I a, I b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)));
  }
  static constexpr int kWords = 16;
  static QO_INLINE Words load_magnitudes(const uint16_t* p) {
    return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi16(0x7fff));
  }
  static QO_INLINE Words max_magnitudes(Words a, Words b) { return _mm256_max_epi16(a, b); }
  static QO_INLINE void store_magnitudes(uint16_t* p, Words v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static QO_INLINE uint16_t largest_magnitude(Words v) {
    const __m128i eight = _mm_max_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i ones = _mm_set1_epi16(-1);  // the smallest complement
    return static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, ones))));
  }
  static QO_INLINE I multiply_wide(I a, uint32_t m, I* high) {
    const I by = _mm256_set1_epi32(static_cast<int>(m));
    const I even = _mm256_mul_epu32(a, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), by);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  static QO_INLINE void store_interleaved(uint32_t* p, I a, I b, I c, I d) {
    const I ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
    const I ab2 = _mm256_unpackhi_epi32(a, b), cd2 = _mm256_unpackhi_epi32(c, d);
    const I q[4] = {_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd), _mm256_unpacklo_epi64(ab2, cd2),
                    _mm256_unpackhi_epi64(ab2, cd2)};  // lanes i and i + 4
    I* to = reinterpret_cast<I*>(p);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(q[0], q[1], 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(q[2], q[3], 0x20));
    _mm256_storeu_si256(to + 2, _mm256_permute2x128_si256(q[0], q[1], 0x31));
    _mm256_storeu_si256(to + 3, _mm256_permute2x128_si256(q[2], q[3], 0x31));
  }
  static QO_INLINE void load_pair(const BFloat16* p, F* even, F* odd) {
    const I both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static QO_INLINE void store_pair(BFloat16* p, F even, F odd) {
    const I low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, _mm256_castps_si256(odd), 0xaa));
  }
  template <class T>
  static QO_INLINE void store_exact(T* p, F v) {
    store(p, v);
  }
  static QO_INLINE void store_exact(BFloat16* p, F v) {
    const I top = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1)));
  }
  static QO_INLINE I bits(F a) { return _mm256_castps_si256(a); }
  static QO_INLINE I abs_bits(F a) { return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)); }

  static QO_INLINE D widen(F v) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
  }
  static QO_INLINE D accumulate(D acc, F a, F b) {
    const D x = widen(a), y = widen(b);
    return {_mm256_fmadd_pd(x.low, y.low, acc.low), _mm256_fmadd_pd(x.high, y.high, acc.high)};
  }

  static QO_INLINE float reduce_min(F a) {
    const __m128 four = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ps(two, _mm_movehdup_ps(two)));
  }
  static QO_INLINE float reduce_max(F a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ps(two, _mm_movehdup_ps(two)));
  }
  static QO_INLINE uint32_t reduce_max_unsigned(I a) {
    const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i two = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_srli_epi64(two, 32))));
  }

  static QO_INLINE bool any_above(I a, I b) { return _mm256_movemask_epi8(_mm256_cmpgt_epi32(a, b)) != 0; }  // signed
  static QO_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static QO_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static QO_INLINE I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static QO_INLINE I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static QO_INLINE I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static QO_INLINE I max_unsigned(I a, I b) { return _mm256_max_epu32(a, b); }
  // v[i] lane j <-> v[j] lane i
  static QO_INLINE void transpose(I (&v)[N]) {
    I pair[N], quad[N];
    for (int i = 0; i < N; i += 2) {
      pair[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
      pair[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < N; i += 4)  // in each 128-bit half: lane j of v[i .. i + 3]
      for (int j = 0; j < 2; ++j) {
        quad[i + 2 * j] = _mm256_unpacklo_epi64(pair[i + j], pair[i + j + 2]);
        quad[i + 2 * j + 1] = _mm256_unpackhi_epi64(pair[i + j], pair[i + j + 2]);
      }
    for (int j = 0; j < 4; ++j) {
      v[j] = _mm256_permute2x128_si256(quad[j], quad[j + 4], 0x20);
      v[j + 4] = _mm256_permute2x128_si256(quad[j], quad[j + 4], 0x31);
    }
  }
  // the sum of the four signed bytes of each lane
  static QO_INLINE I sum_bytes(I a) {
    const I even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), odd = _mm256_srai_epi16(a, 8);
    return _mm256_madd_epi16(_mm256_add_epi16(even, odd), _mm256_set1_epi16(1));
  }
  static QO_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static QO_INLINE I to_int(F a) { return _mm256_cvtps_epi32(a); }
};

}  // namespace
}  // namespace quant_ops::QO_ISA
#endif

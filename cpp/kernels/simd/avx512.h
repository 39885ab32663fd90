// The operations of scalar.h by AVX-512 F, BW, DQ and VL.
#pragma once

#if defined(__x86_64__)
#include "kernels/target.h"

#if !defined(QO_ISA)  // opened alone
#define QO_ISA avx512
#define QO_SIMD "kernels/simd/avx512.h"
#endif

namespace quant_ops::QO_ISA {
namespace {

struct Simd {
  static constexpr int N = 16;
  static constexpr bool kMasks = true;  // a store of the first n elements alone
  static constexpr int kRegisters = 32;
  using F = __m512;
  using I = __m512i;
  using Words = __m512i;  // int16
  struct D {              // N float64
    __m512d low, high;
  };

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
  static QO_INLINE I load_int(const int16_t* p) { return _mm512_cvtepi16_epi32(load256(p)); }
  static QO_INLINE D load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }

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
  static QO_INLINE void store(double* p, D v) {
    _mm512_storeu_pd(p, v.low);
    _mm512_storeu_pd(p + 8, v.high);
  }
  // the first n < N elements
  static QO_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static QO_INLINE void store(float* p, F v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static QO_INLINE void store(int32_t* p, I v, int64_t n) { _mm512_mask_storeu_epi32(p, first(n), v); }
  template <class T>
  static QO_INLINE void store(T* p, F v, int64_t n) {  // Half, BFloat16
    T part[N];
    store(part, v);
    _mm256_mask_storeu_epi16(p, first(n), load256(part));
  }

  // 4 N bytes; packing works in 128-bit lanes: dword 4 j + lane of the result is dword j of the lane
  static QO_INLINE void store_bytes(int8_t* p, I a, I b, I c, I d) {
    store_words(p, _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
  }
  static QO_INLINE void store_bytes(uint8_t* p, I a, I b, I c, I d) {
    store_words(p, _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
  }
  static QO_INLINE void store_words(void* p, I v) {
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, v));
  }

  // Saturating: 4 N codes as bytes, whose order order_lanes mends; vector q of the four is then their quarter q.
  static QO_INLINE I set_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  template <class Y>
  static QO_INLINE I pack_lanes(I a, I b, I c, I d) {
    const I ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
    return std::is_same_v<Y, int8_t> ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
  }
  static QO_INLINE I order_lanes(I codes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), codes);
  }
  static QO_INLINE bool differ(I a, I b) { return _mm512_cmpneq_epi32_mask(a, b) != 0; }
  static QO_INLINE I max_bytes(I a, I b, int8_t) { return _mm512_max_epi8(a, b); }
  static QO_INLINE I max_bytes(I a, I b, uint8_t) { return _mm512_max_epu8(a, b); }
  static QO_INLINE I min_bytes(I a, I b, int8_t) { return _mm512_min_epi8(a, b); }
  static QO_INLINE I min_bytes(I a, I b, uint8_t) { return _mm512_min_epu8(a, b); }
  static QO_INLINE I load_codes(const void* p) { return _mm512_loadu_si512(p); }
  static QO_INLINE void store_codes(void* p, I codes) { _mm512_storeu_si512(p, codes); }
  template <int kQuarter>
  static QO_INLINE void store_quarter(void* p, I codes) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_extracti32x4_epi32(codes, kQuarter));
  }
  template <int kQuarter>
  static QO_INLINE void store_quarter(void* p, I codes, int64_t n) {
    _mm_mask_storeu_epi8(p, first(n), _mm512_extracti32x4_epi32(codes, kQuarter));
  }

  static QO_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static QO_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static QO_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static QO_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static QO_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static QO_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
  static QO_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static QO_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static QO_INLINE F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static QO_INLINE F keep_between(F v, F steps, F lo, F hi) {
    const __mmask16 above = _mm512_cmp_ps_mask(steps, lo, _CMP_GE_OQ);
    return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, steps, hi, _CMP_LE_OQ), v);
  }
  static QO_INLINE F keep_outside(F v, F steps, F lo, F hi) {
    const __mmask16 below = _mm512_cmp_ps_mask(steps, lo, _CMP_LT_OQ), above = _mm512_cmp_ps_mask(steps, hi, _CMP_GT_OQ);
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(below | above), v);
  }
  static QO_INLINE F nan_to_zero(F a) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a); }
  static QO_INLINE I and_bits(I a, I b) { return _mm512_and_si512(a, b); }
  static QO_INLINE I or_bits(I a, I b) { return _mm512_or_si512(a, b); }
  static QO_INLINE I xor_bits(I a, I b) { return _mm512_xor_si512(a, b); }
  static QO_INLINE I shift_left(I a, int by) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(by)); }
  static QO_INLINE I shift_right(I a, int by) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(by)); }
  static QO_INLINE I sub_bytes(I a, I b) { return _mm512_sub_epi8(a, b); }
  template <int kByte>  // of every lane, signed, times 2^24: at the top of its lane
  static QO_INLINE I top_byte(I a) {
    if constexpr (kByte == 0) return _mm512_slli_epi32(a, 24);
    if constexpr (kByte == 3) return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int32_t>(0xff000000)));
    const auto from = [](int lane) { return static_cast<int>(0x00808080u | static_cast<unsigned>(4 * lane + kByte) << 24); };
    return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(_mm_setr_epi32(from(0), from(1), from(2), from(3))));
  }
  static QO_INLINE F as_float(I a) { return _mm512_castsi512_ps(a); }
  static QO_INLINE F if_less(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
  static QO_INLINE F if_greater(I a, I b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmpgt_epi32_mask(a, b), no, yes); }
  static constexpr int kWords = 32;
  static QO_INLINE Words load_magnitudes(const uint16_t* p) {
    return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff));
  }
  static QO_INLINE Words max_magnitudes(Words a, Words b) { return _mm512_max_epi16(a, b); }
  static QO_INLINE void store_magnitudes(uint16_t* p, Words v) { _mm512_storeu_si512(p, v); }
  static QO_INLINE uint16_t largest_magnitude(Words v) {
    const __m256i sixteen = _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    const __m128i eight = _mm_max_epi16(_mm256_castsi256_si128(sixteen), _mm256_extracti128_si256(sixteen, 1));
    const __m128i ones = _mm_set1_epi16(-1);  // the smallest complement
    return static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, ones))));
  }
  static QO_INLINE I multiply_wide(I a, uint32_t m, I* high) {
    const I by = _mm512_set1_epi32(static_cast<int>(m));
    const I even = _mm512_mul_epu32(a, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), by);
    *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  }
  static QO_INLINE void store_interleaved(uint32_t* p, I a, I b, I c, I d) {
    const I ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const I ab2 = _mm512_unpackhi_epi32(a, b), cd2 = _mm512_unpackhi_epi32(c, d);
    const I q[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd), _mm512_unpacklo_epi64(ab2, cd2),
                    _mm512_unpackhi_epi64(ab2, cd2)};  // lanes i, i + 4, i + 8 and i + 12
    const I even[2] = {_mm512_shuffle_i32x4(q[0], q[1], 0x44), _mm512_shuffle_i32x4(q[2], q[3], 0x44)};
    const I odd[2] = {_mm512_shuffle_i32x4(q[0], q[1], 0xee), _mm512_shuffle_i32x4(q[2], q[3], 0xee)};
    _mm512_storeu_si512(p, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
    _mm512_storeu_si512(p + 16, _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
    _mm512_storeu_si512(p + 32, _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
    _mm512_storeu_si512(p + 48, _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
  }
  static QO_INLINE void load_pair(const BFloat16* p, F* even, F* odd) {
    const I both = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static QO_INLINE void store_pair(BFloat16* p, F even, F odd) {
    const I low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_castps_si512(odd)));
  }
  template <class T>
  static QO_INLINE void store_exact(T* p, F v) {
    store(p, v);
  }
  static QO_INLINE void store_exact(BFloat16* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)));
  }
  static QO_INLINE I bits(F a) { return _mm512_castps_si512(a); }
  static QO_INLINE I abs_bits(F a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }

  static QO_INLINE D widen(F v) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
  }
  static QO_INLINE D accumulate(D acc, F a, F b) {
    const D x = widen(a), y = widen(b);
    return {_mm512_fmadd_pd(x.low, y.low, acc.low), _mm512_fmadd_pd(x.high, y.high, acc.high)};
  }

  static QO_INLINE float reduce_min(F a) { return _mm512_reduce_min_ps(a); }
  static QO_INLINE float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
  static QO_INLINE uint32_t reduce_max_unsigned(I a) { return _mm512_reduce_max_epu32(a); }

  static QO_INLINE bool any_above(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b) != 0; }  // signed
  static QO_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static QO_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static QO_INLINE I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static QO_INLINE I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static QO_INLINE I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static QO_INLINE I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
  // v[i] lane j <-> v[j] lane i
  static QO_INLINE void transpose(I (&v)[N]) {
    I pair[N], quad[N];
    for (int i = 0; i < N; i += 2) {
      pair[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
      pair[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < N; i += 4)  // in each quarter q: lane 4 q + j of v[i .. i + 3]
      for (int j = 0; j < 2; ++j) {
        quad[i + 2 * j] = _mm512_unpacklo_epi64(pair[i + j], pair[i + j + 2]);
        quad[i + 2 * j + 1] = _mm512_unpackhi_epi64(pair[i + j], pair[i + j + 2]);
      }
    for (int j = 0; j < 4; ++j) {  // a 4 x 4 transposition of quarters
      const I even_low = _mm512_shuffle_i32x4(quad[j], quad[j + 4], 0x88),
              odd_low = _mm512_shuffle_i32x4(quad[j], quad[j + 4], 0xdd);
      const I even_high = _mm512_shuffle_i32x4(quad[j + 8], quad[j + 12], 0x88),
              odd_high = _mm512_shuffle_i32x4(quad[j + 8], quad[j + 12], 0xdd);
      v[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
      v[j + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
      v[j + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
      v[j + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
  }
  // the sum of the four signed bytes of each lane
  static QO_INLINE I sum_bytes(I a) {
    const I even = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), odd = _mm512_srai_epi16(a, 8);
    return _mm512_madd_epi16(_mm512_add_epi16(even, odd), _mm512_set1_epi16(1));
  }
  static QO_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static QO_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }
};

}  // namespace
}  // namespace quant_ops::QO_ISA
#endif

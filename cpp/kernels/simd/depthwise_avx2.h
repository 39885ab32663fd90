// The Taps of depthwise.h by AVX2, without VNNI.
#pragma once

#if defined(__x86_64__)
#include "kernels/simd/avx2.h"

#include "kernels/generic/unroll.h"

namespace quant_ops::QO_ISA {
namespace {

struct Interleave {
  static constexpr int kBlocks = 1;

  template <int>
  static QO_INLINE void interleave(const uint8_t* const (&row)[kQuad], uint8_t flip, uint8_t* to, int64_t) {
    const __m128i bits = _mm_set1_epi8(static_cast<char>(flip));
    __m128i v[kQuad];
    unroll<kQuad>([&](auto r) QO_LAMBDA { v[r.value] = _mm_xor_si128(Simd::load128(row[r.value]), bits); });
    const __m128i low01 = _mm_unpacklo_epi8(v[0], v[1]), high01 = _mm_unpackhi_epi8(v[0], v[1]);
    const __m128i low23 = _mm_unpacklo_epi8(v[2], v[3]), high23 = _mm_unpackhi_epi8(v[2], v[3]);
    __m128i* q = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(q, _mm_unpacklo_epi16(low01, low23));
    _mm_storeu_si128(q + 1, _mm_unpackhi_epi16(low01, low23));
    _mm_storeu_si128(q + 2, _mm_unpacklo_epi16(high01, high23));
    _mm_storeu_si128(q + 3, _mm_unpackhi_epi16(high01, high23));
  }
};

// Even and odd bytes as int16: vpmaddwd multiplies two and two exactly, and lanes stay where they are.
struct PairsOfTaps : Interleave {
  struct W {
    __m256i even, odd;
  };
  static QO_INLINE W weights(const int8_t* p) {
    const __m256i b = Simd::load_int(reinterpret_cast<const int32_t*>(p));
    return {_mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), _mm256_srai_epi16(b, 8)};
  }
  static QO_INLINE Simd::I start(const int32_t*) { return _mm256_setzero_si256(); }
  static QO_INLINE Simd::I dot(Simd::I acc, const uint8_t* codes, const W& w) {
    const __m256i a = Simd::load_int(reinterpret_cast<const int32_t*>(codes));
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)), w.even);
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(a, 8), w.odd)));
  }
};

}  // namespace
}  // namespace quant_ops::QO_ISA
#endif

// The Taps of depthwise.h by AVX2, without VNNI.
#pragma once

#if defined(__x86_64__)
#include "kernels/simd/avx2.h"

#include "kernels/generic/unroll.h"

namespace quant_ops::QO_ISA {
namespace {

// Codes (0, 1) and (2, 3) of four rows, interleaved, of channels 0 to 7 and of 8 to 15.
struct RowPairs {
  __m128i low01, high01, low23, high23;

  QO_INLINE RowPairs(const uint8_t* const (&row)[kQuad], uint8_t flip) {
    const __m128i bits = _mm_set1_epi8(static_cast<char>(flip));
    __m128i v[kQuad];
    unroll<kQuad>([&](auto r) QO_LAMBDA { v[r.value] = _mm_xor_si128(Simd::load128(row[r.value]), bits); });
    low01 = _mm_unpacklo_epi8(v[0], v[1]);
    high01 = _mm_unpackhi_epi8(v[0], v[1]);
    low23 = _mm_unpacklo_epi8(v[2], v[3]);
    high23 = _mm_unpackhi_epi8(v[2], v[3]);
  }
};

// The line of bytes: lanes of four rows.
struct Interleave {
  static constexpr int kBlocks = 1;
  static constexpr int64_t kLineBytes = 64;
  static constexpr uint32_t kOnes = 0x01010101;

  template <int>
  static QO_INLINE void interleave(const uint8_t* const (&row)[kQuad], uint8_t flip, uint8_t* to, int64_t) {
    const RowPairs p(row, flip);
    __m128i* q = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(q, _mm_unpacklo_epi16(p.low01, p.low23));
    _mm_storeu_si128(q + 1, _mm_unpackhi_epi16(p.low01, p.low23));
    _mm_storeu_si128(q + 2, _mm_unpacklo_epi16(p.high01, p.high23));
    _mm_storeu_si128(q + 3, _mm_unpackhi_epi16(p.high01, p.high23));
  }
};

// Without VNNI: a line of words, lanes of rows 0 and 1 of all sixteen channels before those of rows 2 and 3. vpmaddwd multiplies
// two and two exactly; every output pixel would have to widen bytes again.
struct PairsOfTaps {
  static constexpr int kBlocks = 1;
  static constexpr int64_t kLineBytes = 128;
  static constexpr uint32_t kOnes = 0x00010001;

  struct W {
    __m256i rows01, rows23;
  };

  template <int>
  static QO_INLINE void interleave(const uint8_t* const (&row)[kQuad], uint8_t flip, uint8_t* to, int64_t) {
    const RowPairs p(row, flip);
    __m256i* q = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(q, _mm256_cvtepu8_epi16(p.low01));
    _mm256_storeu_si256(q + 1, _mm256_cvtepu8_epi16(p.high01));
    _mm256_storeu_si256(q + 2, _mm256_cvtepu8_epi16(p.low23));
    _mm256_storeu_si256(q + 3, _mm256_cvtepu8_epi16(p.high23));
  }

  // Bytes kLow and kLow + 1 of each lane as words; byte -1 is 0.
  template <int kLow>
  static QO_INLINE __m256i words(__m256i lanes) {
    constexpr auto top = [](int lane, int byte) { return byte < 0 ? 0x80 : 4 * lane + byte; };
    constexpr auto pick = [top](int lane) { return top(lane, kLow) << 8 | top(lane, kLow + 1) << 24 | 0x00800080; };
    const __m128i tops = _mm_setr_epi32(pick(0), pick(1), pick(2), pick(3));  // the byte above a zero
    return _mm256_srai_epi16(_mm256_shuffle_epi8(lanes, _mm256_broadcastsi128_si256(tops)), 8);
  }
  template <int kShift>
  static QO_INLINE W weights(const int8_t* p) {
    const __m256i b = Simd::load_int(reinterpret_cast<const int32_t*>(p));
    return {words<-kShift>(b), words<2 - kShift>(b)};
  }
  static QO_INLINE Simd::I dot(Simd::I acc, const uint8_t* codes, const W& w) {
    const auto lanes = [&](int64_t at) QO_LAMBDA { return Simd::load_int(reinterpret_cast<const int32_t*>(codes + at)); };
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(lanes(0), w.rows01));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(lanes(64), w.rows23));
    asm volatile("" : "+x"(acc));  // or g++ moves the additions behind all products, whose sums it spills
    return acc;
  }
};

}  // namespace
}  // namespace quant_ops::QO_ISA
#endif

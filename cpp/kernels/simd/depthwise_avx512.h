// The Taps of depthwise.h by AVX-512: with VNNI (QuadsOfTaps) and without (PairsOfTaps).
#pragma once

#if defined(__x86_64__)
#include "kernels/simd/avx512.h"

#include "kernels/generic/unroll.h"

namespace quant_ops::QO_ISA {
namespace {

struct Interleave {
  static constexpr int kBlocks = 2;
  static constexpr int64_t kLineBytes = 64;
  static constexpr uint32_t kOnes = 0x01010101;

  // Dwords L of all rows into lane L (two rows lie in a vector), then a 4 x 4 transposition of bytes within each lane.
  template <int kBlocks>
  static QO_INLINE void interleave(const uint8_t* const (&row)[kQuad], uint8_t flip, uint8_t* to, int64_t block_stride) {
    const __m512i bits = _mm512_set1_epi8(static_cast<char>(flip));
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const auto store = [&](int64_t block, __m512i v)
                           QO_LAMBDA { _mm512_storeu_si512(to + block * block_stride, _mm512_shuffle_epi8(v, bytes)); };
    if constexpr (kBlocks == 1) {
      const __m256i v01 = _mm256_inserti128_si256(_mm256_castsi128_si256(Simd::load128(row[0])), Simd::load128(row[1]), 1);
      const __m256i v23 = _mm256_inserti128_si256(_mm256_castsi128_si256(Simd::load128(row[2])), Simd::load128(row[3]), 1);
      const __m512i v = _mm512_xor_si512(_mm512_inserti64x4(_mm512_castsi256_si512(v01), v23, 1), bits);
      const __m512i dwords = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      store(0, _mm512_permutexvar_epi32(dwords, v));
    } else {
      const auto two = [&](int r) QO_LAMBDA {
        const __m512i low = _mm512_castsi256_si512(Simd::load256(row[r]));
        return _mm512_xor_si512(_mm512_inserti64x4(low, Simd::load256(row[r + 1]), 1), bits);
      };
      const __m512i v01 = two(0), v23 = two(2);
      const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
      const __m512i high = _mm512_setr_epi32(4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
      store(0, _mm512_permutex2var_epi32(v01, low, v23));
      store(1, _mm512_permutex2var_epi32(v01, high, v23));
    }
  }
};

// Without VNNI: a line of words, lanes of rows 0 and 1 before those of rows 2 and 3. vpmaddwd multiplies two and two exactly; every
// output pixel would have to widen bytes again.
struct PairsOfTaps {
  static constexpr int kBlocks = 1;
  static constexpr int64_t kLineBytes = 128;
  static constexpr uint32_t kOnes = 0x00010001;

  struct W {
    __m512i rows01, rows23;
  };

  template <int>
  static QO_INLINE void interleave(const uint8_t* const (&row)[kQuad], uint8_t flip, uint8_t* to, int64_t) {
    const __m128i bits = _mm_set1_epi8(static_cast<char>(flip));
    const auto pairs = [&](int r, uint8_t* at) QO_LAMBDA {
      const __m128i a = _mm_xor_si128(Simd::load128(row[r]), bits), b = _mm_xor_si128(Simd::load128(row[r + 1]), bits);
      const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(a, b)), _mm_unpackhi_epi8(a, b), 1);
      _mm512_storeu_si512(at, _mm512_cvtepu8_epi16(both));
    };
    pairs(0, to);
    pairs(2, to + 64);
  }

  // Bytes kLow and kLow + 1 of each lane as words; byte -1 is 0.
  template <int kLow>
  static QO_INLINE __m512i words(__m512i lanes) {
    constexpr auto top = [](int lane, int byte) { return byte < 0 ? 0x80 : 4 * lane + byte; };
    constexpr auto pick = [top](int lane) { return top(lane, kLow) << 8 | top(lane, kLow + 1) << 24 | 0x00800080; };
    const __m128i tops = _mm_setr_epi32(pick(0), pick(1), pick(2), pick(3));  // the byte above a zero
    return _mm512_srai_epi16(_mm512_shuffle_epi8(lanes, _mm512_broadcast_i32x4(tops)), 8);
  }
  template <int kShift>
  static QO_INLINE W weights(const int8_t* p) {
    const __m512i b = _mm512_loadu_si512(p);
    return {words<-kShift>(b), words<2 - kShift>(b)};
  }
  static QO_INLINE Simd::I dot(Simd::I acc, const uint8_t* codes, const W& w) {
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_loadu_si512(codes), w.rows01));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_loadu_si512(codes + 64), w.rows23));
  }
};

struct QuadsOfTaps : Interleave {
  template <int kShift>
  static QO_INLINE __m512i weights(const int8_t* p) {
    return _mm512_slli_epi32(_mm512_loadu_si512(p), 8 * kShift);
  }
  static QO_INLINE __m512i dot(__m512i acc, const uint8_t* codes, __m512i w) {
    return _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(codes), w);
  }
};

}  // namespace
}  // namespace quant_ops::QO_ISA
#endif

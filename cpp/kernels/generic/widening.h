// The exact u8 x s8 product without VNNI, written once for AVX2 and AVX-512: bytes are widened to int16 and multiplied with
// vpmaddwd, never with vpmaddubsw, whose int16 sums saturate (255 * 127 * 2 > 32767). `Wide` gives
//   V load_weights(const int8_t*)       Simd::N / 2 columns of four k, widened
//   V broadcast(const uint16_t*)        one group of four k to every column
//   V multiply_add(V acc, V a, V b)     vpmaddwd and vpaddd: two partial sums a column; an asm barrier on the sum keeps g++ from
//                                       moving additions together, behind all products, which spills the accumulators
//   I columns(V low, V high)            the sums of Simd::N columns
//   void widen(const uint8_t* a, int64_t groups, uint32_t flip, uint16_t* wide)   the bytes, each four of them xor flip, widened;
//                                       reads 4 * groups bytes; may write up to kSlack elements more
//
// Widening an activation costs as much as a product, so it is done once for all columns of the panel, a chunk of k at a time, and
// not in the inner loop.
#pragma once

#include "kernels/generic/epilogue.h"

namespace quant_ops::QO_ISA {
namespace {

constexpr int64_t kChunk = 256;  // groups of k; a full tile of widened activations fits the L1 cache
constexpr int64_t kSlack = 32;   // elements that widen may write after its last group
constexpr int64_t kWideRow = kChunk * kQuad + kSlack;

// sum[r][0 .. kVectors * N) += the product of one chunk. The accumulators live in registers.
template <class Wide, int kRows, int kVectors>
QO_INLINE void widened_product(const uint16_t* wide, const int8_t* b, int64_t groups, int64_t b_stride, int32_t* sum) {
  typename Wide::V acc[kRows][kVectors][2];
  unroll<kRows>([&](auto r) QO_LAMBDA {
    unroll<kVectors>([&](auto v) QO_LAMBDA { acc[r.value][v.value][0] = acc[r.value][v.value][1] = Wide::zero(); });
  });
  for (int64_t g = 0; g < groups; ++g, wide += kQuad, b += b_stride) {
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      const auto low = Wide::load_weights(b + v.value * Simd::N * kQuad);
      const auto high = Wide::load_weights(b + v.value * Simd::N * kQuad + Simd::N * kQuad / 2);
      unroll<kRows>([&](auto r) QO_LAMBDA {
        const auto a = Wide::broadcast(wide + r.value * kWideRow);
        auto& pair = acc[r.value][v.value];
        pair[0] = Wide::multiply_add(pair[0], a, low);
        pair[1] = Wide::multiply_add(pair[1], a, high);
      });
    });
  }
  unroll<kRows>([&](auto r) QO_LAMBDA {
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      int32_t* to = sum + r.value * kPanel + v.value * Simd::N;
      Simd::store(to, Simd::add(Simd::load_int(to), Wide::columns(acc[r.value][v.value][0], acc[r.value][v.value][1])));
    });
  });
}

// The panel is swept kVectors * N columns at a time, its last columns N at a time.
template <class Wide, int kRows, int kVectors>
QO_INLINE void widened_tile(const GemmTile& t, int64_t width) {
  alignas(64) uint16_t wide[kRows * kWideRow];
  alignas(64) int32_t sum[kRows * kPanel];
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t n = 0; n < width; n += Simd::N) Simd::store(sum + r * kPanel + n, Simd::load_int(t.out.start + n));
  const int8_t* b = t.b;
  const int64_t* offset = t.a_offset;
  const int64_t b_stride = width * kQuad;
  int64_t k = 0;  // next group of the tap that `offset` points to; a chunk may span taps
  for (int64_t left = t.taps * t.quads; left > 0; left -= kChunk) {
    const int64_t groups = left < kChunk ? left : kChunk;
    for (int64_t done = 0; done < groups;) {
      const int64_t run = t.quads - k < groups - done ? t.quads - k : groups - done;
      for (int64_t r = 0; r < kRows; ++r) Wide::widen(t.a + offset[r] + k * kQuad, run, t.flip, wide + r * kWideRow + done * kQuad);
      done += run;
      k += run;
      if (k == t.quads) {
        k = 0;
        offset += kRows;
      }
    }
    int64_t n = 0;
    for (; n + kVectors * Simd::N <= width && n < t.out.columns; n += kVectors * Simd::N)
      widened_product<Wide, kRows, kVectors>(wide, b + n * kQuad, groups, b_stride, sum + n);
    if constexpr (kVectors > 1)
      for (; n < t.out.columns; n += Simd::N) widened_product<Wide, kRows, 1>(wide, b + n * kQuad, groups, b_stride, sum + n);
    b += groups * b_stride;
  }
  finish_sums(t.out, sum, kRows, kPanel);
}

}  // namespace
}  // namespace quant_ops::QO_ISA

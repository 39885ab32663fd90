// The product by NEON's dot instructions, which add four byte products to an int32 lane: written once for sdot and usdot. Lanes are
// output columns. The activation is the operand that is taken by lane, so one load of sixteen bytes serves four groups of k.
// `Dot` gives
//   A                                   sixteen activations in a register
//   A load16(const uint8_t*)            reads sixteen
//   A load4(const uint8_t*)             reads four, into lane 0
//   I offset(const int32_t* column_sum)  what is added to the products of four columns
//   I add<kLane>(I sum, int8x16_t b, A a), and without a lane: all of them, each with its own
#pragma once

#if defined(__aarch64__)
#include "kernels/simd/neon.h"

#include "kernels/generic/epilogue.h"

namespace quant_ops::QO_ISA {
namespace {

// A function of its own: inlined, its registers make g++ spill an accumulator in the loop.
template <int kRows, int kVectors>
__attribute__((noinline)) void finish_vectors(const TileOutput& o, const int32_t* sums) {
  finish_tile<kRows, kVectors>(
      o, [&](auto r, auto v) QO_LAMBDA { return Simd::load_int(sums + (r.value * kVectors + v.value) * Simd::N); });
}

// Columns [n, n + 4 * kVectors) of the panel.
template <class Dot, int kRows, int kVectors>
QO_INLINE void sweep(const GemmTile& t, int64_t n, int64_t b_stride) {
  Simd::I acc[kRows][kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    const int64_t column = n + v.value * Simd::N;
    const Simd::I start = vaddq_s32(Dot::offset(t.out.column_sum + column), Simd::load_int(t.out.start + column));
    unroll<kRows>([&](auto r) QO_LAMBDA { acc[r.value][v.value] = start; });
  });
  const int8_t* b = t.b + n * kQuad;
  const int64_t* offset = t.a_offset;
  const int64_t k_end = t.quads * kQuad;
  for (int64_t tap = 0; tap < t.taps; ++tap, offset += kRows) {
    const uint8_t* a[kRows];
    unroll<kRows>([&](auto r) QO_LAMBDA { a[r.value] = t.a + offset[r.value]; });
    int64_t k = 0;
    for (; k + 4 * kQuad <= k_end; k += 4 * kQuad) {
      typename Dot::A av[kRows];
      unroll<kRows>([&](auto r) QO_LAMBDA { av[r.value] = Dot::load16(a[r.value] + k); });
      unroll<4>([&](auto group) QO_LAMBDA {
        unroll<kVectors>([&](auto v) QO_LAMBDA {
          const int8x16_t bv = vld1q_s8(b + v.value * 16);
          unroll<kRows>([&](auto r) QO_LAMBDA {
            acc[r.value][v.value] = Dot::template add<group.value>(acc[r.value][v.value], bv, av[r.value]);
          });
        });
        b += b_stride;
      });
    }
    for (; k < k_end; k += kQuad, b += b_stride) {
      typename Dot::A av[kRows];
      unroll<kRows>([&](auto r) QO_LAMBDA { av[r.value] = Dot::load4(a[r.value] + k); });
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        const int8x16_t bv = vld1q_s8(b + v.value * 16);
        unroll<kRows>([&](auto r)
                          QO_LAMBDA { acc[r.value][v.value] = Dot::template add<0>(acc[r.value][v.value], bv, av[r.value]); });
      });
    }
  }
  int32_t sums[kRows * kVectors * Simd::N];
  unroll<kRows>([&](auto r) QO_LAMBDA {
    unroll<kVectors>([&](auto v)
                         QO_LAMBDA { Simd::store(sums + (r.value * kVectors + v.value) * Simd::N, acc[r.value][v.value]); });
  });
  finish_vectors<kRows, kVectors>(t.out.from_column(n), sums);
}

// 8 rows x 8 columns: 16 accumulators + 8 activations + 2 weights = 26 of 32 registers, and 64 products for 16 loads; with 6 x 16
// all 32 would be taken. Tiles of fewer rows are wider, so that enough sums are independent.
constexpr int64_t kRows = 8;
constexpr int vectors_of(int64_t rows) { return rows <= 2 ? 8 : rows <= 4 ? 4 : 2; }

template <class Dot, int kTileRows>
QO_INLINE void swept_tile(const GemmTile& t, int64_t width) {
  constexpr int kVectors = vectors_of(kTileRows);
  int64_t n = 0;
  for (; n + kVectors * Simd::N <= width && n < t.out.columns; n += kVectors * Simd::N)
    sweep<Dot, kTileRows, kVectors>(t, n, width * kQuad);
  if constexpr (kVectors > 4)
    for (; n < t.out.columns; n += kPanelStep) sweep<Dot, kTileRows, 4>(t, n, width * kQuad);
}

// The Dot of nibbles.h: signed bytes by sdot, since a nibble has no sign.
struct SignedDot {
  static QO_INLINE Simd::I add(Simd::I sum, const int8_t* a, const Simd::I (&w)[4]) {
    const int8x16_t av = vld1q_s8(a);
    unroll<4>([&](auto i) QO_LAMBDA { sum = vdotq_laneq_s32(sum, vreinterpretq_s8_s32(w[i.value]), av, i.value); });
    return sum;
  }
};

// 8 rows x 8 columns: 16 sums, 8 weights, an activation.
constexpr int64_t kNibbleRows = 8;

template <class Dot>
int64_t peak(int64_t iterations) {
  constexpr int kChains = 16;
  Simd::I acc[kChains];
  const int8x16_t b = vdupq_n_s8(5);
  const auto a = typename Dot::A(vdupq_n_s8(3));
  unroll<kChains>([&](auto c) QO_LAMBDA { acc[c.value] = vdupq_n_s32(0); });
  for (int64_t i = 0; i < iterations; ++i)
    unroll<kChains>([&](auto c) QO_LAMBDA {
      acc[c.value] = Dot::template add<0>(acc[c.value], b, a);
      asm volatile("" : "+w"(acc[c.value]));
    });
  return iterations * kChains * 16;
}

// The Taps of depthwise.h.
template <class Dot>
struct QuadsOfTaps {
  static constexpr int kBlocks = 1;
  static constexpr int64_t kLineBytes = 64;
  static constexpr uint32_t kOnes = 0x01010101;
  template <int>
  static QO_INLINE void interleave(const uint8_t* const (&row)[kQuad], uint8_t flip, uint8_t* to, int64_t) {
    uint8x16x4_t v;
    unroll<kQuad>([&](auto r) QO_LAMBDA { v.val[r.value] = veorq_u8(vld1q_u8(row[r.value]), vdupq_n_u8(flip)); });
    vst4q_u8(to, v);
  }
  template <int kShift>
  static QO_INLINE int8x16_t weights(const int8_t* p) {
    return vreinterpretq_s8_s32(vshlq_n_s32(vreinterpretq_s32_s8(vld1q_s8(p)), 8 * kShift));
  }
  static QO_INLINE Simd::I offset(const int32_t* column_sum) { return Dot::offset(column_sum); }
  static QO_INLINE Simd::I dot(Simd::I acc, const uint8_t* codes, int8x16_t w) { return Dot::add(acc, w, Dot::load16(codes)); }
};

}  // namespace
}  // namespace quant_ops::QO_ISA
#endif

// NEON kernels for processors with the dot product of Armv8.2 (Neoverse N1, Apple M1). Its sdot multiplies signed bytes,
// activations are unsigned: a - 128 is multiplied, and 128 * column_sum is added, which is exact modulo 2^32. column_sum goes over
// all taps. Tested under emulation, never timed on hardware.
#if defined(__aarch64__)
#define QO_ISA neon_dot
#define QO_SIMD "kernels/simd/neon.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#include "kernels/generic/depthwise.h"
#include "kernels/generic/nibbles.h"
#include "kernels/simd/dot_neon.h"

namespace quant_ops {
namespace neon_dot {
namespace {

struct Dot {
  using A = int8x16_t;
  static QO_INLINE A load16(const uint8_t* p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80))); }
  static QO_INLINE A load4(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return vreinterpretq_s8_u32(vdupq_n_u32(four ^ 0x80808080u));
  }
  static QO_INLINE Simd::I offset(const int32_t* column_sum) { return vshlq_n_s32(vld1q_s32(column_sum), 7); }
  template <int kLane>
  static QO_INLINE Simd::I add(Simd::I sum, int8x16_t b, A a) {
    return vdotq_laneq_s32(sum, b, a, kLane);
  }
  static QO_INLINE Simd::I add(Simd::I sum, int8x16_t b, A a) { return vdotq_s32(sum, b, a); }
};

template <int kTileRows>
void gemm_u8s8_8x8_neon_dot(const GemmTile& t, int64_t width) {
  swept_tile<Dot, kTileRows>(t, width);
}

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  with_rows<kRows>(rows, [&](auto r) QO_LAMBDA { gemm_u8s8_8x8_neon_dot<r.value>(tile, width); });
}

GemmShape gemm_shape(int64_t rows, int64_t width) {
  return swept_shape("neon_dot", rows, width, vectors_of(rows) * Simd::N, kPanelStep);
}

void nibbles(const NibbleTile& tile, int64_t rows) {
  with_rows<kNibbleRows>(rows, [&](auto r) QO_LAMBDA { nibble_tile<SignedDot, r.value, 2>(tile); });
}

}  // namespace
}  // namespace neon_dot

constinit const ProductKernels kNeonDotProducts = {
    .isa = "neon_dot",
    .gemm_rows = neon_dot::kRows,
    .slim_rows = neon_dot::kRows,
    .gemm = neon_dot::gemm,
    .gemm_shape = neon_dot::gemm_shape,
    .depthwise = neon_dot::depthwise<neon_dot::QuadsOfTaps<neon_dot::Dot>>,
    .nibble_rows = neon_dot::kNibbleRows,
    .nibbles = neon_dot::nibbles,
    .peak = neon_dot::peak<neon_dot::Dot>,
};

}  // namespace quant_ops
QO_TARGET_END
#endif

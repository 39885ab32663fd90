// NEON kernels for processors with the int8 extension of Armv8.6 (Neoverse V1 and N2, Apple M2): sudot multiplies signed weights by
// unsigned activations as they are, so nothing has to be corrected. Its matrix instructions (usmmla) want eight k of a column side
// by side, which the packed panel has not. Tested under emulation, never timed on hardware.
#if defined(__aarch64__)
#define QO_ISA neon_i8mm
#define QO_SIMD "kernels/simd/neon.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")
#include "kernels/generic/depthwise.h"
#include "kernels/generic/nibbles.h"
#include "kernels/simd/dot_neon.h"

namespace quant_ops {
namespace neon_i8mm {
namespace {

struct Dot {
  using A = uint8x16_t;
  static QO_INLINE A load16(const uint8_t* p) { return vld1q_u8(p); }
  static QO_INLINE A load4(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
  }
  static QO_INLINE Simd::I offset(const int32_t*) { return vdupq_n_s32(0); }
  template <int kLane>
  static QO_INLINE Simd::I add(Simd::I sum, int8x16_t b, A a) {
    return vsudotq_laneq_s32(sum, b, a, kLane);
  }
  static QO_INLINE Simd::I add(Simd::I sum, int8x16_t b, A a) { return vusdotq_s32(sum, a, b); }
};

template <int kTileRows>
void gemm_u8s8_8x8_neon_i8mm(const GemmTile& t, int64_t width) {
  swept_tile<Dot, kTileRows>(t, width);
}

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  with_rows<kRows>(rows, [&](auto r) QO_LAMBDA { gemm_u8s8_8x8_neon_i8mm<r.value>(tile, width); });
}

GemmShape gemm_shape(int64_t rows, int64_t width) {
  return swept_shape("neon_i8mm", rows, width, vectors_of(rows) * Simd::N, kPanelStep);
}

void nibbles(const NibbleTile& tile, int64_t rows) {
  with_rows<kNibbleRows>(rows, [&](auto r) QO_LAMBDA { nibble_tile<SignedDot, r.value, 2>(tile); });
}

}  // namespace
}  // namespace neon_i8mm

constinit const ProductKernels kNeonI8mmProducts = {
    .isa = "neon_i8mm",
    .gemm_rows = neon_i8mm::kRows,
    .slim_rows = neon_i8mm::kRows,
    .gemm = neon_i8mm::gemm,
    .gemm_shape = neon_i8mm::gemm_shape,
    .depthwise = neon_i8mm::depthwise<neon_i8mm::QuadsOfTaps<neon_i8mm::Dot>>,
    .nibble_rows = neon_i8mm::kNibbleRows,
    .nibbles = neon_i8mm::nibbles,
    .peak = neon_i8mm::peak<neon_i8mm::Dot>,
};

}  // namespace quant_ops
QO_TARGET_END
#endif

// Activations of the integer products as unsigned codes.
//
//   floating x   clamp(rne(x / scale) + zero_point, 0, 255)      int8 x   x + 128      uint8 x   x itself
//
// A signed code q becomes q + 128, its zero point z becomes z + 128, and the epilogue subtracts (z + 128) * column_sum. So one
// u8 x s8 product serves signed and unsigned, symmetric and asymmetric activations.
#pragma once

#include "contract/ops.h"
#include "kernels/table.h"

namespace quant_ops {

constexpr int32_t kSignedOffset = 128;

// Of no elements. It contains 0, as choose_qparams_of wants it.
constexpr Range kZeroRange{0.0f, 0.0f, 0};

// The n elements of x from element `offset` on are those of columns 0 to n - 1 where there is a multiplier, of which they then are
// the products.

// Folds the range of n contiguous elements from element `offset` of x into `range`: for symmetric codes the magnitude alone.
void find_range(const KernelTable& table, const InputParams& in, int64_t offset, int64_t n, Range* range);

// Scale and zero point of int8 codes for data of this range: symmetric ones are codes of [-127, 127].
QParams<float> dynamic_qparams(const Range& range, bool asymmetric);

// Scale and zero point of the unsigned codes of row (Linear) or sample (Conv2d) i: from `range` when dynamic, else as given.
QParams<float> code_qparams(const InputParams& in, int64_t i, const Range& range);

// n contiguous elements from element `offset` of x on, as unsigned codes.
void write_codes(const KernelTable& table, const InputParams& in, int64_t offset, int64_t n, const QParams<float>& qparams,
                 uint8_t* codes);

// Whether the GEMM can read the codes of quantized activations where they lie, and with which GemmTile::flip.
inline bool reads_in_place(const KernelTable& table, const InputParams& in) {
  return in.mode == InputMode::kQuantized && (in.dtype == DType::kUInt8 || table.flips);
}
inline uint32_t flip_of(const InputParams& in) { return in.dtype == DType::kInt8 ? 0x80808080u : 0u; }

}  // namespace quant_ops

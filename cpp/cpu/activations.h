// What the integer GEMM and the convolution share: activations to unsigned codes, and the columns' epilogue data.
#pragma once

#include "contract/dtypes.h"
#include "contract/ops.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"
#include "kernels/table.h"

namespace quant_ops {

// Activations are multiplied as unsigned bytes: a signed code q becomes q + 128, its zero point z becomes z + 128, and the epilogue
// subtracts (z + 128) * column_sum. So one u8 x s8 product serves signed and unsigned, symmetric and asymmetric activations.
constexpr int32_t kSignedOffset = 128;

// How one row (Linear) or sample (Conv2d) is turned into unsigned codes.
struct RowCodes {
  float scale;
  int32_t zero_point;  // of the unsigned codes
};

// The scale and zero point of row i: from the range of its data when dynamic, else as given.
RowCodes row_codes(const InputParams& in, int64_t i, const Range& range);

inline bool is_dynamic(const InputParams& in) {
  return in.mode == Activation::kDynamic || in.mode == Activation::kDynamicAsymmetric;
}

// Symmetric quantization asks for the largest magnitude alone.
inline bool only_magnitude(const InputParams& in) { return in.mode == Activation::kDynamic; }

// Rows of the next tile of `left`: full ones, except that the last two share what is left evenly, since narrow tiles are slow.
inline int64_t tile_rows(int64_t left, int64_t full) { return left <= full ? left : left < 2 * full ? (left + 1) / 2 : full; }

// The same of a panel; `narrow`: of at most kSlimColumns columns.
inline int64_t tile_rows(const KernelTable& table, int64_t left, bool narrow) {
  return narrow && left >= table.slim_rows ? table.slim_rows : tile_rows(left, table.gemm_rows);
}

// Whether the GEMM reads the codes of quantized activations where they lie, and with which flip.
inline bool reads_in_place(const KernelTable& table, const InputParams& in) {
  return in.mode == Activation::kQuantized && (in.dtype == DType::kUInt8 || table.flips);
}
inline uint32_t flip_of(const InputParams& in) { return in.dtype == DType::kInt8 ? 0x80808080u : 0u; }

// n contiguous elements starting at element `offset` of x, as unsigned codes.
void write_codes(const KernelTable& table, const InputParams& in, int64_t offset, int64_t n, const RowCodes& row, uint8_t* codes);

// TileOutput::bounded, whatever the sums are.
bool is_bounded(float out_scale, const float* row_scale, int64_t rows, const float* column_scale, const float* bias,
                int64_t columns);

// Per-column scale and bias with `padded_n` readable elements a group; the caller's own arrays where they are long enough.
class Columns {
 public:
  Columns(const OutputParams& out, const PackedLayout& layout, Scratch* scratch);
  void fill(const OutputParams& out, const PackedLayout& layout, const Scratch& scratch);
  TileOutput output(const OutputParams& out, const int32_t* column_sum, int64_t column) const;
  bool bounded(const OutputParams& out, const float* row_scale, int64_t rows) const {
    return dtype_bytes(out.dtype) == 1 && is_bounded(*out.out_scale, row_scale, rows, scale_, bias_, count_);
  }

 private:
  int64_t count_;
  int64_t scale_offset_ = -1, bias_offset_ = -1;
  const float* scale_ = nullptr;
  const float* bias_ = nullptr;
};

}  // namespace quant_ops

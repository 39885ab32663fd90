// Tiles of the integer products: how many rows they have, and the data of their columns that the epilogue reads.
#pragma once

#include <algorithm>

#include "cpu/pack.h"
#include "cpu/scratch.h"
#include "kernels/table.h"

namespace quant_ops {

// Rows of the next tile when `left` remain: full tiles; the last two split the remainder evenly because short tiles are slow.
inline int64_t tile_rows(int64_t left, int64_t full) { return left <= full ? left : left < 2 * full ? (left + 1) / 2 : full; }

// The same for a table; `slim`: the tile has at most kSlimColumns columns. Where an instruction takes many rows, two halves of what
// is left take longer than a full tile and a short one.
inline int64_t tile_rows(const KernelTable& table, int64_t left, bool slim) {
  if (slim && left >= table.slim_rows) return table.slim_rows;
  return table.row_step > 1 ? std::min(left, table.gemm_rows) : tile_rows(left, table.gemm_rows);
}

// The name of the kernel of the first tile of `rows` rows by a panel of `width` columns. The other tiles are like it, except where
// the rows or the columns end.
inline std::string first_tile_name(const KernelTable& table, int64_t rows, int64_t width) {
  return gemm_name(table, tile_rows(table, rows, width <= kSlimColumns), width);
}

// How the values of these rows and columns become codes; `function`: kNone, kRelu or kRelu6; `residual`: the largest magnitude that
// is added to one.
CodeOutput code_output(DType dtype, float scale, int32_t zero_point, Function function, const float* row_scale, int64_t rows,
                       const float* column_scale, const float* bias, int64_t columns, double residual = 0.0);

// Kernels read whole vectors of scales and biases, so every product needs padded_n of each. The caller's arrays serve where they
// are as long and step by 1, else copies.
struct ColumnsPlan {
  int64_t count;              // of all products
  int64_t scale_at, bias_at;  // copies in scratch; kNoCopy: the caller's array

  static constexpr int64_t kNoCopy = -1;
};
ColumnsPlan plan_columns(const OutputParams& out, const PackedLayout& layout, ScratchLayout* scratch);

class Columns {
 public:
  Columns(const ColumnsPlan& plan, const OutputParams& out, const PackedLayout& layout, const Scratch& scratch);

  // The epilogue of tiles that start at this column of all products' columns. Callers add `y`, the valid columns, the rows and the
  // codes, and where there is a residual set_residual. Refers to this object.
  TileOutput output(const OutputParams& out, const int32_t* column_sum, int64_t column) const;

  // TileOutput::codes for rows of these scales; of no use where the result has no codes.
  CodeOutput codes(const OutputParams& out, const float* row_scale, int64_t rows) const;

 private:
  int64_t count_;
  const float* scale_;
  const float* bias_;
  Function clamp_;  // kNone, kRelu or kRelu6
  TileExtras extras_;
  bool has_extras_;
};

// The residual of a tile whose first element is element `offset` of the result, or of a block that lies like it.
inline void set_residual(const OutputParams& out, const void* residual, int64_t offset, int64_t stride, TileOutput* tile) {
  tile->residual = static_cast<const char*>(residual) + offset * dtype_bytes(out.residual.dtype);
  tile->residual_stride = stride;
}

}  // namespace quant_ops

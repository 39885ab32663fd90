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

// Rows of the next call of `gemm` when `left` remain.
inline int64_t call_rows(const KernelTable& table, int64_t left, bool slim) {
  return table.call_rows > 0 ? std::min(left, table.call_rows) : tile_rows(table, left, slim);
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
  int64_t shared_at = 0;      // what Columns::share makes
  bool far = false;           // as in TileOutput

  static constexpr int64_t kNoCopy = -1;
};
constexpr int64_t kFarBytes = int64_t{1} << 20;  // of a result that does not stay in a cache near the core
// `rows` of the result; `shared`: how many times Columns::share is called for memory of its own.
ColumnsPlan plan_columns(const OutputParams& out, const PackedLayout& layout, int64_t rows, int64_t shared, ScratchLayout* scratch);

// The columns of products whose rows share one scale and one zero point, as TileOutput wants them: each array `count` elements.
struct SharedColumns {
  const int32_t* start;
  const float* scale;
  const float* steps_scale;
  const float* steps_bias;

  // Of a tile whose first column is this one.
  void give(int64_t column, TileOutput* tile) const {
    tile->shared = true;
    tile->start = start + column;
    tile->column_scale = scale + column;
    tile->steps_scale = steps_scale + column;
    tile->steps_bias = steps_bias + column;
  }
};
constexpr int64_t kSharedBytes = 16;  // of a column

// Makes them in `memory`, of kSharedBytes a column; `codes` where the result has none is read and without effect.
SharedColumns share_columns(int64_t count, const int32_t* column_sum, const float* column_scale, const float* bias, float row_scale,
                            int32_t row_zero, const CodeOutput& codes, void* memory);

class Columns {
 public:
  Columns(const ColumnsPlan& plan, const OutputParams& out, const PackedLayout& layout, const Scratch& scratch);

  // The epilogue of tiles that start at this column of all products' columns. Callers add `y`, the valid columns, the rows and the
  // codes, and where there is a residual set_residual. Refers to this object.
  TileOutput output(const OutputParams& out, const int32_t* column_sum, int64_t column) const;

  // TileOutput::codes for rows of these scales; of no use where the result has no codes.
  CodeOutput codes(const OutputParams& out, const float* row_scale, int64_t rows) const;

  // For rows that share this scale and zero point; number i of those that are held at a time. `column_sum` is that of all products.
  SharedColumns share(int64_t i, const int32_t* column_sum, float row_scale, int32_t row_zero, const CodeOutput& codes,
                      const Scratch& scratch) const;

 private:
  int64_t count_, shared_at_;
  bool far_;
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

// The plan of int8_linear: all that is chosen from shapes, dtypes and the kernel table before data is read. Read next: linear.cpp.
#pragma once

#include "cpu/columns.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"

namespace quant_ops {

enum class WeightSource : int32_t {
  kPacked,       // pack_weight's
  kPlain,        // read as it is, by KernelTable::dot: for a few rows, packing would cost more than the product
  kPackedOnUse,  // packed panel by panel, each worker into its own memory; a panel stays in the cache while all rows use it
};

struct LinearPlan {
  const KernelTable* table;
  int64_t threads;
  PackedLayout layout;
  WeightSource weight;
  bool in_place;        // the product reads the codes in x itself
  int64_t row_step;     // 0: all rows have one scale and one zero point
  bool shares;          // they are in the arrays over columns, which are made once for all tiles
  int64_t row_bytes;    // of the codes of a row in scratch
  int64_t code_stride;  // between rows of codes, in scratch or in x
  int64_t pass_rows;    // rows of a pass
  int64_t block_rows;   // rows that are multiplied by one panel before the next one is read
  // scratch: what is not needed has no bytes
  ColumnsPlan columns;
  int64_t panel_bytes;  // a worker's panel
  int64_t panels_at, codes_at, scale_at, zero_at;
  int64_t scratch_bytes;
};

LinearPlan plan_linear(const Int8LinearParams& p, const KernelTable& table, int64_t threads);
void run_linear(const LinearPlan& plan, const Int8LinearParams& p);

}  // namespace quant_ops

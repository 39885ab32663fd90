// One row to int8 codes with its scale and zero point: of quantize_rows.cpp and norm_quantize_rows.cpp.
#pragma once

#include "cpu/activations.h"

namespace quant_ops {

// Of contiguous elements `x`; the results are those of row `row` of p.
inline void quantize_row(const KernelTable& table, const QuantizeRowsParams& p, const void* x, DType dtype, int64_t row) {
  Range range = kZeroRange;
  table.range(x, dtype, p.columns, !p.asymmetric, &range);
  const QParams<float> qparams = dynamic_qparams(range, p.asymmetric);
  p.scale[row] = qparams.scale;
  p.zero_point[row] = qparams.zero_point;
  const float reciprocal = reciprocal_of(qparams.scale);
  QuantizeRun run;
  run.x = x;
  run.y = p.q + row * p.columns;
  run.n = p.columns;
  run.scale = p.scale + row;
  run.reciprocal = &reciprocal;
  run.tie = tie_for(255);
  run.zero_point = p.zero_point + row;
  run.scale_step = run.zero_step = 0;
  run.qmin = p.asymmetric ? -128 : -127;
  run.qmax = 127;
  run.x_dtype = dtype;
  run.y_dtype = DType::kInt8;
  run.simulate = false;
  table.quantize(run);
}

}  // namespace quant_ops

// quantize_rows on the CPU: scale and zero point of every row from its range, and its int8 codes; each row is read once from
// memory.
//
//   scale[m], zero_point[m] = choose_qparams_of(min, max of x[m]),  q[m,k] = clamp(rne(x[m,k] / scale[m]) + zero_point[m])
//
// The codes are those of int8_linear's dynamic activations (activations.h).
#include <algorithm>

#include "cpu/activations.h"
#include "cpu/parallel.h"
#include "kernels/log.h"

namespace quant_ops {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 16;

void quantize_row(const KernelTable& table, const QuantizeRowsParams& p, int64_t row) {
  const void* x = static_cast<const char*>(p.x) + row * p.x_stride * dtype_bytes(p.x_dtype);
  Range range = kZeroRange;
  table.range(x, p.x_dtype, p.columns, !p.asymmetric, &range);
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
  run.x_dtype = p.x_dtype;
  run.y_dtype = DType::kInt8;
  run.simulate = false;
  table.quantize(run);
}

}  // namespace

void quantize_rows_cpu(const QuantizeRowsParams& p) {
  log_entries({"range", "quantize"});
  const KernelTable& table = kernels();
  parallel_for(p.rows, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, p.columns)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) quantize_row(table, p, row);
  });
}

}  // namespace quant_ops

// norm_quantize_rows on the CPU: NormQuantizeRowsParams in ops.h has the arithmetic. A normalized row is in scratch while its range
// is taken and its codes are written, so that x is read once from memory.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/quantize_row.h"
#include "cpu/scratch.h"
#include "cpu/staging.h"
#include "kernels/log.h"

namespace quant_ops {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 15;

}  // namespace

void norm_quantize_rows_cpu(const NormQuantizeRowsParams& p) {
  log_entries({"normalize", "range", "quantize"});
  const KernelTable& table = kernels();
  const QuantizeRowsParams& rows = p.rows;
  const int64_t row_bytes = round_up(rows.columns, kSumLanes) * int64_t{sizeof(float)}, threads = parallel_threads();
  const Scratch scratch(threads * row_bytes);
  for_each_share(rows.rows, threads, rows.rows * rows.columns, kElementsPerThread, [&](int64_t worker, int64_t begin, int64_t end) {
    float* y = scratch.at<float>(worker * row_bytes);
    for (int64_t row = begin; row < end; ++row) {
      const void* residual = p.residual == nullptr ? nullptr : element(p.residual, rows.x_dtype, row * p.residual_stride);
      if (rows.columns > 0)
        table.normalize({.x = element(rows.x, rows.x_dtype, row * rows.x_stride),
                         .residual = residual,
                         .dtype = rows.x_dtype,
                         .n = rows.columns,
                         .weight = p.weight,
                         .bias = p.bias,
                         .eps = p.eps,
                         .rms = p.rms,
                         .y = y});
      quantize_row(table, rows, y, DType::kFloat32, row);
    }
  });
}

}  // namespace quant_ops

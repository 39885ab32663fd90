// quantize_rows on the CPU: scale and zero point of every row from its range, and its int8 codes; each row is read once from
// memory.
//
//   scale[m], zero_point[m] = choose_qparams_of(min, max of x[m]),  q[m,k] = clamp(rne(x[m,k] / scale[m]) + zero_point[m])
//
// The codes are those of int8_linear's dynamic activations (activations.h).
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/quantize_row.h"
#include "cpu/staging.h"
#include "kernels/log.h"

namespace quant_ops {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 16;

}  // namespace

void quantize_rows_cpu(const QuantizeRowsParams& p) {
  log_entries({"range", "quantize"});
  const KernelTable& table = kernels();
  parallel_for(p.rows, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, p.columns)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) quantize_row(table, p, element(p.x, p.x_dtype, row * p.x_stride), p.x_dtype, row);
  });
}

}  // namespace quant_ops

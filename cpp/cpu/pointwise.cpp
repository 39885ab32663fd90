// int8_add, int8_mul, requantize and int8_cat on the CPU: one pass over rows (PointwiseParams in ops.h), by
// kernels/generic/pointwise.h.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/staging.h"
#include "kernels/log.h"
#include "kernels/table.h"

namespace quant_ops {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 15;
constexpr int64_t kShortRow = 256;  // bytes of a row of the result; shorter ones are computed several at a time
constexpr int64_t kFactors = 4096;  // codes of a factor that are laid out for several rows

bool is_code(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kUInt8; }

PointwiseRun run_of(const PointwiseParams& p) {
  PointwiseRun run{};
  run.x_dtype = p.x_dtype;
  run.x_scale = p.x_scale ? *p.x_scale : 1.0f;
  run.x_zero_point = p.x_zero_point ? *p.x_zero_point : 0;
  run.residual_dtype = p.residual.dtype;
  run.residual_scale = p.residual.scale ? *p.residual.scale : 1.0f;
  run.residual_zero_point = p.residual.zero_point ? *p.residual.zero_point : 0;
  run.multiplies = p.multiplies;
  run.function = p.function;
  run.y_dtype = p.out.dtype;
  run.out_scale = p.out.scale ? *p.out.scale : 1.0f;
  run.out_zero_point = p.out.zero_point ? *p.out.zero_point : 0;
  return run;
}

// Whether every code becomes itself. With one scale for both, (q - zero) * scale / scale rounds to q - zero again, unless the
// product overflows or the scale is no number but 0.
bool keeps_codes(const PointwiseParams& p, const PointwiseRun& run) {
  const float magnitude = std::fabs(run.x_scale);
  return is_code(p.x_dtype) && p.x_dtype == p.out.dtype && p.residual.r == nullptr && p.function == Function::kNone &&
         run.x_scale == run.out_scale && run.x_zero_point == run.out_zero_point && magnitude > 0.0f && magnitude < 0x1p100f;
}

class PointwiseRows {
 public:
  explicit PointwiseRows(const PointwiseParams& p) : p_(p), run_(run_of(p)), copies_(keeps_codes(p, run_)), table_(kernels()) {}

  // n elements of rows that lie without gaps in y too.
  void contiguous(int64_t first, int64_t n) const { elements(first, n, element(p_.out.y, p_.out.dtype, first)); }

  void rows(int64_t begin, int64_t end) const {
    const int64_t bytes = p_.columns * dtype_bytes(p_.out.dtype);
    if (copies_ || bytes >= kShortRow) {
      for (int64_t row = begin; row < end; ++row) elements(row * p_.columns, p_.columns, y_row(row));
      return;
    }
    char buffer[16 * kShortRow];
    const int64_t together = 16 * kShortRow / bytes;
    for (int64_t row = begin; row < end; row += together) {
      const int64_t count = std::min(together, end - row);
      elements(row * p_.columns, count * p_.columns, buffer);
      for (int64_t i = 0; i < count; ++i) copy_bytes(y_row(row + i), buffer + i * bytes, bytes);
    }
  }

  // Rows of which several share a row of the factor, or whose columns share an element of it: as many elements of the factor as x
  // has are laid out for a call.
  void with_factor(int64_t begin, int64_t end) const {
    const char* const factor = static_cast<const char*>(p_.residual.r);
    const int64_t columns = p_.columns;
    char laid_out[kFactors];
    if (p_.factor_is_column) {
      for (int64_t row = begin; row < end; ++row) {
        std::memset(laid_out, factor[row / p_.shared_rows], static_cast<size_t>(std::min(columns, kFactors)));
        for (int64_t at = 0; at < columns; at += kFactors) multiply(row * columns + at, std::min(kFactors, columns - at), laid_out);
      }
      return;
    }
    const int64_t most = std::max<int64_t>(1, kFactors / columns);
    for (int64_t row = begin, stop; row < end; row = stop) {
      const char* const from = factor + row / p_.shared_rows * columns;
      stop = std::min(end, (row / p_.shared_rows + 1) * p_.shared_rows);
      const int64_t together = std::min(most, stop - row);
      if (together > 1)
        for (int64_t i = 0; i < together; ++i) copy_bytes(laid_out + i * columns, from, columns);
      for (int64_t at = row; at < stop; at += together)
        multiply(at * columns, std::min(together, stop - at) * columns, together > 1 ? laid_out : from);
    }
  }

 private:
  void multiply(int64_t first, int64_t n, const void* factors) const {
    PointwiseRun run = run_;
    run.n = n;
    run.x = element(p_.x, p_.x_dtype, first);
    run.residual = factors;
    run.y = element(p_.out.y, p_.out.dtype, first);
    table_.pointwise(run);
  }

  void* y_row(int64_t row) const { return element(p_.out.y, p_.out.dtype, row * p_.y_stride); }

  void elements(int64_t first, int64_t n, void* y) const {
    const void* const x = element(p_.x, p_.x_dtype, first);
    if (copies_) return copy_bytes(y, x, n);
    PointwiseRun run = run_;
    run.n = n;
    run.x = x;
    if (p_.residual.r != nullptr) run.residual = element(p_.residual.r, p_.residual.dtype, first);
    run.y = y;
    table_.pointwise(run);
  }

  const PointwiseParams& p_;
  const PointwiseRun run_;
  const bool copies_;
  const KernelTable& table_;
};

}  // namespace

void pointwise_cpu(const PointwiseParams& p) {
  log_entries({"pointwise"});
  const PointwiseRows pass(p);
  if (p.shares_factor()) {
    if (p.columns > 0)
      parallel_for(p.rows, ceil_div(kElementsPerThread, p.columns),
                   [&](int64_t begin, int64_t end) { pass.with_factor(begin, end); });
  } else if (p.rows <= 1 || p.y_stride == p.columns) {
    parallel_for(p.rows * p.columns, kElementsPerThread, [&](int64_t begin, int64_t end) { pass.contiguous(begin, end - begin); });
  } else if (p.columns > 0) {
    parallel_for(p.rows, ceil_div(kElementsPerThread, p.columns), [&](int64_t begin, int64_t end) { pass.rows(begin, end); });
  }
}

}  // namespace quant_ops

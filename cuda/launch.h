// Entry points of the CUDA kernels; the structs and formulas are those of ops.h. All work goes to `stream` (a cudaStream_t) of the
// current device, nothing waits for it. Errors of a launch are thrown as std::runtime_error. Read next: quantize.cu.
#pragma once

#include "ops.h"

namespace quant_ops {

// ---- quantize family ------------------------------------------------------------------------------------------------

// In all of it a null zero_point is 0.
void quantize_cuda(const QuantizeParams& p, void* stream);
void dequantize_cuda(const DequantizeParams& p, void* stream);

// `workspace` holds quantize_backward_workspace(p) doubles.
int64_t quantize_backward_workspace(const QuantizeBackwardParams& p);
void quantize_backward_cuda(const QuantizeBackwardParams& p, double* workspace, void* stream);

// n contiguous zero points to int32: floating ones by round_zero_point, integers saturating. is_int64: DType has no name for it.
void zero_points_cuda(const void* from, DType dtype, bool is_int64, int32_t* to, int64_t n, int64_t qmin, int64_t qmax,
                      void* stream);

// `workspace` holds choose_qparams_workspace(p) doubles.
int64_t choose_qparams_workspace(const ChooseQParams& p);
void choose_qparams_cuda(const ChooseQParams& p, double* workspace, void* stream);

// Scale (and zero point) from each row's data, as int8_linear does on the CPU. Codes are signed: [-127, 127] symmetric, [-128, 127]
// asymmetric.
struct RowQuantParams {
  int64_t rows, columns;
  const void* x;
  DType x_dtype;
  int64_t x_stride;
  int8_t* q;
  int64_t q_stride;  // >= columns; the rest of each row is filled with zeros
  float* scale;
  int32_t* zero_point;  // null: symmetric
};
void quantize_rows_cuda(const RowQuantParams& p, void* stream);
void quantize_rows_cuda(const QuantizeRowsParams& p, void* stream);

}  // namespace quant_ops

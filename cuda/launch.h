// Entry points of the CUDA kernels; the structs and formulas are those of ops.h. All work goes to `stream` (a cudaStream_t) of the
// current device, nothing waits for it. Errors of a launch are thrown as std::runtime_error. Read next: quantize.cu.
#pragma once

#include "ops.h"

namespace quant_ops {

void quantize_cuda(const QuantizeParams& p, void* stream);
void dequantize_cuda(const DequantizeParams& p, void* stream);

// `workspace` holds quantize_backward_workspace(p) doubles.
int64_t quantize_backward_workspace(const QuantizeBackwardParams& p);
void quantize_backward_cuda(const QuantizeBackwardParams& p, double* workspace, void* stream);

// n contiguous zero points to int32: floating ones by round_zero_point, integers saturating. is_int64: DType has no name for it.
void zero_points_cuda(const void* from, DType dtype, bool is_int64, int32_t* to, int64_t n, int64_t qmin, int64_t qmax,
                      void* stream);

}  // namespace quant_ops

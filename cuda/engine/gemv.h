// Integer products of up to eight rows (gemv.cu), floating rows quantized on the way. Plain host code.
#pragma once

#include "engine/problem.h"

namespace quant_ops {

// Rows to quantize by their data, in place of IgemmProblem's a, row_scale and row_zero.
struct FloatingRows {
  const void* x;
  DType dtype;
  int64_t stride, columns;
  bool asymmetric;
};

// Whether gemv_cuda is to quantize the rows of p, too.
bool gemv_quantizes(const char* op, const IgemmProblem& p, const FloatingRows& rows);

// p.M <= kGemvRows; gemv_shared_bytes(p.K) fit. rows: null, or the floating rows.
void gemv_cuda(const char* op, const IgemmProblem& p, const FloatingRows* rows, void* stream);

}  // namespace quant_ops

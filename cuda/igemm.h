// The integer GEMM that every CUDA engine computes: y[M,N] = max(floor, fma(row_scale * column_scale,
// float(acc - row_zero * column_sum), bias)), acc = a[M,K] b[N,K]^T. Strides are in elements, K is contiguous. Read next:
// sm90/sm90.h.
#pragma once

#include "ops.h"

namespace quant_ops {

struct IgemmProblem {
  int64_t M, N, K;
  const int8_t* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t b_stride;
  const float* row_scale;
  int64_t row_step;
  const int32_t* row_zero;  // null: none
  const float* column_scale;
  int64_t column_step;
  const int32_t* column_sum;  // null when row_zero is
  const float* bias;          // null: none
  float floor;                // 0: ReLU, -inf
  void* y;
  int64_t y_stride;
  DType y_dtype;
  float out_scale;
  int32_t out_zero_point;
};

}  // namespace quant_ops

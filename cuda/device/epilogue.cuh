// From int32 sums to results: zero-point correction, scales, bias, ReLU, conversion, and where a result lies. Device code that
// every integer kernel of this folder ends in; the same bits as the CPU's. Read next: portable.cuh.
#pragma once

#include "device/common.cuh"
#include "engine/problem.h"

namespace quant_ops {

// Four neighbouring columns of a row are finished at once.
constexpr int kFour = 4;

// Row m belongs to sample m / rows: of a convolution, whose rows are pixels. Of a GEMM every row is a sample.
struct Epilogue {
  const float* row_scale;
  const int32_t* row_zero;  // null: none
  int64_t row_step;         // per sample
  const float* column_scale;
  int64_t column_step;
  const int32_t* column_sum;  // null when row_zero is
  const float* bias;
  float floor;
  void* y;
  DType dtype;
  FastDiv rows = FastDiv(1);
  int64_t y_sample, y_row, y_column;
  bool vectors;  // results of four neighbouring columns are one aligned vector
  const float* out_scale;
  const int32_t* out_zero_point;
};

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kInt8 || dtype == DType::kUInt8 ? 1 : dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 2 : 4;
}

// Whether vectors of four columns are aligned; first columns of groups are multiples of `columns`.
inline bool whole_vectors(const Epilogue& e, int64_t columns) {
  return e.y_column == 1 && columns % kFour == 0 && e.y_row % kFour == 0 && e.y_sample % kFour == 0 &&
         is_aligned(e.y, kFour * bytes_of(e.dtype));
}

inline Epilogue epilogue_of(const IgemmProblem& p) {
  Epilogue e{p.row_scale, p.row_zero, p.row_step, p.column_scale, p.column_step,   p.column_sum,
             p.bias,      p.floor,    p.y,        p.y_dtype,      FastDiv(1),      p.y_stride,
             0,           1,          false,      p.out_scale,    p.out_zero_point};
  e.vectors = whole_vectors(e, p.N);
  return e;
}

struct RowParams {
  float scale;
  int32_t zero;
  int64_t offset;  // of the row in y
};

__device__ __forceinline__ RowParams row_params(const Epilogue& e, int64_t m) {
  const int64_t sample = e.rows.quotient(m);
  RowParams row;
  row.scale = e.dtype == DType::kInt32 ? 1.0f : e.row_scale[sample * e.row_step];
  row.zero = e.row_zero != nullptr ? e.row_zero[sample * e.row_step] : 0;
  row.offset = sample * e.y_sample + (m - sample * e.rows.divisor) * e.y_row;
  return row;
}

struct ColumnParams {
  float scale[kFour], bias[kFour];
  int32_t sum[kFour];
};

// Columns n .. n + 3, of which `count` exist.
__device__ __forceinline__ ColumnParams column_params(const Epilogue& e, int64_t n, int count) {
  ColumnParams c;
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const bool exists = i < count && e.dtype != DType::kInt32;
    c.scale[i] = exists ? e.column_scale[(n + i) * e.column_step] : 0.0f;
    c.bias[i] = exists && e.bias != nullptr ? e.bias[n + i] : -0.0f;  // adding -0 changes nothing
    c.sum[i] = i < count && e.column_sum != nullptr ? e.column_sum[n + i] : 0;
  }
  return c;
}

__device__ __forceinline__ int32_t requantized(float y, float scale, int32_t zero_point, int32_t qmin, int32_t qmax) {
  const float lo = static_cast<float>(qmin - zero_point), hi = static_cast<float>(qmax - zero_point);
  return static_cast<int32_t>(steps_to_code(clamp_steps(quantize_steps(y, scale), lo, hi), zero_point, qmin, qmax));
}

template <class Y>
__device__ __forceinline__ void store_four(const Epilogue& e, int64_t offset, int count, const Y (&values)[kFour]) {
  Y* y = static_cast<Y*>(e.y) + offset;
  if (e.vectors && count == kFour) {
    store_vector<kFour>(y, values);
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i)
      if (i < count) y[i * e.y_column] = values[i];
  }
}

template <class Y>
__device__ __forceinline__ void convert_and_store(const Epilogue& e, int64_t offset, int count, const float (&y)[kFour]) {
  Y values[kFour];
  if constexpr (sizeof(Y) == 1) {
    constexpr int32_t qmin = Y(-1) < Y(0) ? -128 : 0;
    const float scale = *e.out_scale;
    const int32_t zero_point = e.out_zero_point != nullptr ? *e.out_zero_point : 0;
#pragma unroll
    for (int i = 0; i < kFour; ++i) values[i] = static_cast<Y>(requantized(y[i], scale, zero_point, qmin, qmin + 255));
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i) values[i] = rounded_to<Y>(y[i]);
  }
  store_four(e, offset, count, values);
}

// Sums of columns n .. n + 3 of a row, of which `count` exist, to y.
__device__ __forceinline__ void finish_four(const Epilogue& e, const RowParams& row, const ColumnParams& columns, int64_t n,
                                            int count, int32_t (&sums)[kFour]) {
#pragma unroll
  for (int i = 0; i < kFour; ++i)  // modulo 2^32
    sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) -
                                   static_cast<uint32_t>(row.zero) * static_cast<uint32_t>(columns.sum[i]));
  const int64_t offset = row.offset + n * e.y_column;
  if (e.dtype == DType::kInt32) return store_four(e, offset, count, sums);
  float y[kFour];
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    y[i] = epilogue(sums[i], row.scale, columns.scale[i], columns.bias[i], false);
    y[i] = y[i] < e.floor ? e.floor : y[i];
  }
  switch (e.dtype) {
    case DType::kFloat32: return convert_and_store<float>(e, offset, count, y);
    case DType::kFloat16: return convert_and_store<Half>(e, offset, count, y);
    case DType::kBFloat16: return convert_and_store<BFloat16>(e, offset, count, y);
    case DType::kInt8: return convert_and_store<int8_t>(e, offset, count, y);
    default: return convert_and_store<uint8_t>(e, offset, count, y);
  }
}

}  // namespace quant_ops

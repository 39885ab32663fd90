// From int32 sums to results: zero-point correction, scales, bias, ReLU, conversion, and the place of a result in y. Every integer
// kernel but the Hopper engine's ends in this device code. Its bits are those of the CPU. Read next: portable.cuh.
#pragma once

#include "device/common.cuh"
#include "engine/problem.h"

namespace quant_ops {

// A thread finishes this many neighbouring columns of a row at once.
constexpr int kFour = 4;

// Members are those of IgemmProblem. Row m belongs to sample m / rows: in a convolution rows are pixels, in a GEMM every row is a
// sample.
struct Epilogue {
  const float* row_scale = nullptr;
  const int32_t* row_zero = nullptr;
  int64_t row_step = 0;  // per sample
  const float* column_scale = nullptr;
  int64_t column_step = 0;
  const int32_t* column_sum = nullptr;
  const float* bias = nullptr;
  float floor = 0.0f;
  void* y = nullptr;
  DType dtype = DType::kFloat32;
  FastDiv rows = FastDiv(1);
  int64_t y_sample = 0, y_row = 0, y_column = 0;  // strides
  bool vectors = false;                           // results of four neighbouring columns are one aligned vector
  const float* out_scale = nullptr;
  const int32_t* out_zero_point = nullptr;
};

// Whether vectors of four columns are aligned. Groups start at multiples of `columns`.
inline bool whole_vectors(const Epilogue& e, int64_t columns) {
  return e.y_column == 1 && columns % kFour == 0 && e.y_row % kFour == 0 && e.y_sample % kFour == 0 &&
         is_aligned(e.y, kFour * dtype_bytes(e.dtype));
}

inline Epilogue epilogue_of(const IgemmProblem& p) {
  Epilogue e{.row_scale = p.row_scale,
             .row_zero = p.row_zero,
             .row_step = p.row_step,
             .column_scale = p.column_scale,
             .column_step = p.column_step,
             .column_sum = p.column_sum,
             .bias = p.bias,
             .floor = p.floor,
             .y = p.y,
             .dtype = p.y_dtype,
             .y_sample = p.y_stride,
             .y_column = 1,
             .out_scale = p.out_scale,
             .out_zero_point = p.out_zero_point};
  e.vectors = whole_vectors(e, p.N);
  return e;
}

struct OutputRow {
  float scale;
  int32_t zero;
  int64_t offset;  // of the row in y
};

__device__ __forceinline__ OutputRow output_row(const Epilogue& e, int64_t m) {
  const int64_t sample = e.rows.quotient(m);
  OutputRow row;
  row.scale = e.dtype == DType::kInt32 ? 1.0f : e.row_scale[sample * e.row_step];
  row.zero = e.row_zero != nullptr ? e.row_zero[sample * e.row_step] : 0;
  row.offset = sample * e.y_sample + (m - sample * e.rows.divisor) * e.y_row;
  return row;
}

struct OutputColumns {
  float scale[kFour], bias[kFour];
  int32_t sum[kFour];
};

// What the epilogue reads for columns n .. n + 3, of which `count` exist.
__device__ __forceinline__ OutputColumns output_columns(const Epilogue& e, int64_t n, int count) {
  OutputColumns c;
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

// Writes the results of columns n .. n + 3 of a row, of which `count` exist, from their sums.
__device__ __forceinline__ void finish_four(const Epilogue& e, const OutputRow& row, const OutputColumns& columns, int64_t n,
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

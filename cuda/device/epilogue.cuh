// From int32 sums to results: zero-point correction, scales, bias, ReLU, conversion, and the place of a result in y. Every integer
// kernel but the Hopper engine's ends in this device code. Its bits are those of the CPU. Read next: portable.cuh.
#pragma once

#include "device/common.cuh"
#include "engine/problem.h"

namespace quant_ops {

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

// What the epilogue reads for some columns of a row.
template <int kCount>
struct OutputColumns {
  float scale[kCount], bias[kCount];
  int32_t sum[kCount];
};

// Columns n .. n + kCount - 1, of which `count` exist.
template <int kCount = kFour>
__device__ __forceinline__ OutputColumns<kCount> output_columns(const Epilogue& e, int64_t n, int count) {
  OutputColumns<kCount> c;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool exists = i < count && e.dtype != DType::kInt32;
    c.scale[i] = exists ? e.column_scale[(n + i) * e.column_step] : 0.0f;
    c.bias[i] = exists && e.bias != nullptr ? e.bias[n + i] : -0.0f;  // adding -0 changes nothing
    c.sum[i] = i < count && e.column_sum != nullptr ? e.column_sum[n + i] : 0;
  }
  return c;
}

// Of results that are codes; anything else for others.
struct OutputCodes {
  float scale;
  int32_t zero_point;
};
__device__ __forceinline__ OutputCodes output_codes(const Epilogue& e) {
  if (e.out_scale == nullptr) return {1.0f, 0};
  return {*e.out_scale, e.out_zero_point != nullptr ? *e.out_zero_point : 0};
}

__device__ __forceinline__ int32_t requantized(float y, float scale, int32_t zero_point, int32_t qmin, int32_t qmax) {
  const float lo = static_cast<float>(qmin - zero_point), hi = static_cast<float>(qmax - zero_point);
  return static_cast<int32_t>(steps_to_code(clamp_steps(quantize_steps(y, scale), lo, hi), zero_point, qmin, qmax));
}

template <class Y, int kCount>
__device__ __forceinline__ void store_columns(const Epilogue& e, int64_t offset, int count, const Y (&values)[kCount]) {
  Y* y = static_cast<Y*>(e.y) + offset;
  if (e.vectors && count == kCount) {
    store_vector<kCount>(y, values);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < count) y[i * e.y_column] = values[i];
  }
}

// The result of type Y from a sum.
template <class Y>
__device__ __forceinline__ Y result(const Epilogue& e, const OutputRow& row, float scale, float bias, int32_t column_sum,
                                    const OutputCodes& codes, int32_t sum) {
  const int32_t corrected = static_cast<int32_t>(
      static_cast<uint32_t>(sum) - static_cast<uint32_t>(row.zero) * static_cast<uint32_t>(column_sum));  // modulo 2^32
  if constexpr (std::is_same_v<Y, int32_t>) {
    return corrected;
  } else {
    float y = epilogue(corrected, row.scale, scale, bias);
    y = y < e.floor ? e.floor : y;
    if constexpr (sizeof(Y) == 1) {
      constexpr int32_t qmin = Y(-1) < Y(0) ? -128 : 0;
      return static_cast<Y>(requantized(y, codes.scale, codes.zero_point, qmin, qmin + 255));
    } else {
      return rounded_to<Y>(y);
    }
  }
}

// Writes the results of columns n .. n + kCount - 1 of a row, of which `count` exist, from their sums. Y is the type of e.dtype.
template <class Y, int kCount>
__device__ __forceinline__ void finish(const Epilogue& e, const OutputRow& row, const OutputColumns<kCount>& columns, int64_t n,
                                       int count, const OutputCodes& codes, const int32_t (&sums)[kCount]) {
  Y values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = result<Y>(e, row, columns.scale[i], columns.bias[i], columns.sum[i], codes, sums[i]);
  store_columns(e, row.offset + n * e.y_column, count, values);
}

// The same without a branch, so that the compiler interleaves several calls; `count` may be larger or negative. kVectors: either
// all columns exist, which are one aligned vector, or none.
template <class Y, bool kVectors, int kCount>
__device__ __forceinline__ void finish_straight(const Epilogue& e, const OutputRow& row, const OutputColumns<kCount>& columns,
                                                int64_t n, int count, const OutputCodes& codes, const int32_t (&sums)[kCount]) {
  Y values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = result<Y>(e, row, columns.scale[i], columns.bias[i], columns.sum[i], codes, sums[i]);
  Y* const y = static_cast<Y*>(e.y) + row.offset + (kVectors ? n : n * e.y_column);
  if constexpr (kVectors) {
    if (count > 0) store_vector<kCount>(y, values);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < count) y[i * e.y_column] = values[i];
  }
}

// Calls use(static_cast<Y*>(nullptr)) for the type Y of results.
template <class Use>
__device__ __forceinline__ void with_output_type(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kInt32: return use(static_cast<int32_t*>(nullptr));
    case DType::kFloat32: return use(static_cast<float*>(nullptr));
    case DType::kFloat16: return use(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return use(static_cast<BFloat16*>(nullptr));
    case DType::kInt8: return use(static_cast<int8_t*>(nullptr));
    default: return use(static_cast<uint8_t*>(nullptr));
  }
}

__device__ __forceinline__ void finish_four(const Epilogue& e, const OutputRow& row, const OutputColumns<kFour>& columns, int64_t n,
                                            int count, int32_t (&sums)[kFour]) {
  with_output_type(e.dtype, [&](auto* type) {
    finish<std::remove_pointer_t<decltype(type)>>(e, row, columns, n, count, output_codes(e), sums);
  });
}

}  // namespace quant_ops

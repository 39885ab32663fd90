// weight_only_embedding: checks, allocation, WeightOnlyEmbeddingParams. `Backend` supplies, beside what weight_only.h asks for,
//   weight_only_embedding(params, indices)
//   expect_indices(op, indices, rows)   each in [0, rows), where they can be looked at
#pragma once

#include "torch/weight_only.h"

namespace quant_ops {

template <class Backend>
Tensor weight_only_embedding(const Tensor& indices, const Tensor& weight, const Tensor& weight_scale,
                             const std::optional<Tensor>& weight_zero_point, int64_t bits, int64_t group_size,
                             const std::optional<Tensor>& packed_weight, ScalarType out_dtype) {
  const char* op = "weight_only_embedding";
  QO_EXPECT_DTYPE(is_one_of(indices.scalar_type(), {ScalarType::Int, ScalarType::Long}), op,
                  "indices.dtype in (int32, int64), got ", dtype_name(indices.scalar_type()));
  expect_int8(op, "weight", weight);
  const WeightOnlyShape w = weight_only_shape(op, sizes_of(weight), bits, group_size);
  QO_EXPECT_DTYPE(is_one_of(out_dtype, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "out_dtype in (float32, float16, bfloat16), got ", dtype_name(out_dtype));
  Ints shape = sizes_of(indices);
  expect_elements(op, "indices", shape);
  shape.push_back(w.k);
  expect_elements(op, "a result", shape);

  Holder holder;
  WeightOnlyEmbeddingParams p{.M = indices.numel(), .N = w.n, .K = w.k, .group = w.group, .bits = w.bits};
  QO_EXPECT_INDEX(p.N > 0 || p.M == 0, op, "no indices of a weight without rows, got ", p.M);
  take_groups<Backend>(op, weight_scale, weight_zero_point, w, indices, &holder, &p);
  Tensor plain = weight;
  if (packed_weight) {
    expect_packed_weight_only<Backend>(op, *packed_weight, w, indices);
    p.packed = packed_weight->const_data_ptr<int8_t>();
  } else {
    expect_device(op, "weight", weight, indices);
    if (bits == 4) Backend::expect_between(op, "codes of four bits", weight, -8, 7);
    plain = as_rows(weight, &p.weight_stride);
    p.weight = plain.const_data_ptr<int8_t>();
  }
  Backend::expect_indices(op, indices, p.N);
  const Tensor index = as_contiguous(indices);
  p.index = index.const_data_ptr();
  p.index_is_int64 = index.scalar_type() == ScalarType::Long;
  Tensor y = empty(shape, out_dtype, indices);
  p.y = y.mutable_data_ptr();
  p.y_dtype = to_dtype(out_dtype);
  Backend::weight_only_embedding(p, indices);
  return y;
}

}  // namespace quant_ops

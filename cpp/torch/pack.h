// pack_weight, unpack_weight and transpose_packed_weight: checks and allocation. `Backend` supplies packed_bytes(shape) and
// pack(weight, shape, packed), and on the CPU unpack(packed, shape, weight) and transpose(packed, shape, transposed). Read next:
// cpu/pack.h and contract/cuda_weights.h for the layouts.
#pragma once

#include "torch/int8.h"

namespace quant_ops {

// Without output channels any number of groups divides them.
template <class Sizes>
void expect_weight_size(const char* op, const Sizes& shape, int64_t groups) {
  expect_elements(op, "weight", shape);
  QO_EXPECT(groups <= kMostElements, op, "groups <= 2^45, got ", groups);
}

template <class Backend>
Tensor pack_weight(const Tensor& weight, int64_t groups) {
  const char* op = "pack_weight";
  expect_int8(op, "weight", weight);
  QO_EXPECT(weight.dim() == 2 || weight.dim() == 4, op, "weight.shape (N, K) or (O, C/groups, R, S), got ", shape_text(weight));
  QO_EXPECT(groups >= 1 && weight.size(0) % groups == 0 && (groups == 1 || weight.dim() == 4), op,
            "groups to divide the output channels of a convolution, got groups ", groups, " and weight.shape ", shape_text(weight));
  expect_weight_size(op, weight.sizes(), groups);
  const Tensor plain = as_contiguous(weight);
  const WeightShape shape = weight_shape(weight.sizes(), groups);
  Tensor packed = empty({Backend::packed_bytes(shape)}, ScalarType::Char, weight);
  Backend::pack(plain, shape, packed);
  return packed;
}

template <class Backend>
Tensor unpack_weight(const Tensor& packed_weight, const Ints& shape, int64_t groups) {
  const char* op = "unpack_weight";
  expect_int8(op, "packed_weight", packed_weight);
  const bool conv = shape.size() == 4;
  QO_EXPECT(shape.size() == 2 || conv, op, "shape (N, K) or (O, C/groups, R, S), got ", shape_text(shape));
  for (int64_t size : shape) QO_EXPECT(size >= 0, op, "sizes >= 0, got shape ", shape_text(shape));
  QO_EXPECT(groups >= 1 && shape[0] % groups == 0 && (groups == 1 || conv), op,
            "groups to divide the output channels of a convolution, got groups ", groups, " and shape ", shape_text(shape));
  expect_weight_size(op, shape, groups);
  const WeightShape of = weight_shape(shape, groups);
  QO_EXPECT(packed_weight.is_contiguous() && Backend::is_packed_for(packed_weight, of), op,
            "packed_weight made by pack_weight from a weight of this shape, got another one");
  Tensor weight = empty(shape, ScalarType::Char, packed_weight);
  Backend::unpack(packed_weight, of, weight);
  return weight;
}

template <class Backend>
Tensor transpose_packed_weight(const Tensor& packed_weight, const Ints& shape) {
  const char* op = "transpose_packed_weight";
  expect_int8(op, "packed_weight", packed_weight);
  QO_EXPECT(shape.size() == 2, op, "shape (N, K), got ", shape_text(shape));
  for (int64_t size : shape) QO_EXPECT(size >= 0, op, "sizes >= 0, got shape ", shape_text(shape));
  expect_weight_size(op, shape, 1);
  const WeightShape of = weight_shape(shape, 1), transposed_of = weight_shape(Ints{shape[1], shape[0]}, 1);
  QO_EXPECT(packed_weight.is_contiguous() && Backend::is_packed_for(packed_weight, of), op,
            "packed_weight made by pack_weight from a weight of this shape, got another one");
  Tensor transposed = empty({Backend::packed_bytes(transposed_of)}, ScalarType::Char, packed_weight);
  Backend::transpose(packed_weight, of, transposed_of, transposed);
  return transposed;
}

}  // namespace quant_ops

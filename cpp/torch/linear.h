// int8_gemm and int8_linear for any device: checks, allocation, Int8LinearParams. `Backend` supplies linear(op, params, x) and
// one(), the scale of a weight that has none. The formula is in contract/ops.h, what convolutions share in int8.h. Read next:
// cpu/linear.cpp.
#pragma once

#include "torch/int8.h"

namespace quant_ops {

template <class Backend>
Tensor int8_gemm(const Tensor& a, const Tensor& b) {
  const char* op = "int8_gemm";
  QO_EXPECT_DTYPE(is_one_of(a.scalar_type(), {ScalarType::Char, ScalarType::Byte}), op, "a.dtype in (int8, uint8), got ",
                  dtype_name(a.scalar_type()));
  expect_int8(op, "b", b);
  expect_device(op, "b", b, a);
  QO_EXPECT(a.dim() == 2 && b.dim() == 2, op, "a.shape (M, K) and b.shape (N, K), got ", shape_text(a), " and ", shape_text(b));
  QO_EXPECT(a.size(1) == b.size(1), op, "a.shape[1] == b.shape[1], got ", a.size(1), " and ", b.size(1),
            ". b is [N, K], as nn.Linear keeps its weight.");
  expect_exact(op, "K", a.size(1), a.scalar_type() == ScalarType::Byte);
  expect_elements(op, "a", a.sizes());
  expect_elements(op, "b", b.sizes());
  expect_elements(op, "a result", {a.size(0), b.size(0)});

  Holder holder;
  int64_t x_stride;
  const Tensor rows = as_rows(a, &x_stride);
  const int64_t M = a.size(0), N = b.size(0);
  Tensor y = empty({M, N}, ScalarType::Int, a);
  const Int8LinearParams p{
      .M = M,
      .N = N,
      .K = a.size(1),
      .in = {.x = rows.const_data_ptr(), .dtype = to_dtype(a.scalar_type()), .mode = InputMode::kQuantized},
      .x_stride = x_stride,
      .weight = weight_data<Backend>(op, b, std::nullopt, 1, a, &holder).plain,
      .packed = nullptr,
      .out = {.y = y.mutable_data_ptr(), .dtype = DType::kInt32, .weight_scale = Backend::one()},
      .y_stride = N,
  };
  Backend::linear(op, p, a);
  return y;
}

template <class Backend>
Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& x_scale, const std::optional<Tensor>& x_zero_point,
                   const std::optional<Tensor>& packed_weight, bool asymmetric, const std::optional<Tensor>& out_scale,
                   const std::optional<Tensor>& out_zero_point, std::optional<ScalarType> out_dtype, bool relu,
                   const std::optional<Tensor>& x_multiplier, const std::optional<Tensor>& residual,
                   const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& residual_zero_point,
                   int64_t activation) {
  const char* op = "int8_linear";
  const InputArgs input{.scale = x_scale, .zero_point = x_zero_point, .asymmetric = asymmetric};
  const ResultArgs result{.weight_scale = weight_scale,
                          .bias = bias,
                          .scale = out_scale,
                          .zero_point = out_zero_point,
                          .dtype = out_dtype,
                          .relu = relu,
                          .residual = residual,
                          .residual_scale = residual_scale,
                          .residual_zero_point = residual_zero_point,
                          .activation = activation};
  expect_int8(op, "weight", weight);
  QO_EXPECT(weight.dim() == 2, op, "weight.shape (N, K), got ", shape_text(weight));
  QO_EXPECT(x.dim() >= 1, op, "x to have at least one dimension, got shape ", shape_text(x));
  Ints shape = sizes_of(x);
  QO_EXPECT(shape.back() == weight.size(1), op, "x.shape[-1] == weight.shape[1], got ", shape.back(), " and ", weight.size(1));
  expect_elements(op, "x", shape);
  expect_elements(op, "weight", weight.sizes());

  Holder holder;
  Int8LinearParams p{};
  p.N = weight.size(0);
  p.K = weight.size(1);
  shape.back() = p.N;
  expect_elements(op, "a result", shape);
  p.M = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) p.M *= shape[d];
  const Tensor rows = as_rows(x, &p.x_stride);
  shape.back() = 1;
  p.in = input_params<Backend>(op, rows, input, shape, &holder);
  p.in.multiplier = input_multiplier(op, x, x_multiplier, p.K, &holder);
  expect_exact(op, "in_features", p.K, input.unsigned_codes(x));
  ScalarType type;
  p.out = output_params<Backend>(op, x, result, p.N, &type, &holder);
  const WeightData data = weight_data<Backend>(op, weight, packed_weight, 1, x, &holder);
  p.weight = data.plain;
  p.packed = data.packed;
  shape.back() = p.N;
  Tensor y = empty(shape, type, x);
  p.out.residual = residual_params<Backend>(op, result, y, false, &holder);
  p.out.y = y.mutable_data_ptr();
  p.y_stride = p.N;
  Backend::linear(op, p, x);
  return y;
}

}  // namespace quant_ops

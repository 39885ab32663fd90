// The quantize family for any device: checks, allocation, structs. `Backend` supplies the entry points of ops.h:
//   quantize, quantize_backward, dequantize, choose_qparams, quantize_rows, and
//   zero_points(tensor, qmin, qmax) -> int32 tensor of the same shape and whether its values are known to be small, and
//   no_zero_point(), what its kernels take for a zero point of 0.
#pragma once

#include <tuple>

#include "torch/args.h"

namespace quant_ops {

struct ZeroPoints {
  Tensor tensor;  // int32
  bool small;     // all |values| <= 2^24, as far as this device can tell
};

inline void expect_codes(const char* op, int64_t qmin, int64_t qmax) {
  QO_EXPECT(qmin < qmax, op, "qmin < qmax, got ", qmin, " and ", qmax);
  QO_EXPECT(qmin >= INT32_MIN && qmax <= INT32_MAX, op, "qmin and qmax to fit int32, got ", qmin, " and ", qmax);
}

inline void expect_floating(const char* op, const char* name, const Tensor& t) {
  QO_EXPECT(is_floating(t.scalar_type()), op, name, ".dtype in (float32, float16, bfloat16, float64), got ",
            dtype_name(t.scalar_type()));
}

inline ScalarType compute_type(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// The narrowest integer dtype that holds [qmin, qmax].
inline ScalarType code_type(int64_t qmin, int64_t qmax) {
  if (qmin >= -128 && qmax <= 127) return ScalarType::Char;
  if (qmin >= 0 && qmax <= 255) return ScalarType::Byte;
  if (qmin >= -32768 && qmax <= 32767) return ScalarType::Short;
  return ScalarType::Int;
}

// Scale and zero point as the kernels want them. The tensors are kept alive by the caller.
struct Parameters {
  Tensor scale;
  std::optional<Tensor> zero_point;  // none: 0
  bool small;                        // zero points

  void add_to(Space* space) const {
    space->add_parameter("scale", scale);
    if (zero_point)
      space->add_parameter("zero_point", *zero_point);
    else
      space->add_constant();
  }
  template <class Backend>
  const int32_t* zero_points() const {
    return zero_point ? zero_point->const_data_ptr<int32_t>() : Backend::no_zero_point();
  }
};

template <class Backend>
Parameters quantization_parameters(const char* op, const Tensor& tensor, const Tensor& scale,
                                   const std::optional<Tensor>& zero_point, bool asymmetric, int64_t qmin, int64_t qmax,
                                   ScalarType compute) {
  expect_floating(op, "scale", scale);
  expect_device(op, "scale", scale, tensor);
  if (asymmetric) {
    QO_EXPECT(zero_point.has_value(), op, "a zero_point with asymmetric=True, got None");
    expect_device(op, "zero_point", *zero_point, tensor);
    const ScalarType t = zero_point->scalar_type();
    QO_EXPECT(
        is_floating(t) || is_one_of(t, {ScalarType::Char, ScalarType::Byte, ScalarType::Short, ScalarType::Int, ScalarType::Long}),
        op, "zero_point.dtype integer or floating, got ", dtype_name(t));
    ZeroPoints z = Backend::zero_points(*zero_point, qmin, qmax);
    return {to_type(scale, compute), z.tensor, z.small};
  }
  return {to_type(scale, compute), std::nullopt, true};
}

template <class Backend>
Tensor quant_tensor_forward(const Tensor& tensor, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t qmin,
                            int64_t qmax, bool asymmetric, bool simulate, const std::optional<Ints>& block_size) {
  const char* op = "quant_tensor_forward";
  expect_floating(op, "tensor", tensor);
  expect_codes(op, qmin, qmax);
  const ScalarType type = tensor.scalar_type();
  const Parameters q = quantization_parameters<Backend>(op, tensor, scale, zero_point, asymmetric, qmin, qmax, compute_type(type));
  Space space(op, tensor, block_size);
  space.add(tensor);
  Tensor y = empty_like(tensor, simulate ? type : code_type(qmin, qmax));
  space.add(y);
  q.add_to(&space);
  if (tensor.numel() == 0) return y;

  QuantizeParams p;
  p.it = space.iteration();
  p.x = tensor.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.x_dtype = to_dtype(type);
  p.y_dtype = to_dtype(y.scalar_type());
  p.scale = q.scale.const_data_ptr();
  p.zero_point = q.template zero_points<Backend>();
  p.exact_in_float32 = q.small && qmin >= -(1 << 23) && qmax <= (1 << 23);
  p.qmin = static_cast<int32_t>(qmin);
  p.qmax = static_cast<int32_t>(qmax);
  p.simulate = simulate;
  Backend::quantize(p, tensor);
  return y;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> quant_tensor_backward(const Tensor& grad, const Tensor& tensor, const Tensor& scale,
                                                         const std::optional<Tensor>& zero_point, int64_t qmin, int64_t qmax,
                                                         bool asymmetric, const std::optional<Ints>& block_size) {
  const char* op = "quant_tensor_backward";
  expect_floating(op, "tensor", tensor);
  expect_codes(op, qmin, qmax);
  QO_EXPECT(sizes_of(grad) == sizes_of(tensor), op, "grad.shape == tensor.shape, got ", shape_text(grad), " and ",
            shape_text(tensor));
  expect_device(op, "grad", grad, tensor);
  const ScalarType type = tensor.scalar_type(), compute = compute_type(type);
  const Tensor g = to_type(grad, type);
  const Parameters q = quantization_parameters<Backend>(op, tensor, scale, zero_point, asymmetric, qmin, qmax, compute);

  Tensor dx = empty_like(tensor, type);
  // every element of a gradient is written, unless there is nothing to sum
  const auto gradient = [&](const Tensor& parameter, bool written) {
    return written ? torch::stable::new_empty(tensor, parameter.sizes(), compute)
                   : torch::stable::new_zeros(tensor, parameter.sizes(), compute);
  };
  Tensor dscale = gradient(scale, tensor.numel() > 0);
  Tensor dzero = gradient(asymmetric ? *zero_point : scale, asymmetric && tensor.numel() > 0);

  Space elements(op, tensor, block_size), slices = elements;
  elements.add(tensor);
  elements.add(g);
  elements.add(dx);
  q.add_to(&elements);
  slices.add(tensor);
  slices.add(g);
  q.add_to(&slices);
  if (tensor.numel() > 0) {
    QuantizeBackwardParams p;
    p.it = elements.iteration();
    p.x = tensor.const_data_ptr();
    p.grad = g.const_data_ptr();
    p.dx = dx.mutable_data_ptr();
    p.x_dtype = to_dtype(type);
    p.scale = q.scale.const_data_ptr();
    p.zero_point = q.template zero_points<Backend>();
    p.exact_in_float32 = q.small && qmin >= -(1 << 23) && qmax <= (1 << 23);
    p.qmin = static_cast<int32_t>(qmin);
    p.qmax = static_cast<int32_t>(qmax);
    p.scale_sum = slices.reduction(dscale);
    p.dscale = dscale.mutable_data_ptr();
    p.dzero = nullptr;
    if (asymmetric) {
      p.zero_sum = slices.reduction(dzero);
      p.dzero = dzero.mutable_data_ptr();
    }
    Backend::quantize_backward(p, tensor);
  }
  const auto as_given = [&](const Tensor& gradient, const Tensor& parameter) {
    return is_floating(parameter.scalar_type()) ? to_type(gradient, parameter.scalar_type()) : gradient;
  };
  return {dx, as_given(dscale, scale), asymmetric ? as_given(dzero, *zero_point) : dzero};
}

template <class Backend>
Tensor dequant_tensor(const Tensor& tensor, const Tensor& scale, const std::optional<Tensor>& zero_point, ScalarType dtype,
                      const std::optional<Ints>& block_size) {
  const char* op = "dequant_tensor";
  const ScalarType type = tensor.scalar_type();
  QO_EXPECT(is_one_of(type, {ScalarType::Char, ScalarType::Byte, ScalarType::Short, ScalarType::Int}), op,
            "tensor.dtype in (int8, uint8, int16, int32), got ", dtype_name(type));
  QO_EXPECT(is_floating(dtype), op, "the result's dtype in (float32, float16, bfloat16, float64), got ", dtype_name(dtype));
  const Parameters q = quantization_parameters<Backend>(op, tensor, scale, zero_point, zero_point.has_value(), INT32_MIN, INT32_MAX,
                                                        compute_type(dtype));
  Space space(op, tensor, block_size);
  space.add(tensor);
  Tensor y = empty_like(tensor, dtype);
  space.add(y);
  q.add_to(&space);
  if (tensor.numel() == 0) return y;

  DequantizeParams p;
  p.it = space.iteration();
  p.q = tensor.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.q_dtype = to_dtype(type);
  p.y_dtype = to_dtype(dtype);
  p.scale = q.scale.const_data_ptr();
  p.zero_point = q.template zero_points<Backend>();
  p.exact_in_float32 = q.small;
  Backend::dequantize(p, tensor);
  return y;
}

template <class Backend>
std::tuple<Tensor, Tensor> choose_qparams(const Tensor& tensor, const Ints& dim, int64_t qmin, int64_t qmax, bool asymmetric) {
  const char* op = "choose_qparams";
  expect_floating(op, "tensor", tensor);
  expect_codes(op, qmin, qmax);
  QO_EXPECT(asymmetric || qmax > 0, op, "qmax > 0 for a symmetric range, got ", qmax, ". Use asymmetric=True.");
  Ints shape = sizes_of(tensor);
  const int64_t dims = static_cast<int64_t>(shape.size());
  for (int64_t d : dim) {
    QO_EXPECT(d >= -dims && d < dims, op, "dim in [", -dims, ", ", dims - 1, "], got ", d);
    shape[static_cast<size_t>(d < 0 ? d + dims : d)] = 1;
  }
  if (dim.empty()) shape = Ints(shape.size(), 1);
  const ScalarType compute = compute_type(tensor.scalar_type());
  Tensor scale = empty(shape, compute, tensor), zero_point = empty(shape, ScalarType::Int, tensor);
  if (scale.numel() == 0) return {scale, zero_point};

  Space space(op, tensor, std::nullopt);
  space.add(tensor);
  ChooseQParams p;
  p.range = space.reduction(scale);
  p.x = tensor.const_data_ptr();
  p.x_dtype = to_dtype(tensor.scalar_type());
  p.scale = scale.mutable_data_ptr();
  p.zero_point = zero_point.mutable_data_ptr<int32_t>();
  p.qmin = static_cast<int32_t>(qmin);
  p.qmax = static_cast<int32_t>(qmax);
  p.asymmetric = asymmetric;
  Backend::choose_qparams(p, tensor);
  return {scale, zero_point};
}

// The last dimension contiguous and all others one regular step: rows for the kernels. Copies only what is not.
inline Tensor as_rows(const Tensor& x, int64_t* row_stride) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  bool ok = sizes[last] <= 1 || strides[last] == 1;
  int64_t step = -1;     // of the innermost leading dimension with more than one index
  int64_t expected = 0;  // stride that the next one out must have
  for (int64_t d = last - 1; ok && d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (step < 0)
      step = strides[d];
    else
      ok = strides[d] == expected;
    expected = strides[d] * sizes[d];
  }
  if (ok) {
    *row_stride = step < 0 ? sizes[last] : step;
    return x;
  }
  *row_stride = sizes[last];
  return torch::stable::contiguous(x);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, bool asymmetric) {
  const char* op = "quantize_rows";
  const ScalarType type = x.scalar_type();
  QO_EXPECT(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
            "x.dtype in (float32, float16, bfloat16), got ", dtype_name(type));
  QO_EXPECT(x.dim() >= 1, op, "x to have at least one dimension, got shape ", shape_text(x));
  Ints shape = sizes_of(x);
  Tensor q = empty(shape, ScalarType::Char, x);
  const int64_t columns = shape.back();
  shape.back() = 1;
  Tensor scale = empty(shape, ScalarType::Float, x), zero_point = empty(shape, ScalarType::Int, x);
  if (scale.numel() == 0) return {q, scale, zero_point};

  QuantizeRowsParams p;
  const Tensor rows = as_rows(x, &p.x_stride);
  p.rows = scale.numel();
  p.columns = columns;
  p.x = rows.const_data_ptr();
  p.x_dtype = to_dtype(type);
  p.q = q.mutable_data_ptr<int8_t>();
  p.scale = scale.mutable_data_ptr<float>();
  p.zero_point = zero_point.mutable_data_ptr<int32_t>();
  p.asymmetric = asymmetric;
  Backend::quantize_rows(p, x);
  return {q, scale, zero_point};
}

}  // namespace quant_ops

// The quantize family for any device: checks, allocation, the structs of ops.h. `Backend` supplies the entry points of ops.h:
//   quantize, quantize_backward, dequantize, choose_qparams, quantize_rows, and
//   zero_points(tensor, qmin, qmax) -> int32 tensor of the same shape and whether its values are known to be small, and
//   no_zero_point(), what its kernels take for a zero point of 0.
// Read next: space.h for shapes and strides, cpu/quantize.cpp.
#pragma once

#include <tuple>

#include "torch/space.h"

namespace quant_ops {

// Codes and zero points up to here differ by at most 2^24, within which float32 holds every integer.
constexpr int64_t kSmallZeroPoint = 1 << 23;

struct ZeroPoints {
  Tensor tensor;  // int32
  bool small;     // all |values| <= kSmallZeroPoint, as far as this device can tell
};

inline void expect_codes(const char* op, int64_t qmin, int64_t qmax) {
  QO_EXPECT(qmin < qmax, op, "qmin < qmax, got ", qmin, " and ", qmax);
  QO_EXPECT(qmin >= INT32_MIN && qmax <= INT32_MAX, op, "qmin and qmax to fit int32, got ", qmin, " and ", qmax);
}

inline void expect_like(const char* op, const Tensor& grad, const Tensor& tensor) {
  QO_EXPECT(sizes_of(grad) == sizes_of(tensor), op, "grad.shape == tensor.shape, got ", shape_text(grad), " and ",
            shape_text(tensor));
  expect_device(op, "grad", grad, tensor);
}

inline ScalarType compute_type(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// The narrowest integer dtype that holds [qmin, qmax].
inline ScalarType code_type(int64_t qmin, int64_t qmax) {
  if (qmin >= -128 && qmax <= 127) return ScalarType::Char;
  if (qmin >= 0 && qmax <= 255) return ScalarType::Byte;
  if (qmin >= -32768 && qmax <= 32767) return ScalarType::Short;
  return ScalarType::Int;
}

// A scale and a zero point as the kernels read them, kept alive.
struct ScaleAndZeroPoint {
  Tensor scale;                      // in compute_type
  std::optional<Tensor> zero_point;  // none: 0
  bool small;                        // ZeroPoints::small

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
  // QuantizeParams::exact_in_float32, for codes in [qmin, qmax].
  bool exact_in_float32(int64_t qmin, int64_t qmax) const { return small && qmin >= -kSmallZeroPoint && qmax <= kSmallZeroPoint; }
};

template <class Backend>
ScaleAndZeroPoint scale_and_zero_point(const char* op, const Tensor& tensor, const Tensor& scale,
                                       const std::optional<Tensor>& zero_point, bool asymmetric, int64_t qmin, int64_t qmax,
                                       ScalarType compute) {
  expect_floating(op, "scale", scale);
  expect_device(op, "scale", scale, tensor);
  if (!asymmetric) return {.scale = to_type(scale, compute), .zero_point = std::nullopt, .small = true};
  QO_EXPECT(zero_point.has_value(), op, "a zero_point with asymmetric=True, got None");
  expect_device(op, "zero_point", *zero_point, tensor);
  expect_zero_point_dtype(op, "zero_point", *zero_point);
  const ZeroPoints z = Backend::zero_points(*zero_point, qmin, qmax);
  return {.scale = to_type(scale, compute), .zero_point = z.tensor, .small = z.small};
}

template <class Backend>
Tensor quant_tensor_forward(const Tensor& tensor, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t qmin,
                            int64_t qmax, bool asymmetric, bool simulate, const std::optional<Ints>& block_size) {
  const char* op = "quant_tensor_forward";
  expect_floating(op, "tensor", tensor);
  expect_codes(op, qmin, qmax);
  const ScalarType type = tensor.scalar_type();
  const ScaleAndZeroPoint z =
      scale_and_zero_point<Backend>(op, tensor, scale, zero_point, asymmetric, qmin, qmax, compute_type(type));
  Space space(op, tensor, block_size);
  space.add(tensor);
  Tensor y = empty_like(tensor, simulate ? type : code_type(qmin, qmax));
  space.add(y);
  z.add_to(&space);
  if (tensor.numel() == 0) return y;

  const QuantizeParams p{
      .it = space.iteration(),
      .x = tensor.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .x_dtype = to_dtype(type),
      .y_dtype = to_dtype(y.scalar_type()),
      .scale = z.scale.const_data_ptr(),
      .zero_point = z.template zero_points<Backend>(),
      .exact_in_float32 = z.exact_in_float32(qmin, qmax),
      .qmin = static_cast<int32_t>(qmin),
      .qmax = static_cast<int32_t>(qmax),
      .simulate = simulate,
  };
  Backend::quantize(p, tensor);
  return y;
}

// A gradient of a scale or zero point, in the dtype that it is summed in; zeros unless the kernels write it.
inline Tensor gradient_of(const Tensor& parameter, ScalarType compute, const Tensor& tensor, bool written) {
  return written ? empty(sizes_of(parameter), compute, tensor) : torch::stable::new_zeros(tensor, parameter.sizes(), compute);
}
inline Tensor as_parameter(const Tensor& gradient, const Tensor& parameter) {
  return is_floating(parameter.scalar_type()) ? to_type(gradient, parameter.scalar_type()) : gradient;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> quant_tensor_backward(const Tensor& grad, const Tensor& tensor, const Tensor& scale,
                                                         const std::optional<Tensor>& zero_point, int64_t qmin, int64_t qmax,
                                                         bool asymmetric, const std::optional<Ints>& block_size) {
  const char* op = "quant_tensor_backward";
  expect_floating(op, "tensor", tensor);
  expect_codes(op, qmin, qmax);
  expect_like(op, grad, tensor);
  expect_elements(op, "tensor", tensor.sizes());
  const ScalarType type = tensor.scalar_type(), compute = compute_type(type);
  const Tensor g = to_type(grad, type);
  const ScaleAndZeroPoint z = scale_and_zero_point<Backend>(op, tensor, scale, zero_point, asymmetric, qmin, qmax, compute);
  Tensor dx = empty_like(tensor, type);
  // every element of a gradient is written, unless there is nothing to sum
  const bool summed = tensor.numel() > 0;
  Tensor dscale = gradient_of(scale, compute, tensor, summed);
  Tensor dzero = gradient_of(asymmetric ? *zero_point : scale, compute, tensor, asymmetric && summed);

  Space elements(op, tensor, block_size), slices = elements;
  elements.add(tensor);
  elements.add(g);
  elements.add(dx);
  z.add_to(&elements);
  slices.add(tensor);
  slices.add(g);
  z.add_to(&slices);
  if (summed) {
    const QuantizeBackwardParams p{
        .it = elements.iteration(),
        .x = tensor.const_data_ptr(),
        .grad = g.const_data_ptr(),
        .dx = dx.mutable_data_ptr(),
        .x_dtype = to_dtype(type),
        .scale = z.scale.const_data_ptr(),
        .zero_point = z.template zero_points<Backend>(),
        .exact_in_float32 = z.exact_in_float32(qmin, qmax),
        .qmin = static_cast<int32_t>(qmin),
        .qmax = static_cast<int32_t>(qmax),
        .scale_sum = slices.reduction(dscale),
        .zero_sum = asymmetric ? slices.reduction(dzero) : Reduction{},
        .dscale = dscale.mutable_data_ptr(),
        .dzero = asymmetric ? dzero.mutable_data_ptr() : nullptr,
    };
    Backend::quantize_backward(p, tensor);
  }
  return {dx, as_parameter(dscale, scale), asymmetric ? as_parameter(dzero, *zero_point) : dzero};
}

template <class Backend>
Tensor dequant_tensor(const Tensor& tensor, const Tensor& scale, const std::optional<Tensor>& zero_point, ScalarType dtype,
                      const std::optional<Ints>& block_size) {
  const char* op = "dequant_tensor";
  const ScalarType type = tensor.scalar_type();
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Char, ScalarType::Byte, ScalarType::Short, ScalarType::Int}), op,
                  "tensor.dtype in (int8, uint8, int16, int32), got ", dtype_name(type));
  QO_EXPECT_DTYPE(is_floating(dtype), op, "the result's dtype in (float32, float16, bfloat16, float64), got ", dtype_name(dtype));
  const ScaleAndZeroPoint z = scale_and_zero_point<Backend>(op, tensor, scale, zero_point, zero_point.has_value(), INT32_MIN,
                                                            INT32_MAX, compute_type(dtype));
  Space space(op, tensor, block_size);
  space.add(tensor);
  Tensor y = empty_like(tensor, dtype);
  space.add(y);
  z.add_to(&space);
  if (tensor.numel() == 0) return y;

  const DequantizeParams p{
      .it = space.iteration(),
      .q = tensor.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .q_dtype = to_dtype(type),
      .y_dtype = to_dtype(dtype),
      .scale = z.scale.const_data_ptr(),
      .zero_point = z.template zero_points<Backend>(),
      .exact_in_float32 = z.small,
  };
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
  expect_elements(op, "tensor", shape);
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
  Reduction range = space.reduction(scale);
  for (int d = 0; d < range.reduced.ndim; ++d)  // the elements of an expanded dimension are one
    if (range.reduced.stride[0][d] == 0 && range.reduced.size[d] > 1) range.reduced.size[d] = 1;
  const ChooseQParams p{
      .range = range,
      .x = tensor.const_data_ptr(),
      .x_dtype = to_dtype(tensor.scalar_type()),
      .scale = scale.mutable_data_ptr(),
      .zero_point = zero_point.mutable_data_ptr<int32_t>(),
      .qmin = static_cast<int32_t>(qmin),
      .qmax = static_cast<int32_t>(qmax),
      .asymmetric = asymmetric,
  };
  Backend::choose_qparams(p, tensor);
  return {scale, zero_point};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, bool asymmetric) {
  const char* op = "quantize_rows";
  const ScalarType type = x.scalar_type();
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "x.dtype in (float32, float16, bfloat16), got ", dtype_name(type));
  QO_EXPECT(x.dim() >= 1, op, "x to have at least one dimension, got shape ", shape_text(x));
  Ints shape = sizes_of(x);
  expect_elements(op, "x", shape);
  Tensor q = empty(shape, ScalarType::Char, x);
  const int64_t columns = shape.back();
  shape.back() = 1;
  Tensor scale = empty(shape, ScalarType::Float, x), zero_point = empty(shape, ScalarType::Int, x);
  if (scale.numel() == 0) return {q, scale, zero_point};

  int64_t x_stride;
  const Tensor rows = as_rows(x, &x_stride);
  const QuantizeRowsParams p{
      .rows = scale.numel(),
      .columns = columns,
      .x = rows.const_data_ptr(),
      .x_stride = x_stride,
      .x_dtype = to_dtype(type),
      .q = q.mutable_data_ptr<int8_t>(),
      .scale = scale.mutable_data_ptr<float>(),
      .zero_point = zero_point.mutable_data_ptr<int32_t>(),
      .asymmetric = asymmetric,
  };
  Backend::quantize_rows(p, x);
  return {q, scale, zero_point};
}

// A weight or bias of a norm: [columns], in float32.
inline const float* norm_parameter(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x,
                                   std::optional<Tensor>* kept) {
  if (!t) return nullptr;
  expect_floating(op, name, *t);
  expect_device(op, name, *t, x);
  QO_EXPECT(t->dim() == 1 && t->size(0) == x.size(x.dim() - 1), op, name, ".shape (", x.size(x.dim() - 1), ",), got ",
            shape_text(*t));
  *kept = as_contiguous(to_type(*t, ScalarType::Float));
  return (*kept)->const_data_ptr<float>();
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> norm_quantize_rows(const Tensor& x, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, double eps, bool rms, bool asymmetric,
                                                      const std::optional<Tensor>& residual) {
  const char* op = "norm_quantize_rows";
  const ScalarType type = x.scalar_type();
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "x.dtype in (float32, float16, bfloat16), got ", dtype_name(type));
  QO_EXPECT(x.dim() >= 1, op, "x to have at least one dimension, got shape ", shape_text(x));
  if (residual) {
    expect_device(op, "residual", *residual, x);
    QO_EXPECT_DTYPE(residual->scalar_type() == type, op, "residual.dtype == x.dtype, got ", dtype_name(residual->scalar_type()),
                    " and ", dtype_name(type));
    QO_EXPECT(sizes_of(*residual) == sizes_of(x), op, "residual.shape == x.shape, got ", shape_text(*residual), " and ",
              shape_text(x));
  }
  Ints shape = sizes_of(x);
  expect_elements(op, "x", shape);
  std::optional<Tensor> kept[2];
  NormQuantizeRowsParams p{};
  p.weight = norm_parameter(op, "weight", weight, x, &kept[0]);
  p.bias = norm_parameter(op, "bias", bias, x, &kept[1]);
  p.eps = static_cast<float>(eps);
  p.rms = rms;
  Tensor q = empty(shape, ScalarType::Char, x);
  p.rows.columns = shape.back();
  shape.back() = 1;
  Tensor scale = empty(shape, ScalarType::Float, x), zero_point = empty(shape, ScalarType::Int, x);
  if (scale.numel() == 0) return {q, scale, zero_point};

  const Tensor rows = as_rows(x, &p.rows.x_stride);
  const std::optional<Tensor> others = residual ? std::optional(as_rows(*residual, &p.residual_stride)) : std::nullopt;
  p.rows.rows = scale.numel();
  p.rows.x = rows.const_data_ptr();
  p.rows.x_dtype = to_dtype(type);
  p.rows.q = q.mutable_data_ptr<int8_t>();
  p.rows.scale = scale.mutable_data_ptr<float>();
  p.rows.zero_point = zero_point.mutable_data_ptr<int32_t>();
  p.rows.asymmetric = asymmetric;
  p.residual = others ? others->const_data_ptr() : nullptr;
  Backend::norm_quantize_rows(op, p, x);
  return {q, scale, zero_point};
}

}  // namespace quant_ops

// int8_gemm, int8_linear, int8_conv2d and pack_weight for any device: checks, allocation, structs. `Backend` supplies
//   linear(op, Int8LinearParams, x), conv2d(Int8Conv2dParams, x), the entry points of ops.h,
//   given_zero_points(op, name, tensor, qmin, qmax, holder) -> int32 values where the kernels read them, and of packed weights
//   packed_bytes(shape), pack(weight, shape, packed) and is_packed_for(packed, shape).
#pragma once

#include <cstdint>

#include "cpu/pack.h"
#include "torch/quantize.h"

namespace quant_ops {

// The largest K (or C/groups * R * S) whose sum cannot overflow int32: |a| <= 128 times |b| <= 128 for signed codes, |a| <= 255
// for unsigned ones and for codes that a zero point corrects.
constexpr int64_t kMaxK = 131071, kMaxKUnsigned = 65793;

inline void expect_exact(const char* op, const char* what, int64_t k, bool unsigned_codes) {
  const int64_t bound = unsigned_codes ? kMaxKUnsigned : kMaxK;
  QO_EXPECT(k <= bound, op, what, " <= ", bound, " so that the int32 sum is exact, got ", k,
            unsigned_codes ? ". Symmetric int8 activations reach 131071; else split the sum." : ". Split the sum into parts.");
}

inline void expect_int8(const char* op, const char* name, const Tensor& t) {
  QO_EXPECT(t.scalar_type() == ScalarType::Char, op, name, ".dtype int8, got ", dtype_name(t.scalar_type()),
            is_floating(t.scalar_type()) ? ". Quantize it first, e.g. with quant_tensor_forward(simulate=False)." : "");
}

// Small tensors that an op call must keep alive, as contiguous arrays.
struct Holder {
  std::vector<Tensor> tensors;
  std::vector<std::vector<int32_t>> integers;

  const float* floats(const Tensor& t) {
    const bool as_it_is = t.scalar_type() == ScalarType::Float && t.is_contiguous();  // the caller keeps it alive
    if (as_it_is) return static_cast<const float*>(t.const_data_ptr());
    tensors.push_back(torch::stable::contiguous(to_type(t, ScalarType::Float)));
    return tensors.back().const_data_ptr<float>();
  }
};

// A weight [o, c, r, s] for `groups`; of a linear layer [o, c, 1, 1].
struct WeightShape {
  int64_t o, c, r, s, groups;
};
inline WeightShape weight_shape(const Ints& shape, int64_t groups) {
  const bool conv = shape.size() == 4;
  return {shape[0], shape[1], conv ? shape[2] : 1, conv ? shape[3] : 1, groups};
}

inline void expect_zero_point_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  QO_EXPECT(is_floating(type) ||
                is_one_of(type, {ScalarType::Char, ScalarType::Byte, ScalarType::Short, ScalarType::Int, ScalarType::Long}),
            op, name, ".dtype integer or floating, got ", dtype_name(type));
}

// On the CPU: the values of an integer or floating zero point, rounded and clamped to [qmin, qmax] if floating, refused outside if
// integer.
inline std::vector<int32_t> zero_point_values(const char* op, const char* name, const Tensor& t, int64_t qmin, int64_t qmax) {
  const ScalarType type = t.scalar_type();
  const bool floating = is_floating(type);
  std::vector<int32_t> values(static_cast<size_t>(t.numel()));
  const auto take = [&](size_t i, int64_t z) {
    QO_EXPECT(z >= qmin && z <= qmax, op, name, " in [", qmin, ", ", qmax, "], got ", z);
    values[i] = static_cast<int32_t>(z);
  };
  if (type == ScalarType::Int && t.is_contiguous()) {  // what the modules keep: a conversion would cost more than a small layer
    for (size_t i = 0; i < values.size(); ++i) take(i, static_cast<const int32_t*>(t.const_data_ptr())[i]);
    return values;
  }
  const Tensor wide = torch::stable::contiguous(to_type(t, floating ? ScalarType::Double : ScalarType::Long));
  for (size_t i = 0; i < values.size(); ++i)
    take(i, floating ? round_zero_point(wide.const_data_ptr<double>()[i], qmin, qmax) : wide.const_data_ptr<int64_t>()[i]);
  return values;
}

// Activations: dynamic, static or already quantized. `rows` and `row_shape` say what a per-row (per-sample) parameter looks like.
template <class Backend>
InputParams input_params(const char* op, const Tensor& x, const std::optional<Tensor>& x_scale,
                         const std::optional<Tensor>& x_zero_point, bool asymmetric, const Ints& row_shape, Holder* holder) {
  const ScalarType type = x.scalar_type();
  QO_EXPECT(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Char, ScalarType::Byte}), op,
            "x.dtype in (float32, float16, bfloat16, int8, uint8), got ", dtype_name(type));
  InputParams in{};
  in.x = x.const_data_ptr();
  in.dtype = to_dtype(type);
  if (!x_scale) {
    QO_EXPECT(is_floating(type), op, "x_scale with a quantized x, got x.dtype ", dtype_name(type),
              " and no x_scale. Pass the scale that x was quantized with.");
    QO_EXPECT(!x_zero_point, op, "x_zero_point only together with x_scale, got x_zero_point alone");
    in.mode = asymmetric ? Activation::kDynamicAsymmetric : Activation::kDynamic;
    return in;
  }
  QO_EXPECT(!asymmetric, op, "asymmetric=True only for dynamic quantization, got it with x_scale. Pass x_zero_point instead.");
  in.mode = is_floating(type) ? Activation::kStatic : Activation::kQuantized;
  const auto per_row = [&](const char* name, const Tensor& t) -> int64_t {
    if (t.numel() == 1) return 0;
    QO_EXPECT(sizes_of(t) == row_shape, op, name, " to have one element or the shape ", list_text(row_shape), ", got ",
              shape_text(t));
    return 1;
  };
  expect_floating(op, "x_scale", *x_scale);
  expect_device(op, "x_scale", *x_scale, x);
  in.scale_stride = per_row("x_scale", *x_scale);
  in.scale = holder->floats(*x_scale);
  if (x_zero_point) {
    expect_device(op, "x_zero_point", *x_zero_point, x);
    in.zero_point_stride = per_row("x_zero_point", *x_zero_point);
    const bool is_unsigned = type == ScalarType::Byte;
    expect_zero_point_dtype(op, "x_zero_point", *x_zero_point);
    in.zero_point =
        Backend::given_zero_points(op, "x_zero_point", *x_zero_point, is_unsigned ? 0 : -128, is_unsigned ? 255 : 127, holder);
  }
  return in;
}

// The dtype of the result and the epilogue. `channels` is N or O.
template <class Backend>
OutputParams output_params(const char* op, const Tensor& x, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                           std::optional<ScalarType> out_dtype, bool relu, int64_t channels, ScalarType* type, Holder* holder) {
  OutputParams out{};
  expect_floating(op, "weight_scale", weight_scale);
  expect_device(op, "weight_scale", weight_scale, x);
  const Ints shape = sizes_of(weight_scale);
  bool per_channel = !shape.empty() && shape[0] == channels;
  for (size_t d = 1; d < shape.size(); ++d) per_channel = per_channel && shape[d] == 1;
  QO_EXPECT(per_channel || weight_scale.numel() == 1, op, "weight_scale to have one element or one per output channel (", channels,
            "), got shape ", shape_text(weight_scale));
  out.weight_scale = holder->floats(weight_scale);
  out.weight_scale_stride = weight_scale.numel() == 1 ? 0 : 1;
  if (bias) {
    expect_floating(op, "bias", *bias);
    expect_device(op, "bias", *bias, x);
    QO_EXPECT(sizes_of(*bias) == Ints{channels}, op, "bias.shape == (", channels, ",), got ", shape_text(*bias));
    out.bias = holder->floats(*bias);
  }
  out.relu = relu;
  if (out_scale) {
    expect_floating(op, "out_scale", *out_scale);
    expect_device(op, "out_scale", *out_scale, x);
    QO_EXPECT(out_scale->numel() == 1, op, "out_scale to have one element, got shape ", shape_text(*out_scale));
    *type = out_dtype.value_or(ScalarType::Char);
    QO_EXPECT(is_one_of(*type, {ScalarType::Char, ScalarType::Byte}), op, "out_dtype int8 or uint8 with out_scale, got ",
              dtype_name(*type));
    out.out_scale = holder->floats(*out_scale);
    const bool is_unsigned = *type == ScalarType::Byte;
    if (out_zero_point) {
      QO_EXPECT(out_zero_point->numel() == 1, op, "out_zero_point to have one element, got shape ", shape_text(*out_zero_point));
      expect_device(op, "out_zero_point", *out_zero_point, x);
      expect_zero_point_dtype(op, "out_zero_point", *out_zero_point);
      out.out_zero_point = Backend::given_zero_points(op, "out_zero_point", *out_zero_point, is_unsigned ? 0 : -128,
                                                      is_unsigned ? 255 : 127, holder);
    }
  } else {
    QO_EXPECT(!out_zero_point, op, "out_zero_point only together with out_scale, got out_zero_point alone");
    *type = out_dtype.value_or(is_floating(x.scalar_type()) ? x.scalar_type() : ScalarType::Float);
    QO_EXPECT(is_one_of(*type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
              "out_dtype in (float32, float16, bfloat16), got ", dtype_name(*type),
              is_one_of(*type, {ScalarType::Char, ScalarType::Byte}) ? ". Integer output needs out_scale." : "");
  }
  out.dtype = to_dtype(*type);
  return out;
}

// The weight, contiguous, and its packed copy if one is given.
template <class Backend>
void weight_params(const char* op, const Tensor& weight, const std::optional<Tensor>& packed_weight, int64_t groups,
                   const Tensor& x, const int8_t** plain, const int8_t** packed, Holder* holder) {
  expect_device(op, "weight", weight, x);
  *packed = nullptr;
  *plain = nullptr;
  if (packed_weight) {
    expect_int8(op, "packed_weight", *packed_weight);
    expect_device(op, "packed_weight", *packed_weight, x);
    *packed = packed_weight->const_data_ptr<int8_t>();
    QO_EXPECT(packed_weight->is_contiguous() && Backend::is_packed_for(*packed_weight, weight_shape(sizes_of(weight), groups)), op,
              "packed_weight made by pack_weight from this weight, got another one. Call pack_weight(weight, groups) again.");
    if (!Backend::kReadsPlainBesidePacked) return;
  }
  holder->tensors.push_back(weight.is_contiguous() ? weight : torch::stable::contiguous(weight));
  *plain = holder->tensors.back().const_data_ptr<int8_t>();
}

template <class Backend>
Tensor int8_gemm(const Tensor& a, const Tensor& b) {
  const char* op = "int8_gemm";
  QO_EXPECT(is_one_of(a.scalar_type(), {ScalarType::Char, ScalarType::Byte}), op, "a.dtype in (int8, uint8), got ",
            dtype_name(a.scalar_type()));
  expect_int8(op, "b", b);
  expect_device(op, "b", b, a);
  QO_EXPECT(a.dim() == 2 && b.dim() == 2, op, "a.shape (M, K) and b.shape (N, K), got ", shape_text(a), " and ", shape_text(b));
  QO_EXPECT(a.size(1) == b.size(1), op, "a.shape[1] == b.shape[1], got ", a.size(1), " and ", b.size(1),
            ". b is [N, K], as nn.Linear keeps its weight.");
  const bool is_unsigned = a.scalar_type() == ScalarType::Byte;
  expect_exact(op, "K", a.size(1), is_unsigned);

  Holder holder;
  Int8LinearParams p{};
  p.M = a.size(0);
  p.N = b.size(0);
  p.K = a.size(1);
  Tensor y = empty({p.M, p.N}, ScalarType::Int, a);
  const Tensor rows = as_rows(a, &p.x_stride);
  p.in.x = rows.const_data_ptr();
  p.in.dtype = to_dtype(a.scalar_type());
  p.in.mode = Activation::kQuantized;
  weight_params<Backend>(op, b, std::nullopt, 1, a, &p.weight, &p.packed, &holder);
  p.out.weight_scale = Backend::one();
  p.out.y = y.mutable_data_ptr();
  p.out.dtype = DType::kInt32;
  p.y_stride = p.N;
  Backend::linear(op, p, a);
  return y;
}

template <class Backend>
Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& x_scale, const std::optional<Tensor>& x_zero_point,
                   const std::optional<Tensor>& packed_weight, bool asymmetric, const std::optional<Tensor>& out_scale,
                   const std::optional<Tensor>& out_zero_point, std::optional<ScalarType> out_dtype, bool relu) {
  const char* op = "int8_linear";
  expect_int8(op, "weight", weight);
  QO_EXPECT(weight.dim() == 2, op, "weight.shape (N, K), got ", shape_text(weight));
  QO_EXPECT(x.dim() >= 1, op, "x to have at least one dimension, got shape ", shape_text(x));
  Ints shape = sizes_of(x);
  QO_EXPECT(shape.back() == weight.size(1), op, "x.shape[-1] == weight.shape[1], got ", shape.back(), " and ", weight.size(1));

  Holder holder;
  Int8LinearParams p{};
  p.N = weight.size(0);
  p.K = weight.size(1);
  Ints row_shape = shape;
  row_shape.back() = 1;
  const Tensor rows = as_rows(x, &p.x_stride);
  p.in = input_params<Backend>(op, rows, x_scale, x_zero_point, asymmetric, row_shape, &holder);
  expect_exact(op, "in_features", p.K, asymmetric || x_zero_point.has_value() || x.scalar_type() == ScalarType::Byte);
  ScalarType type;
  p.out = output_params<Backend>(op, x, weight_scale, bias, out_scale, out_zero_point, out_dtype, relu, p.N, &type, &holder);
  weight_params<Backend>(op, weight, packed_weight, 1, x, &p.weight, &p.packed, &holder);
  shape.back() = p.N;
  Tensor y = empty(shape, type, x);
  p.M = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) p.M *= shape[d];
  p.out.y = y.mutable_data_ptr();
  p.y_stride = p.N;
  Backend::linear(op, p, x);
  return y;
}

// An int[2] argument given as one or two numbers.
inline void pair_of(const char* op, const char* name, const Ints& list, int64_t at_least, int64_t* out) {
  QO_EXPECT(list.size() == 1 || list.size() == 2, op, name, " to be one or two numbers, got ", list_text(list));
  out[0] = list[0];
  out[1] = list.back();
  QO_EXPECT(out[0] >= at_least && out[1] >= at_least, op, name, " >= ", at_least, ", got ", list_text(list));
}

template <class Backend>
Tensor int8_conv2d(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                   const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                   const std::optional<Tensor>& x_scale, const std::optional<Tensor>& x_zero_point,
                   const std::optional<Tensor>& packed_weight, bool asymmetric, const std::optional<Tensor>& out_scale,
                   const std::optional<Tensor>& out_zero_point, std::optional<ScalarType> out_dtype, bool relu) {
  const char* op = "int8_conv2d";
  expect_int8(op, "weight", weight);
  QO_EXPECT(weight.dim() == 4, op, "weight.shape (O, C/groups, R, S), got ", shape_text(weight));
  const bool batched = x.dim() == 4;
  QO_EXPECT(batched || x.dim() == 3, op, "x.shape (N, C, H, W) or (C, H, W), got ", shape_text(x));

  Int8Conv2dParams p{};
  Ints shape = sizes_of(x), x_stride(x.strides().begin(), x.strides().end());
  if (!batched) {
    shape.insert(shape.begin(), 1);
    x_stride.insert(x_stride.begin(), 0);
  }
  p.N = shape[0];
  p.C = shape[1];
  p.H = shape[2];
  p.W = shape[3];
  p.O = weight.size(0);
  p.R = weight.size(2);
  p.S = weight.size(3);
  p.groups = groups;
  QO_EXPECT(groups >= 1 && p.C % groups == 0 && p.O % groups == 0, op,
            "groups to divide the input and output channels, got groups ", groups, ", ", p.C, " input and ", p.O,
            " output channels");
  QO_EXPECT(p.C >= 1 && weight.size(1) * groups == p.C, op, "x.shape[-3] == weight.shape[1] * groups, got ", p.C, " and ",
            weight.size(1), " * ", groups);
  QO_EXPECT(p.R >= 1 && p.S >= 1, op, "a kernel of at least 1 x 1, got ", p.R, " x ", p.S);
  pair_of(op, "stride", stride, 1, p.stride);
  pair_of(op, "dilation", dilation, 1, p.dilation);
  Ints pad = padding.size() == 4 ? padding : Ints();
  if (pad.empty()) {
    int64_t both[2];
    pair_of(op, "padding", padding, 0, both);
    pad = {both[0], both[0], both[1], both[1]};
  }
  for (int64_t side : pad) QO_EXPECT(side >= 0, op, "padding >= 0, got ", list_text(padding));
  p.pad[0] = pad[0];
  p.pad[1] = pad[2];
  const int64_t reach_h = p.H + pad[0] + pad[1] - p.dilation[0] * (p.R - 1) - 1;
  const int64_t reach_w = p.W + pad[2] + pad[3] - p.dilation[1] * (p.S - 1) - 1;
  QO_EXPECT(reach_h >= 0 && reach_w >= 0, op, "an output of at least 1 x 1, got an input of ", p.H, " x ", p.W, ", padding ",
            list_text(padding), ", dilation ", list_text(dilation), " and a kernel of ", p.R, " x ", p.S);
  p.OH = reach_h / p.stride[0] + 1;
  p.OW = reach_w / p.stride[1] + 1;
  expect_exact(op, "C/groups * R * S", weight.size(1) * p.R * p.S,
               asymmetric || x_zero_point.has_value() || x.scalar_type() == ScalarType::Byte);

  // NHWC (channels step by 1) and NCHW (columns step by 1) are read where they are, anything else is copied once.
  // The result has x's memory format: channels_last if x's channels step by 1 and x is not plainly contiguous.
  Holder holder;
  p.y_channels_last = batched && !x.is_contiguous() && x_stride[1] == 1;
  Tensor source = x;
  if (x_stride[1] != 1 && x_stride[3] != 1) {
    source = torch::stable::contiguous(x);
    x_stride = {p.C * p.H * p.W, p.H * p.W, p.W, 1};
  }
  const Ints row_shape = batched ? Ints{p.N, 1, 1, 1} : Ints{1, 1, 1};
  p.in = input_params<Backend>(op, source, x_scale, x_zero_point, asymmetric, row_shape, &holder);
  ScalarType type;
  p.out = output_params<Backend>(op, x, weight_scale, bias, out_scale, out_zero_point, out_dtype, relu, p.O, &type, &holder);
  weight_params<Backend>(op, weight, packed_weight, groups, x, &p.weight, &p.packed, &holder);
  for (int d = 0; d < 4; ++d) p.x_stride[d] = x_stride[static_cast<size_t>(d)];

  Ints y_shape = {p.N, p.O, p.OH, p.OW};
  if (!batched) y_shape.erase(y_shape.begin());
  Tensor y = empty(y_shape, type, x, p.y_channels_last);
  p.out.y = y.mutable_data_ptr();
  Backend::conv2d(p, x);
  return y;
}

template <class Backend>
Tensor pack_weight(const Tensor& weight, int64_t groups) {
  const char* op = "pack_weight";
  expect_int8(op, "weight", weight);
  QO_EXPECT(weight.dim() == 2 || weight.dim() == 4, op, "weight.shape (N, K) or (O, C/groups, R, S), got ", shape_text(weight));
  QO_EXPECT(groups >= 1 && weight.size(0) % groups == 0 && (groups == 1 || weight.dim() == 4), op,
            "groups to divide the output channels of a convolution, got groups ", groups, " and weight.shape ", shape_text(weight));
  const Tensor plain = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  const WeightShape shape = weight_shape(sizes_of(weight), groups);
  Tensor packed = empty({Backend::packed_bytes(shape)}, ScalarType::Char, weight);
  Backend::pack(plain, shape, packed);
  return packed;
}

inline Tensor unpack_weight(const Tensor& packed_weight, const Ints& shape, int64_t groups) {
  const char* op = "unpack_weight";
  expect_int8(op, "packed_weight", packed_weight);
  const bool conv = shape.size() == 4;
  QO_EXPECT(shape.size() == 2 || conv, op, "shape (N, K) or (O, C/groups, R, S), got ", list_text(shape));
  QO_EXPECT(groups >= 1 && shape[0] % groups == 0 && (groups == 1 || conv), op,
            "groups to divide the output channels of a convolution, got groups ", groups, " and shape ", list_text(shape));
  const PackedLayout layout = packed_layout(shape[0], shape[1], conv ? shape[2] : 1, conv ? shape[3] : 1, groups);
  const int8_t* packed = packed_weight.const_data_ptr<int8_t>();
  QO_EXPECT(packed_weight.is_contiguous() && is_packed_for(packed, packed_weight.numel(), layout), op,
            "packed_weight made by pack_weight from a weight of this shape, got another one");
  Tensor weight = empty(shape, ScalarType::Char, packed_weight);
  unpack_weight_cpu(packed, layout, weight.mutable_data_ptr<int8_t>());
  return weight;
}

}  // namespace quant_ops

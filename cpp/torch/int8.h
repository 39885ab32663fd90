// What int8_gemm, int8_linear and int8_conv2d have in common: how large a sum may be, the activations, the result and its epilogue,
// and the weight. `Backend` supplies, beside the entry points of ops.h,
//   given_zero_points(op, name, tensor, qmin, qmax, holder) -> int32 values where its kernels read them,
//   is_packed_for(packed, shape) and kReadsPlainBesidePacked, of packed weights.
// Read next: linear.h and conv2d.h.
#pragma once

#include <cstdint>

#include "torch/args.h"

namespace quant_ops {

// The largest K (or C/groups * R * S) whose sum cannot overflow int32: |a| <= 128 times |b| <= 128 for signed codes, |a| <= 255
// for unsigned ones and for codes that a zero point corrects.
constexpr int64_t kMaxK = 131071, kMaxKUnsigned = 65793;

inline void expect_exact(const char* op, const char* what, int64_t k, bool unsigned_codes) {
  const int64_t bound = unsigned_codes ? kMaxKUnsigned : kMaxK;
  QO_EXPECT(k <= bound, op, what, " <= ", bound, " so that the int32 sum is exact, got ", k,
            unsigned_codes ? ". Symmetric int8 activations reach 131071; else split the sum." : ". Split the sum into parts.");
}

// Small tensors that an operator's call must keep alive, as contiguous arrays.
struct Holder {
  std::vector<Tensor> tensors;
  std::vector<std::vector<int32_t>> integers;

  const float* floats(const Tensor& t) {
    const bool as_it_is = t.scalar_type() == ScalarType::Float && t.is_contiguous();  // the caller keeps it alive
    if (as_it_is) return static_cast<const float*>(t.const_data_ptr());
    tensors.push_back(as_contiguous(to_type(t, ScalarType::Float)));
    return tensors.back().const_data_ptr<float>();
  }
};

// The int32 values of a zero point of int8 or uint8 codes.
template <class Backend>
const int32_t* code_zero_points(const char* op, const char* name, const Tensor& zero_point, ScalarType codes, Holder* holder) {
  expect_zero_point_dtype(op, name, zero_point);
  const bool is_unsigned = codes == ScalarType::Byte;
  return Backend::given_zero_points(op, name, zero_point, is_unsigned ? 0 : -128, is_unsigned ? 255 : 127, holder);
}

// ---- the input ------------------------------------------------------------------------------------------------------

struct InputArgs {
  const std::optional<Tensor>&scale, &zero_point;
  bool asymmetric;

  // Whether codes of x can be as large as 255, with which a sum overflows earlier.
  bool unsigned_codes(const Tensor& x) const { return asymmetric || zero_point.has_value() || x.scalar_type() == ScalarType::Byte; }
};

// `row_shape`: the shape of a parameter that has one value per row (int8_linear) or per sample (int8_conv2d).
template <class Backend>
InputParams input_params(const char* op, const Tensor& x, const InputArgs& args, const Ints& row_shape, Holder* holder) {
  const ScalarType type = x.scalar_type();
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Char, ScalarType::Byte}),
                  op, "x.dtype in (float32, float16, bfloat16, int8, uint8), got ", dtype_name(type));
  InputParams in{};
  in.x = x.const_data_ptr();
  in.dtype = to_dtype(type);
  if (!args.scale) {
    QO_EXPECT(is_floating(type), op, "x_scale with a quantized x, got x.dtype ", dtype_name(type),
              " and no x_scale. Pass the scale that x was quantized with.");
    QO_EXPECT(!args.zero_point, op, "x_zero_point only together with x_scale, got x_zero_point alone");
    in.mode = args.asymmetric ? InputMode::kDynamicAsymmetric : InputMode::kDynamic;
    return in;
  }
  QO_EXPECT(!args.asymmetric, op, "asymmetric=True only for dynamic quantization, got it with x_scale. Pass x_zero_point instead.");
  in.mode = is_floating(type) ? InputMode::kStatic : InputMode::kQuantized;
  const auto stride_of = [&](const char* name, const Tensor& t) -> int64_t {
    if (t.numel() == 1) return 0;
    QO_EXPECT(sizes_of(t) == row_shape, op, name, " to have one element or the shape ", shape_text(row_shape), ", got ",
              shape_text(t));
    return 1;
  };
  expect_floating(op, "x_scale", *args.scale);
  expect_device(op, "x_scale", *args.scale, x);
  in.scale_stride = stride_of("x_scale", *args.scale);
  in.scale = holder->floats(*args.scale);
  if (args.zero_point) {
    expect_device(op, "x_zero_point", *args.zero_point, x);
    in.zero_point_stride = stride_of("x_zero_point", *args.zero_point);
    in.zero_point = code_zero_points<Backend>(op, "x_zero_point", *args.zero_point, type, holder);
  }
  return in;
}

// The multipliers of the columns of x, of which there are k; null without any.
inline const float* input_multiplier(const char* op, const Tensor& x, const std::optional<Tensor>& multiplier, int64_t k,
                                     Holder* holder) {
  if (!multiplier) return nullptr;
  QO_EXPECT_DTYPE(is_floating(x.scalar_type()), op, "x_multiplier only with a floating x, got x.dtype ",
                  dtype_name(x.scalar_type()), ". Multiply before x is quantized, or fold the multiplier into the weight.");
  expect_floating(op, "x_multiplier", *multiplier);
  expect_device(op, "x_multiplier", *multiplier, x);
  QO_EXPECT(sizes_of(*multiplier) == Ints{k}, op, "x_multiplier.shape == (", k, ",), one element for each column of x, got ",
            shape_text(*multiplier));
  return holder->floats(*multiplier);
}

// ---- the result -----------------------------------------------------------------------------------------------------

struct ResultArgs {
  const Tensor& weight_scale;
  const std::optional<Tensor>&bias, &scale, &zero_point;  // out_scale, out_zero_point
  std::optional<ScalarType> dtype;                        // out_dtype
  bool relu;
  const std::optional<Tensor>&residual, &residual_scale, &residual_zero_point;
  int64_t activation;
};

// The function that relu or activation asks for.
inline Function function_of(const char* op, bool relu, int64_t activation) {
  QO_EXPECT(activation >= 0 && activation < kFunctions, op, "activation in [0, ", kFunctions - 1,
            "]: 0 none, 1 relu, 2 relu6, 3 hardswish, 4 silu, 5 gelu, 6 gelu_tanh, 7 sigmoid, 8 hardsigmoid, got ", activation);
  QO_EXPECT(!relu || activation == 0, op, "relu=True or an activation, got both. Leave relu out.");
  return relu ? Function::kRelu : static_cast<Function>(activation);
}

inline ScalarType result_type(const char* op, const Tensor& x, const ResultArgs& args) {
  if (args.scale) {
    const ScalarType type = args.dtype.value_or(ScalarType::Char);
    QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Char, ScalarType::Byte}), op, "out_dtype int8 or uint8 with out_scale, got ",
                    dtype_name(type));
    return type;
  }
  const ScalarType type = args.dtype.value_or(is_floating(x.scalar_type()) ? x.scalar_type() : ScalarType::Float);
  if (type == ScalarType::Int) {  // the sums themselves
    QO_EXPECT(!args.bias && !args.relu, op, "neither bias nor relu with out_dtype int32, which has the sums before them, got ",
              args.bias ? "bias" : "relu", ". Add them to the scaled sums.");
    QO_EXPECT(!args.residual && args.activation == 0, op,
              "neither residual nor activation with out_dtype int32, which has the sums before them, got ",
              args.residual ? "residual" : "activation", ". Add them to the scaled sums.");
    return type;
  }
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "out_dtype in (float32, float16, bfloat16, int32), got ", dtype_name(type),
                  is_one_of(type, {ScalarType::Char, ScalarType::Byte}) ? ". Integer output needs out_scale." : "");
  return type;
}

// The epilogue and the dtype of the result. `channels`: N of a linear layer, O of a convolution.
template <class Backend>
OutputParams output_params(const char* op, const Tensor& x, const ResultArgs& args, int64_t channels, ScalarType* type,
                           Holder* holder) {
  OutputParams out{};
  const Tensor& weight_scale = args.weight_scale;
  expect_floating(op, "weight_scale", weight_scale);
  expect_device(op, "weight_scale", weight_scale, x);
  const auto shape = weight_scale.sizes();
  bool per_channel = !shape.empty() && shape[0] == channels;
  for (size_t d = 1; d < shape.size(); ++d) per_channel = per_channel && shape[d] == 1;
  QO_EXPECT(per_channel || weight_scale.numel() == 1, op, "weight_scale to have one element or one per output channel (", channels,
            "), got shape ", shape_text(weight_scale));
  out.weight_scale = holder->floats(weight_scale);
  out.weight_scale_stride = weight_scale.numel() == 1 ? 0 : 1;
  if (args.bias) {
    expect_floating(op, "bias", *args.bias);
    expect_device(op, "bias", *args.bias, x);
    QO_EXPECT(sizes_of(*args.bias) == Ints{channels}, op, "bias.shape == (", channels, ",), got ", shape_text(*args.bias));
    out.bias = holder->floats(*args.bias);
  }
  out.function = function_of(op, args.relu, args.activation);
  if (args.scale) {
    expect_floating(op, "out_scale", *args.scale);
    expect_device(op, "out_scale", *args.scale, x);
    QO_EXPECT(args.scale->numel() == 1, op, "out_scale to have one element, got shape ", shape_text(*args.scale));
    out.out_scale = holder->floats(*args.scale);
  }
  QO_EXPECT(args.scale || !args.zero_point, op, "out_zero_point only together with out_scale, got out_zero_point alone");
  *type = result_type(op, x, args);
  if (args.zero_point) {
    QO_EXPECT(args.zero_point->numel() == 1, op, "out_zero_point to have one element, got shape ", shape_text(*args.zero_point));
    expect_device(op, "out_zero_point", *args.zero_point, x);
    out.out_zero_point = code_zero_points<Backend>(op, "out_zero_point", *args.zero_point, *type, holder);
  }
  out.dtype = to_dtype(*type);
  return out;
}

// A tensor with the elements of t and the strides of y, which has its shape: t itself, or a copy.
inline Tensor like_result(const Tensor& t, const Tensor& y, bool channels_last, Holder* holder) {
  bool same = true;
  for (int64_t d = 0; d < y.dim(); ++d) same = same && (y.size(d) == 1 || t.stride(d) == y.stride(d));
  if (same || y.numel() == 0) return t;
  holder->tensors.push_back(empty(sizes_of(y), t.scalar_type(), t, channels_last));
  return torch::stable::copy_(holder->tensors.back(), t);
}

// The residual of a result y, which is dense.
template <class Backend>
ResidualParams residual_params(const char* op, const ResultArgs& args, const Tensor& y, bool channels_last, Holder* holder) {
  ResidualParams residual{};
  if (!args.residual) {
    QO_EXPECT(!args.residual_scale && !args.residual_zero_point, op,
              "residual_scale and residual_zero_point only with residual, got ",
              args.residual_scale ? "residual_scale" : "residual_zero_point", " alone");
    return residual;
  }
  const Tensor& r = *args.residual;
  const ScalarType type = r.scalar_type();
  const bool codes = is_one_of(type, {ScalarType::Char, ScalarType::Byte});
  QO_EXPECT_DTYPE(codes || is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "residual.dtype in (int8, uint8, float32, float16, bfloat16), got ", dtype_name(type));
  expect_device(op, "residual", r, y);
  QO_EXPECT(sizes_of(r) == sizes_of(y), op, "residual to have the shape of the result, ", shape_text(y), ", got ", shape_text(r));
  residual.dtype = to_dtype(type);
  residual.r = like_result(r, y, channels_last, holder).const_data_ptr();
  if (!codes) {
    QO_EXPECT(!args.residual_scale && !args.residual_zero_point, op,
              "residual_scale and residual_zero_point only with a residual of int8 or uint8, got residual.dtype ",
              dtype_name(type));
    return residual;
  }
  QO_EXPECT(args.residual_scale.has_value(), op, "residual_scale with a residual of ", dtype_name(type),
            ", got none. Pass the scale that residual was quantized with.");
  expect_floating(op, "residual_scale", *args.residual_scale);
  expect_device(op, "residual_scale", *args.residual_scale, y);
  QO_EXPECT(args.residual_scale->numel() == 1, op, "residual_scale to have one element, got shape ",
            shape_text(*args.residual_scale));
  residual.scale = holder->floats(*args.residual_scale);
  if (args.residual_zero_point) {
    QO_EXPECT(args.residual_zero_point->numel() == 1, op, "residual_zero_point to have one element, got shape ",
              shape_text(*args.residual_zero_point));
    expect_device(op, "residual_zero_point", *args.residual_zero_point, y);
    residual.zero_point = code_zero_points<Backend>(op, "residual_zero_point", *args.residual_zero_point, type, holder);
  }
  return residual;
}

// ---- the weight -----------------------------------------------------------------------------------------------------

// A weight [o, c, r, s] for `groups`; of a linear layer [o, c, 1, 1].
struct WeightShape {
  int64_t o, c, r, s, groups;
};
template <class Sizes>
WeightShape weight_shape(const Sizes& shape, int64_t groups) {
  const bool conv = shape.size() == 4;
  return {.o = shape[0], .c = shape[1], .r = conv ? shape[2] : 1, .s = conv ? shape[3] : 1, .groups = groups};
}

// What the kernels read of a weight; null what they do not.
struct WeightData {
  const int8_t* plain = nullptr;  // contiguous
  const int8_t* packed = nullptr;
};

template <class Backend>
WeightData weight_data(const char* op, const Tensor& weight, const std::optional<Tensor>& packed_weight, int64_t groups,
                       const Tensor& x, Holder* holder) {
  WeightData data;
  expect_device(op, "weight", weight, x);
  if (packed_weight) {
    expect_int8(op, "packed_weight", *packed_weight);
    expect_device(op, "packed_weight", *packed_weight, x);
    data.packed = packed_weight->const_data_ptr<int8_t>();
    QO_EXPECT(packed_weight->is_contiguous() && Backend::is_packed_for(*packed_weight, weight_shape(weight.sizes(), groups)), op,
              "packed_weight made by pack_weight from this weight, got another one. Call pack_weight(weight, groups) again.");
    if (!Backend::kReadsPlainBesidePacked) return data;
  }
  holder->tensors.push_back(as_contiguous(weight));
  data.plain = holder->tensors.back().const_data_ptr<int8_t>();
  return data;
}

}  // namespace quant_ops

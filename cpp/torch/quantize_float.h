// Simulated floating formats for any device: checks, allocation, the structs of ops.h. `Backend` supplies the entry points
// quantize_float and quantize_block, and seed(tensor), where the kernels find its value.
// Read next: contract/float_format.h, cpu/quantize_float.cpp.
#pragma once

#include "contract/iteration.h"
#include "torch/quantize.h"

namespace quant_ops {

// The arguments of the operators that name a format.
struct FormatArguments {
  int64_t exponent_bits, mantissa_bits;
  std::optional<int64_t> bias;
  std::optional<int64_t> special;
  bool saturate = true, subnormals = true;
  int64_t rounding = 0;
};

// The special codes of the published standard with these widths: OCP FP8, IEEE 754 binary16, bfloat16. With 8 exponent bits float32
// lacks the last exponent.
inline SpecialCodes standard_special(int64_t exponent_bits, int64_t mantissa_bits) {
  if (exponent_bits == 4 && mantissa_bits == 3) return SpecialCodes::kNan;
  const bool ieee = exponent_bits == 8 || (exponent_bits == 5 && (mantissa_bits == 2 || mantissa_bits == 10));
  return ieee ? SpecialCodes::kIeee : SpecialCodes::kNone;
}

inline FloatFormat expect_format(const char* op, const FormatArguments& a) {
  const int64_t e = a.exponent_bits, m = a.mantissa_bits;
  QO_EXPECT(e >= 1 && e <= 8, op, "exponent_bits in [1, 8], got ", e, ". For integer grids of n steps a side use 1 exponent bit.");
  QO_EXPECT(m >= 0 && m <= 23, op, "mantissa_bits in [0, 23], got ", m);
  const int64_t standard_bias = (int64_t{1} << (e - 1)) - 1, bias = a.bias.value_or(standard_bias);
  const int64_t kind =
      a.special.value_or(static_cast<int64_t>(bias == standard_bias || e == 8 ? standard_special(e, m) : SpecialCodes::kNone));
  QO_EXPECT(kind >= 0 && kind <= 2, op, "special in 0 (none), 1 (nan), 2 (ieee), got ", kind);
  QO_EXPECT(a.rounding >= 0 && a.rounding <= 3, op,
            "rounding in 0 (nearest_even), 1 (nearest_away), 2 (toward_zero), 3 (stochastic), got ", a.rounding);
  QO_EXPECT(a.saturate || kind != 0, op,
            "a format with codes for infinity or NaN (special 1 or 2) for saturate=False, got special 0. Use saturate=True.");
  const SpecialCodes special = static_cast<SpecialCodes>(kind);
  const int64_t reserved = special == SpecialCodes::kIeee ? int64_t{1} << m : special == SpecialCodes::kNan ? 1 : 0;
  const int64_t last = (int64_t{1} << (e + m)) - 1 - reserved;
  QO_EXPECT(last > 0 && (a.subnormals || last >> m > 0), op, "a format with a finite value other than 0, got exponent_bits ", e,
            ", mantissa_bits ", m, ", special ", kind, a.subnormals ? "" : " without subnormals", ". Use special 0 (none).");
  QO_EXPECT(e < 8 || special == SpecialCodes::kIeee, op,
            "special 2 (ieee) with 8 exponent bits, whose last exponent float32 lacks, got ", kind);
  const int64_t least = std::max<int64_t>((last >> m) - 127, -126);  // float32's exponents are -126 to 127
  QO_EXPECT(bias >= least && bias <= 127, op, "a bias in [", least, ", 127], so that float32 has the numbers, got ", bias,
            ". Use a scale for others.");
  return float_format(static_cast<int>(e), static_cast<int>(m), static_cast<int>(bias), special, a.saturate, a.subnormals,
                      static_cast<Rounding>(a.rounding));
}

// The seed of stochastic rounding; of others it is not read.
template <class Backend>
Seed expect_seed(const char* op, const std::optional<Tensor>& seed, const FloatFormat& format, const Tensor& tensor) {
  if (format.rounding != Rounding::kStochastic) return {};
  QO_EXPECT(seed.has_value(), op, "a seed with stochastic rounding, got None");
  QO_EXPECT_DTYPE(seed->scalar_type() == ScalarType::Long, op, "seed.dtype int64, got ", dtype_name(seed->scalar_type()));
  QO_EXPECT(seed->numel() == 1, op, "a seed of one element, got seed.shape ", shape_text(*seed));
  if (!seed->is_cpu()) expect_device(op, "seed", *seed, tensor);
  return Backend::seed(*seed);
}

// ---- one scale, or scales that broadcast ----------------------------------------------------------------------------

template <class Backend>
Tensor quantize_float(const char* op, const Tensor* grad, const Tensor& tensor, const FormatArguments& arguments,
                      const std::optional<Tensor>& scale, const std::optional<Tensor>& seed,
                      const std::optional<Ints>& block_size) {
  expect_floating(op, "tensor", tensor);
  const FloatFormat format = expect_format(op, arguments);
  const ScalarType type = tensor.scalar_type();
  if (grad != nullptr) expect_like(op, *grad, tensor);
  const Seed random = expect_seed<Backend>(op, seed, format, tensor);
  if (scale) {
    expect_floating(op, "scale", *scale);
    expect_device(op, "scale", *scale, tensor);
  }
  const Tensor divisor = scale ? to_type(*scale, compute_type(type)) : tensor;
  const Tensor gradient = grad != nullptr ? to_type(*grad, type) : tensor;
  Space space(op, tensor, block_size);
  space.add(tensor);
  Tensor y = empty_like(tensor, type);
  space.add(y);
  scale ? space.add_parameter("scale", divisor) : space.add_constant();
  grad != nullptr ? space.add(gradient) : space.add_index();
  if (tensor.numel() == 0) return y;

  const QuantizeFloatParams p{
      .it = space.iteration(),
      .x = tensor.const_data_ptr(),
      .grad = grad != nullptr ? gradient.const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .dtype = to_dtype(type),
      .scale = scale ? divisor.const_data_ptr() : nullptr,
      .format = format,
      .seed = random,
  };
  Backend::quantize_float(op, p, tensor);
  return y;
}

template <class Backend>
Tensor quant_float_forward(const Tensor& tensor, int64_t exponent_bits, int64_t mantissa_bits, const std::optional<Tensor>& scale,
                           const std::optional<Tensor>& seed, const std::optional<int64_t>& bias,
                           const std::optional<int64_t>& special, bool saturate, bool subnormals, int64_t rounding,
                           const std::optional<Ints>& block_size) {
  return quantize_float<Backend>("quant_float_forward", nullptr, tensor,
                                 {.exponent_bits = exponent_bits,
                                  .mantissa_bits = mantissa_bits,
                                  .bias = bias,
                                  .special = special,
                                  .saturate = saturate,
                                  .subnormals = subnormals,
                                  .rounding = rounding},
                                 scale, seed, block_size);
}

template <class Backend>
Tensor quant_float_backward(const Tensor& grad, const Tensor& tensor, int64_t exponent_bits, int64_t mantissa_bits,
                            const std::optional<Tensor>& scale, const std::optional<int64_t>& bias,
                            const std::optional<int64_t>& special, bool subnormals, const std::optional<Ints>& block_size) {
  return quantize_float<Backend>(
      "quant_float_backward", &grad, tensor,
      {.exponent_bits = exponent_bits, .mantissa_bits = mantissa_bits, .bias = bias, .special = special, .subnormals = subnormals},
      scale, std::nullopt, block_size);
}

// ---- a scale for every block, from its data -------------------------------------------------------------------------

// Whether the tensor fills a piece of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// t in the dtype and the memory layout of `like`, which is dense.
inline Tensor laid_out_as(const Tensor& t, const Tensor& like) {
  bool same = t.scalar_type() == like.scalar_type();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) <= 1 || t.stride(d) == like.stride(d);
  if (same) return t;
  Tensor copy = empty_like(like, like.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

template <class Backend>
Tensor quantize_block(const char* op, const Tensor* grad, const Tensor& tensor, int64_t dim, int64_t block_size,
                      const FormatArguments& arguments, const std::optional<Tensor>& tensor_scale,
                      const std::optional<Tensor>& seed, int64_t scale_rule, const std::optional<double>& scale_divisor) {
  const ScalarType type = tensor.scalar_type();
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "tensor.dtype in (float32, float16, bfloat16), got ", dtype_name(type),
                  type == ScalarType::Double ? ". The scales of blocks are computed in float32: convert it first." : "");
  const int64_t dims = tensor.dim();
  QO_EXPECT(dims >= 1, op, "tensor to have at least one dimension, got shape ", shape_text(tensor));
  QO_EXPECT(dim >= -dims && dim < dims, op, "dim in [", -dims, ", ", dims - 1, "], got ", dim);
  QO_EXPECT(block_size >= 1, op, "block_size >= 1, got ", block_size);
  expect_elements(op, "tensor", tensor.sizes());
  const FloatFormat format = expect_format(op, arguments);
  QO_EXPECT(scale_rule >= 0 && scale_rule <= 6, op,
            "scale_rule in 0 (floor), 1 (even), 2 (ceil), 3 (round_up), 4 (e4m3), 5 (bfloat16), 6 (float32), got ", scale_rule);
  const ScaleRule rule = static_cast<ScaleRule>(scale_rule);
  const double divisor = scale_divisor.value_or(static_cast<double>(format.largest));
  QO_EXPECT(is_power_of_two_rule(rule) || (divisor >= 0x1p-126 && divisor < 0x1p128), op, "scale_divisor in [2^-126, 2^128), got ",
            divisor);
  QO_EXPECT(!scale_divisor || !is_power_of_two_rule(rule), op,
            "no scale_divisor with a scale that is a power of two, got one with scale_rule ", scale_rule, ".");
  if (tensor_scale) {
    QO_EXPECT(rule == ScaleRule::kE4m3, op, "scale_rule 4 (e4m3) with a tensor_scale, got ", scale_rule);
    QO_EXPECT_DTYPE(tensor_scale->scalar_type() == ScalarType::Float, op, "tensor_scale.dtype float32, got ",
                    dtype_name(tensor_scale->scalar_type()));
    QO_EXPECT(tensor_scale->numel() == 1, op, "a tensor_scale of one element, got shape ", shape_text(*tensor_scale));
    expect_device(op, "tensor_scale", *tensor_scale, tensor);
  }
  if (grad != nullptr) expect_like(op, *grad, tensor);
  const Seed random = expect_seed<Backend>(op, seed, format, tensor);

  const Tensor x = is_dense(tensor) ? tensor : allocated(tensor.numel(), type, [&] { return torch::stable::clone(tensor); });
  Tensor y = empty_like(x, type);
  if (x.numel() == 0) return y;
  const Tensor gradient = grad != nullptr ? laid_out_as(*grad, x) : x;
  Space space(op, x, std::nullopt);
  space.add_index();
  space.add(x);
  Iteration order = space.iteration();
  sort_and_coalesce(&order, 1);
  const int64_t length = x.size(dim), inner = length > 1 ? x.stride(dim) : x.numel();
  const QuantizeBlockParams p{
      .outer = x.numel() / (length * inner),
      .length = length,
      .inner = inner,
      .block = std::min(block_size, length),
      .x = x.const_data_ptr(),
      .grad = grad != nullptr ? gradient.const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .dtype = to_dtype(type),
      .format = {.element = format, .rule = rule, .divisor = static_cast<float>(divisor)},
      .tensor_scale = tensor_scale ? tensor_scale->const_data_ptr<float>() : nullptr,
      .seed = random,
      .order = order,
  };
  Backend::quantize_block(op, p, tensor);
  return y;
}

template <class Backend>
Tensor quant_block_forward(const Tensor& tensor, int64_t dim, int64_t block_size, int64_t exponent_bits, int64_t mantissa_bits,
                           const std::optional<Tensor>& tensor_scale, const std::optional<Tensor>& seed,
                           const std::optional<int64_t>& bias, const std::optional<int64_t>& special, int64_t rounding,
                           int64_t scale_rule, const std::optional<double>& scale_divisor) {
  return quantize_block<Backend>(
      "quant_block_forward", nullptr, tensor, dim, block_size,
      {.exponent_bits = exponent_bits, .mantissa_bits = mantissa_bits, .bias = bias, .special = special, .rounding = rounding},
      tensor_scale, seed, scale_rule, scale_divisor);
}

template <class Backend>
Tensor quant_block_backward(const Tensor& grad, const Tensor& tensor, int64_t dim, int64_t block_size, int64_t exponent_bits,
                            int64_t mantissa_bits, const std::optional<Tensor>& tensor_scale, const std::optional<int64_t>& bias,
                            const std::optional<int64_t>& special, int64_t scale_rule, const std::optional<double>& scale_divisor) {
  return quantize_block<Backend>("quant_block_backward", &grad, tensor, dim, block_size,
                                 {.exponent_bits = exponent_bits, .mantissa_bits = mantissa_bits, .bias = bias, .special = special},
                                 tensor_scale, std::nullopt, scale_rule, scale_divisor);
}

}  // namespace quant_ops

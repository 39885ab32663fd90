// Scales and biases of the columns of a product, and whether its rounding needs care: see columns.h.
#include "cpu/columns.h"

#include <cmath>

#include "cpu/activations.h"

namespace quant_ops {

CodeOutput code_output(DType dtype, float scale, int32_t zero_point, Function function, const float* row_scale, int64_t rows,
                       const float* column_scale, const float* bias, int64_t columns, double residual) {
  const auto largest = [](const float* x, int64_t n) {
    Range range{0.0f, 0.0f, 0};
    kernels().range(x, DType::kFloat32, n, true, &range);
    return double{bits_float(range.abs_bits)};  // NaN if x contains one; then no comparison below holds
  };
  const bool is_unsigned = dtype == DType::kUInt8;
  const int32_t least = is_unsigned ? 0 : -128, most = is_unsigned ? 255 : 127;
  const auto code_of = [&](float x) {
    const float steps =
        clamp_steps(quantize_steps(x, scale), static_cast<float>(least - zero_point), static_cast<float>(most - zero_point));
    return static_cast<int32_t>(steps_to_code(steps, zero_point, least, most));
  };
  const double largest_bias = largest(bias, columns);
  const double value = 0x1p31 * largest(row_scale, rows) * largest(column_scale, columns) + largest_bias + residual;
  CodeOutput codes;
  const int32_t shift = is_unsigned ? 0 : kSignedOffset;
  codes.scale = scale;
  codes.reciprocal = 1.0f / scale;
  codes.divide = !(scale > 0x1p-100f && scale < 0x1p100f && value < 0x1p30 * scale);
  // In units of 2^-24, the relative error of one rounding: an unsaturated quotient is below 256, so the product is below that plus
  // bias and residual; each is rounded a few times, and their sum in steps and the value itself and its quotient once.
  if (!codes.divide) codes.slack = static_cast<float>(0x1p-24 * (2048.0 + (6.0 * largest_bias + 8.0 * residual) / scale));
  codes.zero_point = zero_point + shift;
  codes.least = (function == Function::kNone ? least : zero_point) + shift;
  codes.most = (function == Function::kRelu6 ? code_of(6.0f) : most) + shift;
  codes.flip = is_unsigned ? 0 : 0x80;
  return codes;
}

SharedColumns share_columns(int64_t count, const int32_t* column_sum, const float* column_scale, const float* bias, float row_scale,
                            int32_t row_zero, const CodeOutput& codes, void* memory) {
  int32_t* start = static_cast<int32_t*>(memory);
  float* scale = static_cast<float*>(memory) + count;
  float* steps_scale = scale + count;
  float* steps_bias = steps_scale + count;
  const float offset = codes.offset();
  for (int64_t n = 0; n < count; ++n) {
    start[n] = static_cast<int32_t>(0u - static_cast<uint32_t>(row_zero) * static_cast<uint32_t>(column_sum[n]));
    scale[n] = row_scale * column_scale[n];
    steps_scale[n] = scale[n] * codes.reciprocal;
    steps_bias[n] = bias[n] * codes.reciprocal + offset;
  }
  return {start, scale, steps_scale, steps_bias};
}

ColumnsPlan plan_columns(const OutputParams& out, const PackedLayout& l, int64_t rows, int64_t shared, ScratchLayout* scratch) {
  const bool depthwise = l.form == WeightForm::kDepthwise;
  ColumnsPlan plan{depthwise ? l.padded_n : l.products * l.padded_n, ColumnsPlan::kNoCopy, ColumnsPlan::kNoCopy};
  const bool unpadded = plan.count == l.out_channels;
  const int64_t bytes = plan.count * int64_t{sizeof(float)};
  if (!unpadded || out.weight_scale_stride != 1) plan.scale_at = scratch->add(bytes);
  if (!unpadded || out.bias == nullptr) plan.bias_at = scratch->add(bytes);
  plan.shared_at = scratch->add(shared * plan.count * kSharedBytes);
  plan.far = rows * l.out_channels * dtype_bytes(out.dtype) > kFarBytes;
  return plan;
}

Columns::Columns(const ColumnsPlan& plan, const OutputParams& out, const PackedLayout& l, const Scratch& scratch)
    : count_(plan.count), shared_at_(plan.shared_at), far_(plan.far), scale_(out.weight_scale), bias_(out.bias) {
  const bool depthwise = l.form == WeightForm::kDepthwise;
  const int64_t products = depthwise ? 1 : l.products, n = depthwise ? l.out_channels : l.n;
  const auto padded = [&](int64_t at, const float* from, int64_t stride, float missing) {
    float* to = scratch.at<float>(at);
    for (int64_t g = 0; g < products; ++g)
      for (int64_t j = 0; j < l.padded_n; ++j) to[g * l.padded_n + j] = j < n && from ? from[(g * n + j) * stride] : missing;
    return to;
  };
  if (plan.scale_at != ColumnsPlan::kNoCopy) scale_ = padded(plan.scale_at, out.weight_scale, out.weight_scale_stride, 0.0f);
  if (plan.bias_at != ColumnsPlan::kNoCopy) bias_ = padded(plan.bias_at, out.bias, 1, -0.0f);  // adding -0 changes nothing

  // Rounding to codes keeps the order of the values if the scale is positive, so that clamping can wait until afterwards.
  const bool codes = out.out_scale != nullptr;
  const bool clamps =
      (out.function == Function::kRelu || (codes && out.function == Function::kRelu6)) && !(codes && *out.out_scale < 0);
  const ResidualParams& r = out.residual;
  clamp_ = clamps ? out.function : Function::kNone;
  extras_ = {.function = clamps ? Function::kNone : out.function,
             .residual_dtype = r.dtype,
             .residual_scale = r.scale ? *r.scale : 1.0f,
             .residual_zero = r.zero_point ? *r.zero_point : 0};
  has_extras_ = r.r != nullptr || extras_.function != Function::kNone;
}

CodeOutput Columns::codes(const OutputParams& out, const float* row_scale, int64_t rows) const {
  if (dtype_bytes(out.dtype) != 1) return {};
  const ResidualParams& r = out.residual;
  // sums with a floating residual, however large, are made steps only when they are complete
  const double residual = r.r == nullptr || r.scale == nullptr ? 0.0 : 255.0 * std::fabs(double{*r.scale});
  return code_output(out.dtype, *out.out_scale, out.out_zero_point ? *out.out_zero_point : 0, clamp_, row_scale, rows, scale_,
                     bias_, count_, residual);
}

SharedColumns Columns::share(int64_t i, const int32_t* column_sum, float row_scale, int32_t row_zero, const CodeOutput& codes,
                             const Scratch& scratch) const {
  void* memory = scratch.at<char>(shared_at_ + i * count_ * kSharedBytes);
  return share_columns(count_, column_sum, scale_, bias_, row_scale, row_zero, codes, memory);
}

TileOutput Columns::output(const OutputParams& out, const int32_t* column_sum, int64_t column) const {
  TileOutput o;
  o.dtype = out.dtype;
  o.column_sum = column_sum;
  o.column_scale = scale_ + column;
  o.bias = bias_ + column;
  o.floor = clamp_ == Function::kNone ? -INFINITY : 0.0f;
  o.extras = has_extras_ ? &extras_ : nullptr;
  o.far = far_;
  return o;
}

}  // namespace quant_ops

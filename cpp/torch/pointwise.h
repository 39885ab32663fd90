// requantize, int8_add, int8_mul and int8_cat for any device: checks, allocation, PointwiseParams. `Backend` supplies pointwise(op,
// params, x). The formula is in contract/ops.h. Read next: cpu/pointwise.cpp.
#pragma once

#include "torch/int8.h"

namespace quant_ops {

// ---- codes and their scale ------------------------------------------------------------------------------------------

inline void expect_codes_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Char, ScalarType::Byte}), op, name, ".dtype in (int8, uint8), got ",
                  dtype_name(type),
                  is_floating(type) ? ". Quantize it first, e.g. with quant_tensor_forward(simulate=False)." : "");
}

// The one element of a scale.
inline const float* scale_of_codes(const char* op, const char* name, const Tensor& scale, const Tensor& x, Holder* holder) {
  expect_floating(op, name, scale);
  expect_device(op, name, scale, x);
  QO_EXPECT(scale.numel() == 1, op, name, " to have one element, got shape ", shape_text(scale));
  return holder->floats(scale);
}

// The one element of the zero point of codes of this type; null without one.
template <class Backend>
const int32_t* zero_point_of_codes(const char* op, const char* name, const Tensor* zero_point, ScalarType codes, const Tensor& x,
                                   Holder* holder) {
  if (zero_point == nullptr) return nullptr;
  QO_EXPECT(zero_point->numel() == 1, op, name, " to have one element, got shape ", shape_text(*zero_point));
  expect_device(op, name, *zero_point, x);
  return code_zero_points<Backend>(op, name, *zero_point, codes, holder);
}
template <class Backend>
const int32_t* zero_point_of_codes(const char* op, const char* name, const std::optional<Tensor>& zero_point, ScalarType codes,
                                   const Tensor& x, Holder* holder) {
  return zero_point_of_codes<Backend>(op, name, zero_point ? &*zero_point : nullptr, codes, x, holder);
}

// ---- the result -----------------------------------------------------------------------------------------------------

// What an operator on codes is asked to give: out_scale, out_zero_point and out_dtype.
struct CodesResultArgs {
  const std::optional<Tensor>&scale, &zero_point;
  std::optional<ScalarType> dtype;
};

// The conversion and the dtype of the result, whose y the caller sets.
template <class Backend>
ResultParams result_params(const char* op, const Tensor& x, const CodesResultArgs& args, ScalarType* type, Holder* holder) {
  ResultParams out{};
  QO_EXPECT(args.scale || !args.zero_point, op, "out_zero_point only together with out_scale, got out_zero_point alone");
  *type = args.dtype.value_or(args.scale ? ScalarType::Char : ScalarType::Float);
  if (args.scale) {
    QO_EXPECT_DTYPE(is_one_of(*type, {ScalarType::Char, ScalarType::Byte}), op, "out_dtype int8 or uint8 with out_scale, got ",
                    dtype_name(*type));
    out.scale = scale_of_codes(op, "out_scale", *args.scale, x, holder);
    out.zero_point = zero_point_of_codes<Backend>(op, "out_zero_point", args.zero_point, *type, x, holder);
  } else {
    QO_EXPECT_DTYPE(is_one_of(*type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                    "out_dtype in (float32, float16, bfloat16), got ", dtype_name(*type),
                    is_one_of(*type, {ScalarType::Char, ScalarType::Byte}) ? ". Integer output needs out_scale." : "");
  }
  out.dtype = to_dtype(*type);
  return out;
}

// ---- elements in the order of memory --------------------------------------------------------------------------------

// Whether t's elements lie as those of a dense tensor do, in torch's order or (4-D) in channels_last.
inline bool is_dense(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes(), strides = t.strides();
  const size_t dims = sizes.size(), from_innermost[] = {1, 3, 2, 0};
  int64_t step = 1;
  for (size_t i = 0; i < dims; ++i) {
    const size_t d = channels_last ? from_innermost[i] : dims - 1 - i;
    if (sizes[d] != 1 && strides[d] != step) return false;
    step *= sizes[d];
  }
  return true;
}

// An empty tensor that lies as t does, if t is dense; else in torch's order for a tensor made like it.
inline Tensor dense_like(const Tensor& t, ScalarType type) {
  if (t.is_contiguous()) return empty(sizes_of(t), type, t);
  const auto step = t.strides();
  const bool channels_last = t.dim() == 4 && step[1] == 1 && step[3] == t.size(1) && is_dense(t, true);
  return channels_last ? empty(sizes_of(t), type, t, true) : empty_like(t, type);  // empty_like takes a microsecond
}

// t's elements where y has them: t itself or a copy.
inline Tensor in_order_of(const Tensor& y, const Tensor& t) {
  const auto sizes = y.sizes();
  const auto to = y.strides(), from = t.strides();
  bool same = true;
  for (size_t d = 0; d < sizes.size(); ++d) same = same && (sizes[d] <= 1 || to[d] == from[d]);
  if (same || t.numel() == 0) return t;
  Tensor copy = dense_like(y, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// ---- the operators --------------------------------------------------------------------------------------------------

template <class Backend>
Tensor requantize(const Tensor& x, const Tensor& x_scale, const std::optional<Tensor>& x_zero_point,
                  const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                  std::optional<ScalarType> out_dtype, int64_t activation) {
  const char* op = "requantize";
  expect_codes_dtype(op, "x", x);
  expect_elements(op, "x", x.sizes());
  Holder holder;
  ScalarType type;
  PointwiseParams p{
      .rows = 1,
      .columns = x.numel(),
      .x_dtype = to_dtype(x.scalar_type()),
      .x_scale = scale_of_codes(op, "x_scale", x_scale, x, &holder),
      .x_zero_point = zero_point_of_codes<Backend>(op, "x_zero_point", x_zero_point, x.scalar_type(), x, &holder),
      .function = function_of(op, false, activation),
      .out = result_params<Backend>(op, x, {.scale = out_scale, .zero_point = out_zero_point, .dtype = out_dtype}, &type, &holder),
      .y_stride = x.numel()};
  Tensor y = dense_like(x, type);
  const Tensor source = in_order_of(y, x);
  p.x = source.const_data_ptr();
  p.out.y = y.mutable_data_ptr();
  Backend::pointwise(op, p, x);
  return y;
}

// One of two tensors of codes that are added or multiplied.
struct CodesArgs {
  const Tensor &codes, &scale;
  const std::optional<Tensor>& zero_point;
};

// Of a and b as one row, whose memory the caller sets.
template <class Backend>
PointwiseParams params_of_two(const char* op, const CodesArgs& a, const CodesArgs& b, const CodesResultArgs& out,
                              int64_t activation, ScalarType* type, Holder* holder) {
  const ScalarType a_type = a.codes.scalar_type(), b_type = b.codes.scalar_type();
  return {.rows = 1,
          .columns = a.codes.numel(),
          .x_dtype = to_dtype(a_type),
          .x_scale = scale_of_codes(op, "a_scale", a.scale, a.codes, holder),
          .x_zero_point = zero_point_of_codes<Backend>(op, "a_zero_point", a.zero_point, a_type, a.codes, holder),
          .residual = {.dtype = to_dtype(b_type),
                       .scale = scale_of_codes(op, "b_scale", b.scale, a.codes, holder),
                       .zero_point = zero_point_of_codes<Backend>(op, "b_zero_point", b.zero_point, b_type, a.codes, holder)},
          .function = function_of(op, false, activation),
          .out = result_params<Backend>(op, a.codes, out, type, holder),
          .y_stride = a.codes.numel()};
}

template <class Backend>
Tensor int8_add(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                const std::optional<Tensor>& a_zero_point, const std::optional<Tensor>& b_zero_point,
                const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                std::optional<ScalarType> out_dtype, int64_t activation) {
  const char* op = "int8_add";
  expect_codes_dtype(op, "a", a);
  expect_codes_dtype(op, "b", b);
  expect_device(op, "b", b, a);
  QO_EXPECT(sizes_of(a) == sizes_of(b), op, "a.shape == b.shape, got ", shape_text(a), " and ", shape_text(b),
            ". Expand the smaller one.");
  expect_elements(op, "a", a.sizes());
  Holder holder;
  ScalarType type;
  PointwiseParams p =
      params_of_two<Backend>(op, {a, a_scale, a_zero_point}, {b, b_scale, b_zero_point},
                             {.scale = out_scale, .zero_point = out_zero_point, .dtype = out_dtype}, activation, &type, &holder);
  Tensor y = dense_like(a, type);
  const Tensor a_source = in_order_of(y, a), b_source = in_order_of(y, b);
  p.x = a_source.const_data_ptr();
  p.residual.r = b_source.const_data_ptr();
  p.out.y = y.mutable_data_ptr();
  Backend::pointwise(op, p, a);
  return y;
}

// How the elements of a, as they lie in memory, meet those of a factor of the same sizes, or (N, C, 1, 1) for an image.
struct FactorRows {
  int64_t rows, columns, shared_rows;
  bool is_column;
};
inline FactorRows factor_rows(const Ints& a, bool per_channel, bool channels_last) {
  int64_t elements = 1;
  for (int64_t size : a) elements *= size;
  if (!per_channel) return {1, elements, 1, false};
  const int64_t pixels = a[2] * a[3];
  if (channels_last) return {a[0] * pixels, a[1], std::max<int64_t>(pixels, 1), false};
  return {a[0] * a[1], pixels, 1, true};
}

// Whether b has one element for each channel of the image a, and not more.
inline bool is_per_channel(const Ints& a, const Ints& b) { return a != b && a.size() == 4 && b == Ints{a[0], a[1], 1, 1}; }

template <class Backend>
Tensor int8_mul(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                const std::optional<Tensor>& a_zero_point, const std::optional<Tensor>& b_zero_point,
                const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                std::optional<ScalarType> out_dtype, int64_t activation) {
  const char* op = "int8_mul";
  expect_codes_dtype(op, "a", a);
  expect_codes_dtype(op, "b", b);
  expect_device(op, "b", b, a);
  const Ints sizes = sizes_of(a);
  const bool per_channel = is_per_channel(sizes, sizes_of(b));
  QO_EXPECT(per_channel || sizes_of(b) == sizes, op, "b.shape == a.shape, or (N, C, 1, 1) with a of (N, C, H, W), got a of ",
            shape_text(a), " and b of ", shape_text(b), ". Expand the smaller one.");
  expect_elements(op, "a", a.sizes());
  Holder holder;
  ScalarType type;
  PointwiseParams p =
      params_of_two<Backend>(op, {a, a_scale, a_zero_point}, {b, b_scale, b_zero_point},
                             {.scale = out_scale, .zero_point = out_zero_point, .dtype = out_dtype}, activation, &type, &holder);
  p.multiplies = true;
  const Tensor y = dense_like(a, type);
  const bool channels_last = !y.is_contiguous() && sizes.size() == 4 && is_dense(y, true);
  const bool rows_of_pixels = !per_channel || channels_last || y.is_contiguous();
  Tensor in_rows = rows_of_pixels ? y : empty(sizes, type, a);
  const Tensor a_source = in_order_of(in_rows, a), b_source = per_channel ? as_contiguous(b) : in_order_of(in_rows, b);
  const FactorRows rows = factor_rows(sizes, per_channel, channels_last);
  p.rows = rows.rows;
  p.columns = p.y_stride = rows.columns;
  p.shared_rows = rows.shared_rows;
  p.factor_is_column = rows.is_column;
  p.x = a_source.const_data_ptr();
  p.residual.r = b_source.const_data_ptr();
  p.out.y = in_rows.mutable_data_ptr();
  Backend::pointwise(op, p, a);
  if (rows_of_pixels) return y;
  Tensor result = y;
  torch::stable::copy_(result, in_rows);
  return result;
}

// The memory of a dense tensor of these sizes as rows, of which those of several tensors stand side by side in their concatenation
// along `dim`.
struct CatRows {
  int64_t rows, columns;
};
template <class Sizes>
CatRows cat_rows(const Sizes& sizes, int64_t dim, bool channels_last) {
  const size_t from_outermost[] = {0, 2, 3, 1};
  CatRows r{1, 1};
  bool inside = false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const size_t d = channels_last ? from_outermost[i] : i;
    inside = inside || static_cast<int64_t>(d) == dim;
    (inside ? r.columns : r.rows) *= sizes[d];
  }
  return r;
}

inline void expect_cat(const char* op, const std::vector<Tensor>& tensors, size_t scales, size_t zero_points, int64_t dim) {
  QO_EXPECT(!tensors.empty(), op, "at least one tensor, got none");
  QO_EXPECT(scales == tensors.size(), op, "a scale for each of the ", tensors.size(), " tensors, got ", scales);
  QO_EXPECT(zero_points == 0 || zero_points == tensors.size(), op, "no zero points or one for each of the ", tensors.size(),
            " tensors, got ", zero_points);
  const Tensor& first = tensors[0];
  const int64_t dims = first.dim();
  QO_EXPECT(dim >= -dims && dim < dims, op, "dim in [", -dims, ", ", dims - 1, "], got ", dim);
  for (const Tensor& t : tensors) {
    expect_codes_dtype(op, "tensors", t);
    expect_device(op, "tensors", t, first);
    bool alike = t.dim() == dims;
    for (int64_t d = 0; alike && d < dims; ++d) alike = d == (dim < 0 ? dim + dims : dim) || t.size(d) == first.size(d);
    QO_EXPECT(alike, op, "tensors that differ in dimension ", dim, " alone, got shapes ", shape_text(first), " and ",
              shape_text(t));
  }
}

template <class Backend>
Tensor int8_cat(const std::vector<Tensor>& tensors, const std::vector<Tensor>& scales, const std::vector<Tensor>& zero_points,
                int64_t dim, const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                std::optional<ScalarType> out_dtype) {
  const char* op = "int8_cat";
  expect_cat(op, tensors, scales.size(), zero_points.size(), dim);
  const Tensor& first = tensors[0];
  if (dim < 0) dim += first.dim();
  const bool channels_last = first.dim() == 4 && !first.is_contiguous() && first.stride(1) == 1;
  Ints shape = sizes_of(first);
  for (size_t i = 1; i < tensors.size(); ++i) shape[static_cast<size_t>(dim)] += tensors[i].size(dim);
  expect_elements(op, "a result", shape);
  Holder holder;
  ScalarType type;
  PointwiseParams p{.function = Function::kNone,
                    .out = result_params<Backend>(op, first, {.scale = out_scale, .zero_point = out_zero_point, .dtype = out_dtype},
                                                  &type, &holder)};
  Tensor y = empty(shape, type, first, channels_last);
  p.y_stride = cat_rows(y.sizes(), dim, channels_last).columns;
  char* to = static_cast<char*>(y.mutable_data_ptr());
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor t = tensors[i];
    if (!is_dense(t, channels_last)) {
      t = empty(sizes_of(t), t.scalar_type(), t, channels_last);
      torch::stable::copy_(t, tensors[i]);
    }
    const ScalarType codes = t.scalar_type();
    const CatRows rows = cat_rows(t.sizes(), dim, channels_last);
    p.rows = rows.rows;
    p.columns = rows.columns;
    p.x = t.const_data_ptr();
    p.x_dtype = to_dtype(codes);
    p.x_scale = scale_of_codes(op, "scales", scales[i], first, &holder);
    p.x_zero_point =
        zero_point_of_codes<Backend>(op, "zero_points", zero_points.empty() ? nullptr : &zero_points[i], codes, first, &holder);
    p.out.y = to;
    Backend::pointwise(op, p, first);
    to += p.columns * dtype_bytes(p.out.dtype);
  }
  return y;
}

}  // namespace quant_ops

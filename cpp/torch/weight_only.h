// weight_only_linear, pack_weight_only and unpack_weight_only: checks, allocation, WeightOnlyParams. `Backend` supplies
//   weight_only(op, params, x), weight_only_bytes(shape), pack(weight, shape, packed), unpack(packed, shape, weight),
//   is_packed_for(packed, shape)           of a WeightOnlyShape
//   expect_between(op, name, tensor, low, high)   the values of an integer tensor, where they can be looked at
// Read next: weight_only_embedding.h; contract/weight_only_layout.h.
#pragma once

#include "torch/int8.h"
#include "torch/logged.h"

namespace quant_ops {

struct WeightOnlyShape {
  int64_t n, k;
  int bits;
  int64_t group;  // k of a group; of a whole column where group_size is -1

  int64_t groups() const { return k == 0 ? 1 : (k + group - 1) / group; }
};

inline WeightOnlyShape weight_only_shape(const char* op, const Ints& shape, int64_t bits, int64_t group_size) {
  QO_EXPECT(shape.size() == 2, op, "weight.shape (N, K), got ", shape_text(shape));
  for (int64_t size : shape) QO_EXPECT(size >= 0, op, "sizes >= 0, got shape ", shape_text(shape));
  expect_elements(op, "weight", shape);
  QO_EXPECT(bits == 4 || bits == 8, op, "bits 4 or 8, got ", bits);
  QO_EXPECT(group_size == -1 || group_size == 32 || group_size == 64 || group_size == 128 || group_size == 256, op,
            "group_size 32, 64, 128, 256 or -1 (one group a row of the weight), got ", group_size);
  const int64_t whole = std::max<int64_t>(shape[1], 1);
  return {.n = shape[0],
          .k = shape[1],
          .bits = static_cast<int>(bits),
          .group = group_size == -1 ? whole : std::min(group_size, whole)};
}

template <class Backend>
Tensor packed_weight_only(const char* op, const Tensor& weight, const WeightOnlyShape& shape) {
  const Tensor plain = as_contiguous(weight);
  if (shape.bits == 4) Backend::expect_between(op, "codes of four bits", plain, -8, 7);
  Tensor packed = empty({Backend::weight_only_bytes(shape)}, ScalarType::Char, weight);
  Backend::pack(plain, shape, packed);
  return packed;
}

template <class Backend>
Tensor pack_weight_only(const Tensor& weight, int64_t bits, int64_t group_size) {
  const char* op = "pack_weight_only";
  expect_int8(op, "weight", weight);
  return packed_weight_only<Backend>(op, weight, weight_only_shape(op, sizes_of(weight), bits, group_size));
}

template <class Backend>
Tensor unpack_weight_only(const Tensor& packed_weight, const Ints& shape, int64_t bits, int64_t group_size) {
  const char* op = "unpack_weight_only";
  expect_int8(op, "packed_weight", packed_weight);
  const WeightOnlyShape of = weight_only_shape(op, shape, bits, group_size);
  QO_EXPECT(
      packed_weight.is_contiguous() && Backend::is_packed_for(packed_weight, of), op,
      "packed_weight made by pack_weight_only from a weight of this shape, with these bits and this group_size, got another one");
  Tensor weight = empty(shape, ScalarType::Char, packed_weight);
  Backend::unpack(packed_weight, of, weight);
  return weight;
}

// A parameter of the groups, (N, groups) or, with one group, (N,) too: the strides of a column and of a group.
inline void group_strides(const char* op, const char* name, const Tensor& t, const WeightOnlyShape& w, int64_t (&stride)[2]) {
  const bool vector = t.dim() == 1 && w.groups() == 1;
  QO_EXPECT((vector && t.size(0) == w.n) || (t.dim() == 2 && t.size(0) == w.n && t.size(1) == w.groups()), op, name,
            ".shape (N, groups) = (", w.n, ", ", w.groups(), "), got ", shape_text(t));
  stride[0] = t.stride(0);
  stride[1] = vector ? 0 : t.stride(1);
}

// Scales and zero points of the groups, where the tensors or `holder` keep them; `like` is the operator's first argument. Returns
// whether the zero points are integers.
template <class Backend, class Params>
bool take_groups(const char* op, const Tensor& weight_scale, const std::optional<Tensor>& weight_zero_point,
                 const WeightOnlyShape& w, const Tensor& like, Holder* holder, Params* p) {
  expect_floating(op, "weight_scale", weight_scale);
  expect_device(op, "weight_scale", weight_scale, like);
  const Tensor scale = holder->tensors.emplace_back(to_type(weight_scale, ScalarType::Float));
  group_strides(op, "weight_scale", scale, w, p->scale_stride);
  p->scale = static_cast<const float*>(scale.const_data_ptr());
  if (!weight_zero_point) return false;
  const char* name = "weight_zero_point";
  expect_zero_point_dtype(op, name, *weight_zero_point);
  expect_device(op, name, *weight_zero_point, like);
  const bool integer = !is_floating(weight_zero_point->scalar_type());
  if (integer && weight_zero_point->scalar_type() != ScalarType::Char)
    Backend::expect_between(op, name, *weight_zero_point, -128, 127);
  const Tensor zero = holder->tensors.emplace_back(to_type(*weight_zero_point, integer ? ScalarType::Char : ScalarType::Float));
  group_strides(op, name, zero, w, p->zero_stride);
  if (integer)
    p->zero_point = static_cast<const int8_t*>(zero.const_data_ptr());
  else
    p->float_zero = static_cast<const float*>(zero.const_data_ptr());
  return integer;
}

// Refuses a packed weight that was made of another shape, or for other bits or groups.
template <class Backend>
void expect_packed_weight_only(const char* op, const Tensor& packed_weight, const WeightOnlyShape& w, const Tensor& like) {
  expect_int8(op, "packed_weight", packed_weight);
  expect_device(op, "packed_weight", packed_weight, like);
  QO_EXPECT(packed_weight.is_contiguous() && Backend::is_packed_for(packed_weight, w), op,
            "packed_weight made by pack_weight_only from this weight, with these bits and this group_size, got another one. Call "
            "pack_weight_only(weight, bits, group_size) again.");
}

template <class Backend>
Tensor weight_only_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& weight_zero_point, const std::optional<Tensor>& bias, int64_t bits,
                          int64_t group_size, const std::optional<Tensor>& packed_weight, bool dynamic, bool asymmetric,
                          std::optional<ScalarType> out_dtype, const std::optional<Tensor>& x_multiplier) {
  const char* op = "weight_only_linear";
  QO_EXPECT_DTYPE(is_one_of(x.scalar_type(), {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "x.dtype in (float32, float16, bfloat16), got ", dtype_name(x.scalar_type()));
  expect_int8(op, "weight", weight);
  const WeightOnlyShape w = weight_only_shape(op, sizes_of(weight), bits, group_size);
  QO_EXPECT(x.dim() >= 1, op, "x to have at least one dimension, got shape ", shape_text(x));
  Ints shape = sizes_of(x);
  QO_EXPECT(shape.back() == w.k, op, "x.shape[-1] == weight.shape[1], got ", shape.back(), " and ", w.k);
  QO_EXPECT(dynamic || !asymmetric, op, "asymmetric=True only with dynamic=True, got it alone");
  expect_elements(op, "x", shape);

  Holder holder;
  const auto keep = [&](const Tensor& t) -> const Tensor& { return holder.tensors.emplace_back(t); };
  holder.tensors.reserve(8);  // references to its elements stay valid
  WeightOnlyParams p{};
  p.N = w.n;
  p.K = w.k;
  p.group = w.group;
  p.bits = w.bits;
  p.codes = dynamic;
  shape.back() = p.N;
  expect_elements(op, "a result", shape);
  p.M = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) p.M *= shape[d];

  const bool integer_zero = take_groups<Backend>(op, weight_scale, weight_zero_point, w, x, &holder, &p);
  if (dynamic) {
    // the largest |a - zero_a| times the largest |q - zero|
    const int64_t code = p.bits == 4 ? 8 : 128, largest = integer_zero ? code - 1 + 128 : code;
    const int64_t bound = INT32_MAX / ((asymmetric ? 255 : 128) * largest);
    QO_EXPECT(p.group <= bound, op, "groups of at most ", bound, " k so that the int32 sum is exact, got ", p.group,
              ". Choose a group_size.");
  }
  if (bias) {
    expect_floating(op, "bias", *bias);
    expect_device(op, "bias", *bias, x);
    QO_EXPECT(sizes_of(*bias) == Ints{p.N}, op, "bias.shape == (", p.N, ",), got ", shape_text(*bias));
    p.bias = holder.floats(*bias);
  }
  const ScalarType type = out_dtype.value_or(x.scalar_type());
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "out_dtype in (float32, float16, bfloat16), got ", dtype_name(type));
  p.y_dtype = to_dtype(type);

  if (packed_weight) {
    expect_packed_weight_only<Backend>(op, *packed_weight, w, x);
    p.packed = packed_weight->const_data_ptr<int8_t>();
  } else {
    expect_device(op, "weight", weight, x);
    const LogsLater of_the_product;
    p.packed = keep(packed_weight_only<Backend>(op, weight, w)).template const_data_ptr<int8_t>();
  }
  const Tensor& rows = keep(as_rows(x, &p.x_stride));
  p.in = {.x = rows.const_data_ptr(),
          .dtype = to_dtype(x.scalar_type()),
          .mode = asymmetric ? InputMode::kDynamicAsymmetric : InputMode::kDynamic,
          .multiplier = input_multiplier(op, x, x_multiplier, p.K, &holder)};
  Tensor y = empty(shape, type, x);
  p.y = y.mutable_data_ptr();
  p.y_stride = p.N;
  Backend::weight_only(op, p, x);
  return y;
}

}  // namespace quant_ops

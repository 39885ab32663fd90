// int8_attention for any device: checks, allocation, AttentionParams. Read next: ops.h, cpu/attention.cpp.
#pragma once

#include <cmath>

#include "torch/int8.h"

namespace quant_ops {

inline void expect_head_rows(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  QO_EXPECT(t.dim() == 4, op, name, ".shape (batch, heads, rows, columns), got ", shape_text(t));
  QO_EXPECT_DTYPE(t.scalar_type() == q.scalar_type(), op, name, ".dtype == q.dtype, got ", dtype_name(t.scalar_type()), " and ",
                  dtype_name(q.scalar_type()));
  expect_device(op, name, t, q);
  expect_elements(op, name, t.sizes());
}

// Its columns contiguous; copies only what is not.
inline Tensor with_contiguous_columns(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : as_contiguous(t); }

inline void copy_strides(const Tensor& t, int64_t* to) {
  for (int64_t d = 0; d < 3; ++d) to[d] = t.stride(d);
}

// The mask's strides over (batch, heads, L, S), 0 where it is broadcast.
inline void set_mask(const char* op, const Tensor& mask, const Tensor& q, AttentionParams* p) {
  const ScalarType type = mask.scalar_type();
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Bool, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "mask.dtype in (bool, float32, float16, bfloat16), got ", dtype_name(type));
  expect_device(op, "mask", mask, q);
  const Ints shape{p->batch, p->heads, p->L, p->S};
  bool fits = mask.dim() <= 4;
  for (int64_t d = 0; fits && d < mask.dim(); ++d) {
    const int64_t of = d + 4 - mask.dim();
    fits = mask.size(d) == 1 || mask.size(d) == shape[static_cast<size_t>(of)];
    p->mask_stride[of] = mask.size(d) == 1 ? 0 : mask.stride(d);
  }
  QO_EXPECT(fits, op, "mask.shape to broadcast to (batch, heads, L, S) ", shape_text(shape), ", got ", shape_text(mask));
  p->mask = mask.const_data_ptr();
  p->mask_dtype = type == ScalarType::Bool ? DType::kUInt8 : to_dtype(type);
}

template <class Backend>
Tensor int8_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, bool causal,
                      const std::optional<double>& scale) {
  const char* op = "int8_attention";
  const ScalarType type = q.scalar_type();
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op,
                  "q.dtype in (float32, float16, bfloat16), got ", dtype_name(type));
  expect_head_rows(op, "q", q, q);
  expect_head_rows(op, "k", k, q);
  expect_head_rows(op, "v", v, q);
  QO_EXPECT(k.size(0) == q.size(0) && k.size(3) == q.size(3), op, "k.shape (", q.size(0), ", heads, S, ", q.size(3), "), got ",
            shape_text(k));
  QO_EXPECT(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2), op, "v.shape (", k.size(0), ", ", k.size(1),
            ", ", k.size(2), ", columns), got ", shape_text(v));
  QO_EXPECT(k.size(1) == 0 ? q.size(1) == 0 : q.size(1) % k.size(1) == 0, op, "k's heads to divide q's, got ", k.size(1), " and ",
            q.size(1));
  QO_EXPECT(q.size(3) >= 1, op, "q.shape[-1] >= 1, got 0");
  expect_exact(op, "q.shape[-1]", q.size(3), false);
  QO_EXPECT(k.size(2) <= kMaxKUnsigned, op, "k.shape[-2] <= ", kMaxKUnsigned, " so that the int32 sum is exact, got ", k.size(2),
            ". Use torch.nn.functional.scaled_dot_product_attention.");
  QO_EXPECT(!causal || !mask, op, "mask or causal=True, got both. Put the causal part into the mask.");

  const Tensor columns[3] = {with_contiguous_columns(q), with_contiguous_columns(k), with_contiguous_columns(v)};
  AttentionParams p{};
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.L = q.size(2);
  p.S = k.size(2);
  p.D = q.size(3);
  p.DV = v.size(3);
  p.dtype = to_dtype(type);
  p.q = columns[0].const_data_ptr();
  p.k = columns[1].const_data_ptr();
  p.v = columns[2].const_data_ptr();
  copy_strides(columns[0], p.q_stride);
  copy_strides(columns[1], p.k_stride);
  copy_strides(columns[2], p.v_stride);
  if (mask) set_mask(op, *mask, q, &p);
  p.causal = causal;
  p.scale = scale ? static_cast<float>(*scale) : static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.D)));
  const Ints shape{p.batch, p.L, p.heads, p.DV};
  expect_elements(op, "a result", shape);
  // (batch, L, heads, DV) in memory, as the layer that reads all heads of a row wants it
  Tensor y = torch::stable::transpose(empty(shape, type, q), 1, 2);
  p.y = y.mutable_data_ptr();
  copy_strides(y, p.y_stride);
  Backend::attention(op, p, q);
  return y;
}

}  // namespace quant_ops

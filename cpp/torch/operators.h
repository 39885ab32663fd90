// The operators: their schemas, which exist only here, and what is registered for every device. Each operator is a template over a
// `Backend`, which is what differs between devices: library_cpu.cpp, library_cuda.cpp, and library_meta.cpp for the fake kernels.
//   quant_tensor_forward to quantize_rows   quantize.h
//   quant_float_*, quant_block_*            quantize_float.h
//   *_affine                                affine.h
//   int8_gemm, int8_linear                  linear.h
//   int8_conv2d                             conv2d.h
//   requantize, int8_add, int8_mul, int8_cat   pointwise.h
//   int8_*_pool2d, int8_upsample_nearest2d  pool.h
//   int8_chain                              chain.h, chain_plan.h, chain_program.h; on the CPU only
//   int8_attention                          attention.h
//   pack_weight, unpack_weight, transpose_packed_weight   pack.h
//   weight_only_linear and its packing      weight_only.h
//   weight_only_embedding                   weight_only_embedding.h
// Read next: one of these; python/quant_ops/ops for the documentation of an operator, its fake kernel and its gradient.
#pragma once

#include "torch/affine.h"
#include "torch/attention.h"
#include "torch/conv2d.h"
#include "torch/linear.h"
#include "torch/logged.h"
#include "torch/pack.h"
#include "torch/pointwise.h"
#include "torch/pool.h"
#include "torch/quantize.h"
#include "torch/quantize_float.h"
#include "torch/weight_only.h"
#include "torch/weight_only_embedding.h"

namespace quant_ops {

template <class Library>
void define_operators(Library& m) {
  m.def(
      "quant_tensor_forward(Tensor tensor, Tensor scale, Tensor? zero_point, int qmin, int qmax, bool asymmetric=False, "
      "bool simulate=True, *, int[]? block_size=None) -> Tensor");
  m.def(
      "quant_tensor_backward(Tensor grad, Tensor tensor, Tensor scale, Tensor? zero_point, int qmin, int qmax, "
      "bool asymmetric=False, *, int[]? block_size=None) -> (Tensor grad_tensor, Tensor grad_scale, Tensor grad_zero_point)");
  m.def(
      "dequant_tensor(Tensor tensor, Tensor scale, Tensor? zero_point=None, ScalarType dtype=float32, *, "
      "int[]? block_size=None) -> Tensor");
  m.def("choose_qparams(Tensor tensor, int[] dim, int qmin, int qmax, bool asymmetric=False) -> (Tensor scale, Tensor zero_point)");
  m.def("quantize_rows(Tensor x, bool asymmetric=False) -> (Tensor q, Tensor scale, Tensor zero_point)");
  m.def(
      "norm_quantize_rows(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms=False, bool asymmetric=False, "
      "Tensor? residual=None) -> (Tensor q, Tensor scale, Tensor zero_point)");
  m.def(
      "quant_float_forward(Tensor tensor, int exponent_bits, int mantissa_bits, Tensor? scale=None, Tensor? seed=None, *, "
      "int? bias=None, int? special=None, bool saturate=True, bool subnormals=True, int rounding=0, int[]? block_size=None) -> "
      "Tensor");
  m.def(
      "quant_float_backward(Tensor grad, Tensor tensor, int exponent_bits, int mantissa_bits, Tensor? scale=None, *, "
      "int? bias=None, int? special=None, bool subnormals=True, int[]? block_size=None) -> Tensor");
  m.def(
      "quant_block_forward(Tensor tensor, int dim, int block_size, int exponent_bits, int mantissa_bits, "
      "Tensor? tensor_scale=None, Tensor? seed=None, *, int? bias=None, int? special=None, int rounding=0, int scale_rule=0, "
      "float? scale_divisor=None) -> Tensor");
  m.def(
      "quant_block_backward(Tensor grad, Tensor tensor, int dim, int block_size, int exponent_bits, int mantissa_bits, "
      "Tensor? tensor_scale=None, *, int? bias=None, int? special=None, int scale_rule=0, float? scale_divisor=None) -> Tensor");
  m.def(
      "choose_qparams_affine(Tensor input, int mapping_type, int[] block_size, int quant_min, int quant_max, float? eps=None, "
      "ScalarType? scale_dtype=None, ScalarType? zero_point_dtype=None, bool keepdim=False, *, bool preserve_zero=True, "
      "int zero_point_domain=0) -> (Tensor scale, Tensor zero_point)");
  m.def(
      "quantize_affine(Tensor input, int[] block_size, Tensor scale, Tensor? zero_point, ScalarType output_dtype, int quant_min, "
      "int quant_max, int zero_point_domain=0) -> Tensor");
  m.def(
      "dequantize_affine(Tensor input, int[] block_size, Tensor scale, Tensor? zero_point, int quant_min, int quant_max, "
      "int zero_point_domain=0, *, ScalarType output_dtype=float32) -> Tensor");
  m.def("int8_gemm(Tensor a, Tensor b) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? x_scale=None, "
      "Tensor? x_zero_point=None, *, Tensor? packed_weight=None, bool asymmetric=False, Tensor? out_scale=None, "
      "Tensor? out_zero_point=None, ScalarType? out_dtype=None, bool relu=False, Tensor? x_multiplier=None, "
      "Tensor? residual=None, Tensor? residual_scale=None, Tensor? residual_zero_point=None, int activation=0) -> Tensor");
  m.def(
      "int8_conv2d(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, Tensor? x_scale=None, Tensor? x_zero_point=None, *, Tensor? packed_weight=None, "
      "bool asymmetric=False, Tensor? out_scale=None, Tensor? out_zero_point=None, ScalarType? out_dtype=None, "
      "bool relu=False, bool? channels_last=None, "
      "Tensor? residual=None, Tensor? residual_scale=None, Tensor? residual_zero_point=None, int activation=0) -> Tensor");
  m.def(
      "requantize(Tensor x, Tensor x_scale, Tensor? x_zero_point=None, *, Tensor? out_scale=None, Tensor? out_zero_point=None, "
      "ScalarType? out_dtype=None, int activation=0) -> Tensor");
  m.def(
      "int8_add(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero_point=None, Tensor? b_zero_point=None, *, "
      "Tensor? out_scale=None, Tensor? out_zero_point=None, ScalarType? out_dtype=None, int activation=0) -> Tensor");
  m.def(
      "int8_mul(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero_point=None, Tensor? b_zero_point=None, *, "
      "Tensor? out_scale=None, Tensor? out_zero_point=None, ScalarType? out_dtype=None, int activation=0) -> Tensor");
  m.def(
      "int8_cat(Tensor[] tensors, Tensor[] scales, Tensor[] zero_points, int dim=1, *, Tensor? out_scale=None, "
      "Tensor? out_zero_point=None, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_max_pool2d(Tensor x, int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) "
      "-> Tensor");
  m.def(
      "int8_avg_pool2d(Tensor x, Tensor x_scale, Tensor? x_zero_point, int[2] kernel_size, int[2] stride=[], int[2] padding=0, "
      "bool ceil_mode=False, bool count_include_pad=True, int? divisor_override=None, *, Tensor? out_scale=None, "
      "Tensor? out_zero_point=None, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_adaptive_avg_pool2d(Tensor x, Tensor x_scale, Tensor? x_zero_point, int[2] output_size, *, Tensor? out_scale=None, "
      "Tensor? out_zero_point=None, ScalarType? out_dtype=None) -> Tensor");
  m.def("int8_upsample_nearest2d(Tensor x, int[2] scale_factor) -> Tensor");
  m.def("int8_chain(Tensor[] inputs, Tensor[] constants, int[] program) -> Tensor[]");
  m.def("int8_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, bool causal=False, float? scale=None) -> Tensor");
  m.def("pack_weight(Tensor weight, int groups=1) -> Tensor");
  m.def(
      "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point=None, Tensor? bias=None, "
      "int bits=8, int group_size=-1, *, Tensor? packed_weight=None, bool dynamic=False, bool asymmetric=False, "
      "ScalarType? out_dtype=None, Tensor? x_multiplier=None) -> Tensor");
  m.def(
      "weight_only_embedding(Tensor indices, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point=None, int bits=8, "
      "int group_size=-1, *, Tensor? packed_weight=None, ScalarType? out_dtype=None) -> Tensor");
  m.def("pack_weight_only(Tensor weight, int bits=8, int group_size=-1) -> Tensor");
  m.def("unpack_weight_only(Tensor packed_weight, int[] shape, int bits=8, int group_size=-1) -> Tensor");
  m.def("unpack_weight(Tensor packed_weight, int[] shape, int groups=1) -> Tensor");
  m.def("transpose_packed_weight(Tensor packed_weight, int[] shape) -> Tensor");
}

// Registers the operator of this name for the library `m`, with errors that name it and a line of the log.
#define QO_IMPLEMENT(m, name, Backend)                                                                 \
  m.impl(#name, [](StableIValue* stack, uint64_t arguments, uint64_t results) {                        \
    struct Name {                                                                                      \
      static const char* text() { return #name; }                                                      \
    };                                                                                                 \
    using Operator = ::quant_ops::Logged<Name, Backend, &::quant_ops::name<Backend>>;                  \
    ::quant_ops::named_errors(#name, [&] { TORCH_BOX (&Operator::call)(stack, arguments, results); }); \
  })

// All but unpack_weight and transpose_packed_weight, which CUDA does not have.
template <class Backend, class Library>
void implement_operators(Library& m) {
  QO_IMPLEMENT(m, quant_tensor_forward, Backend);
  QO_IMPLEMENT(m, quant_tensor_backward, Backend);
  QO_IMPLEMENT(m, dequant_tensor, Backend);
  QO_IMPLEMENT(m, choose_qparams, Backend);
  QO_IMPLEMENT(m, quantize_rows, Backend);
  QO_IMPLEMENT(m, norm_quantize_rows, Backend);
  QO_IMPLEMENT(m, quant_float_forward, Backend);
  QO_IMPLEMENT(m, quant_float_backward, Backend);
  QO_IMPLEMENT(m, quant_block_forward, Backend);
  QO_IMPLEMENT(m, quant_block_backward, Backend);
  QO_IMPLEMENT(m, choose_qparams_affine, Backend);
  QO_IMPLEMENT(m, quantize_affine, Backend);
  QO_IMPLEMENT(m, dequantize_affine, Backend);
  QO_IMPLEMENT(m, int8_gemm, Backend);
  QO_IMPLEMENT(m, int8_linear, Backend);
  QO_IMPLEMENT(m, int8_conv2d, Backend);
  QO_IMPLEMENT(m, requantize, Backend);
  QO_IMPLEMENT(m, int8_add, Backend);
  QO_IMPLEMENT(m, int8_mul, Backend);
  QO_IMPLEMENT(m, int8_cat, Backend);
  QO_IMPLEMENT(m, int8_max_pool2d, Backend);
  QO_IMPLEMENT(m, int8_avg_pool2d, Backend);
  QO_IMPLEMENT(m, int8_adaptive_avg_pool2d, Backend);
  QO_IMPLEMENT(m, int8_upsample_nearest2d, Backend);
  QO_IMPLEMENT(m, int8_attention, Backend);
  QO_IMPLEMENT(m, pack_weight, Backend);
  QO_IMPLEMENT(m, weight_only_linear, Backend);
  QO_IMPLEMENT(m, weight_only_embedding, Backend);
  QO_IMPLEMENT(m, pack_weight_only, Backend);
  QO_IMPLEMENT(m, unpack_weight_only, Backend);
}

}  // namespace quant_ops

// The operators: their schemas, and the kernels that every device has, by its `Device` (torch/library_cpu.cpp,
// ../cpp/torch/library_cuda.cpp).
#pragma once

#include "torch/int8.h"

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
  m.def("int8_gemm(Tensor a, Tensor b) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? x_scale=None, "
      "Tensor? x_zero_point=None, *, Tensor? packed_weight=None, bool asymmetric=False, Tensor? out_scale=None, "
      "Tensor? out_zero_point=None, ScalarType? out_dtype=None, bool relu=False) -> Tensor");
  m.def(
      "int8_conv2d(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, Tensor? x_scale=None, Tensor? x_zero_point=None, *, Tensor? packed_weight=None, "
      "bool asymmetric=False, Tensor? out_scale=None, Tensor? out_zero_point=None, ScalarType? out_dtype=None, "
      "bool relu=False) -> Tensor");
  m.def("pack_weight(Tensor weight, int groups=1) -> Tensor");
  m.def("unpack_weight(Tensor packed_weight, int[] shape, int groups=1) -> Tensor");
}

template <class Device, class Library>
void implement_operators(Library& m) {
  m.impl("quant_tensor_forward", TORCH_BOX(&quant_tensor_forward<Device>));
  m.impl("quant_tensor_backward", TORCH_BOX(&quant_tensor_backward<Device>));
  m.impl("dequant_tensor", TORCH_BOX(&dequant_tensor<Device>));
  m.impl("choose_qparams", TORCH_BOX(&choose_qparams<Device>));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows<Device>));
  m.impl("int8_gemm", TORCH_BOX(&int8_gemm<Device>));
  m.impl("int8_linear", TORCH_BOX(&int8_linear<Device>));
  m.impl("int8_conv2d", TORCH_BOX(&int8_conv2d<Device>));
  m.impl("pack_weight", TORCH_BOX(&pack_weight<Device>));
}

}  // namespace quant_ops

// Registers the CUDA kernels of torch.ops.quant_ops; schemas come from libquant_ops.so, which is loaded first. Checks and
// allocation are those of the CPU (cpp/bindings_quantize.h). Linked against torch's CPU libraries only, so that it builds and loads
// beside any torch; the one CUDA function of torch that it needs is weak. QUANT_OPS_EMULATION registers the same operators under
// another name for CPU tensors, with the kernels emulated (host_emulation.h): a test build. Read next: launch.h.
#include <torch/csrc/stable/accelerator.h>

#include "bindings_quantize.h"
#include "launch.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace quant_ops {
namespace {

#if defined(QUANT_OPS_EMULATION)
struct OnDeviceOf {
  OnDeviceOf(const char*, const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
// Makes x's device the current one and knows its current stream.
class OnDeviceOf {
 public:
  OnDeviceOf(const char* op, const Tensor& x) : guard_(x.get_device_index()) {
    QO_EXPECT(aoti_torch_get_current_cuda_stream != nullptr, op,
              "a torch that has CUDA, got one built for the CPU. Install a CUDA build of torch.");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

struct Cuda {
  static void quantize(const QuantizeParams& p, const Tensor& x) {
    const OnDeviceOf device("quant_tensor_forward", x);
    quantize_cuda(p, device.stream());
  }

  static void quantize_backward(const QuantizeBackwardParams& p, const Tensor& x) {
    const OnDeviceOf device("quant_tensor_backward", x);
    // torch's caching allocator: reused in stream order, also inside a captured graph
    Tensor workspace = empty({quantize_backward_workspace(p)}, ScalarType::Double, x);
    quantize_backward_cuda(p, workspace.mutable_data_ptr<double>(), device.stream());
  }

  static void dequantize(const DequantizeParams& p, const Tensor& x) {
    const OnDeviceOf device("dequant_tensor", x);
    dequantize_cuda(p, device.stream());
  }

  static void choose_qparams(const ChooseQParams& p, const Tensor& x) {
    const OnDeviceOf device("choose_qparams", x);
    Tensor workspace = empty({choose_qparams_workspace(p)}, ScalarType::Double, x);
    choose_qparams_cuda(p, workspace.mutable_data_ptr<double>(), device.stream());
  }

  static void quantize_rows(const QuantizeRowsParams& p, const Tensor& x) {
    const OnDeviceOf device("quantize_rows", x);
    quantize_rows_cuda(p, device.stream());
  }

  static const int32_t* no_zero_point() { return nullptr; }

  // Values stay on the device, so that nothing waits for it; whether they are small is known from the dtype alone.
  static ZeroPoints zero_points(const Tensor& t, int64_t qmin, int64_t qmax) {
    const ScalarType type = t.scalar_type();
    const bool small = is_floating(type) ? qmin >= -(1 << 23) && qmax <= (1 << 23)
                                         : is_one_of(type, {ScalarType::Char, ScalarType::Byte, ScalarType::Short});
    if (type == ScalarType::Int) return {t, small};
    const OnDeviceOf device("zero_point", t);
    const Tensor dense = torch::stable::contiguous(t);
    Tensor z = empty(sizes_of(t), ScalarType::Int, t);
    const bool is_int64 = type == ScalarType::Long;
    zero_points_cuda(dense.const_data_ptr(), is_int64 ? DType::kInt32 : to_dtype(type), is_int64, z.mutable_data_ptr<int32_t>(),
                     z.numel(), qmin, qmax, device.stream());
    return {z, small};
  }
};

}  // namespace
}  // namespace quant_ops

#if defined(QUANT_OPS_EMULATION)
STABLE_TORCH_LIBRARY(quant_ops_emulated, m) {
  m.def(
      "quant_tensor_forward(Tensor tensor, Tensor scale, Tensor? zero_point, int qmin, int qmax, bool asymmetric=False, "
      "bool simulate=True, *, int[]? block_size=None) -> Tensor");
  m.def(
      "quant_tensor_backward(Tensor grad, Tensor tensor, Tensor scale, Tensor? zero_point, int qmin, int qmax, "
      "bool asymmetric=False, *, int[]? block_size=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dequant_tensor(Tensor tensor, Tensor scale, Tensor? zero_point=None, ScalarType dtype=float32, *, "
      "int[]? block_size=None) -> Tensor");
  m.def("choose_qparams(Tensor tensor, int[] dim, int qmin, int qmax, bool asymmetric=False) -> (Tensor, Tensor)");
  m.def("quantize_rows(Tensor x, bool asymmetric=False) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(quant_ops_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(quant_ops, CUDA, m) {
#endif
  using namespace quant_ops;
  m.impl("quant_tensor_forward", TORCH_BOX(&quant_tensor_forward<Cuda>));
  m.impl("quant_tensor_backward", TORCH_BOX(&quant_tensor_backward<Cuda>));
  m.impl("dequant_tensor", TORCH_BOX(&dequant_tensor<Cuda>));
  m.impl("choose_qparams", TORCH_BOX(&choose_qparams<Cuda>));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows<Cuda>));
}

// Registers the CUDA kernels of torch.ops.quant_ops; schemas come from libquant_ops.so, which is loaded first. Checks and
// allocation are those of the CPU (cpp/torch/quantize.h). Linked against torch's CPU libraries only, so that it builds and loads
// beside any torch; the one CUDA function of torch that it needs is weak. QUANT_OPS_EMULATION registers the same operators under
// another name for CPU tensors, with the kernels emulated (host_emulation.h): a test build. Read next: launch.h.
#include <torch/csrc/stable/accelerator.h>

#include "launch.h"
#include "torch/operators.h"

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
    const bool small = is_floating(type) ? qmin >= -kSmallZeroPoint && qmax <= kSmallZeroPoint
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

  // ---- integer products: sizes of workspaces first, then work ----

  static void linear(const char* op, const Int8LinearParams& p, const Tensor& x) {
    with_workspace(op, x, [&](void* memory, void* stream) { return int8_linear_cuda(op, p, memory, stream); });
  }
  static void conv2d(const Int8Conv2dParams& p, const Tensor& x) {
    with_workspace("int8_conv2d", x, [&](void* memory, void* stream) { return int8_conv2d_cuda(p, memory, stream); });
  }

  // Integer zero points are used as they are: looking at them would wait for the device.
  static const int32_t* given_zero_points(const char*, const char*, const Tensor& t, int64_t qmin, int64_t qmax, Holder* holder) {
    holder->tensors.push_back(torch::stable::contiguous(zero_points(t, qmin, qmax).tensor));
    return holder->tensors.back().const_data_ptr<int32_t>();
  }

  static constexpr bool kReadsPlainBesidePacked = true;  // cuda_weights.h
  static CudaWeights layout_of(const WeightShape& w) { return cuda_weights(w.o, w.c, w.r, w.s, w.groups); }
  static int64_t packed_bytes(const WeightShape& w) { return layout_of(w).bytes; }
  static void pack(const Tensor& weight, const WeightShape& shape, Tensor& packed) {
    const OnDeviceOf device("pack_weight", weight);
    const CudaWeights w = layout_of(shape);
    int8_t* to = packed.mutable_data_ptr<int8_t>();
    pack_weight_cuda(weight.const_data_ptr<int8_t>(), w, reinterpret_cast<int32_t*>(to), w.plain ? nullptr : to + w.rows_offset,
                     device.stream());
  }
  // its length is all that the host can see
  static bool is_packed_for(const Tensor& packed, const WeightShape& w) {
    return packed.numel() == packed_bytes(w) && reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0;
  }
  static const float* one() { return nullptr; }  // an int32 result reads no scales

 private:
  template <class Work>
  static void with_workspace(const char* op, const Tensor& x, const Work& work) {
    const OnDeviceOf device(op, x);
    const int64_t bytes = work(nullptr, nullptr);
    // one byte more, so that there is memory even for a call that needs none; torch's allocator reuses it in stream order
    Tensor memory = empty({bytes + 1}, ScalarType::Byte, x);
    work(memory.mutable_data_ptr(), device.stream());
  }
};

}  // namespace
}  // namespace quant_ops

// The kernel of a dense product with bfloat16 results on the current device, for python/quant_ops/_library.py; a text that stays
// valid until the thread's next call, an error if it starts with "quant_ops".
extern "C" __attribute__((visibility("default"))) const char* quant_ops_cuda_gemm_kernel(int64_t M, int64_t N, int64_t K) {
  thread_local std::string kept;
  quant_ops::IgemmProblem p{};
  p.M = M;
  p.N = p.y_stride = N;
  p.K = p.a_stride = p.b_stride = (K + 15) / 16 * 16;
  p.row_step = p.column_step = 1;
  p.y_dtype = quant_ops::DType::kBFloat16;
  try {
    kept = quant_ops::igemm_kernel_text("int8_gemm", p);
  } catch (const std::exception& e) {
    kept = e.what();
  }
  return kept.c_str();
}

// As quant_ops_is_dtype_refusal of exports.cpp, for the refusals of this library.
extern "C" __attribute__((visibility("default"))) int quant_ops_cuda_is_dtype_refusal(const char* sentence) {
  return quant_ops::last_dtype_refusal() == sentence;
}

#if defined(QUANT_OPS_EMULATION)
STABLE_TORCH_LIBRARY(quant_ops_emulated, m) { quant_ops::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(quant_ops_emulated, CPU, m) { quant_ops::implement_operators<quant_ops::Cuda>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(quant_ops, CUDA, m) { quant_ops::implement_operators<quant_ops::Cuda>(m); }
#endif

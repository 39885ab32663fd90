// Registers the CUDA kernels of torch.ops.quant_ops; schemas come from libquant_ops.so, which is loaded first. Checks and
// allocation are those of the CPU (cpp/torch/quantize.h). Linked against torch's CPU libraries only, so that it builds and loads
// beside any torch; the one CUDA function of torch that it needs is weak. QUANT_OPS_EMULATION makes a test build: it registers the
// same operators under another name for CPU tensors, with the kernels emulated (host_emulation.h). Read next: launch.h.
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>

#include "contract/log.h"
#include "contract/weight_only_layout.h"
#include "launch.h"
#include "torch/operators.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace quant_ops {
namespace {

#if defined(QUANT_OPS_EMULATION)
class OnDeviceOf {
 public:
  OnDeviceOf(const char* op, const Tensor&) : op_(op) {}
  Launch launch(void* memory = nullptr) const { return {op_, memory, nullptr}; }

 private:
  const char* op_;
};
#else
// Makes x's device the current one and launches on its current stream.
class OnDeviceOf {
 public:
  OnDeviceOf(const char* op, const Tensor& x) : op_(op), guard_(x.get_device_index()) {
    QO_EXPECT(aoti_torch_get_current_cuda_stream != nullptr, op,
              "a torch that has CUDA, got one built for the CPU. Install a CUDA build of torch.");
    QO_TORCH(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  Launch launch(void* memory = nullptr) const { return {op_, memory, stream_}; }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

// The bytes that a plan asks for, from torch's caching allocator. It reuses them in stream order, also inside a captured graph.
class Workspace {
 public:
  Workspace(int64_t bytes, const Tensor& x) {
    if (bytes > 0) tensor_ = empty({bytes}, ScalarType::Byte, x);
  }
  void* memory() { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

// Rows of x times their multiplier, as float32 rows in memory of their own, which take the place of x in the parameters of a linear
// layer. Without a multiplier nothing happens.
class MultipliedRows {
 public:
  template <class Params>
  MultipliedRows(Params* p, const OnDeviceOf& device, const Tensor& x)
      : memory_(p->in.multiplier == nullptr ? 0 : p->M * p->K * int64_t{sizeof(float)}, x) {
    if (p->in.multiplier == nullptr) return;
    float* to = static_cast<float*>(memory_.memory());
    multiply_rows_cuda({.rows = p->M,
                        .columns = p->K,
                        .x = p->in.x,
                        .x_stride = p->x_stride,
                        .dtype = p->in.dtype,
                        .multiplier = p->in.multiplier,
                        .to = to},
                       device.launch());
    p->in.x = to;
    p->in.dtype = DType::kFloat32;
    p->in.multiplier = nullptr;
    p->x_stride = p->K;
  }

 private:
  Workspace memory_;
};

// A result with a residual, or with a function that the products' kernels lack: while this lives the product gives float32 into
// memory of its own, dense as the result is, which finish() turns into the result by one more pass.
class Finishing {
 public:
  Finishing(OutputParams* out, int64_t elements, const Tensor& x)
      : given_(*out),
        elements_(elements),
        needed_(out->residual.r != nullptr || (out->function != Function::kNone && out->function != Function::kRelu)),
        memory_(needed_ ? times(elements, sizeof(float)) : 0, x) {
    if (!needed_) return;
    out->y = memory_.memory();
    out->dtype = DType::kFloat32;
    out->residual = {};
    out->function = Function::kNone;
    out->out_scale = nullptr;
    out->out_zero_point = nullptr;
  }

  void finish(const OnDeviceOf& device) {
    if (!needed_) return;
    pointwise_cuda({.rows = 1,
                    .columns = elements_,
                    .x = memory_.memory(),
                    .x_dtype = DType::kFloat32,
                    .residual = given_.residual,
                    .function = given_.function,
                    .out = {.y = given_.y, .dtype = given_.dtype, .scale = given_.out_scale, .zero_point = given_.out_zero_point},
                    .y_stride = elements_},
                   device.launch());
  }

 private:
  const OutputParams given_;
  const int64_t elements_;
  const bool needed_;
  Workspace memory_;
};

struct Cuda {
  static constexpr const char* kDevice = "cuda";

  static void quantize(const QuantizeParams& p, const Tensor& x) {
    const OnDeviceOf device("quant_tensor_forward", x);
    quantize_cuda(p, device.launch());
  }

  static void quantize_backward(const QuantizeBackwardParams& p, const Tensor& x) {
    const OnDeviceOf device("quant_tensor_backward", x);
    const QuantizeBackwardPlan plan = plan_quantize_backward(p, gpu_limits());
    Workspace workspace(plan.bytes, x);
    run_quantize_backward(plan, p, device.launch(workspace.memory()));
  }

  static void dequantize(const DequantizeParams& p, const Tensor& x) {
    const OnDeviceOf device("dequant_tensor", x);
    dequantize_cuda(p, device.launch());
  }

  static void choose_qparams(const ChooseQParams& p, const Tensor& x) {
    const OnDeviceOf device("choose_qparams", x);
    const QParamsPlan plan = plan_choose_qparams(p, gpu_limits().multiprocessors);
    Workspace workspace(plan.bytes, x);
    run_choose_qparams(plan, p, device.launch(workspace.memory()));
  }

  static void quantize_rows(const QuantizeRowsParams& p, const Tensor& x) {
    const OnDeviceOf device("quantize_rows", x);
    quantize_rows_cuda(p, p.columns, device.launch());
  }

  static void quantize_float(const char* op, const QuantizeFloatParams& p, const Tensor& x) {
    const OnDeviceOf device(op, x);
    quantize_float_cuda(p, device.launch());
  }

  static void quantize_block(const char* op, const QuantizeBlockParams& p, const Tensor& x) {
    const OnDeviceOf device(op, x);
    const QuantizeBlockPlan plan = plan_quantize_block(p);
    Workspace workspace(plan.bytes, x);
    run_quantize_block(plan, p, device.launch(workspace.memory()));
  }

  static void choose_qparams_affine(const ChooseAffineParams& p, const Tensor& x) {
    const OnDeviceOf device("choose_qparams_affine", x);
    choose_qparams_affine_cuda(p, device.launch());
  }
  static void quantize_affine(const AffineParams& p, const Tensor& x) {
    const OnDeviceOf device("quantize_affine", x);
    quantize_affine_cuda(p, device.launch());
  }
  static void dequantize_affine(const AffineParams& p, const Tensor& x) {
    const OnDeviceOf device("dequantize_affine", x);
    dequantize_affine_cuda(p, device.launch());
  }

  // A seed on the device stays there, so that nothing waits for it, and a captured graph reads it anew.
  static Seed seed(const Tensor& t) {
    const int64_t* const memory = t.const_data_ptr<int64_t>();
#if defined(QUANT_OPS_EMULATION)
    const bool on_device = t.dim() > 0;  // so that the tests have both
#else
    const bool on_device = !t.is_cpu();
#endif
    if (on_device) return {.value = 0, .memory = memory};
    return {.value = static_cast<uint64_t>(*memory), .memory = nullptr};
  }

  static const int32_t* no_zero_point() { return nullptr; }

  // Values stay on the device, so that nothing waits for it; whether they are small is known from the dtype alone.
  static ZeroPoints zero_points(const Tensor& t, int64_t qmin, int64_t qmax) {
    const ScalarType type = t.scalar_type();
    const bool small = is_floating(type) ? qmin >= -kSmallZeroPoint && qmax <= kSmallZeroPoint
                                         : is_one_of(type, {ScalarType::Char, ScalarType::Byte, ScalarType::Short});
    if (type == ScalarType::Int) return {t, small};
    const OnDeviceOf device("zero_point", t);
    const Tensor dense = as_contiguous(t);
    Tensor z = empty(sizes_of(t), ScalarType::Int, t);
    const bool is_int64 = type == ScalarType::Long;
    zero_points_cuda({.from = dense.const_data_ptr(),
                      .dtype = is_int64 ? DType::kInt32 : to_dtype(type),
                      .is_int64 = is_int64,
                      .to = z.mutable_data_ptr<int32_t>(),
                      .n = z.numel(),
                      .qmin = qmin,
                      .qmax = qmax},
                     device.launch());
    return {z, small};
  }

  static void linear(const char* op, Int8LinearParams p, const Tensor& x) {
    if (p.M == 0 || p.N == 0) return;
    const OnDeviceOf device(op, x);
    const MultipliedRows rows(&p, device, x);
    Finishing finishing(&p.out, p.M * p.N, x);
    const LinearPlan plan = plan_linear(p, gpu_limits(), kernel_choice());
    expect_kernel(op, plan.kernel, kernel_choice());
    log_kernel([&] { return kernel_text(plan.kernel); });
    Workspace workspace(plan.bytes, x);
    run_linear(plan, p, device.launch(workspace.memory()));
    finishing.finish(device);
  }

  static void conv2d(Int8Conv2dParams p, const Tensor& x) {
    const char* op = "int8_conv2d";
    if (p.N == 0 || p.O == 0 || p.OH * p.OW == 0) return;
    const OnDeviceOf device(op, x);
    Finishing finishing(&p.out, p.N * p.O * p.OH * p.OW, x);
    const Conv2dPlan plan = plan_conv2d(p, gpu_limits(), kernel_choice());
    expect_kernel(op, plan.kernel, kernel_choice());
    log_kernel([&] { return kernel_text(plan.kernel); });
    Workspace workspace(plan.bytes, x);
    run_conv2d(plan, p, device.launch(workspace.memory()));
    finishing.finish(device);
  }

  static void pointwise(const char* op, const PointwiseParams& p, const Tensor& x) {
    if (p.rows * p.columns == 0) return;
    const OnDeviceOf device(op, x);
    pointwise_cuda(p, device.launch());
  }

  static void max_pool(const MaxPoolParams& p, const Tensor& x) {
    const OnDeviceOf device("int8_max_pool2d", x);
    max_pool2d_cuda(p, device.launch());
  }
  static void avg_pool(const char* op, const AvgPoolParams& p, const Tensor& x) {
    const OnDeviceOf device(op, x);
    avg_pool2d_cuda(p, device.launch());
  }
  static void upsample(const UpsampleParams& p, const Tensor& x) {
    const OnDeviceOf device("int8_upsample_nearest2d", x);
    upsample_nearest2d_cuda(p, device.launch());
  }

  static void norm_quantize_rows(const char* op, const NormQuantizeRowsParams&, const Tensor&) {
    QO_EXPECT(false, op, "tensors on the CPU, got CUDA. Use torch's norm and quantize_rows there.");
  }
  static void attention(const char* op, const AttentionParams&, const Tensor&) {
    QO_EXPECT(false, op, "tensors on the CPU, got CUDA. Use torch.nn.functional.scaled_dot_product_attention there.");
  }

  // Integer zero points are used as they are: looking at them would wait for the device.
  static const int32_t* given_zero_points(const char*, const char*, const Tensor& t, int64_t qmin, int64_t qmax, Holder* holder) {
    holder->tensors.push_back(as_contiguous(zero_points(t, qmin, qmax).tensor));
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
                     device.launch());
  }
  // The length is all that the host can see.
  static bool is_packed_for(const Tensor& packed, const WeightShape& w) {
    return packed.numel() == packed_bytes(w) && reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0;
  }
  static const float* one() { return nullptr; }  // an int32 result reads no scales

  static void weight_only(const char* op, WeightOnlyParams p, const Tensor& x) {
    if (p.M == 0 || p.N == 0) return;
    const OnDeviceOf device(op, x);
    const MultipliedRows rows(&p, device, x);
    const WeightOnlyPlan plan = plan_weight_only(p, gpu_limits(), kernel_choice());
    log_kernel([&] { return kernel_text(plan); });
    Workspace workspace(plan.bytes, x);
    run_weight_only(plan, p, device.launch(workspace.memory()));
  }
  static WeightOnlyLayout layout_of(const WeightOnlyShape& w) { return weight_only_layout(w.n, w.k, w.bits, w.group); }
  static int64_t weight_only_bytes(const WeightOnlyShape& w) { return layout_of(w).bytes; }
  static void pack(const Tensor& weight, const WeightOnlyShape& w, Tensor& packed) {
    const OnDeviceOf device("pack_weight_only", weight);
    pack_weight_only_cuda(weight.const_data_ptr<int8_t>(), layout_of(w), packed.mutable_data_ptr<int8_t>(), device.launch());
  }
  static void unpack(const Tensor& packed, const WeightOnlyShape& w, Tensor& weight) {
    const OnDeviceOf device("unpack_weight_only", packed);
    unpack_weight_only_cuda(packed.const_data_ptr<int8_t>(), layout_of(w), weight.mutable_data_ptr<int8_t>(), device.launch());
  }
  // The length is all that the host can see. The kernels load 16 bytes at a time.
  static bool is_packed_for(const Tensor& packed, const WeightOnlyShape& w) {
    return packed.numel() == weight_only_bytes(w) && reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0;
  }
  static void expect_between(const char*, const char*, const Tensor&, int64_t, int64_t) {}

  static void weight_only_embedding(const WeightOnlyEmbeddingParams& p, const Tensor& indices) {
    const OnDeviceOf device("weight_only_embedding", indices);
    weight_only_embedding_cuda(p, device.launch());
  }
  static void expect_indices(const char*, const Tensor&, int64_t) {}  // the kernel asserts it
};

}  // namespace
}  // namespace quant_ops

#define QO_EXPORT extern "C" __attribute__((visibility("default")))

// For python/quant_ops/_library.py. The kernel of an int8_linear with codes and bfloat16 results on the current device, as text
// that stays valid until the thread's next call. A text that starts with "quant_ops" is an error.
QO_EXPORT const char* quant_ops_cuda_gemm_kernel(int64_t M, int64_t N, int64_t K) {
  thread_local std::string kept;
  quant_ops::Int8LinearParams p{};
  p.M = M;
  p.N = p.y_stride = N;
  p.K = p.x_stride = K;
  p.in.dtype = quant_ops::DType::kInt8;
  p.in.mode = quant_ops::InputMode::kQuantized;
  p.in.scale_stride = p.out.weight_scale_stride = 1;
  p.out.dtype = quant_ops::DType::kBFloat16;
  try {
    const quant_ops::KernelPlan kernel = quant_ops::plan_linear(p, quant_ops::gpu_limits(), quant_ops::kernel_choice()).kernel;
    quant_ops::expect_kernel("int8_gemm", kernel, quant_ops::kernel_choice());
    kept = quant_ops::kernel_text(kernel);
  } catch (const std::exception& e) {
    kept = e.what();
  }
  return kept.c_str();
}

// As quant_ops_refusal of exports.cpp, for the refusals of this library.
QO_EXPORT int quant_ops_cuda_refusal(const char* sentence) { return static_cast<int>(quant_ops::refusal_of(sentence)); }

// Wants this kernel from now on, in place of the one that QUANT_OPS_CUDA_KERNEL names; null or empty: that one again.
QO_EXPORT void quant_ops_cuda_set_kernel(const char* text) { quant_ops::set_kernel_choice(text); }

#if defined(QUANT_OPS_EMULATION)
STABLE_TORCH_LIBRARY(quant_ops_emulated, m) { quant_ops::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(quant_ops_emulated, CPU, m) { quant_ops::implement_operators<quant_ops::Cuda>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(quant_ops, CUDA, m) { quant_ops::implement_operators<quant_ops::Cuda>(m); }
#endif

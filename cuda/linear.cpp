// int8_linear and int8_gemm on CUDA: start reading here.
//
// The rows of x become int8 codes, each row with a scale from its own data (quantize_rows.cu) or with the given scale
// (activations.cu). Codes that can be read where they are stay there. One integer product with its epilogue follows (problem.h).
// Rows without a given scale are quantized by the product's kernel itself where that is faster (gemv.cu, fused.cu). Where x has a
// multiplier, library_cuda.cpp has put float32 rows of products in its place. Bits are those of cpp/cpu/linear.cpp.
#include <cmath>

#include "contract/dtypes.h"
#include "engine/fused.h"
#include "engine/gemv.h"
#include "engine/remembered.h"
#include "launch.h"

namespace quant_ops {
namespace {

// Whether the kernels can read x itself: int8 codes, rows of whole aligned vectors, none of them padded.
bool is_codes(const Int8LinearParams& p, int64_t k, int64_t x_stride) {
  return p.in.dtype == DType::kInt8 && k == p.K && x_stride % kVectorBytes == 0 && is_aligned(p.in.x, kVectorBytes);
}

// Whether run_linear makes arrays of the rows' given scales and zero points. The product takes one stride for both, and zero points
// of unsigned codes are shifted.
bool rewrites_given_params(const InputParams& in) {
  return has_zero_points(in) && (in.dtype == DType::kUInt8 || in.scale_stride != in.zero_point_stride);
}

// All of the product but the addresses of its operands and of the rows' parameters.
IgemmProblem product_of(const Int8LinearParams& p, const CudaWeights& weight, bool in_place, int64_t x_stride, int64_t row_step) {
  return {.M = p.M,
          .N = p.N,
          .K = weight.k,
          .a_stride = in_place ? x_stride : weight.k,
          .b_stride = weight.row_bytes,
          .row_step = row_step,
          .column_scale = p.out.weight_scale,
          .column_step = p.out.weight_scale_stride,
          .bias = p.out.bias,
          .floor = p.out.function == Function::kRelu ? 0.0f : -INFINITY,
          .y = p.out.y,
          .y_stride = p.y_stride,
          .y_dtype = p.out.dtype,
          .out_scale = p.out.out_scale,
          .out_zero_point = p.out.out_zero_point};
}

// ---- the choice of a kernel, remembered -----------------------------------------------------------------------------

struct Choice {
  KernelPlan kernel;
  bool quantizes;  // the rows as well
};

Choice choose(const IgemmProblem& p, bool dynamic, int64_t x_bytes, const GpuLimits& gpu, const KernelChoice& wanted) {
  const KernelPlan kernel = choose_kernel(p, gpu, wanted);
  const KernelPlan both = dynamic ? choose_quantizing_kernel(p, x_bytes, gpu, wanted, kernel) : KernelPlan{};
  return both.engine != Engine::kNone ? Choice{both, true} : Choice{kernel, false};
}

// The key is all that a choice may depend on: sizes, strides, dtypes, which operands there are, and how addresses are aligned.
Choice remembered_choice(const IgemmProblem& p, bool dynamic, int64_t x_bytes, const GpuLimits& gpu) {
  const auto place = [](const void* at) {
    return at == nullptr ? int64_t{-1} : static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) % 16);
  };
  const std::array<int64_t, 20> key{p.M,
                                    p.N,
                                    p.K,
                                    p.a_stride,
                                    p.b_stride,
                                    p.y_stride,
                                    p.row_step,
                                    p.column_step,
                                    static_cast<int64_t>(p.y_dtype),
                                    p.row_zero != nullptr,
                                    place(p.y),
                                    place(p.bias),
                                    place(p.column_scale),
                                    place(p.out_scale),
                                    place(p.out_zero_point),
                                    dynamic ? x_bytes : 0,
                                    gpu.arch,
                                    gpu.multiprocessors,
                                    gpu.block_bytes,
                                    gpu.shared_bytes};
  return remembered(key, [&] { return choose(p, dynamic, x_bytes, gpu, KernelChoice()); });
}

QuantizeRowsParams dynamic_rows(const Int8LinearParams& p) {
  return {.rows = p.M,
          .columns = p.K,
          .x = p.in.x,
          .x_stride = p.x_stride,
          .x_dtype = p.in.dtype,
          .q = nullptr,
          .scale = nullptr,
          .zero_point = nullptr,
          .asymmetric = p.in.mode == InputMode::kDynamicAsymmetric};
}

// Codes of the rows, and arrays of their scales and zero points where the plan has them.
void encode_rows(const LinearPlan& plan, const Int8LinearParams& p, const Launch& at) {
  int8_t* codes = plan.codes.in(at.memory);
  float* scale = plan.row_scale.in(at.memory);
  int32_t* zero_point = plan.row_zero.in(at.memory);
  const int64_t k = plan.weight.layout.k;
  if (plan.encoder == Encoder::kRange) {
    QuantizeRowsParams rows = dynamic_rows(p);
    rows.q = codes;
    rows.scale = scale;
    rows.zero_point = zero_point;
    return quantize_rows_cuda(rows, k, at);
  }
  if (plan.encoder == Encoder::kGiven)  // a row is a sample of one pixel
    write_codes_cuda({.in = p.in,
                      .stride = {p.x_stride, 1, 0, 0},
                      .samples = p.M,
                      .height = 1,
                      .width = 1,
                      .channels = p.K,
                      .tap = k,
                      .q = codes,
                      .pixel = k},
                     at);
  if (plan.row_scale)
    write_sample_params_cuda({.samples = p.M,
                              .scale = p.in.scale,
                              .scale_stride = p.in.scale_stride,
                              .zero_point = p.in.zero_point,
                              .zero_point_stride = p.in.zero_point_stride,
                              .offset = p.in.dtype == DType::kUInt8 ? 128 : 0,
                              .scale_out = scale,
                              .zero_point_out = zero_point,
                              .padding = nullptr},
                             at);
}

}  // namespace

LinearPlan plan_linear(const Int8LinearParams& p, const GpuLimits& gpu, const KernelChoice& wanted) {
  LinearPlan plan{};
  WorkspaceLayout workspace;
  const bool dynamic = is_dynamic(p.in), corrected = has_zero_points(p.in);
  plan.weight = plan_weight(cuda_weights(p.N, p.K, 1, 1, 1), p.weight, p.packed, corrected, &workspace);
  const int64_t k = plan.weight.layout.k, x_stride = p.M == 1 ? k : p.x_stride;
  const bool in_place = is_codes(p, k, x_stride), own_params = dynamic || rewrites_given_params(p.in);
  plan.encoder = in_place ? Encoder::kNone : dynamic ? Encoder::kRange : Encoder::kGiven;
  plan.product = product_of(p, plan.weight.layout, in_place, x_stride, own_params ? 1 : p.in.scale_stride);

  const Choice choice = wanted.name.empty() && wanted.splits == 0
                            ? remembered_choice(plan.product, dynamic, dtype_bytes(p.in.dtype), gpu)
                            : choose(plan.product, dynamic, dtype_bytes(p.in.dtype), gpu, wanted);
  plan.kernel = choice.kernel;
  if (choice.quantizes) {
    plan.encoder = Encoder::kProduct;
    plan.bytes = workspace.bytes();
    return plan;
  }
  plan.early = plan.encoder == Encoder::kRange && gpu.arch >= 90;
  if (!in_place) plan.codes = workspace.add<int8_t>(p.M * k);
  if (own_params) plan.row_scale = workspace.add<float>(p.M);
  if (own_params && corrected) plan.row_zero = workspace.add<int32_t>(p.M);
  if (plan.kernel.sums > 0) plan.sums = workspace.add<int32_t>(plan.kernel.sums);
  plan.bytes = workspace.bytes();
  return plan;
}

void run_linear(const LinearPlan& plan, const Int8LinearParams& p, const Launch& at) {
  const WeightOnDevice weight = run_weight(plan.weight, p.weight, p.packed, at);
  IgemmProblem product = plan.product;
  product.b = weight.rows;
  product.column_sum = weight.sums;
  if (plan.encoder == Encoder::kProduct)
    return plan.kernel.engine == Engine::kGemv ? run_quantizing_gemv(product, dynamic_rows(p), at)
                                               : run_fused(product, dynamic_rows(p), plan.kernel, at);

  encode_rows(plan, p, at);
  product.a = plan.encoder == Encoder::kNone ? static_cast<const int8_t*>(p.in.x) : plan.codes.in(at.memory);
  product.row_scale = plan.row_scale ? plan.row_scale.in(at.memory) : p.in.scale;
  product.row_zero = plan.row_scale ? plan.row_zero.in(at.memory) : p.in.zero_point;
  product.early = plan.early;
  run_product(product, plan.kernel, plan.sums.in(at.memory), at);
}

}  // namespace quant_ops

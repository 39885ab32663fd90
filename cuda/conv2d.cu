// int8_conv2d on CUDA: implicit GEMM, never an im2col matrix.
//
//   y[n,o,oh,ow] = epilogue(sum_{c,r,s} a[n, c, oh*stride - pad + r*dilation, ...] b[o,c,r,s])
//
// The image becomes NHWC codes in a workspace (activations.cu), unless it is NHWC codes already. Row m of the product is an output
// pixel, and k runs over taps and channels (Gather in layout.cuh). A tap beside the image reads the zero point's code, so that the
// plain column-sum correction is right everywhere. Dynamic scales are per sample (qparams.cu). Pointwise convolutions over dense
// codes are plain products, depthwise ones have a kernel of their own (conv2d_depthwise.cu). Bits are those of cpp/cpu/conv2d.cpp.
// Read next: portable.cuh.
#include <cmath>

#include "conv2d.cuh"
#include "engine/portable.cuh"

namespace quant_ops {
namespace {

bool has_pixels(const Int8Conv2dParams& p) { return p.H * p.W > 0; }

// Whether results of neighbouring output channels are neighbours in memory.
bool channels_are_contiguous(const Int8Conv2dParams& p) { return p.y_channels_last || p.OH * p.OW == 1; }

// ---- activations ----------------------------------------------------------------------------------------------------

// choose_qparams over a sample. Codes are those of quantize_rows.
ChooseQParams range_of_samples(const Int8Conv2dParams& p, float* scale, int32_t* zero_point) {
  const bool asymmetric = p.in.mode == Activation::kDynamicAsymmetric;
  ChooseQParams q{};
  Iteration &kept = q.range.kept, &reduced = q.range.reduced;
  kept.ndim = 1;
  kept.operands = 2;
  kept.size[0] = p.N;
  kept.stride[0][0] = p.x_stride[0];
  kept.stride[1][0] = 1;
  reduced.ndim = 3;
  reduced.operands = 1;
  const int64_t sizes[3] = {p.C, p.H, p.W};
  for (int d = 0; d < 3; ++d) {
    reduced.size[d] = sizes[d];
    reduced.stride[0][d] = p.x_stride[d + 1];
  }
  q.x = p.in.x;
  q.x_dtype = p.in.dtype;
  q.scale = scale;
  q.zero_point = zero_point;
  q.qmin = asymmetric ? -128 : -127;
  q.qmax = 127;
  q.asymmetric = asymmetric;
  return q;
}

// Whether the kernels can read x itself: int8 codes in NHWC, taps of whole aligned vectors or words, none of them padded.
bool is_codes(const Int8Conv2dParams& p, int64_t channels, int64_t tap) {
  const int64_t alignment = tap % kVectorBytes == 0 ? kVectorBytes : 4;
  return p.in.dtype == DType::kInt8 && p.x_stride[1] == 1 && channels == tap && is_aligned(p.in.x, alignment) &&
         p.x_stride[0] % alignment == 0 && p.x_stride[2] % alignment == 0 && p.x_stride[3] % alignment == 0;
}

// The codes as a kernel walks over them, but for their addresses. `tap` is the bytes of a tap of one group, `pixel` those of all.
Gather gather_of(const Int8Conv2dParams& p, bool in_place, int64_t tap, int64_t pixel) {
  Gather gather;
  gather.sample = in_place ? p.x_stride[0] : p.H * p.W * pixel;
  gather.row = in_place ? p.x_stride[2] : p.W * pixel;
  gather.pixel = in_place ? p.x_stride[3] : pixel;
  gather.group = tap;
  gather.height = static_cast<int32_t>(p.H);
  gather.width = static_cast<int32_t>(p.W);
  for (int d = 0; d < 2; ++d) {  // all below 2^30: conv2d_geometry of torch/conv2d.h
    gather.stride[d] = static_cast<int32_t>(p.stride[d]);
    gather.pad[d] = static_cast<int32_t>(p.pad[d]);
    gather.dilation[d] = static_cast<int32_t>(p.dilation[d]);
  }
  gather.pixels = FastDiv(p.OH * p.OW);
  gather.columns = FastDiv(p.OW);
  gather.tap = FastDiv(tap);
  gather.kernel_columns = FastDiv(p.S);
  return gather;
}

// Codes, and arrays of the samples' scales, zero points and padding where the plan has them.
void encode_samples(const Conv2dPlan& plan, const Int8Conv2dParams& p, const Launch& at) {
  float* scale = plan.scale.in(at.memory);
  int32_t* zero_point = plan.zero_point.in(at.memory);
  InputParams in = p.in;
  if (plan.range) {
    run_choose_qparams(*plan.range, range_of_samples(p, scale, zero_point), {at.op, plan.range_memory.in(at.memory), at.stream});
    in.scale = scale;
    in.zero_point = has_zero_points(p.in) ? zero_point : nullptr;
    in.scale_stride = in.zero_point_stride = 1;
  }
  if (plan.encoder != Encoder::kNone)
    write_codes_cuda({.in = in,
                      .stride = {p.x_stride[0], p.x_stride[1], p.x_stride[2], p.x_stride[3]},
                      .samples = p.N,
                      .height = p.H,
                      .width = p.W,
                      .channels = plan.channels,
                      .tap = plan.gather.group,
                      .q = plan.codes.in(at.memory),
                      .pixel = plan.gather.pixel},
                     at);
  const bool rewrites = plan.scale && !plan.range;
  if (rewrites || plan.padding)
    write_sample_params_cuda({.samples = p.N,
                              .scale = in.scale,
                              .scale_stride = in.scale_stride,
                              .zero_point = in.zero_point,
                              .zero_point_stride = in.zero_point_stride,
                              .offset = p.in.dtype == DType::kUInt8 ? 128 : 0,
                              .scale_out = rewrites ? scale : nullptr,
                              .zero_point_out = rewrites ? zero_point : nullptr,
                              .padding = plan.padding.in(at.memory)},
                             at);
}

// ---- products -------------------------------------------------------------------------------------------------------

// Whether output pixels are input pixels, which lie in memory as dense rows of one product with one scale.
bool is_dense(const Int8Conv2dParams& p, const CudaWeights& w, const Gather& g, int64_t row_step) {
  const bool same_pixels =
      w.taps == 1 && p.stride[0] == 1 && p.stride[1] == 1 && p.OH == p.H && p.OW == p.W && p.pad[0] == 0 && p.pad[1] == 0;
  const bool one_matrix = w.groups == 1 && !w.depthwise && g.pixel % kVectorBytes == 0 && (p.H == 1 || g.row == p.W * g.pixel) &&
                          (p.N == 1 || g.sample == p.H * p.W * g.pixel);
  return same_pixels && one_matrix && row_step == 0 && channels_are_contiguous(p);
}

// All of a dense product but the addresses of its operands and of the samples' parameters.
IgemmProblem product_of(const Int8Conv2dParams& p, const CudaWeights& w, const Gather& gather) {
  return {.M = p.N * p.OH * p.OW,
          .N = p.O,
          .K = w.k,
          .a_stride = gather.pixel,
          .b_stride = w.row_bytes,
          .row_step = 0,
          .column_scale = p.out.weight_scale,
          .column_step = p.out.weight_scale_stride,
          .bias = p.out.bias,
          .floor = p.out.relu ? 0.0f : -INFINITY,
          .y = p.out.y,
          .y_stride = p.O,
          .y_dtype = p.out.dtype,
          .out_scale = p.out.out_scale,
          .out_zero_point = p.out.out_zero_point};
}

int64_t row_step_of(const Int8Conv2dParams& p, bool own_params) { return p.N == 1 ? 0 : own_params ? 1 : p.in.scale_stride; }

Epilogue epilogue_of(const Int8Conv2dParams& p, const Conv2dPlan& plan, const int32_t* column_sum, const Launch& at) {
  const int64_t pixels = p.OH * p.OW;
  const bool across = channels_are_contiguous(p), own_params = static_cast<bool>(plan.scale);
  Epilogue out{.row_scale = own_params ? plan.scale.in(at.memory) : p.in.scale,
               .row_zero = has_zero_points(p.in) ? plan.zero_point.in(at.memory) : nullptr,
               .row_step = row_step_of(p, own_params),
               .column_scale = p.out.weight_scale,
               .column_step = p.out.weight_scale_stride,
               .column_sum = column_sum,
               .bias = p.out.bias,
               .floor = p.out.relu ? 0.0f : -INFINITY,
               .y = p.out.y,
               .dtype = p.out.dtype,
               .rows = FastDiv(pixels),
               .y_sample = pixels * p.O,
               .y_row = across ? p.O : 1,
               .y_column = across ? 1 : pixels,
               .out_scale = p.out.out_scale,
               .out_zero_point = p.out.out_zero_point};
  const CudaWeights& w = plan.weight.layout;
  out.vectors = whole_vectors(out, w.depthwise ? p.O : w.n);
  return out;
}

void run_gather(const Int8Conv2dParams& p, const Conv2dPlan& plan, const Gather& gather, const Epilogue& out, const int8_t* weight,
                const Launch& at) {
  const CudaWeights& w = plan.weight.layout;
  IgemmArgs args{};
  args.M = p.N * p.OH * p.OW;
  args.N = w.n;
  args.K = w.k;
  args.b = weight;
  args.b_stride = w.row_bytes;
  args.gather = gather;
  args.out = out;
  args.groups = w.groups;
  const bool vectors = gather.group % kVectorBytes == 0;
  run_portable(args, plan.kernel, vectors ? igemm_kernel_of<GatherLoader<kVectorBytes>> : igemm_kernel_of<GatherLoader<4>>,
               plan.sums.in(at.memory), at);
}

}  // namespace

Conv2dPlan plan_conv2d(const Int8Conv2dParams& p, const GpuLimits& gpu, const KernelChoice& wanted) {
  Conv2dPlan plan{};
  WorkspaceLayout workspace;
  const CudaWeights w = cuda_weights(p.O, p.C / p.groups, p.R, p.S, p.groups);
  const bool corrected = has_zero_points(p.in), own_params = is_dynamic(p.in) || corrected;
  plan.weight = plan_weight(w, p.weight, p.packed, corrected, &workspace);

  // Codes of one group follow those of the other, each tap padded to `tap` bytes.
  const int64_t tap = w.depthwise ? w.rows_bytes / w.taps : w.tap_bytes, pixel = w.depthwise ? tap : w.groups * tap;
  plan.channels = w.depthwise ? p.C : w.channels();
  const bool in_place = is_codes(p, plan.channels, tap);
  plan.encoder = in_place ? Encoder::kNone : is_dynamic(p.in) ? Encoder::kRange : Encoder::kGiven;
  plan.gather = gather_of(p, in_place, tap, pixel);
  if (!in_place) plan.codes = workspace.add<int8_t>(p.N * p.H * p.W * pixel);
  if (own_params) plan.scale = workspace.add<float>(p.N);
  if (own_params) plan.zero_point = workspace.add<int32_t>(p.N);
  if (corrected) plan.padding = workspace.add<int8_t>(p.N * kVectorBytes);
  if (is_dynamic(p.in) && has_pixels(p)) {  // a sample without pixels has scale 1, as one of zeros
    plan.range = plan_choose_qparams(range_of_samples(p, nullptr, nullptr), gpu.multiprocessors);
    plan.range_memory = workspace.add<char>(plan.range->bytes);
  }

  plan.dense = is_dense(p, w, plan.gather, row_step_of(p, own_params));
  if (w.depthwise) {
    plan.kernel.engine = Engine::kDepthwise;
  } else if (plan.dense) {
    plan.product = product_of(p, w, plan.gather);
    plan.kernel = choose_kernel(plan.product, gpu, wanted);
  } else {
    const int load_bytes = tap % kVectorBytes == 0 ? kVectorBytes : 4;
    plan.kernel = choose_conv_tile({p.N * p.OH * p.OW, w.n, w.k, w.groups, load_bytes}, gpu, wanted);
  }
  if (plan.kernel.sums > 0) plan.sums = workspace.add<int32_t>(plan.kernel.sums);
  plan.bytes = workspace.bytes();
  return plan;
}

void run_conv2d(const Conv2dPlan& plan, const Int8Conv2dParams& p, const Launch& at) {
  const WeightOnDevice weight = run_weight(plan.weight, p.weight, p.packed, at);
  encode_samples(plan, p, at);
  Gather gather = plan.gather;
  gather.codes = plan.encoder == Encoder::kNone ? static_cast<const int8_t*>(p.in.x) : plan.codes.in(at.memory);
  gather.padding = plan.padding.in(at.memory);
  const Epilogue out = epilogue_of(p, plan, weight.sums, at);
  if (plan.weight.layout.depthwise) return run_depthwise(p, gather, out, weight.rows, at);
  if (!plan.dense) return run_gather(p, plan, gather, out, weight.rows, at);
  IgemmProblem product = plan.product;
  product.a = gather.codes;
  product.b = weight.rows;
  product.row_scale = out.row_scale;
  product.row_zero = out.row_zero;
  product.column_sum = weight.sums;
  run_product(product, plan.kernel, plan.sums.in(at.memory), at);
}

}  // namespace quant_ops

// int8_conv2d on CUDA: implicit GEMM, never an im2col matrix in memory.
//
//   y[n,o,oh,ow] = epilogue(sum_{c,r,s} a[n, c, oh*stride - pad + r*dilation, ...] b[o,c,r,s])
//
// The image becomes NHWC codes in a workspace (activations.cu), unless it is NHWC codes already. Row m of the product is an output
// pixel, and k runs over taps and channels (Gather in layout.cuh). A tap beside the image reads the zero point's code, so that the
// plain column-sum correction is right everywhere. Dynamic scales are per sample (qparams.cu). Pointwise convolutions over dense
// codes are plain products. Depthwise ones and those of few channels have kernels that quantize x themselves (conv2d_depthwise.cu,
// conv2d_direct.cu), and patches that do not overlap are a linear layer (conv2d_patches.cu). Bits are those of cpp/cpu/conv2d.cpp.
// Read next: portable.cuh.
#include <algorithm>
#include <cmath>

#include "conv2d.cuh"
#include "engine/portable.cuh"
#if defined(QUANT_OPS_SM90)
#include "engine/sm90/choose.h"
#endif

namespace quant_ops {
namespace {

// A pointwise convolution with strides reads some of the pixels: it is one of these alone, without strides. Scales of samples still
// are those of all pixels. Only where channels are contiguous, since codes are made from vectors of x.
Int8Conv2dParams of_read_pixels(const Int8Conv2dParams& p) {
  Int8Conv2dParams read = p;
  const bool within = p.OH > 0 && p.OW > 0 && (p.OH - 1) * p.stride[0] < p.H && (p.OW - 1) * p.stride[1] < p.W;
  if (p.R * p.S != 1 || p.pad[0] != 0 || p.pad[1] != 0 || p.x_stride[1] != 1 || !within) return read;
  read.H = p.OH;
  read.W = p.OW;
  for (int d = 0; d < 2; ++d) {
    read.x_stride[2 + d] *= p.stride[d];
    read.stride[d] = 1;
  }
  return read;
}

bool has_pixels(const Int8Conv2dParams& p) { return p.H * p.W > 0; }

// Whether results of neighbouring output channels are neighbours in memory.
bool channels_are_contiguous(const Int8Conv2dParams& p) { return p.y_channels_last || p.OH * p.OW == 1; }

// ---- the Hopper engine ----------------------------------------------------------------------------------------------

// TMA reads zeros beside the image, which is the code of 0.0 only where no zero point is. Where there are zero points, the codes
// lie in an image with a border, which write_codes fills with their codes, and no tap leaves that image.

bool has_border(const Conv2dPlan& plan) { return plan.border[0] > 0 || plan.border[1] > 0; }

#if defined(QUANT_OPS_SM90)
sm90::Problem hopper_problem(const Int8Conv2dParams& p, const CudaWeights& w, const Gather& gather) {
  return {.M = p.N * p.OH * p.OW,
          .N = w.n,
          .K = w.k,
          .groups = w.groups,
          .b_stride = w.row_bytes,
          .gathers = true,
          .gather = gather,
          .samples = p.N};
}

// How far the taps reach beside the image.
int64_t reach_beside(const Int8Conv2dParams& p, int d) {
  const int64_t size = d == 0 ? p.H : p.W, kernel = d == 0 ? p.R : p.S, count = d == 0 ? p.OH : p.OW;
  return std::max<int64_t>({0, p.pad[d], (count - 1) * p.stride[d] - p.pad[d] + (kernel - 1) * p.dilation[d] - (size - 1)});
}
#endif

// Takes the Hopper engine's fastest kernel, or the wanted one, if that engine takes the convolution. It was the faster engine
// wherever both were timed.
void choose_hopper(const Int8Conv2dParams& p, const CudaWeights& w, bool in_place, const GpuLimits& gpu, const KernelChoice& wanted,
                   Conv2dPlan* plan) {
#if defined(QUANT_OPS_SM90)
  const bool names_hopper = sm90::kernel_named(wanted.name) < sm90::kKernels;
  if (gpu.arch != 90 || p.N * p.OH * p.OW == 0 || names_tile(wanted)) return;
  Gather gather = plan->gather;
  int64_t border[2] = {0, 0};
  if (has_zero_points(p.in))
    for (int d = 0; d < 2; ++d) border[d] = reach_beside(p, d);
  if (border[0] > 0 || border[1] > 0) {
    constexpr int64_t kMost = 4;  // times the pixels of the image
    if ((p.H + 2 * border[0]) * (p.W + 2 * border[1]) > kMost * p.H * p.W) return;
    in_place = false;
    gather.height += static_cast<int32_t>(2 * border[0]);
    gather.width += static_cast<int32_t>(2 * border[1]);
    gather.pixel = w.groups * gather.group;
    gather.row = gather.width * gather.pixel;
    gather.sample = gather.height * gather.row;
    for (int d = 0; d < 2; ++d) gather.pad[d] -= static_cast<int32_t>(border[d]);
  }
  gather.codes = in_place ? static_cast<const int8_t*>(p.in.x) : nullptr;
  sm90::Problem problem = hopper_problem(p, w, gather);
  problem.out.dtype = p.out.dtype;
  const KernelPlan kernel =
      names_hopper ? sm90::choose(problem, gpu.multiprocessors, wanted) : sm90::choose(problem, gpu.multiprocessors);
  if (kernel.engine == Engine::kNone) return;
  plan->kernel = kernel;
  plan->gather = gather;
  std::copy(border, border + 2, plan->border);
#else
  static_cast<void>(p), static_cast<void>(w), static_cast<void>(in_place), static_cast<void>(gpu), static_cast<void>(wanted);
  static_cast<void>(plan);
#endif
}

// ---- activations ----------------------------------------------------------------------------------------------------

// choose_qparams over a sample. Codes are those of quantize_rows.
ChooseQParams range_of_samples(const Int8Conv2dParams& p, float* scale, int32_t* zero_point) {
  const bool asymmetric = p.in.mode == InputMode::kDynamicAsymmetric;
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

// Codes, and arrays of the samples' scales, zero points and padding where the plan has them; scales of dynamic samples are those of
// `all` pixels. Returns the input with scales and zero points by which it is quantized.
InputParams encode_samples(const Conv2dPlan& plan, const Int8Conv2dParams& p, const Int8Conv2dParams& all, const Launch& at) {
  float* scale = plan.scale.in(at.memory);
  int32_t* zero_point = plan.zero_point.in(at.memory);
  InputParams in = p.in;
  SampleRanges ranges{};
  if (plan.range) {
    const ChooseQParams samples = range_of_samples(all, scale, zero_point);
    const Launch range_at{at.op, plan.range_memory.in(at.memory), at.stream};
    if (plan.encoder == Encoder::kRange) {  // write_codes chooses the scales
      run_ranges(*plan.range, samples, range_at);
      ranges = {range_at.memory, plan.range->parts, samples.asymmetric, scale, zero_point};
    } else {
      run_choose_qparams(*plan.range, samples, range_at);
    }
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
                      .pixel = plan.gather.pixel,
                      .border_h = plan.border[0],
                      .border_w = plan.border[1],
                      .ranges = ranges},
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
  if (in.scale == nullptr && plan.scale) {  // of samples without pixels
    in.scale = scale;
    in.zero_point = zero_point;
    in.scale_stride = in.zero_point_stride = 1;
  }
  return in;
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
          .floor = p.out.function == Function::kRelu ? 0.0f : -INFINITY,
          .y = p.out.y,
          .y_stride = p.O,
          .y_dtype = p.out.dtype,
          .out_scale = p.out.out_scale,
          .out_zero_point = p.out.out_zero_point};
}

// Whether the plan has arrays of the samples' scales and zero points: the given ones have one stride, and zero points of unsigned
// codes are shifted.
bool has_own_params(const InputParams& in) {
  return is_dynamic(in) || (has_zero_points(in) && (in.dtype == DType::kUInt8 || in.scale_stride != in.zero_point_stride));
}

int64_t row_step_of(const Int8Conv2dParams& p, bool own_params) { return p.N == 1 ? 0 : own_params ? 1 : p.in.scale_stride; }

Epilogue epilogue_of(const Int8Conv2dParams& p, const Conv2dPlan& plan, const int32_t* column_sum, const Launch& at) {
  const int64_t pixels = p.OH * p.OW;
  const bool across = channels_are_contiguous(p), own_params = static_cast<bool>(plan.scale);
  Epilogue out{.row_scale = own_params ? plan.scale.in(at.memory) : p.in.scale,
               .row_zero = !has_zero_points(p.in) ? nullptr
                           : own_params           ? plan.zero_point.in(at.memory)
                                                  : p.in.zero_point,
               .row_step = row_step_of(p, own_params),
               .column_scale = p.out.weight_scale,
               .column_step = p.out.weight_scale_stride,
               .column_sum = column_sum,
               .bias = p.out.bias,
               .floor = p.out.function == Function::kRelu ? 0.0f : -INFINITY,
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
#if defined(QUANT_OPS_SM90)
  if (plan.kernel.engine == Engine::kSm90) {
    sm90::Problem problem = hopper_problem(p, w, gather);
    problem.b = weight;
    problem.out = out;
    return sm90::run(problem, plan.kernel, plan.sums.in(at.memory), at);
  }
#endif
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

// ---- patches --------------------------------------------------------------------------------------------------------

// The linear layer of a convolution's patches. Their order is that of the weight itself, so that a packed one is of use for its
// sums alone.
Int8LinearParams linear_of_patches(const Int8Conv2dParams& p, const InputParams& in) {
  Int8LinearParams l{};
  l.M = p.N * p.OH * p.OW;
  l.N = p.O;
  l.K = p.C * p.R * p.S;
  l.in = in;
  l.in.dtype = DType::kInt8;
  l.in.mode = InputMode::kQuantized;
  l.x_stride = (l.K + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  l.weight = p.weight;
  l.packed = l.K % kVectorBytes == 0 ? p.packed : nullptr;
  l.out = p.out;
  l.y_stride = p.O;
  return l;
}

// Scales, zero points and codes of the rows; null in a plan.
InputParams rows_of_patches(const Conv2dPlan& plan, const InputParams& samples, void* memory) {
  InputParams rows = samples;
  rows.x = plan.codes.in(memory);
  const bool own = static_cast<bool>(plan.patches->row_scale);
  if (own) rows.scale = plan.patches->row_scale.in(memory);
  rows.scale_stride = own ? 1 : 0;
  if (plan.patches->row_zero) rows.zero_point = plan.patches->row_zero.in(memory);
  rows.zero_point_stride = rows.scale_stride;
  return rows;
}

Conv2dPlan plan_patches(const Int8Conv2dParams& p, const GpuLimits& gpu, const KernelChoice& wanted) {
  Conv2dPlan plan{};
  WorkspaceLayout workspace;
  const int64_t M = p.N * p.OH * p.OW;
  const bool corrected = has_zero_points(p.in);
  const bool by_sample =
      p.N > 1 && (is_dynamic(p.in) || p.in.scale_stride != 0 || (p.in.zero_point && p.in.zero_point_stride != 0));
  plan.encoder = Encoder::kNone;
  plan.patches.emplace();
  plan.codes = workspace.add<int8_t>(M * linear_of_patches(p, p.in).x_stride);
  if (is_dynamic(p.in)) {
    plan.scale = workspace.add<float>(p.N);
    plan.zero_point = workspace.add<int32_t>(p.N);
    plan.range = plan_choose_qparams(range_of_samples(p, nullptr, nullptr), gpu.multiprocessors);
    plan.range_memory = workspace.add<char>(plan.range->bytes);
  }
  if (by_sample || p.in.dtype == DType::kUInt8) {  // zero points of uint8 codes become smaller by 128
    plan.patches->row_scale = workspace.add<float>(M);
    if (corrected) plan.patches->row_zero = workspace.add<int32_t>(M);
  }
  static int32_t exists = 0;  // a plan asks only whether there are zero points
  InputParams rows = rows_of_patches(plan, p.in, nullptr);
  rows.zero_point = corrected ? &exists : nullptr;
  plan.patches->linear = plan_linear(linear_of_patches(p, rows), gpu, wanted);
  plan.kernel = plan.patches->linear.kernel;
  plan.patches->linear_memory = workspace.add<char>(plan.patches->linear.bytes);
  plan.bytes = workspace.bytes();
  return plan;
}

void run_patches(const Conv2dPlan& plan, const Int8Conv2dParams& p, const Launch& at) {
  const InputParams samples = encode_samples(plan, p, p, at), rows = rows_of_patches(plan, samples, at.memory);
  const Int8LinearParams linear = linear_of_patches(p, rows);
  write_patches_cuda(p, samples,
                     {.q = plan.codes.in(at.memory),
                      .row_bytes = linear.x_stride,
                      .scale = plan.patches->row_scale.in(at.memory),
                      .zero_point = plan.patches->row_zero.in(at.memory)},
                     at);
  run_linear(plan.patches->linear, linear, {at.op, plan.patches->linear_memory.in(at.memory), at.stream});
}

}  // namespace

Conv2dPlan plan_conv2d(const Int8Conv2dParams& all, const GpuLimits& gpu, const KernelChoice& wanted) {
  const Int8Conv2dParams p = of_read_pixels(all);
  if (is_patches(p) && channels_are_contiguous(p) && has_pixels(p) && p.N > 0) return plan_patches(p, gpu, wanted);
  Conv2dPlan plan{};
  WorkspaceLayout workspace;
  const CudaWeights w = cuda_weights(p.O, p.C / p.groups, p.R, p.S, p.groups);
  const bool corrected = has_zero_points(p.in), own_params = has_own_params(p.in);
  plan.weight = plan_weight(w, p.weight, p.packed, corrected, &workspace);

  // Codes of one group follow those of the other, each tap padded to `tap` bytes.
  const int64_t tap = w.depthwise ? w.rows_bytes / w.taps : w.tap_bytes, pixel = w.depthwise ? tap : w.groups * tap;
  plan.channels = w.depthwise ? p.C : w.channels();
  if (w.depthwise) plan.depthwise = plan_depthwise(p, gpu);
  if (wanted.name.compare(0, 5, "igemm") != 0) plan.direct = plan_direct(p, w, gpu);
  const bool quantizes = plan.depthwise.rows > 0 || plan.direct.tile_rows > 0;  // the kernel itself
  bool in_place = quantizes || is_codes(p, plan.channels, tap);
  plan.gather = gather_of(p, in_place, tap, pixel);
  plan.dense = is_dense(p, w, plan.gather, row_step_of(p, own_params));
  if (w.depthwise) {
    plan.kernel.engine = Engine::kDepthwise;
  } else if (plan.direct.tile_rows > 0) {
    plan.kernel.engine = Engine::kDirect;
  } else if (plan.dense) {
    plan.product = product_of(p, w, plan.gather);
    plan.kernel = choose_kernel(plan.product, gpu, wanted);
  } else {
    choose_hopper(p, w, in_place, gpu, wanted, &plan);
    const IgemmShape shape{p.N * p.OH * p.OW, w.n, w.k, w.groups, tap % kVectorBytes == 0 ? kVectorBytes : 4};
    if (plan.kernel.engine == Engine::kNone) plan.kernel = choose_conv_tile(shape, gpu, wanted);
    in_place = in_place && !has_border(plan);
  }

  plan.encoder = in_place ? Encoder::kNone : is_dynamic(p.in) ? Encoder::kRange : Encoder::kGiven;
  if (!in_place) plan.codes = workspace.add<int8_t>(p.N * plan.gather.height * plan.gather.width * pixel);
  if (own_params) plan.scale = workspace.add<float>(p.N);
  if (own_params) plan.zero_point = workspace.add<int32_t>(p.N);
  const bool reads_padding = plan.kernel.engine != Engine::kSm90 && !(quantizes && p.in.mode != InputMode::kQuantized);
  if (corrected && reads_padding) plan.padding = workspace.add<int8_t>(p.N * kVectorBytes);
  if (is_dynamic(p.in) && has_pixels(p)) {  // a sample without pixels has scale 1, as one of zeros
    plan.range = plan_choose_qparams(range_of_samples(all, nullptr, nullptr), gpu.multiprocessors);
    plan.range_memory = workspace.add<char>(plan.encoder == Encoder::kRange ? ranges_bytes(*plan.range) : plan.range->bytes);
  }
  if (plan.kernel.sums > 0) plan.sums = workspace.add<int32_t>(plan.kernel.sums);
  plan.bytes = workspace.bytes();
  return plan;
}

void run_conv2d(const Conv2dPlan& plan, const Int8Conv2dParams& all, const Launch& at) {
  const Int8Conv2dParams p = of_read_pixels(all);
  if (plan.patches) return run_patches(plan, p, at);
  const WeightOnDevice weight = run_weight(plan.weight, p.weight, p.packed, at);
  const InputParams in = encode_samples(plan, p, all, at);
  Gather gather = plan.gather;
  gather.codes = plan.encoder == Encoder::kNone ? static_cast<const int8_t*>(p.in.x) : plan.codes.in(at.memory);
  gather.padding = plan.padding.in(at.memory);
  const Epilogue out = epilogue_of(p, plan, weight.sums, at);
  if (plan.weight.layout.depthwise) return run_depthwise(p, plan.depthwise, {in, gather, out, weight.rows}, at);
  if (plan.direct.tile_rows > 0) return run_direct(p, plan.weight.layout, plan.direct, {in, gather, out, weight.rows}, at);
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

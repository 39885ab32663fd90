// int8_conv2d on CUDA: implicit GEMM, never an im2col matrix.
//
//   y[n,o,oh,ow] = epilogue(sum_{c,r,s} a[n, c, oh*stride - pad + r*dilation, ...] b[o,c,r,s])
//
// The image becomes NHWC codes in a workspace (activations.cu), unless it is that already. Row m of the product is an output pixel,
// k runs over kernel positions and channels (Gather in layout.cuh); a position beside the image reads the zero point's code, so
// that the plain column-sum correction is right everywhere. Dynamic scales are per sample (qparams.cu). Pointwise convolutions over
// dense codes are plain products, depthwise ones have a kernel of their own (conv2d_depthwise.cu). Bits are those of
// cpp/cpu/conv2d.cpp. Read next: portable.cuh.
#include <cmath>

#include "conv2d.cuh"
#include "engine/portable.cuh"

namespace quant_ops {
namespace {

// ---- activations ----------------------------------------------------------------------------------------------------

// choose_qparams over a sample.
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

// Whether x itself is the codes that the kernels read: NHWC, whole chunks, aligned.
bool is_codes(const Int8Conv2dParams& p, int64_t channels, int64_t tap) {
  const int64_t alignment = tap % kChunk == 0 ? kChunk : 4;
  return p.in.dtype == DType::kInt8 && p.x_stride[1] == 1 && channels == tap && is_aligned(p.in.x, alignment) &&
         p.x_stride[0] % alignment == 0 && p.x_stride[2] % alignment == 0 && p.x_stride[3] % alignment == 0;
}

void expect_small(const Int8Conv2dParams& p) {
  constexpr int64_t kMost = int64_t{1} << 30;  // coordinates are int32
  const auto reach = [&](int d, int64_t size, int64_t kernel, int64_t out) {
    return std::max({size + p.pad[d], (kernel - 1) * p.dilation[d], (out - 1) * p.stride[d]});
  };
  const int64_t height = reach(0, p.H, p.R, p.OH), width = reach(1, p.W, p.S, p.OW);
  if (height >= kMost || width >= kMost || p.N >= kMost)
    throw std::runtime_error(
        "quant_ops.int8_conv2d: expected less than 2^30 images of less than 2^30 rows and columns with their "
        "padding, got " +
        std::to_string(p.N) + " of " + std::to_string(height) + " x " + std::to_string(width) + ". Split the batch.");
}

}  // namespace

int64_t int8_conv2d_cuda(const Int8Conv2dParams& p, void* memory, void* stream) {
  const char* op = "int8_conv2d";
  const int64_t pixels = p.OH * p.OW;
  if (p.N == 0 || p.O == 0 || pixels == 0) return 0;
  expect_small(p);
  Workspace workspace(memory);
  const CudaWeights w = cuda_weights(p.O, p.C / p.groups, p.R, p.S, p.groups);
  const bool dynamic = p.in.mode == Activation::kDynamic || p.in.mode == Activation::kDynamicAsymmetric;
  const bool is_unsigned = p.in.dtype == DType::kUInt8, empty = p.H * p.W == 0;
  const bool asymmetric = p.in.mode == Activation::kDynamicAsymmetric || p.in.zero_point != nullptr || is_unsigned;
  const WeightOnDevice weight(w, p.weight, p.packed, asymmetric, &workspace);

  // codes: channels of one group after the other, each padded to `tap` bytes
  const int64_t channels = w.depthwise ? p.C : w.channels(), tap = w.depthwise ? w.rows_bytes / w.taps : w.tap;
  const int64_t pixel = w.depthwise ? tap : w.groups * tap;
  const bool in_place = is_codes(p, channels, tap);
  int8_t* codes = in_place ? nullptr : workspace.take<int8_t>(p.N * p.H * p.W * pixel);
  // scales and zero points per sample, and 16 codes of each zero point
  const bool made = dynamic || asymmetric;
  float* scale = made ? workspace.take<float>(p.N) : nullptr;
  int32_t* zero_point = made ? workspace.take<int32_t>(p.N) : nullptr;
  int8_t* padding = asymmetric ? workspace.take<int8_t>(p.N * kChunk) : nullptr;
  const bool ranged = dynamic && !empty;  // a sample without pixels has scale 1, as one of zeros
  const ChooseQParams range = range_of_samples(p, scale, zero_point);
  double* partial = ranged ? workspace.take<double>(choose_qparams_workspace(range)) : nullptr;

  if (!workspace.counts()) {
    weight.prepare(stream);
    if (ranged) choose_qparams_cuda(range, partial, stream);
    const CodesParams encode{p.in.x,
                             p.in.dtype,
                             {p.x_stride[0], p.x_stride[1], p.x_stride[2], p.x_stride[3]},
                             p.N,
                             p.H,
                             p.W,
                             channels,
                             tap,
                             codes,
                             pixel,
                             ranged ? scale : p.in.scale,
                             ranged ? 1 : p.in.scale_stride,
                             ranged ? asymmetric ? zero_point : nullptr : p.in.zero_point,
                             ranged ? 1 : p.in.zero_point_stride};
    if (!in_place) write_codes_cuda(op, encode, stream);
    if (made && !(ranged && !asymmetric))
      sample_params_cuda(op,
                         {p.N, encode.scale, encode.scale_step, encode.zero_point, encode.zero_step, is_unsigned ? 128 : 0,
                          ranged ? nullptr : scale, ranged ? nullptr : zero_point, padding},
                         stream);
  }

  Gather gather;
  gather.codes = in_place ? static_cast<const int8_t*>(p.in.x) : codes;
  gather.padding = padding;
  gather.sample = in_place ? p.x_stride[0] : p.H * p.W * pixel;
  gather.row = in_place ? p.x_stride[2] : p.W * pixel;
  gather.pixel = in_place ? p.x_stride[3] : pixel;
  gather.group = tap;
  gather.height = static_cast<int32_t>(p.H);
  gather.width = static_cast<int32_t>(p.W);
  for (int d = 0; d < 2; ++d) {
    gather.stride[d] = static_cast<int32_t>(p.stride[d]);
    gather.pad[d] = static_cast<int32_t>(p.pad[d]);
    gather.dilation[d] = static_cast<int32_t>(p.dilation[d]);
  }
  gather.pixels = FastDiv(pixels);
  gather.columns = FastDiv(p.OW);
  gather.tap = FastDiv(tap);
  gather.kernel_columns = FastDiv(p.S);

  const bool across = p.y_channels_last || pixels == 1;
  Epilogue out{};
  out.row_scale = made ? scale : p.in.scale;
  out.row_zero = asymmetric ? zero_point : nullptr;
  out.row_step = p.N == 1 ? 0 : made ? 1 : p.in.scale_stride;
  out.column_scale = p.out.weight_scale;
  out.column_step = p.out.weight_scale_stride;
  out.column_sum = weight.sums;
  out.bias = p.out.bias;
  out.floor = p.out.relu ? 0.0f : -INFINITY;
  out.y = p.out.y;
  out.dtype = p.out.dtype;
  out.rows = FastDiv(pixels);
  out.y_sample = pixels * p.O;
  out.y_row = across ? p.O : 1;
  out.y_column = across ? 1 : pixels;
  out.vectors = whole_vectors(out, w.depthwise ? p.O : w.n);
  out.out_scale = p.out.out_scale;
  out.out_zero_point = p.out.out_zero_point;

  if (w.depthwise) {
    if (!workspace.counts()) run_depthwise(p, gather, out, w, weight.rows, stream);
    return workspace.used();
  }
  const bool pointwise = w.taps == 1 && w.groups == 1 && p.stride[0] == 1 && p.stride[1] == 1 && p.OH == p.H && p.OW == p.W &&
                         p.pad[0] == 0 && p.pad[1] == 0 && (p.H == 1 || gather.row == p.W * gather.pixel) &&
                         (p.N == 1 || gather.sample == p.H * p.W * gather.pixel);
  if (pointwise && across && out.row_step == 0 && gather.pixel % kChunk == 0) {
    const IgemmProblem product{p.N * pixels,  p.O,   w.k,          gather.codes,     gather.pixel,    weight.rows,       w.row,
                               out.row_scale, 0,     out.row_zero, out.column_scale, out.column_step, out.column_sum,    out.bias,
                               out.floor,     out.y, p.O,          out.dtype,        out.out_scale,   out.out_zero_point};
    igemm_cuda(op, product, &workspace, stream);
    return workspace.used();
  }
  IgemmArgs args{};
  args.M = p.N * pixels;
  args.N = w.n;
  args.K = w.k;
  args.b = weight.rows;
  args.b_stride = w.row;
  args.gather = gather;
  args.out = out;
  args.groups = w.groups;
  const bool chunks = tap % kChunk == 0;
  const char* name = forced_kernel();
  // a name that is of dense products only leaves the choice to the model
  const ForcedKernel forced(is_igemm_tile(name) ? name : nullptr);
  const IgemmChoice choice = portable_choice({args.M, args.N, args.K, args.groups, chunks ? kChunk : 4}, gpu_limits(), forced);
  if (choice.tile < 0) refuse_forced_kernel(op, name);
  run_igemm(op, args, choice, chunks ? igemm_kernel_of<GatherLoader<kChunk>> : igemm_kernel_of<GatherLoader<4>>, &workspace,
            stream);
  return workspace.used();
}

}  // namespace quant_ops

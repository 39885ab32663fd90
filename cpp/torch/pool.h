// int8_max_pool2d, int8_avg_pool2d, int8_adaptive_avg_pool2d and int8_upsample_nearest2d for any device: checks, allocation, the
// structs of ops.h. `Backend` supplies max_pool(params, x), avg_pool(op, params, x) and upsample(params, x). Read next:
// cpu/pool.cpp.
#pragma once

#include "torch/conv2d.h"
#include "torch/pointwise.h"

namespace quant_ops {

// More codes than this in a window, and their int32 sum could overflow: |x - zero_point| <= 255.
constexpr int64_t kMaxWindow = 8421504;

// ---- images ---------------------------------------------------------------------------------------------------------

inline void expect_image(const char* op, const Tensor& x) {
  expect_codes_dtype(op, "x", x);
  QO_EXPECT(x.dim() == 4 || x.dim() == 3, op, "x.shape (N, C, H, W) or (C, H, W), got ", shape_text(x));
  QO_EXPECT(x.size(-2) >= 1 && x.size(-1) >= 1, op, "images of at least 1 x 1, got x.shape ", shape_text(x));
  expect_elements(op, "x", x.sizes());
}

// x as the kernels read it, and how the result lies: in channels_last if x's channels step by 1 and x is not plainly contiguous.
struct Image {
  Tensor source;
  int64_t N, C, H, W;
  bool channels_last;
  int64_t stride[4];
};
inline Image image_of(const Tensor& x) {
  const bool batched = x.dim() == 4;
  const bool channels_last = batched && !x.is_contiguous() && x.stride(1) == 1;
  const Tensor source = channels_last || x.stride(-1) == 1 ? x : as_contiguous(x);
  const auto n = source.sizes(), step = source.strides();
  const size_t c = batched ? 1 : 0;
  Image image{.source = source,
              .N = batched ? n[0] : 1,
              .C = n[c],
              .H = n[c + 1],
              .W = n[c + 2],
              .channels_last = channels_last,
              .stride = {batched ? step[0] : 0, step[c], step[c + 1], step[c + 2]}};
  for (int64_t& s : image.stride)  // so large only where it leads nowhere: of a single index, or in an empty image
    if (s > kMostElements) s = 0;
  return image;
}

inline Tensor empty_image(const Image& image, const Tensor& x, int64_t height, int64_t width, ScalarType type) {
  return empty(x.dim() == 4 ? Ints{image.N, image.C, height, width} : Ints{image.C, height, width}, type, x, image.channels_last);
}

inline PoolShape pool_shape(const Image& image, const PoolAxis& h, const PoolAxis& w) {
  PoolShape shape{.N = image.N, .C = image.C, .h = h, .w = w, .y_channels_last = image.channels_last};
  for (int d = 0; d < 4; ++d) shape.x_stride[d] = image.stride[d];
  return shape;
}

// ---- windows --------------------------------------------------------------------------------------------------------

struct WindowArgs {
  const Ints &kernel_size, &stride, &padding, &dilation;
  bool ceil_mode;
};

// Both axes, vertical first. As torch has it, padding is at most half of a window, and with ceil_mode the last window begins in the
// image or in the padding before it.
struct Windows {
  PoolAxis axis[2];
};
inline Windows windows_of(const char* op, const Image& image, const WindowArgs& args) {
  int64_t kernel[2], stride[2], pad[2], dilation[2];
  pair_of(op, "kernel_size", args.kernel_size, 1, kernel);
  pair_of(op, "stride", args.stride.empty() ? args.kernel_size : args.stride, 1, stride);
  pair_of(op, "padding", args.padding, 0, pad);
  pair_of(op, "dilation", args.dilation, 1, dilation);
  Windows windows{};
  for (int d = 0; d < 2; ++d) {
    const int64_t size = d == 0 ? image.H : image.W;
    const bool small = std::max({kernel[d], stride[d], pad[d], dilation[d], size, image.N}) < kMostSize;
    QO_EXPECT(small, op, "the batch, each side of the image, kernel_size, stride, padding and dilation below 2^30, got x of ",
              image.N, " images of ", image.H, " x ", image.W, ", kernel_size ", shape_text(Ints(kernel, kernel + 2)), ", stride ",
              shape_text(Ints(stride, stride + 2)), ", padding ", shape_text(Ints(pad, pad + 2)), " and dilation ",
              shape_text(Ints(dilation, dilation + 2)), ". Split the batch or the image.");
    const int64_t reach = dilation[d] * (kernel[d] - 1) + 1;
    QO_EXPECT(2 * pad[d] <= reach, op, "padding of at most half of the window, got padding ", shape_text(Ints(pad, pad + 2)),
              ", kernel_size ", shape_text(Ints(kernel, kernel + 2)), " and dilation ", shape_text(Ints(dilation, dilation + 2)));
    const int64_t room = size + 2 * pad[d] - reach;
    int64_t out = room < 0 ? 0 : room / stride[d] + 1;
    if (args.ceil_mode && room + stride[d] - 1 >= 0) {
      out = (room + stride[d] - 1) / stride[d] + 1;
      if ((out - 1) * stride[d] >= size + pad[d]) --out;
    }
    QO_EXPECT(out >= 1, op, "a result of at least 1 x 1, got an image of ", image.H, " x ", image.W, ", kernel_size ",
              shape_text(Ints(kernel, kernel + 2)), ", padding ", shape_text(Ints(pad, pad + 2)), " and dilation ",
              shape_text(Ints(dilation, dilation + 2)));
    windows.axis[d] = {.size = size, .out = out, .kernel = kernel[d], .stride = stride[d], .pad = pad[d], .dilation = dilation[d]};
  }
  expect_elements(op, "a result", {image.N, image.C, windows.axis[0].out, windows.axis[1].out});
  return windows;
}

// ---- the operators --------------------------------------------------------------------------------------------------

template <class Backend>
Tensor int8_max_pool2d(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                       bool ceil_mode) {
  const char* op = "int8_max_pool2d";
  expect_image(op, x);
  const Image image = image_of(x);
  const Windows windows = windows_of(
      op, image, {.kernel_size = kernel_size, .stride = stride, .padding = padding, .dilation = dilation, .ceil_mode = ceil_mode});
  Tensor y = empty_image(image, x, windows.axis[0].out, windows.axis[1].out, x.scalar_type());
  const MaxPoolParams p{.shape = pool_shape(image, windows.axis[0], windows.axis[1]),
                        .x = image.source.const_data_ptr(),
                        .y = y.mutable_data_ptr(),
                        .dtype = to_dtype(x.scalar_type())};
  Backend::max_pool(p, x);
  return y;
}

// What the two averages share, once the windows are known.
struct AverageArgs {
  const Tensor& x_scale;
  const std::optional<Tensor>& x_zero_point;
  CodesResultArgs result;
  bool counts_padding;
  int64_t divisor;
};
template <class Backend>
Tensor averages(const char* op, const Tensor& x, const Image& image, const Windows& windows, const AverageArgs& args) {
  int64_t taps = 1;
  for (const PoolAxis& a : windows.axis)
    taps *= a.kernel == 0 ? a.size / std::max<int64_t>(1, a.out) + (a.size % a.out != 0 ? 2 : 0) : std::min(a.kernel, a.size);
  QO_EXPECT(taps <= kMaxWindow, op, "windows of at most ", kMaxWindow, " pixels so that the int32 sum is exact, got ", taps,
            ". Average twice.");
  Holder holder;
  ScalarType type;
  AvgPoolParams p{.shape = pool_shape(image, windows.axis[0], windows.axis[1]),
                  .x = image.source.const_data_ptr(),
                  .dtype = to_dtype(x.scalar_type()),
                  .x_scale = scale_of_codes(op, "x_scale", args.x_scale, x, &holder),
                  .x_zero_point = zero_point_of_codes<Backend>(op, "x_zero_point", args.x_zero_point, x.scalar_type(), x, &holder),
                  .counts_padding = args.counts_padding,
                  .divisor = args.divisor,
                  .out = result_params<Backend>(op, x, args.result, &type, &holder)};
  Tensor y = empty_image(image, x, windows.axis[0].out, windows.axis[1].out, type);
  p.out.y = y.mutable_data_ptr();
  Backend::avg_pool(op, p, x);
  return y;
}

template <class Backend>
Tensor int8_avg_pool2d(const Tensor& x, const Tensor& x_scale, const std::optional<Tensor>& x_zero_point, const Ints& kernel_size,
                       const Ints& stride, const Ints& padding, bool ceil_mode, bool count_include_pad,
                       std::optional<int64_t> divisor_override, const std::optional<Tensor>& out_scale,
                       const std::optional<Tensor>& out_zero_point, std::optional<ScalarType> out_dtype) {
  const char* op = "int8_avg_pool2d";
  expect_image(op, x);
  QO_EXPECT(!divisor_override || *divisor_override != 0, op, "divisor_override other than 0, got 0");
  const Image image = image_of(x);
  const Windows windows = windows_of(
      op, image, {.kernel_size = kernel_size, .stride = stride, .padding = padding, .dilation = {1}, .ceil_mode = ceil_mode});
  return averages<Backend>(op, x, image, windows,
                           {.x_scale = x_scale,
                            .x_zero_point = x_zero_point,
                            .result = {.scale = out_scale, .zero_point = out_zero_point, .dtype = out_dtype},
                            .counts_padding = count_include_pad,
                            .divisor = divisor_override.value_or(0)});
}

template <class Backend>
Tensor int8_adaptive_avg_pool2d(const Tensor& x, const Tensor& x_scale, const std::optional<Tensor>& x_zero_point,
                                const Ints& output_size, const std::optional<Tensor>& out_scale,
                                const std::optional<Tensor>& out_zero_point, std::optional<ScalarType> out_dtype) {
  const char* op = "int8_adaptive_avg_pool2d";
  expect_image(op, x);
  const Image image = image_of(x);
  int64_t out[2];
  pair_of(op, "output_size", output_size, 1, out);
  QO_EXPECT(std::max({out[0], out[1], image.H, image.W, image.N}) < kMostSize, op,
            "the batch, each side of the image and output_size below 2^30, got x.shape ", shape_text(x), " and output_size ",
            shape_text(output_size), ". Split the batch or the image.");
  expect_elements(op, "a result", {image.N, image.C, out[0], out[1]});
  const Windows windows{{{.size = image.H, .out = out[0], .dilation = 1}, {.size = image.W, .out = out[1], .dilation = 1}}};
  return averages<Backend>(op, x, image, windows,
                           {.x_scale = x_scale,
                            .x_zero_point = x_zero_point,
                            .result = {.scale = out_scale, .zero_point = out_zero_point, .dtype = out_dtype},
                            .counts_padding = false,
                            .divisor = 0});
}

template <class Backend>
Tensor int8_upsample_nearest2d(const Tensor& x, const Ints& scale_factor) {
  const char* op = "int8_upsample_nearest2d";
  expect_image(op, x);
  const Image image = image_of(x);
  UpsampleParams p{.N = image.N, .C = image.C, .H = image.H, .W = image.W};
  pair_of(op, "scale_factor", scale_factor, 1, p.factor);
  const int64_t height = times(p.H, p.factor[0]), width = times(p.W, p.factor[1]);
  QO_EXPECT(std::max({height, width, p.N}) < kMostSize, op, "the batch and each side of the result below 2^30, got x.shape ",
            shape_text(x), " and scale_factor ", shape_text(scale_factor), ". Split the batch or the image.");
  expect_elements(op, "a result", {p.N, p.C, height, width});
  Tensor y = empty_image(image, x, height, width, x.scalar_type());
  p.x = image.source.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.y_channels_last = image.channels_last;
  for (int d = 0; d < 4; ++d) p.x_stride[d] = image.stride[d];
  Backend::upsample(p, x);
  return y;
}

}  // namespace quant_ops

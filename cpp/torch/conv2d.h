// int8_conv2d for any device: checks, allocation, Int8Conv2dParams. `Backend` supplies conv2d(params, x). The formula is in
// contract/ops.h, what a linear layer shares in int8.h. Read next: cpu/conv2d.cpp.
#pragma once

#include "torch/int8.h"

namespace quant_ops {

// An int[2] argument given as one or two numbers.
inline void pair_of(const char* op, const char* name, const Ints& list, int64_t at_least, int64_t* out) {
  QO_EXPECT(list.size() == 1 || list.size() == 2, op, name, " to be one or two numbers, got ", shape_text(list));
  out[0] = list[0];
  out[1] = list.back();
  QO_EXPECT(out[0] >= at_least && out[1] >= at_least, op, name, " >= ", at_least, ", got ", shape_text(list));
}

// Top, bottom, left and right, given as one, two or four numbers.
struct Padding {
  int64_t top, bottom, left, right;
};
inline Padding padding_of(const char* op, const Ints& list) {
  if (list.size() == 4) {
    for (int64_t side : list) QO_EXPECT(side >= 0, op, "padding >= 0, got ", shape_text(list));
    return {.top = list[0], .bottom = list[1], .left = list[2], .right = list[3]};
  }
  int64_t both[2];
  pair_of(op, "padding", list, 0, both);
  return {.top = both[0], .bottom = both[0], .left = both[1], .right = both[1]};
}

// Sizes and steps of the convolution: every check of one is here. x is [N, C, H, W], the weight [O, C/groups, R, S].
inline Int8Conv2dParams conv2d_geometry(const char* op, const Ints& x, const Ints& weight, const Ints& stride, const Ints& padding,
                                        const Ints& dilation, int64_t groups) {
  Int8Conv2dParams p{.N = x[0], .C = x[1], .H = x[2], .W = x[3], .O = weight[0], .R = weight[2], .S = weight[3], .groups = groups};
  QO_EXPECT(groups >= 1 && p.C % groups == 0 && p.O % groups == 0, op,
            "groups to divide the input and output channels, got groups ", groups, ", ", p.C, " input and ", p.O,
            " output channels");
  QO_EXPECT(p.C >= 1 && times(weight[1], groups) == p.C, op, "x.shape[-3] == weight.shape[1] * groups, got ", p.C, " and ",
            weight[1], " * ", groups);
  QO_EXPECT(p.R >= 1 && p.S >= 1, op, "a kernel of at least 1 x 1, got ", p.R, " x ", p.S);
  pair_of(op, "stride", stride, 1, p.stride);
  pair_of(op, "dilation", dilation, 1, p.dilation);
  const Padding pad = padding_of(op, padding);
  p.pad[0] = pad.top;
  p.pad[1] = pad.left;
  expect_elements(op, "x", x);
  expect_elements(op, "weight", weight);
  const auto is_small = [](std::initializer_list<int64_t> numbers) {  // they are not negative
    int64_t largest = 0;
    for (int64_t n : numbers) largest = std::max(largest, n);
    return largest < kMostSize;
  };
  const bool small =
      is_small({p.N, p.H, p.W, pad.top, pad.bottom, pad.left, pad.right, p.stride[0], p.stride[1], p.dilation[0], p.dilation[1]}) &&
      is_small({p.H + pad.top + pad.bottom, p.W + pad.left + pad.right});
  QO_EXPECT(small, op, "the batch, each side of the image with its padding, stride and dilation below 2^30, got x.shape ",
            shape_text(x), ", padding ", shape_text(padding), ", stride ", shape_text(stride), " and dilation ",
            shape_text(dilation), ". Split the batch or the image.");
  const int64_t padded_h = p.H + pad.top + pad.bottom, padded_w = p.W + pad.left + pad.right;
  expect_elements(op, "an image with its padding", {p.C, padded_h, padded_w});
  const int64_t reach_h = padded_h - times(p.dilation[0], p.R - 1) - 1;
  const int64_t reach_w = padded_w - times(p.dilation[1], p.S - 1) - 1;
  QO_EXPECT(reach_h >= 0 && reach_w >= 0, op, "an output of at least 1 x 1, got an input of ", p.H, " x ", p.W, ", padding ",
            shape_text(padding), ", dilation ", shape_text(dilation), " and a kernel of ", p.R, " x ", p.S);
  p.OH = reach_h / p.stride[0] + 1;
  p.OW = reach_w / p.stride[1] + 1;
  expect_elements(op, "a result", {p.N, p.O, p.OH, p.OW});
  return p;
}

// Where the kernels read the image: NHWC (channels step by 1) and NCHW (columns step by 1) in place, anything else in a contiguous
// copy. The result gets x's memory format: channels_last if x's channels step by 1 and x is not plainly contiguous.
inline Tensor conv2d_source(const Tensor& x, Int8Conv2dParams* p) {
  const bool batched = x.dim() == 4;
  const auto strides = x.strides();
  p->x_stride[0] = batched ? strides[0] : 0;
  for (size_t d = 1; d < 4; ++d) p->x_stride[d] = strides[batched ? d : d - 1];
  for (int64_t& step : p->x_stride)  // so large only where it leads nowhere: of a single index, or in an empty image
    if (step > kMostElements) step = 0;
  p->y_channels_last = batched && !x.is_contiguous() && p->x_stride[1] == 1;
  if (p->x_stride[1] == 1 || p->x_stride[3] == 1) return x;
  p->x_stride[0] = p->C * p->H * p->W;
  p->x_stride[1] = p->H * p->W;
  p->x_stride[2] = p->W;
  p->x_stride[3] = 1;
  return as_contiguous(x);
}

template <class Backend>
Tensor int8_conv2d(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                   const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                   const std::optional<Tensor>& x_scale, const std::optional<Tensor>& x_zero_point,
                   const std::optional<Tensor>& packed_weight, bool asymmetric, const std::optional<Tensor>& out_scale,
                   const std::optional<Tensor>& out_zero_point, std::optional<ScalarType> out_dtype, bool relu,
                   std::optional<bool> channels_last, const std::optional<Tensor>& residual,
                   const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& residual_zero_point,
                   int64_t activation) {
  const char* op = "int8_conv2d";
  const InputArgs input{.scale = x_scale, .zero_point = x_zero_point, .asymmetric = asymmetric};
  const ResultArgs result{.weight_scale = weight_scale,
                          .bias = bias,
                          .scale = out_scale,
                          .zero_point = out_zero_point,
                          .dtype = out_dtype,
                          .relu = relu,
                          .residual = residual,
                          .residual_scale = residual_scale,
                          .residual_zero_point = residual_zero_point,
                          .activation = activation};
  expect_int8(op, "weight", weight);
  QO_EXPECT(weight.dim() == 4, op, "weight.shape (O, C/groups, R, S), got ", shape_text(weight));
  const bool batched = x.dim() == 4;
  QO_EXPECT(batched || x.dim() == 3, op, "x.shape (N, C, H, W) or (C, H, W), got ", shape_text(x));
  Ints shape = sizes_of(x);
  if (!batched) shape.insert(shape.begin(), 1);
  Int8Conv2dParams p = conv2d_geometry(op, shape, sizes_of(weight), stride, padding, dilation, groups);
  expect_exact(op, "C/groups * R * S", times(times(weight.size(1), p.R), p.S), input.unsigned_codes(x));

  Holder holder;
  const Tensor source = conv2d_source(x, &p);
  QO_EXPECT(batched || !channels_last, op, "x.shape (N, C, H, W) for a result that is channels_last or not, got ", shape_text(x));
  if (channels_last) p.y_channels_last = *channels_last;
  p.in = input_params<Backend>(op, source, input, batched ? Ints{p.N, 1, 1, 1} : Ints{1, 1, 1}, &holder);
  ScalarType type;
  p.out = output_params<Backend>(op, x, result, p.O, &type, &holder);
  const WeightData data = weight_data<Backend>(op, weight, packed_weight, groups, x, &holder);
  p.weight = data.plain;
  p.packed = data.packed;
  Tensor y = empty(batched ? Ints{p.N, p.O, p.OH, p.OW} : Ints{p.O, p.OH, p.OW}, type, x, p.y_channels_last);
  p.out.residual = residual_params<Backend>(op, result, y, p.y_channels_last, &holder);
  p.out.y = y.mutable_data_ptr();
  Backend::conv2d(p, x);
  return y;
}

}  // namespace quant_ops

// int8_chain: from a program and the shapes of its inputs to a plan of cpu/chain.h, once for each of them. Read next: chain.h.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/chain.h"
#include "torch/chain_program.h"
#include "torch/conv2d.h"
#include "torch/linear.h"
#include "torch/pointwise.h"
#include "torch/pool.h"
#include "torch/quantize.h"

namespace quant_ops {

// How an input comes to lie as the steps read it: as it is, or copied.
enum class Arrival { kAsItIs, kChannelsLast, kContiguous };

// A plan and what each call needs beside it.
struct Chain {
  ChainPlan plan;
  std::vector<ChainSource> sources;   // of each step
  std::vector<PackedLayout> layouts;  // of the weight of each step, where it has one
  std::vector<ScalarType> types;      // of each value, for the caller
  std::vector<Arrival> arrivals;      // of each input
  int64_t zero_points = 0;            // that the steps read, at most
};

inline ScalarType chain_type(const char* op, int64_t number) {
  constexpr ScalarType kTypes[] = {ScalarType::Char, ScalarType::Byte, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  QO_EXPECT(number >= 0 && number < 5, op, "a dtype numbered 0 to 4, got ", number);
  return kTypes[number];
}
inline bool is_codes(ScalarType type) { return is_one_of(type, {ScalarType::Char, ScalarType::Byte}); }

// Follows the shapes through the steps. Parameters are those of the whole batch until `finish` divides it into samples.
class ChainBuilder {
 public:
  ChainBuilder(const ChainProgram& program, const KernelTable& table, int64_t threads) : table_(table), threads_(threads) {
    chain_.sources = program.steps;
    chain_.plan.results = program.results;
    program_inputs_ = program.inputs;
    find_rows();
  }

  // Of four dimensions, values lie in channels_last, but for the rows of linear layers. What only convolutions read may lie as the
  // caller has it.
  void add_input(const Ints& sizes, ScalarType type, bool channels_last) {
    Arrival arrival = Arrival::kAsItIs;
    if (sizes.size() == 4 && is_rows_[static_cast<size_t>(inputs_)])
      arrival = Arrival::kContiguous;
    else if (sizes.size() == 4 && !channels_last && !any_order(inputs_, true))
      arrival = Arrival::kChannelsLast;
    ChainValue& value = add_value(sizes, type, arrival == Arrival::kAsItIs ? channels_last : arrival == Arrival::kChannelsLast);
    value.place = ChainValue::Place::kInput;
    value.at = inputs_++;
    chain_.arrivals.push_back(arrival);
  }

  std::shared_ptr<const Chain> build() {
    samples_ = common_samples();
    for (const ChainSource& source : chain_.sources) add_step(source);
    shift_codes();
    chain_.plan.samples = samples_;
    for (ChainParams& params : chain_.plan.params) divide(&params);
    plan_chain(&chain_.plan, table_, threads_);
    return std::make_shared<const Chain>(std::move(chain_));
  }

 private:
  // Which values are rows of linear layers, or elementwise made of them or to them.
  void find_rows() {
    const size_t inputs = static_cast<size_t>(program_inputs_);
    is_rows_.assign(inputs + chain_.sources.size(), false);
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t i = 0; i < chain_.sources.size(); ++i) {
        const ChainSource& source = chain_.sources[i];
        const bool elementwise = source.op == ChainOp::kQuantize || source.op == ChainOp::kDequantize ||
                                 source.op == ChainOp::kAdd || source.op == ChainOp::kMul || source.op == ChainOp::kRequantize;
        bool rows = is_rows_[inputs + i] || source.op == ChainOp::kLinear;
        if (elementwise)
          for (int64_t from : source.inputs) rows = rows || is_rows_[static_cast<size_t>(from)];
        if (!rows || (!elementwise && source.op != ChainOp::kLinear)) continue;
        const auto mark = [&](size_t number) {
          changed = changed || !is_rows_[number];
          is_rows_[number] = true;
        };
        mark(inputs + i);
        for (int64_t from : source.inputs) mark(static_cast<size_t>(from));
      }
    }
  }

  // Whether convolutions alone read a value, or (`quantized`) codes that are made from it.
  bool any_order(int64_t value, bool quantized) const {
    for (int64_t result : chain_.plan.results)
      if (result == value) return false;
    for (size_t i = 0; i < chain_.sources.size(); ++i) {
      const ChainSource& source = chain_.sources[i];
      for (size_t place = 0; place < source.inputs.size(); ++place) {
        if (source.inputs[place] != value) continue;
        const bool convolves = source.op == ChainOp::kConv2d && place == 0;
        const bool quantizes = source.op == ChainOp::kQuantize && quantized;
        if (!convolves && !(quantizes && any_order(program_inputs_ + static_cast<int64_t>(i), false))) return false;
      }
    }
    return true;
  }

  ChainValue& value(int64_t i) { return chain_.plan.values[static_cast<size_t>(i)]; }
  ScalarType type(int64_t i) const { return chain_.types[static_cast<size_t>(i)]; }

  ChainValue& add_value(const Ints& sizes, ScalarType type, bool channels_last) {
    ChainValue v;
    v.sizes = sizes;
    v.dtype = to_dtype(type);
    v.channels_last = channels_last && sizes.size() == 4;
    chain_.plan.values.push_back(v);
    chain_.types.push_back(type);
    if (sizes.empty() || sizes[0] != samples_) samples_ = 1;
    return chain_.plan.values.back();
  }

  // The first size of all inputs, where they agree; 1 where samples cannot be told apart.
  int64_t common_samples() {
    const Ints& first = value(0).sizes;
    if (first.empty()) return 1;
    for (const ChainValue& v : chain_.plan.values)
      if (v.sizes.empty() || v.sizes[0] != first[0]) return 1;
    return std::max<int64_t>(1, first[0]);
  }

  void add_step(const ChainSource& source) {
    switch (source.op) {
      case ChainOp::kQuantize: return add_quantize(source);
      case ChainOp::kConv2d: return add_conv2d(source);
      case ChainOp::kLinear: return add_linear(source);
      case ChainOp::kAdd:
      case ChainOp::kMul:
      case ChainOp::kRequantize: return add_pointwise(source);
      case ChainOp::kMaxPool2d: return add_max_pool(source);
      case ChainOp::kAvgPool2d:
      case ChainOp::kAdaptiveAvgPool2d: return add_avg_pool(source);
      case ChainOp::kCat: return add_cat(source);
      case ChainOp::kUpsampleNearest2d: return add_upsample(source);
      case ChainOp::kFlatten: return add_flatten(source);
      case ChainOp::kDequantize: return add_dequantize(source);
      case ChainOp::kSlice: return add_slice(source);
      case ChainOp::kChannelShuffle: return add_channel_shuffle(source);
    }
  }

  template <class Params>
  void add(const ChainSource& source, const Params& params, int64_t weight_bytes, const Ints& sizes, ScalarType type,
           bool channels_last) {
    expect_elements(source.name.c_str(), "a result", sizes);
    add_value(sizes, type, channels_last);
    chain_.zero_points += static_cast<int64_t>(source.inputs.size()) + 1;
    chain_.plan.params.push_back(params);
    PackedLayout layout{};
    if constexpr (std::is_same_v<Params, Int8Conv2dParams>) layout = weight_layout(params);
    if constexpr (std::is_same_v<Params, Int8LinearParams>) layout = packed_layout(params.N, params.K, 1, 1, 1);
    chain_.layouts.push_back(layout);
    chain_.plan.steps.push_back(
        {.inputs = source.inputs, .output = static_cast<int64_t>(chain_.plan.values.size()) - 1, .weight_bytes = weight_bytes});
  }

  static int64_t elements(const ChainValue& v) {
    int64_t n = 1;
    for (int64_t size : v.sizes) n *= size;
    return n;
  }

  void add_quantize(const ChainSource& source) {
    const char* op = source.name.c_str();
    const ChainValue x = value(source.inputs[0]);
    const int64_t qmin = source.numbers[0], qmax = source.numbers[1];
    expect_codes(op, qmin, qmax);
    QO_EXPECT_DTYPE(is_floating(type(source.inputs[0])), op, "a floating value, got ", dtype_name(type(source.inputs[0])));
    const ScalarType to = code_type(qmin, qmax);
    QO_EXPECT(is_codes(to), op, "qmin and qmax of int8 or uint8 codes, got ", qmin, " and ", qmax);
    const ChainElements p{.n = elements(x),
                          .quantizes = true,
                          .from = x.dtype,
                          .to = to_dtype(to),
                          .scale = nullptr,
                          .zero_point = 0,
                          .qmin = static_cast<int32_t>(qmin),
                          .qmax = static_cast<int32_t>(qmax)};
    add(source, p, 0, x.sizes, to, x.channels_last);
  }

  void add_dequantize(const ChainSource& source) {
    const char* op = source.name.c_str();
    const ChainValue x = value(source.inputs[0]);
    const ScalarType to = chain_type(op, source.numbers[0]);
    QO_EXPECT_DTYPE(is_codes(type(source.inputs[0])), op, "int8 or uint8 codes, got ", dtype_name(type(source.inputs[0])));
    QO_EXPECT_DTYPE(is_floating(to), op, "a floating dtype of the result, got ", dtype_name(to));
    const ChainElements p{.n = elements(x),
                          .quantizes = false,
                          .from = x.dtype,
                          .to = to_dtype(to),
                          .scale = nullptr,
                          .zero_point = 0,
                          .qmin = 0,
                          .qmax = 0};
    add(source, p, 0, x.sizes, to, x.channels_last);
  }

  // Plans look at whether there is a packed weight; each call brings it.
  static const int8_t* packed_weight(const ChainSource& source) {
    static const int8_t kPresent = 0;
    return source.constants[0] >= 0 ? &kPresent : nullptr;
  }

  // What convolutions and linear layers share: how x is read, and the dtype of the result.
  ScalarType add_product(const ChainSource& source, int64_t out_dtype, int64_t activation, int64_t k, InputParams* in,
                         OutputParams* out) {
    const char* op = source.name.c_str();
    const ScalarType from = type(source.inputs[0]), to = chain_type(op, out_dtype);
    const Ints& c = source.constants;
    const bool has_scale = c[3] >= 0, has_zero_point = c[4] >= 0;
    QO_EXPECT(has_scale || is_floating(from), op, "x_scale for ", dtype_name(from), " codes, got none");
    QO_EXPECT(c[0] >= 0 || c[9] >= 0, op, "packed_weight or weight, got neither");
    QO_EXPECT(c[1] >= 0, op, "weight_scale, got none");
    expect_scale_of(op, to, c[5]);
    expect_exact(op, "the products of a sum", k, has_zero_point || from == ScalarType::Byte);
    in->dtype = to_dtype(from);
    in->mode = !has_scale ? InputMode::kDynamic : is_floating(from) ? InputMode::kStatic : InputMode::kQuantized;
    out->dtype = to_dtype(to);
    out->weight_scale_stride = 1;
    static const float kPresent = 0.0f;  // plans look at whether there is a bias; each call brings it
    if (c[2] >= 0) out->bias = &kPresent;
    out->function = function_of(op, false, activation);
    return to;
  }

  // out_scale, a constant, goes with codes alone.
  static void expect_scale_of(const char* op, ScalarType to, int64_t out_scale) {
    QO_EXPECT(is_codes(to) == (out_scale >= 0), op, "out_scale with int8 and uint8 results and no others, got ", dtype_name(to),
              out_scale >= 0 ? " with one" : " without one");
  }

  // The residual of a product whose result has these sizes.
  void take_residual(const ChainSource& source, const Ints& sizes, OutputParams* out) {
    if (source.inputs.size() < 2) return;
    const char* op = source.name.c_str();
    const ChainValue& r = value(source.inputs[1]);
    const bool codes = is_codes(type(source.inputs[1]));
    QO_EXPECT(r.sizes == sizes, op, "residual to have the shape of the result, ", shape_text(sizes), ", got ", shape_text(r.sizes));
    QO_EXPECT(r.channels_last == (source.op == ChainOp::kConv2d && sizes.size() == 4), op,
              "a residual that lies as the result does, got rows of a linear layer and an image");
    QO_EXPECT(codes == (source.constants[7] >= 0), op, "residual_scale with a residual of int8 or uint8 and no other, got ",
              dtype_name(type(source.inputs[1])), codes ? " without one" : " with one");
    static const int8_t kPresent = 0;  // as kPresent of a bias
    out->residual.r = &kPresent;
  }

  void add_conv2d(const ChainSource& source) {
    const char* op = source.name.c_str();
    const ChainValue x = value(source.inputs[0]);
    const Ints& n = source.numbers;
    const bool batched = x.sizes.size() == 4;
    QO_EXPECT(batched || x.sizes.size() == 3, op, "a value (N, C, H, W) or (C, H, W), got ", shape_text(x.sizes));
    Ints shape = x.sizes;
    if (!batched) {
      shape.insert(shape.begin(), 1);
      samples_ = 1;
    }
    for (int i = 0; i < 4; ++i) QO_EXPECT(n[static_cast<size_t>(i)] >= 0, op, "sizes of the weight >= 0, got ", shape_text(n));
    const Ints weight{n[0], n[1], n[2], n[3]};
    Int8Conv2dParams p = conv2d_geometry(op, shape, weight, {n[4], n[5]}, {n[6], n[7], n[8], n[9]}, {n[10], n[11]}, n[12]);
    const ScalarType to = add_product(source, n[13], n[14], times(times(n[1], n[2]), n[3]), &p.in, &p.out);
    const Ints strides = strides_of(x.channels_last, p.C, p.H, p.W);
    std::copy(strides.begin(), strides.end(), p.x_stride);
    p.packed = packed_weight(source);
    p.y_channels_last = batched;
    const Ints sizes = batched ? Ints{p.N, p.O, p.OH, p.OW} : Ints{p.O, p.OH, p.OW};
    take_residual(source, sizes, &p.out);
    add(source, p, times(times(n[0], n[1]), times(n[2], n[3])), sizes, to, true);
  }

  void add_linear(const ChainSource& source) {
    const char* op = source.name.c_str();
    const ChainValue x = value(source.inputs[0]);
    const int64_t N = source.numbers[0], K = source.numbers[1];
    QO_EXPECT(N >= 0 && !x.sizes.empty() && x.sizes.back() == K, op, "a value of ", K, " columns, got ", shape_text(x.sizes));
    expect_elements(op, "weight", {N, K});
    Int8LinearParams p{};
    p.N = N;
    p.K = p.x_stride = K;
    p.y_stride = N;
    p.packed = packed_weight(source);
    p.M = 1;
    for (size_t d = 0; d + 1 < x.sizes.size(); ++d) p.M *= x.sizes[d];
    const ScalarType to = add_product(source, source.numbers[2], source.numbers[3], K, &p.in, &p.out);
    if (x.sizes.size() < 2) samples_ = 1;
    QO_EXPECT(!x.channels_last, op, "a value that does not lie in channels_last, got one. Flatten it first.");
    Ints sizes = x.sizes;
    sizes.back() = N;
    take_residual(source, sizes, &p.out);
    add(source, p, N * K, sizes, to, false);
  }

  void add_flatten(const ChainSource& source) {
    const ChainValue x = value(source.inputs[0]);
    const int64_t dims = static_cast<int64_t>(x.sizes.size()), start = source.numbers[0];
    QO_EXPECT(start >= 0 && start < dims, source.name.c_str(), "start_dim in [0, ", dims - 1, "], got ", start);
    Ints sizes(x.sizes.begin(), x.sizes.begin() + start);
    sizes.push_back(1);
    for (int64_t d = start; d < dims; ++d) sizes.back() *= x.sizes[static_cast<size_t>(d)];
    QO_EXPECT(sizes.size() != 4, source.name.c_str(), "a result of other than 4 dimensions, which would be an image, got ",
              shape_text(sizes));
    if (start == 0) samples_ = 1;
    ChainFlatten p{.images = elements(x), .pixels = 1, .channels = 1, .element_bytes = dtype_bytes(x.dtype)};
    if (x.channels_last)
      p = {.images = x.sizes[0], .pixels = x.sizes[2] * x.sizes[3], .channels = x.sizes[1], .element_bytes = p.element_bytes};
    add(source, p, 0, sizes, type(source.inputs[0]), false);
  }

  void add_pointwise(const ChainSource& source) {
    const char* op = source.name.c_str();
    const ChainValue x = value(source.inputs[0]);
    const bool two = source.inputs.size() == 2, multiplies = source.op == ChainOp::kMul;
    expect_codes_of(op, source.inputs);
    const ScalarType to = chain_type(op, source.numbers[0]);
    expect_scale_of(op, to, source.constants[two ? 4 : 2]);
    PointwiseParams p{.rows = 1, .columns = elements(x), .function = function_of(op, false, source.numbers[1])};
    if (two) {
      const ChainValue& b = value(source.inputs[1]);
      const bool per_channel = multiplies && is_per_channel(x.sizes, b.sizes);
      QO_EXPECT(per_channel || b.sizes == x.sizes, op, "values of one shape", multiplies ? " or a second of (N, C, 1, 1)" : "",
                ", got ", shape_text(x.sizes), " and ", shape_text(b.sizes));
      QO_EXPECT(per_channel || b.channels_last == x.channels_last, op,
                "values that both lie in channels_last or neither, got rows of a linear layer and an image");
      const FactorRows rows = factor_rows(x.sizes, per_channel, x.channels_last);
      p.rows = rows.rows;
      p.columns = p.y_stride = rows.columns;
      p.multiplies = multiplies;
      p.shared_rows = rows.shared_rows;
      p.factor_is_column = rows.is_column;
    }
    add(source, p, 0, x.sizes, to, x.channels_last);
  }

  void expect_codes_of(const char* op, const Ints& values) const {
    for (int64_t i : values) QO_EXPECT_DTYPE(is_codes(type(i)), op, "int8 or uint8 codes, got ", dtype_name(type(i)));
  }

  // The images that pools and upsampling read.
  Image image_of_value(const ChainSource& source) {
    const char* op = source.name.c_str();
    const ChainValue& x = value(source.inputs[0]);
    const bool batched = x.sizes.size() == 4;
    expect_codes_of(op, source.inputs);
    QO_EXPECT(batched || x.sizes.size() == 3, op, "a value (N, C, H, W) or (C, H, W), got ", shape_text(x.sizes));
    const size_t c = batched ? 1 : 0;
    Image image{.source = Tensor(),
                .N = batched ? x.sizes[0] : 1,
                .C = x.sizes[c],
                .H = x.sizes[c + 1],
                .W = x.sizes[c + 2],
                .channels_last = x.channels_last,
                .stride = {}};
    QO_EXPECT(image.H >= 1 && image.W >= 1, op, "images of at least 1 x 1, got ", shape_text(x.sizes));
    if (!batched) samples_ = 1;
    const Ints strides = strides_of(x.channels_last, image.C, image.H, image.W);
    std::copy(strides.begin(), strides.end(), image.stride);
    return image;
  }
  static Ints strides_of(bool channels_last, int64_t c, int64_t h, int64_t w) {
    return channels_last ? Ints{c * h * w, 1, w * c, c} : Ints{c * h * w, h * w, w, 1};
  }
  Ints image_sizes(const ChainSource& source, const Image& image, int64_t height, int64_t width) {
    const bool batched = value(source.inputs[0]).sizes.size() == 4;
    return batched ? Ints{image.N, image.C, height, width} : Ints{image.C, height, width};
  }

  void add_max_pool(const ChainSource& source) {
    const Ints& n = source.numbers;
    const Image image = image_of_value(source);
    const Windows windows = windows_of(source.name.c_str(), image,
                                       {.kernel_size = {n[0], n[1]},
                                        .stride = {n[2], n[3]},
                                        .padding = {n[4], n[5]},
                                        .dilation = {n[6], n[7]},
                                        .ceil_mode = n[8] != 0});
    const MaxPoolParams p{.shape = pool_shape(image, windows.axis[0], windows.axis[1])};
    add(source, p, 0, image_sizes(source, image, windows.axis[0].out, windows.axis[1].out), type(source.inputs[0]),
        image.channels_last);
  }

  void add_avg_pool(const ChainSource& source) {
    const char* op = source.name.c_str();
    const Ints& n = source.numbers;
    const Image image = image_of_value(source);
    const bool adaptive = source.op == ChainOp::kAdaptiveAvgPool2d;
    const ScalarType to = chain_type(op, n.back());
    expect_scale_of(op, to, source.constants[2]);
    AvgPoolParams p{};
    if (adaptive) {
      p.shape = adaptive_shape(op, image, n[0], n[1]);
    } else {
      QO_EXPECT(n[8] != 0, op, "divisor_override other than 0, got 0");
      const Windows windows = windows_of(
          op, image,
          {.kernel_size = {n[0], n[1]}, .stride = {n[2], n[3]}, .padding = {n[4], n[5]}, .dilation = {1}, .ceil_mode = n[6] != 0});
      p.shape = pool_shape(image, windows.axis[0], windows.axis[1]);
      p.counts_padding = n[7] != 0;
      p.divisor = n[8] == -1 ? 0 : n[8];
    }
    expect_exact_windows(op, p.shape);
    add(source, p, 0, image_sizes(source, image, p.shape.h.out, p.shape.w.out), to, image.channels_last);
  }

  // The windows of an adaptive average.
  static PoolShape adaptive_shape(const char* op, const Image& image, int64_t height, int64_t width) {
    QO_EXPECT(height >= 1 && width >= 1 && std::max({height, width, image.H, image.W}) < kMostSize, op,
              "a result of at least 1 x 1 and each side of both images below 2^30, got ", height, " x ", width);
    return pool_shape(image, {.size = image.H, .out = height, .dilation = 1}, {.size = image.W, .out = width, .dilation = 1});
  }

  static void expect_exact_windows(const char* op, const PoolShape& shape) {
    int64_t taps = 1;
    for (const PoolAxis& a : {shape.h, shape.w})
      taps = times(taps, a.kernel == 0 ? ceil_div(a.size, a.out) + 1 : std::min(a.kernel, a.size));
    QO_EXPECT(taps <= kMaxWindow, op, "windows of at most ", kMaxWindow, " pixels so that the int32 sum is exact, got ", taps);
  }

  void add_upsample(const ChainSource& source) {
    const char* op = source.name.c_str();
    const Image image = image_of_value(source);
    UpsampleParams p{.N = image.N, .C = image.C, .H = image.H, .W = image.W, .y_channels_last = image.channels_last};
    pair_of(op, "scale_factor", source.numbers, 1, p.factor);
    std::copy(image.stride, image.stride + 4, p.x_stride);
    const int64_t height = times(p.H, p.factor[0]), width = times(p.W, p.factor[1]);
    QO_EXPECT(std::max(height, width) < kMostSize, op, "each side of the result below 2^30, got ", height, " x ", width);
    add(source, p, 0, image_sizes(source, image, height, width), type(source.inputs[0]), image.channels_last);
  }

  void add_cat(const ChainSource& source) {
    const char* op = source.name.c_str();
    const ChainValue first = value(source.inputs[0]);
    const int64_t dims = static_cast<int64_t>(first.sizes.size());
    int64_t dim = source.numbers[0];
    expect_codes_of(op, source.inputs);
    QO_EXPECT(dim >= -dims && dim < dims, op, "dim in [", -dims, ", ", dims - 1, "], got ", dim);
    if (dim < 0) dim += dims;
    const size_t d = static_cast<size_t>(dim);
    const ScalarType to = chain_type(op, source.numbers[1]);
    expect_scale_of(op, to, source.constants[source.constants.size() - 2]);
    if (dim == 0) samples_ = 1;
    Ints sizes = first.sizes;
    sizes[d] = 0;
    ChainCat cat;
    for (int64_t i : source.inputs) {
      const ChainValue& v = value(i);
      bool alike = v.sizes.size() == sizes.size();
      for (size_t k = 0; alike && k < sizes.size(); ++k) alike = k == d || v.sizes[k] == sizes[k];
      QO_EXPECT(alike, op, "values that differ in dimension ", dim, " alone, got shapes ", shape_text(first.sizes), " and ",
                shape_text(v.sizes));
      sizes[d] += v.sizes[d];
      const CatRows rows = cat_rows(v.sizes, dim, first.channels_last);
      cat.parts.push_back({.rows = rows.rows, .columns = rows.columns});
    }
    for (PointwiseParams& part : cat.parts) part.y_stride = cat_rows(sizes, dim, first.channels_last).columns;
    add(source, cat, 0, sizes, to, first.channels_last);
  }

  void add_slice(const ChainSource& source) {
    const char* op = source.name.c_str();
    const ChainValue x = value(source.inputs[0]);
    const int64_t dims = static_cast<int64_t>(x.sizes.size()), dim = source.numbers[0], start = source.numbers[1],
                  length = source.numbers[2];
    expect_codes_of(op, source.inputs);
    QO_EXPECT(dim >= 0 && dim < dims, op, "dim in [0, ", dims - 1, "], got ", dim);
    Ints sizes = x.sizes;
    int64_t& size = sizes[static_cast<size_t>(dim)];
    QO_EXPECT(start >= 0 && length >= 1 && start <= size - length, op, "start and length in a dimension of ", size, ", got ", start,
              " and ", length);
    const CatRows rows = cat_rows(x.sizes, dim, x.channels_last);
    const int64_t inner = rows.columns / size;
    if (dim == 0) samples_ = 1;
    size = length;
    const ChainSlice p{.rows = rows.rows, .row_bytes = rows.columns, .first = start * inner, .bytes = length * inner};
    add(source, p, 0, sizes, type(source.inputs[0]), x.channels_last);
  }

  void add_channel_shuffle(const ChainSource& source) {
    const char* op = source.name.c_str();
    const ChainValue x = value(source.inputs[0]);
    const int64_t groups = source.numbers[0];
    expect_codes_of(op, source.inputs);
    QO_EXPECT(x.sizes.size() == 4, op, "a value (N, C, H, W), got ", shape_text(x.sizes));
    QO_EXPECT(groups >= 1 && x.sizes[1] % groups == 0, op, "groups that divide ", x.sizes[1], " channels, got ", groups);
    const int64_t pixels = x.sizes[2] * x.sizes[3], per_group = x.sizes[1] / groups;
    const ChainShuffle p{.outer = x.sizes[0] * (x.channels_last ? pixels : 1),
                         .groups = groups,
                         .per_group = per_group,
                         .inner = x.channels_last ? 1 : pixels};
    add(source, p, 0, x.sizes, type(source.inputs[0]), x.channels_last);
  }

  // Steps whose result has codes of the same scale and zero point as their input.
  static bool keeps_codes(ChainOp op) {
    return op == ChainOp::kFlatten || op == ChainOp::kMaxPool2d || op == ChainOp::kUpsampleNearest2d || op == ChainOp::kSlice ||
           op == ChainOp::kChannelShuffle;
  }

  // Keeps int8 codes between steps as q + 128 where neither the caller nor a step that keeps codes of the caller's sees them.
  void shift_codes() {
    std::vector<ChainValue>& values = chain_.plan.values;
    for (size_t i = static_cast<size_t>(inputs_); i < values.size(); ++i) values[i].shifted = values[i].dtype == DType::kInt8;
    for (int64_t result : chain_.plan.results) value(result).shifted = false;
    const auto unite = [&](const ChainStep& step) {
      bool shifted = value(step.output).shifted;
      for (int64_t input : step.inputs) shifted = shifted && value(input).shifted;
      bool changed = value(step.output).shifted != shifted;
      value(step.output).shifted = shifted;
      for (int64_t input : step.inputs) {
        changed = changed || value(input).shifted != shifted;
        value(input).shifted = shifted;
      }
      return changed;
    };
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t i = 0; i < chain_.sources.size(); ++i)
        if (keeps_codes(chain_.sources[i].op)) changed = unite(chain_.plan.steps[i]) || changed;
    }
    for (ChainValue& v : values)
      if (v.shifted) v.dtype = DType::kUInt8;
    for (size_t i = 0; i < chain_.plan.steps.size(); ++i) take_dtypes(chain_.plan.steps[i], &chain_.plan.params[i]);
  }

  void take_dtypes(const ChainStep& step, ChainParams* params) {
    const DType from = value(step.inputs[0]).dtype, to = value(step.output).dtype;
    const DType second = step.inputs.size() > 1 ? value(step.inputs[1]).dtype : DType::kInt8;
    const auto take_product = [&](auto* product) {
      product->in.dtype = from;
      product->out.residual.dtype = second;
      product->out.dtype = to;
    };
    if (auto* conv = std::get_if<Int8Conv2dParams>(params)) take_product(conv);
    if (auto* linear = std::get_if<Int8LinearParams>(params)) take_product(linear);
    if (auto* pool = std::get_if<MaxPoolParams>(params)) pool->dtype = from;
    if (auto* pointwise = std::get_if<PointwiseParams>(params)) {
      pointwise->x_dtype = from;
      pointwise->residual.dtype = second;
      pointwise->out.dtype = to;
    }
    if (auto* pool = std::get_if<AvgPoolParams>(params)) {
      pool->dtype = from;
      pool->out.dtype = to;
    }
    if (auto* cat = std::get_if<ChainCat>(params))
      for (size_t i = 0; i < cat->parts.size(); ++i) {
        cat->parts[i].x_dtype = value(step.inputs[i]).dtype;
        cat->parts[i].out.dtype = to;
      }
    if (auto* elements = std::get_if<ChainElements>(params)) {
      const int32_t shift = elements->quantizes && value(step.output).shifted ? kSignedOffset : 0;
      elements->from = from;
      elements->to = to;
      elements->qmin += shift;
      elements->qmax += shift;
    }
  }

  // From the whole batch to one sample.
  void divide(ChainParams* params) const {
    if (auto* conv = std::get_if<Int8Conv2dParams>(params)) conv->N /= samples_;
    if (auto* linear = std::get_if<Int8LinearParams>(params)) linear->M /= samples_;
    if (auto* elements = std::get_if<ChainElements>(params)) elements->n /= samples_;
    if (auto* flatten = std::get_if<ChainFlatten>(params)) flatten->images /= samples_;
    if (auto* p = std::get_if<PointwiseParams>(params)) (p->shares_factor() ? p->rows : p->columns) /= samples_;
    if (auto* pool = std::get_if<MaxPoolParams>(params)) pool->shape.N /= samples_;
    if (auto* pool = std::get_if<AvgPoolParams>(params)) pool->shape.N /= samples_;
    if (auto* upsample = std::get_if<UpsampleParams>(params)) upsample->N /= samples_;
    if (auto* slice = std::get_if<ChainSlice>(params)) slice->rows /= samples_;
    if (auto* shuffle = std::get_if<ChainShuffle>(params)) shuffle->outer /= samples_;
    if (auto* cat = std::get_if<ChainCat>(params))
      for (PointwiseParams& part : cat->parts) part.rows /= samples_;
  }

  const KernelTable& table_;
  const int64_t threads_;
  int64_t program_inputs_ = 0, inputs_ = 0, samples_ = 1;
  std::vector<bool> is_rows_;  // of each value
  Chain chain_;
};

}  // namespace quant_ops

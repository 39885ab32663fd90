// quant_ops._kernels: every micro-kernel callable by instruction set on numpy arrays, without torch, for tests and
// micro-benchmarks. Outputs are written into arrays of the caller, who can surround them with guards.
// float16 is numpy's; bfloat16 travels as uint16 bits with dtype="bfloat16". Weights in groups: module_weight_only.cpp.
#include "kernels/module.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "cpu/columns.h"
#include "cpu/conv2d.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace quant_ops {

// One thread: the module tests kernels, not drivers.
void parallel_run(int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }
int64_t parallel_threads() { return 1; }

namespace {

bool runs(const std::string& isa) {
  const KernelTable* tables[8];
  for (int i = 0, n = runnable_kernels(tables); i < n; ++i)
    if (isa == tables[i]->isa) return true;
  return false;
}

// Tables whose instructions are emulated; never chosen at run time.
std::vector<std::string> emulated_isas() {
#if defined(__x86_64__)
  if (runs("avx2")) return {kAmxEmulatedProducts.isa};
#endif
  return {};
}

}  // namespace

const KernelTable& table_of(const std::string& isa) {
  const KernelTable* tables[8];
  for (int i = 0, n = runnable_kernels(tables); i < n; ++i)
    if (isa == tables[i]->isa) return *tables[i];
#if defined(__x86_64__)
  static const KernelTable amx_emulated{kAmxEmulatedProducts, kAvx2Vectors};
  if (isa == amx_emulated.isa && runs("avx2")) return amx_emulated;
#endif
  throw py::value_error("this machine does not run the instruction set '" + isa + "'");
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "int8") return DType::kInt8;
  if (name == "uint8") return DType::kUInt8;
  if (name == "int16") return DType::kInt16;
  if (name == "int32") return DType::kInt32;
  throw py::value_error("unknown dtype '" + name + "'");
}

namespace {

std::vector<std::string> isas() {
  const KernelTable* tables[8];
  std::vector<std::string> names;
  for (int i = 0, n = runnable_kernels(tables); i < n; ++i) names.push_back(tables[i]->isa);
  return names;
}

py::array_t<int8_t> pack_weight(const py::array_t<int8_t, py::array::c_style>& w, int64_t groups) {
  const PackedLayout layout =
      packed_layout(w.shape(0), w.shape(1), w.ndim() == 4 ? w.shape(2) : 1, w.ndim() == 4 ? w.shape(3) : 1, groups);
  py::array_t<int8_t> packed(layout.bytes);
  pack_weight_cpu(w.data(), layout, packed.mutable_data());
  return packed;
}

// y[M, N] from codes a[taps][M, 4 quads] and weights w[N, k, taps], in tiles of `rows` rows.
void gemm(const std::string& isa, const Vector<uint8_t>& a, const Vector<int8_t>& w, py::array y, const std::string& dtype,
          const Vector<int32_t>& row_zero, const Vector<float>& row_scale, const Vector<float>& column_scale,
          const Vector<float>& bias, bool relu, float out_scale, int32_t out_zero_point, int64_t rows, uint32_t flip) {
  const KernelTable& table = table_of(isa);
  const int64_t taps = a.shape(0), m_count = a.shape(1), row_bytes = a.shape(2), n_count = w.shape(0);
  const PackedLayout layout = packed_layout(n_count, w.shape(1), taps, 1, 1);
  if (layout.quads * kQuad != row_bytes || w.shape(2) != taps || rows < 1 ||
      (rows > table.gemm_rows && rows > table.call_rows && (rows != table.slim_rows || layout.padded_n > kSlimColumns)) ||
      (flip != 0 && !table.flips) || column_scale.size() < layout.padded_n || bias.size() < layout.padded_n ||
      row_zero.size() != m_count || row_scale.size() != m_count)
    throw py::value_error("inconsistent shapes");
  std::vector<int8_t> packed(static_cast<size_t>(layout.bytes));
  pack_weight_cpu(w.data(), layout, packed.data());
  const CodeOutput codes = code_output(dtype_of(dtype), out_scale, out_zero_point, relu ? Function::kRelu : Function::kNone,
                                       row_scale.data(), m_count, column_scale.data(), bias.data(), layout.padded_n);
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    const int64_t column = panel * kPanel, width = layout.width(panel);
    for (int64_t m = 0, count; m < m_count; m += count) {
      count = rows > table.gemm_rows && table.call_rows == 0 ? tile_rows(table, m_count - m, true) : std::min(rows, m_count - m);
      std::vector<int64_t> offsets;
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t r = 0; r < count; ++r) offsets.push_back((t * m_count + m + r) * row_bytes);
      GemmTile tile;
      tile.taps = taps;
      tile.quads = layout.quads;
      tile.flip = flip;
      tile.a = a.data();
      tile.a_offset = offsets.data();
      tile.b = tile.ahead = layout.panel(packed.data(), 0, panel);
      tile.out.dtype = dtype_of(dtype);
      tile.out.y = static_cast<char*>(y.mutable_data()) + m * y.strides(0) + column * y.itemsize();
      tile.out.y_stride = y.strides(0) / y.itemsize();
      tile.out.columns = std::min(width, n_count - column);
      tile.out.column_sum = layout.column_sum(packed.data(), 0) + column;
      tile.out.column_scale = column_scale.data() + column;
      tile.out.bias = bias.data() + column;
      tile.out.row_zero = row_zero.data() + m;
      tile.out.row_scale = row_scale.data() + m;
      tile.out.row_step = 1;
      tile.out.floor = relu ? 0.0f : -INFINITY;
      tile.out.codes = codes;
      table.gemm(tile, count, width);
    }
  }
}

// The sums y[N, OH, OW, O] of a whole convolution of codes x[N, H, W, C] less their zero point, and weights w[O, C / groups, R, S].
void conv2d(const std::string& isa, const Vector<uint8_t>& x, const Vector<int8_t>& w, Vector<int32_t> y, int32_t zero_point,
            int64_t stride, int64_t pad, int64_t dilation, int64_t groups) {
  const KernelTable& table = table_of(isa);
  const int64_t channels = x.shape(3), outputs = w.shape(0);
  if (y.ndim() != 4 || y.shape(3) != outputs || w.shape(1) * groups != channels) throw py::value_error("inconsistent shapes");
  const std::vector<float> ones(static_cast<size_t>(outputs), 1.0f);
  Int8Conv2dParams p{.N = x.shape(0),
                     .C = channels,
                     .H = x.shape(1),
                     .W = x.shape(2),
                     .O = outputs,
                     .R = w.shape(2),
                     .S = w.shape(3),
                     .OH = y.shape(1),
                     .OW = y.shape(2),
                     .groups = groups,
                     .stride = {stride, stride},
                     .pad = {pad, pad},
                     .dilation = {dilation, dilation},
                     .in = {.x = x.data(), .dtype = DType::kUInt8, .mode = InputMode::kQuantized, .zero_point = &zero_point},
                     .x_stride = {x.shape(1) * x.shape(2) * channels, 1, x.shape(2) * channels, channels},
                     .weight = w.data(),
                     .packed = nullptr,
                     .out = {.y = y.mutable_data(), .dtype = DType::kInt32, .weight_scale = ones.data(), .weight_scale_stride = 1},
                     .y_channels_last = true};
  run_conv2d(plan_conv2d(p, weight_layout(p), table, 1), p);
}

// A row y[pixels, C] from input rows a[R, W, channels rounded up to 16], whose bytes, xor `flip`, are the codes, and weights w[C,
// 1, R, S].
void depthwise(const std::string& isa, const Vector<uint8_t>& a, const Vector<int8_t>& w, py::array y, const std::string& dtype,
               int32_t row_zero, float row_scale, const Vector<float>& column_scale, const Vector<float>& bias, int64_t first,
               int64_t stride, int64_t dilation, uint8_t padding, uint8_t flip, int64_t out_rows) {
  const KernelTable& table = table_of(isa);
  const int64_t channels = w.shape(0);
  const PackedLayout layout = packed_layout(channels, 1, w.shape(2), w.shape(3), channels);
  if (layout.form != WeightForm::kDepthwise || a.ndim() != 3 || (out_rows == 2 && (layout.r >= kQuad || y.shape(0) % 2 != 0)) ||
      a.shape(0) != layout.r + out_rows - 1 || a.shape(2) != layout.padded_n || column_scale.size() < layout.padded_n ||
      bias.size() < layout.padded_n)
    throw py::value_error("inconsistent shapes");
  std::vector<int8_t> packed(static_cast<size_t>(layout.bytes));
  pack_weight_cpu(w.data(), layout, packed.data());
  std::vector<const uint8_t*> rows;
  for (int64_t r = 0; r < round_up(layout.r, kQuad); ++r) rows.push_back(a.data(std::min(r, a.shape(0) - 1), 0, 0));
  DepthwiseRun run;
  run.r = layout.r;
  run.s = layout.s;
  run.stride = stride;
  run.dilation = dilation;
  run.rows = rows.data();
  run.pixel = layout.padded_n;
  run.first = first;
  run.width = a.shape(1);
  run.flip = flip;
  run.padding = padding;
  run.b = packed.data() + layout.panels_offset;
  run.pixels = y.shape(0) / out_rows;
  run.out_rows = out_rows;
  std::vector<uint8_t> line(static_cast<size_t>(run.line_bytes()));
  run.line = line.data();
  run.out.y = y.mutable_data();
  run.out.y_stride = y.strides(0) / y.itemsize();
  run.y_row = run.pixels * run.out.y_stride;
  run.out.dtype = dtype_of(dtype);
  run.out.columns = channels;
  run.out.column_sum = layout.column_sum(packed.data(), 0);
  run.out.column_scale = column_scale.data();
  run.out.bias = bias.data();
  run.out.floor = -INFINITY;
  run.out.codes =
      code_output(run.out.dtype, 1.0f, 0, Function::kNone, &row_scale, 1, column_scale.data(), bias.data(), layout.padded_n);
  std::vector<char> shared(static_cast<size_t>(layout.padded_n * kSharedBytes));
  share_columns(layout.padded_n, run.out.column_sum, column_scale.data(), bias.data(), row_scale, row_zero, run.out.codes,
                shared.data())
      .give(0, &run.out);
  table.depthwise(run);
}

// `size` elements in `rows` rows; scale and zero_point have one element, one an element of a row, or two dimensions that broadcast.
void set_rows(RowsRun* run, int64_t rows, int64_t size, const Vector<float>& scale, const Vector<int32_t>& zero_point) {
  run->rows = rows;
  run->n = run->from_row = run->to_row = size / rows;
  run->scale = scale.data();
  run->zero_point = zero_point.data();
  const auto steps = [](const py::array& a, int* step, int64_t* row) {
    const int64_t columns = a.shape(a.ndim() - 1);
    *step = columns > 1 ? 1 : 0;
    *row = a.ndim() > 1 && a.shape(0) > 1 ? columns : 0;
  };
  steps(scale, &run->scale_step, &run->scale_row);
  steps(zero_point, &run->zero_step, &run->zero_row);
}

// With divide, the kernel gets no reciprocals.
void quantize(const std::string& isa, const py::array& x, const std::string& x_dtype, py::array y, const std::string& y_dtype,
              const Vector<float>& scale, const Vector<int32_t>& zero_point, int32_t qmin, int32_t qmax, bool simulate,
              int64_t rows, bool divide) {
  QuantizeRun run;
  set_rows(&run, rows, x.size(), scale, zero_point);
  std::vector<float> reciprocal;
  for (int64_t i = 0; i < scale.size(); ++i) reciprocal.push_back(reciprocal_of(scale.data()[i]));
  int64_t largest = 0;
  for (int64_t i = 0; i < zero_point.size(); ++i)
    for (int64_t bound : {qmin, qmax}) largest = std::max(largest, std::abs(bound - zero_point.data()[i]));
  run.reciprocal = divide ? nullptr : reciprocal.data();
  run.tie = tie_for(largest);
  run.x = x.data();
  run.y = y.mutable_data();
  run.qmin = qmin;
  run.qmax = qmax;
  run.x_dtype = dtype_of(x_dtype);
  run.y_dtype = dtype_of(y_dtype);
  run.simulate = simulate;
  table_of(isa).quantize(run);
}

void dequantize(const std::string& isa, const py::array& q, const std::string& q_dtype, py::array y, const std::string& y_dtype,
                const Vector<float>& scale, const Vector<int32_t>& zero_point, int64_t rows) {
  DequantizeRun run;
  set_rows(&run, rows, q.size(), scale, zero_point);
  run.q = q.data();
  run.y = y.mutable_data();
  run.q_dtype = dtype_of(q_dtype);
  run.y_dtype = dtype_of(y_dtype);
  table_of(isa).dequantize(run);
}

// Returns (sum for the scale, sum for the zero point) of up to 1024 elements, None for longer ones.
py::object straight_through_run(const std::string& isa, const py::array& x, const py::array& grad, py::array dx,
                                const std::string& dtype, const Vector<float>& scale, const Vector<int32_t>& zero_point,
                                int32_t qmin, int32_t qmax) {
  StraightThroughRun run;
  double sums[2] = {0, 0};
  run.x = x.data();
  run.grad = grad.data();
  run.dx = dx.mutable_data();
  run.n = x.size();
  run.scale = scale.data();
  run.zero_point = zero_point.data();
  run.scale_step = scale.size() == 1 ? 0 : 1;
  run.zero_step = zero_point.size() == 1 ? 0 : 1;
  run.qmin = qmin;
  run.qmax = qmax;
  run.dtype = dtype_of(dtype);
  const bool chunk = run.n <= kReduceChunk;
  run.scale_sum = chunk ? &sums[0] : nullptr;
  run.zero_sum = chunk ? &sums[1] : nullptr;
  table_of(isa).straight_through(run);
  if (!chunk) return py::none();
  return py::make_tuple(sums[0], sums[1]);
}

// x, grad and dx are [rows, at most 64 columns]; adds to lanes[2][32][64], starting with `lane`.
void straight_through_columns(const std::string& isa, const py::array& x, const py::array& grad, py::array dx,
                              const std::string& dtype, const Vector<float>& scale, const Vector<int32_t>& zero_point, int32_t qmin,
                              int32_t qmax, int64_t lane, Vector<double> lanes) {
  StraightThroughColumnsRun run;
  if (lanes.size() != 2 * kReduceLanes * kReduceColumns || x.shape(1) > kReduceColumns)
    throw py::value_error("inconsistent shapes");
  run.x = x.data();
  run.grad = grad.data();
  run.dx = dx.mutable_data();
  run.rows = x.shape(0);
  run.columns = x.shape(1);
  run.x_row = x.strides(0) / x.itemsize();
  run.grad_row = grad.strides(0) / grad.itemsize();
  run.dx_row = dx.strides(0) / dx.itemsize();
  run.scale = scale.data();
  run.zero_point = zero_point.data();
  run.scale_step = scale.size() == 1 ? 0 : 1;
  run.zero_step = zero_point.size() == 1 ? 0 : 1;
  run.qmin = qmin;
  run.qmax = qmax;
  run.dtype = dtype_of(dtype);
  run.lane = lane;
  run.scale_lanes = lanes.mutable_data();
  run.zero_lanes = lanes.mutable_data() + kReduceLanes * kReduceColumns;
  table_of(isa).straight_through_columns(run);
}

py::tuple range(const std::string& isa, const py::array& x, const std::string& dtype) {
  Range r{INFINITY, -INFINITY, 0};
  table_of(isa).range(x.data(), dtype_of(dtype), x.size(), false, &r);
  return py::make_tuple(r.min, r.max, r.abs_bits);
}

// Folds the ranges of the columns of x into min, max and abs_bits.
void range_columns(const std::string& isa, const py::array& x, const std::string& dtype, Vector<float> min, Vector<float> max,
                   Vector<uint32_t> abs_bits) {
  RangeColumnsRun run;
  run.x = x.data();
  run.dtype = dtype_of(dtype);
  run.rows = x.shape(0);
  run.columns = x.shape(1);
  run.x_row = x.strides(0) / x.itemsize();
  run.min = min.mutable_data();
  run.max = max.mutable_data();
  run.abs_bits = abs_bits.mutable_data();
  table_of(isa).range_columns(run);
}

void codes(const std::string& isa, const py::array& x, const std::string& dtype, float scale, int32_t zero_point, py::array y) {
  table_of(isa).codes(x.data(), dtype_of(dtype), x.size(), scale, zero_point, static_cast<uint8_t*>(y.mutable_data()));
}

// ---- floating formats -----------------------------------------------------------------------------------------------

void quantize_float(const std::string& isa, const py::array& x, py::array y, const std::string& dtype, const FloatFormat& format,
                    const std::optional<Vector<float>>& scale, const std::optional<Vector<uint32_t>>& random,
                    const std::optional<py::array>& grad) {
  FloatRun run;
  expect_size(y.size(), x.size());
  if (scale && scale->size() != 1) expect_size(scale->size(), x.size());
  if (random) expect_size(random->size(), x.size());
  if (grad) expect_size(grad->size(), x.size());
  run.x = x.data();
  run.grad = data_or_null(grad);
  run.y = y.mutable_data();
  run.n = x.size();
  run.dtype = dtype_of(dtype);
  run.scale = data_or_null(scale);
  run.scale_step = scale && scale->size() != 1 ? 1 : 0;
  run.random = data_or_null(random);
  run.format = format;
  table_of(isa).quantize_float(run);
}

// Blocks of one dimension of x are contiguous ones: x starts with block `first` of a row of `length` elements. Those of two lie
// down the columns; x, grad and y have rows equally far apart.
void quantize_block(const std::string& isa, const py::array& x, py::array y, const std::string& dtype, const FloatFormat& element,
                    int32_t rule, float divisor, float tensor_scale, int64_t length, int64_t block, int64_t first, int64_t blocks,
                    const std::optional<Vector<uint32_t>>& random, const std::optional<py::array>& grad) {
  BlockRun run;
  expect_size(y.size(), x.size());
  if (random) expect_size(random->size(), x.size());
  if (grad) expect_size(grad->size(), x.size());
  run.x = x.data();
  run.grad = data_or_null(grad);
  run.y = y.mutable_data();
  run.dtype = dtype_of(dtype);
  run.format = {element, static_cast<ScaleRule>(rule), divisor};
  run.tensor_scale = tensor_scale;
  run.random = data_or_null(random);
  if (x.ndim() == 1) {
    run.length = length;
    run.block = block;
    run.first = first;
    run.blocks = blocks;
    table_of(isa).quantize_blocks(run);
  } else {
    expect_size(y.strides(0), x.strides(0));
    if (grad) expect_size(grad->strides(0), x.strides(0));
    run.length = x.shape(0);
    run.columns = x.shape(1);
    run.row = x.strides(0) / x.itemsize();
    table_of(isa).quantize_block_columns(run);
  }
}

void random_words(const std::string& isa, uint64_t seed, uint64_t first, Vector<uint32_t> words) {
  table_of(isa).random_words(seed, first, words.size(), words.mutable_data());
}

// One row; factor and offset have one element or one for each. Codes are in [lo, hi]; `narrow` rounds to x's dtype.
void affine(const std::string& isa, bool quantizes, const py::array& x, const std::string& x_dtype, py::array y,
            const std::string& y_dtype, const Vector<float>& factor, const Vector<float>& offset, int32_t domain, bool narrow,
            float lo, float hi, float mid) {
  expect_size(y.size(), x.size());
  if (factor.size() != 1) expect_size(factor.size(), x.size());
  expect_size(offset.size(), factor.size());
  AffineRun run;
  run.from = x.data();
  run.to = y.mutable_data();
  run.from_dtype = dtype_of(x_dtype);
  run.to_dtype = dtype_of(y_dtype);
  run.n = x.size();
  run.factor = factor.data();
  run.offset = offset.data();
  run.step = factor.size() == 1 ? 0 : 1;
  run.domain = static_cast<ZeroPointDomain>(domain);
  run.narrow = narrow;
  run.lo = lo;
  run.hi = hi;
  run.mid = mid;
  quantizes ? table_of(isa).quantize_affine(run) : table_of(isa).dequantize_affine(run);
}

FloatFormat make_format(int exponent_bits, int mantissa_bits, int bias, int special, bool saturate, bool subnormals, int rounding) {
  return float_format(exponent_bits, mantissa_bits, bias, static_cast<SpecialCodes>(special), saturate, subnormals,
                      static_cast<Rounding>(rounding));
}

int64_t peak(const std::string& isa, int64_t iterations) {
  const KernelTable& table = table_of(isa);
  py::gil_scoped_release release;
  return table.peak(iterations);
}

}  // namespace
}  // namespace quant_ops

PYBIND11_MODULE(_kernels, m) {
  namespace q = quant_ops;
  using namespace py::literals;
  m.doc() = "Micro-kernels of quant_ops by instruction set, on numpy arrays.";
  m.def(
      "tiles",
      [](const std::string& isa, int64_t rows, bool slim) {
        std::vector<int64_t> tiles;
        for (; rows > 0; rows -= tiles.back()) tiles.push_back(q::tile_rows(q::table_of(isa), rows, slim));
        return tiles;
      },
      "isa"_a, "rows"_a, "slim"_a = false, "The rows of the tiles that so many rows are cut into.");
  m.def("gemm_rows", [](const std::string& isa) { return q::table_of(isa).gemm_rows; }, "isa"_a, "Rows of the full tile.");
  m.def(
      "slim_rows", [](const std::string& isa) { return q::table_of(isa).slim_rows; }, "isa"_a,
      "Rows of the full tile of at most 32 columns.");
  m.def(
      "gemm_name", [](const std::string& isa, int64_t rows, int64_t width) { return q::gemm_name(q::table_of(isa), rows, width); },
      "isa"_a, "rows"_a, "width"_a, "The kernel that multiplies a tile of so many rows by a panel of so many columns.");
  m.def(
      "kernel_names", [](const std::string& isa) { return q::kernel_names(q::table_of(isa)); }, "isa"_a,
      "(entry, function) of every kernel of the table.");
  m.def("flips", [](const std::string& isa) { return q::table_of(isa).flips; }, "isa"_a, "Whether gemm takes a flip.");
  m.def("isas", &q::isas, "Instruction sets this machine runs, worst first.");
  m.def("emulated_isas", &q::emulated_isas, "Names of kernels whose instructions are emulated, for tests only.");
  m.def("pack_weight", &q::pack_weight, "weight"_a, "groups"_a = 1);
  m.def("gemm", &q::gemm, "isa"_a, "a"_a, "weight"_a, "y"_a, "dtype"_a, "row_zero"_a, "row_scale"_a, "column_scale"_a, "bias"_a,
        "relu"_a = false, "out_scale"_a = 1.0f, "out_zero_point"_a = 0, "rows"_a = 1, "flip"_a = 0);
  m.def("conv2d", &q::conv2d, "isa"_a, "x"_a, "weight"_a, "y"_a.noconvert(), "zero_point"_a, "stride"_a, "pad"_a, "dilation"_a,
        "groups"_a, "A whole convolution by these kernels, without an epilogue.");
  m.def("depthwise", &q::depthwise, "isa"_a, "a"_a, "weight"_a, "y"_a, "dtype"_a, "row_zero"_a, "row_scale"_a, "column_scale"_a,
        "bias"_a, "first"_a = 0, "stride"_a = 1, "dilation"_a = 1, "padding"_a = 0, "flip"_a = 0, "out_rows"_a = 1);
  m.def("quantize", &q::quantize, "isa"_a, "x"_a, "x_dtype"_a, "y"_a, "y_dtype"_a, "scale"_a, "zero_point"_a, "qmin"_a, "qmax"_a,
        "simulate"_a, "rows"_a = 1, "divide"_a = false);
  m.def("dequantize", &q::dequantize, "isa"_a, "q"_a, "q_dtype"_a, "y"_a, "y_dtype"_a, "scale"_a, "zero_point"_a, "rows"_a = 1);
  m.def("straight_through", &q::straight_through_run, "isa"_a, "x"_a, "grad"_a, "dx"_a, "dtype"_a, "scale"_a, "zero_point"_a,
        "qmin"_a, "qmax"_a);
  m.def("straight_through_columns", &q::straight_through_columns, "isa"_a, "x"_a, "grad"_a, "dx"_a, "dtype"_a, "scale"_a,
        "zero_point"_a, "qmin"_a, "qmax"_a, "lane"_a, "lanes"_a.noconvert());
  m.def("range_columns", &q::range_columns, "isa"_a, "x"_a, "dtype"_a, "min"_a.noconvert(), "max"_a.noconvert(),
        "abs_bits"_a.noconvert());
  m.def("range", &q::range, "isa"_a, "x"_a, "dtype"_a, "(min, max, bits of the largest magnitude) of x.");
  m.def("codes", &q::codes, "isa"_a, "x"_a, "dtype"_a, "scale"_a, "zero_point"_a, "y"_a, "Activations for the GEMM, as bytes.");
  py::class_<q::FloatFormat>(m, "FloatFormat", "A floating format, with its rounding.")
      .def(py::init(&q::make_format), "exponent_bits"_a, "mantissa_bits"_a, "bias"_a, "special"_a = 0, "saturate"_a = true,
           "subnormals"_a = true, "rounding"_a = 0)
      .def_readonly("largest", &q::FloatFormat::largest)
      .def_property_readonly(
          "method", [](const q::FloatFormat& f) { return static_cast<int>(f.method); }, "How kernels round to it: RoundingMethod.");
  m.def("quantize_float", &q::quantize_float, "isa"_a, "x"_a, "y"_a, "dtype"_a, "format"_a, "scale"_a = py::none(),
        "random"_a = py::none(), "grad"_a = py::none());
  m.def("quantize_block", &q::quantize_block, "isa"_a, "x"_a, "y"_a, "dtype"_a, "element"_a, "rule"_a, "divisor"_a,
        "tensor_scale"_a = 1.0f, "length"_a = 0, "block"_a = 0, "first"_a = 0, "blocks"_a = 0, "random"_a = py::none(),
        "grad"_a = py::none());
  m.def("affine", &q::affine, "isa"_a, "quantizes"_a, "x"_a, "x_dtype"_a, "y"_a, "y_dtype"_a, "factor"_a, "offset"_a, "domain"_a,
        "narrow"_a = false, "lo"_a = 0.0f, "hi"_a = 0.0f, "mid"_a = 0.0f, "quantize_affine or dequantize_affine of a row.");
  q::add_weight_only(m);
  m.def("random_words", &q::random_words, "isa"_a, "seed"_a, "first"_a, "words"_a.noconvert(), "Those of stochastic rounding.");
  m.def("peak", &q::peak, "isa"_a, "iterations"_a, "Runs the multiply-accumulate instruction alone; returns the MACs done.");
}

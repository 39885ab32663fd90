// Every table of kernels that this machine runs against the scalar one, on fixed pseudo-random cases: all entries, and the drivers
// that call them; and the drivers' plans. Needs the core sources only (cpp/, no torch, no Python), so that it can be compiled for
// another architecture and run under emulation; test_aarch64.py does.
//
// Prints "<isa> <64-bit hash of all results>" for every table; the hashes agree between machines as well. Exit status 1 where a
// result differs. Random cases and the log of results: isa_check.h.
#include "isa_check.h"

#include "cpu/columns.h"
#include "cpu/conv2d.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/weight_only.h"

namespace quant_ops {

// Three workers, one after another: the drivers divide their work as for threads.
void parallel_run(int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  for (int64_t i = 0; i < 3; ++i)
    if (i * n / 3 < (i + 1) * n / 3) body(context, i * n / 3, (i + 1) * n / 3);
}
int64_t parallel_threads() { return 3; }

namespace {

// ---- the entries of a table -----------------------------------------------------------------------------------------

// The clamping and the conversion of a tile whose dtype, columns and biases are set.
void set_end(TileOutput* out, Random* random, const float* row_scale, int64_t rows, int64_t width) {
  const Function function = static_cast<Function>(random->between(0, dtype_bytes(out->dtype) == 1 ? 2 : 1));
  out->floor = function == Function::kNone ? -INFINITY : 0.0f;
  const float scale = out_scale_of(random);
  out->codes = code_output(out->dtype, scale, out_zero_of(out->dtype, random), function, row_scale, rows, out->column_scale,
                           out->bias, width);
}

// One panel of weights against `m_count` rows, in tiles of every number of rows that the table has.
bool check_gemm(const KernelTable& table, Random* random, DType dtype, int64_t width, int64_t taps, int64_t k, int64_t m_count,
                Log* log) {
  const int64_t columns = random->one_in(2) ? width : random->between(width - kPanelStep + 1, width);
  const int64_t row_step = random->between(0, 1);
  const bool shared = row_step == 0 && random->one_in(2);
  const PackedLayout layout = packed_layout(columns, k, taps, 1, 1);
  const int64_t row_bytes = layout.quads * kQuad, y_stride = columns + random->between(0, 3);
  const bool plain = random->one_in(4), extreme = k > 1000 || random->one_in(4);  // at the largest k sums pass 2^31
  const Bytes a(taps * m_count * row_bytes, [&](int64_t) { return extreme ? uint8_t{255} : static_cast<uint8_t>(random->bits()); });
  const Edge<int8_t> w(columns * k * taps,
                       [&](int64_t) { return static_cast<int8_t>(extreme ? -128 : random->between(-128, 127)); });
  const Edge<int8_t> packed(layout.bytes);
  pack_weight_cpu(w.data(), layout, packed.data());
  const Edge<int32_t> sum(width, [&](int64_t n) { return layout.column_sum(packed.data(), 0)[n]; });
  const int64_t odd = plain ? 0 : 12;
  const Edge<float> column_scale(width, [&](int64_t) { return random->real(plain ? 4 : 40, odd); });
  const Edge<float> bias(width, [&](int64_t) { return random->one_in(3) ? -0.0f : random->real(plain ? 4 : 40, odd); });
  const int64_t settings = row_step ? m_count : 1, one_zero = random->one_in(2) ? 128 : -1;
  const Edge<int32_t> row_zero(settings,
                               [&](int64_t) { return static_cast<int32_t>(one_zero >= 0 ? one_zero : random->between(0, 255)); });
  const Edge<float> row_scale(settings, [&](int64_t) { return random->real(plain ? 4 : 40, odd); });
  GemmTile tile;
  tile.out.dtype = dtype;
  tile.taps = taps;
  tile.quads = layout.quads;
  tile.a = a.data();
  tile.b = tile.ahead = layout.panel(packed.data(), 0, 0);
  tile.out.y_stride = y_stride;
  tile.out.columns = columns;
  tile.out.column_sum = sum.data();
  tile.out.column_scale = column_scale.data();
  tile.out.bias = bias.data();
  tile.out.row_step = row_step;
  const std::string name =
      named("gemm: dtype, width, columns, taps, k, rows", {int64_t(dtype), width, columns, taps, k, m_count}) + " in tiles of ";
  const int64_t y_bytes = ((m_count - 1) * y_stride + columns) * dtype_bytes(dtype);
  std::vector<uint8_t> first;
  set_end(&tile.out, random, row_scale.data(), settings, width);
  const Bytes share(width * kSharedBytes);
  if (shared)
    share_columns(width, sum.data(), column_scale.data(), bias.data(), row_scale.data()[0], row_zero.data()[0], tile.out.codes,
                  share.data())
        .give(0, &tile.out);
  const int64_t most = std::max(width <= kSlimColumns ? table.slim_rows : table.gemm_rows, table.call_rows);
  for (int64_t rows = 1; rows <= std::min(most, m_count); ++rows) {
    if (rows > table.gemm_rows && rows != table.slim_rows && table.call_rows == 0) continue;
    const Bytes y(y_bytes, [](int64_t) { return uint8_t{0xa5}; });
    for (int64_t m = 0, count; m < m_count; m += count) {
      count = rows > table.gemm_rows && table.call_rows == 0 ? tile_rows(table, m_count - m, true) : std::min(rows, m_count - m);
      const Edge<int64_t> offset(taps * count, [&](int64_t i) { return (i / count * m_count + m + i % count) * row_bytes; });
      tile.a_offset = offset.data();
      tile.out.row_zero = row_zero.data() + m * row_step;
      tile.out.row_scale = row_scale.data() + m * row_step;
      tile.out.y = y.data() + m * y_stride * dtype_bytes(dtype);
      table.gemm(tile, count, width);
    }
    Log result;  // the same for every size of tile
    result.add("", y.data(), y_bytes, dtype);
    if (rows == 1) {
      first = result.bytes;
      log->add(name + "any", y.data(), y_bytes, dtype);
    } else if (result.bytes != first) {
      std::fprintf(stderr, "isa_check: %s differs from itself in %s%d\n", table.isa, name.c_str(), static_cast<int>(rows));
      return false;
    }
  }
  return true;
}

void check_depthwise(const KernelTable& table, Random* random, DType dtype, Log* log) {
  const int64_t channels = random->between(2, 90), r = random->between(1, 6), s = random->between(1, 5);
  const PackedLayout layout = packed_layout(channels, 1, r, s, channels);
  const Edge<int8_t> w(channels * r * s, [&](int64_t) { return static_cast<int8_t>(random->between(-128, 127)); });
  const Edge<int8_t> packed(layout.bytes);
  pack_weight_cpu(w.data(), layout, packed.data());
  const Edge<int32_t> sum(layout.padded_n, [&](int64_t c) { return layout.column_sum(packed.data(), 0)[c]; });
  DepthwiseRun run;
  run.out.dtype = dtype;
  run.r = r;
  run.s = s;
  run.stride = random->between(1, 3);
  run.dilation = random->between(1, 3);
  run.width = random->between(1, 12);
  run.pixels = random->between(1, 12);
  run.first = random->between(-3, run.width);
  run.flip = random->one_in(2) ? 0x80 : 0;
  run.padding = static_cast<uint8_t>(random->between(0, 255));
  run.pixel = layout.padded_n;
  run.out_rows = r < kQuad ? random->between(1, 2) : 1;
  const int64_t in_rows = r + run.out_rows - 1;
  const Bytes a(in_rows * run.width * run.pixel, [&](int64_t) { return static_cast<uint8_t>(random->bits()); });
  const Edge<const uint8_t*> rows(round_up(r, kQuad),
                                  [&](int64_t i) { return a.data() + std::min(i, in_rows - 1) * run.width * run.pixel; });
  const Bytes line(run.line_bytes());
  const Edge<float> column_scale(layout.padded_n, [&](int64_t) { return random->real(20, 12); });
  const Edge<float> bias(layout.padded_n, [&](int64_t) { return random->real(20, 12); });
  const Edge<int32_t> row_zero(1, [&](int64_t) { return static_cast<int32_t>(random->between(0, 255)); });
  const Edge<float> row_scale(1, [&](int64_t) { return random->real(20, 12); });
  run.out.y_stride = channels + random->between(0, 3);
  run.y_row = run.pixels * run.out.y_stride;
  const Bytes y(((run.out_rows * run.pixels - 1) * run.out.y_stride + channels) * dtype_bytes(dtype),
                [](int64_t) { return uint8_t{0xa5}; });
  run.rows = rows.data();
  run.line = line.data();
  run.b = packed.data() + layout.panels_offset;
  run.out.y = y.data();
  run.out.columns = channels;
  run.out.column_sum = sum.data();
  run.out.column_scale = column_scale.data();
  run.out.bias = bias.data();
  set_end(&run.out, random, row_scale.data(), 1, layout.padded_n);
  const Bytes share(layout.padded_n * kSharedBytes);
  share_columns(layout.padded_n, sum.data(), column_scale.data(), bias.data(), row_scale.data()[0], row_zero.data()[0],
                run.out.codes, share.data())
      .give(0, &run.out);
  table.depthwise(run);
  log->add(named("depthwise: dtype, channels, R, S, first, pixels", {int64_t(dtype), channels, r, s, run.first, run.pixels}),
           y.data(), y.bytes(), dtype);
}

void check_quantize(const KernelTable& table, Random* random, DType x_dtype, DType y_dtype, bool simulate, Log* log) {
  const int64_t n = random->between(1, 150);
  QuantizeRun r;
  r.scale_step = static_cast<int>(random->between(0, 1));
  r.zero_step = static_cast<int>(random->between(0, 1));
  r.qmin = y_dtype == DType::kUInt8 ? 0 : y_dtype == DType::kInt8 ? -128 : y_dtype == DType::kInt16 ? -32768 : -100000;
  r.qmax = y_dtype == DType::kUInt8 ? 255 : y_dtype == DType::kInt8 ? 127 : y_dtype == DType::kInt16 ? 32767 : 100000;
  if (random->one_in(3)) r.qmin /= 16, r.qmax /= 16;
  const Bytes x(n * dtype_bytes(x_dtype)), y(n * dtype_bytes(y_dtype));
  fill(x, x_dtype, random, 10, 10);
  const Edge<float> scale(r.scale_step ? n : 1, [&](int64_t) { return random->real(8, 20); });
  const Edge<int32_t> zero(r.zero_step ? n : 1, [&](int64_t) { return static_cast<int32_t>(random->between(-300, 300)); });
  r.x = x.data();
  r.y = y.data();
  r.n = n;
  r.scale = scale.data();
  r.zero_point = zero.data();
  r.x_dtype = x_dtype;
  r.y_dtype = y_dtype;
  r.simulate = simulate;
  table.quantize(r);
  log->add(named("quantize: from, to, simulate, n", {int64_t(x_dtype), int64_t(y_dtype), simulate, n}), y.data(), y.bytes(),
           y_dtype);
}

void check_codes(const KernelTable& table, Random* random, DType dtype, Log* log) {
  const int64_t n = random->between(1, 150);
  const Bytes x(n * dtype_bytes(dtype)), codes(n);
  fill(x, dtype, random, 10, 10);
  const float scale = random->real(4, 20);
  table.codes(x.data(), dtype, n, scale, static_cast<int32_t>(random->between(0, 255)), codes.data());
  log->add(named("codes: from, n", {int64_t(dtype), n}), codes.data(), n, DType::kUInt8);
}

void check_dequantize(const KernelTable& table, Random* random, DType q_dtype, DType y_dtype, Log* log) {
  const int64_t n = random->between(1, 150);
  DequantizeRun r;
  r.scale_step = static_cast<int>(random->between(0, 1));
  r.zero_step = static_cast<int>(random->between(0, 1));
  const Bytes q(n), y(n * dtype_bytes(y_dtype));
  fill(q, q_dtype, random, 0, 0);
  const Edge<float> scale(r.scale_step ? n : 1, [&](int64_t) { return random->real(40, 8); });
  const Edge<int32_t> zero(r.zero_step ? n : 1, [&](int64_t) { return static_cast<int32_t>(random->between(-300, 300)); });
  r.q = q.data();
  r.y = y.data();
  r.n = n;
  r.scale = scale.data();
  r.zero_point = zero.data();
  r.q_dtype = q_dtype;
  r.y_dtype = y_dtype;
  table.dequantize(r);
  log->add(named("dequantize: from, to, n", {int64_t(q_dtype), int64_t(y_dtype), n}), y.data(), y.bytes(), y_dtype);
}

void check_straight_through(const KernelTable& table, Random* random, DType dtype, Log* log) {
  const int64_t n = random->between(1, 150);
  StraightThroughRun r;
  r.scale_step = static_cast<int>(random->between(0, 1));
  r.zero_step = static_cast<int>(random->between(0, 1));
  r.qmin = -128;
  r.qmax = 127;
  const Bytes x(n * dtype_bytes(dtype)), grad(n * dtype_bytes(dtype)), dx(n * dtype_bytes(dtype));
  fill(x, dtype, random, 8, 8);
  fill(grad, dtype, random, 30, 4);
  const Edge<float> scale(r.scale_step ? n : 1, [&](int64_t) { return random->real(2, 20); });
  const Edge<int32_t> zero(r.zero_step ? n : 1, [&](int64_t) { return static_cast<int32_t>(random->between(-128, 127)); });
  r.x = x.data();
  r.grad = grad.data();
  r.dx = dx.data();
  r.n = n;
  r.scale = scale.data();
  r.zero_point = zero.data();
  r.dtype = dtype;
  table.straight_through(r);
  log->add(named("straight_through: dtype, n", {int64_t(dtype), n}), dx.data(), dx.bytes(), dtype, true);
}

void check_range(const KernelTable& table, Random* random, DType dtype, Log* log) {
  const int64_t n = random->between(1, 150);
  const Bytes x(n * dtype_bytes(dtype));
  fill(x, dtype, random, 12, random->one_in(2) ? 20 : 0);
  const bool only_magnitude = random->one_in(2);
  Range r{random->one_in(2) ? INFINITY : 0.0f, random->one_in(2) ? -INFINITY : 0.0f, 0};
  table.range(x.data(), dtype, n, only_magnitude, &r);
  // Which NaN has the largest bits is not specified, nor the sign of a zero: minimum and maximum of zeros are any of them.
  const float values[3] = {only_magnitude ? 0.0f : r.min + 0.0f, only_magnitude ? 0.0f : r.max + 0.0f, bits_float(r.abs_bits)};
  log->add(named("range: dtype, n", {int64_t(dtype), n}), values, sizeof(values), DType::kFloat32);
}

// A format that kernels round to by any of the three methods.
FloatFormat any_format(Random* random) {
  static const int kWidths[][4] = {{4, 3, 7, 1},  {5, 2, 15, 2},  {2, 1, 1, 0},    {1, 6, 1, 0},    {3, 0, 3, 0},
                                   {3, 2, 20, 0}, {8, 7, 127, 2}, {8, 10, 127, 2}, {8, 23, 127, 2}, {4, 3, -112, 0}};
  const int* w = kWidths[random->between(0, 9)];
  const SpecialCodes special = static_cast<SpecialCodes>(w[3]);
  const bool saturate = special == SpecialCodes::kNone || random->one_in(2), subnormals = w[0] == 1 || random->one_in(2);
  return float_format(w[0], w[1], w[2], special, saturate, subnormals, static_cast<Rounding>(random->between(0, 3)));
}

// From anywhere, often where the counter's high half changes.
void draw_words(const KernelTable& table, Random* random, const Edge<uint32_t>& words) {
  const uint64_t seed = random->bits(), anywhere = random->bits() >> 2;
  const uint64_t near = (uint64_t{1} << 34) - static_cast<uint64_t>(random->between(0, 80));
  table.random_words(seed, random->one_in(2) ? near : anywhere, words.bytes() / 4, words.data());
}

void check_random_words(const KernelTable& table, Random* random, Log* log) {
  const int64_t n = random->between(1, 300);
  const Edge<uint32_t> words(n);
  draw_words(table, random, words);
  log->add(named("random_words: n", {n}), words.data(), words.bytes(), DType::kInt32);
}

void check_quantize_float(const KernelTable& table, Random* random, DType dtype, Log* log) {
  const int64_t n = random->between(1, 150);
  const bool forward = random->one_in(2) || random->one_in(2), scaled = random->one_in(2);
  const Bytes x(n * dtype_bytes(dtype)), grad(n * dtype_bytes(dtype)), y(n * dtype_bytes(dtype));
  fill(x, dtype, random, 12, 10);
  fill(grad, dtype, random, 20, 0);
  const Edge<uint32_t> words(n);
  draw_words(table, random, words);
  FloatRun r;
  r.format = any_format(random);
  r.scale_step = static_cast<int>(random->between(0, 1));
  const Edge<float> scale(r.scale_step ? n : 1, [&](int64_t) { return std::fabs(random->real(8, 20)); });
  r.x = x.data();
  r.grad = forward ? nullptr : grad.data();
  r.y = y.data();
  r.n = n;
  r.dtype = dtype;
  r.scale = scaled ? scale.data() : nullptr;
  r.random = r.format.rounding == Rounding::kStochastic ? words.data() : nullptr;
  table.quantize_float(r);
  log->add(named("quantize_float: dtype, forward, scaled, mantissa bits, n",
                 {int64_t(dtype), forward, scaled, r.format.mantissa_bits, n}),
           y.data(), y.bytes(), dtype);
}

// Contiguous blocks, or columns of a matrix.
void check_quantize_block(const KernelTable& table, Random* random, DType dtype, bool columns, Log* log) {
  BlockRun r;
  r.format.element = any_format(random);
  r.format.rule = static_cast<ScaleRule>(random->between(0, 6));
  r.format.divisor = random->one_in(2) ? r.format.element.largest : 3.0f;
  if (r.format.rule == ScaleRule::kE4m3 && random->one_in(2)) r.tensor_scale = 0x1.8p-7f;
  r.dtype = dtype;
  r.length = random->between(1, 70);
  int64_t n = 0, elements;  // results, and elements with the gaps between rows
  if (columns) {
    r.columns = random->between(1, 100);
    r.row = r.columns + random->between(0, 9);
    n = r.length * r.columns;
    elements = (r.length - 1) * r.row + r.columns;
  } else {
    r.block = random->between(1, r.length);
    const int64_t of_row = ceil_div(r.length, r.block);
    r.first = random->between(0, of_row - 1);
    r.blocks = random->between(1, 140);
    for (int64_t b = r.first; b < r.first + r.blocks; ++b) n += std::min(r.block, r.length - b % of_row * r.block);
    elements = n;
  }
  const bool forward = random->one_in(2) || random->one_in(2);
  const Bytes x(elements * dtype_bytes(dtype)), grad(elements * dtype_bytes(dtype));
  const Bytes y(elements * dtype_bytes(dtype), [](int64_t) { return uint8_t{0xa5}; });
  const int span = random->one_in(4) ? 126 : 12;
  fill(x, dtype, random, span, random->one_in(2) ? 0 : 300);
  fill(grad, dtype, random, 20, 0);
  const Edge<uint32_t> words(n);
  draw_words(table, random, words);
  r.x = x.data();
  r.grad = forward ? nullptr : grad.data();
  r.y = y.data();
  r.random = r.format.element.rounding == Rounding::kStochastic ? words.data() : nullptr;
  (columns ? table.quantize_block_columns : table.quantize_blocks)(r);
  log->add(named("quantize_block: dtype, columns, rule, forward, mantissa bits, length, block",
                 {int64_t(dtype), r.columns, int64_t(r.format.rule), forward, r.format.element.mantissa_bits, r.length, r.block}),
           y.data(), y.bytes(), dtype);
}

// ---- the drivers, with the table chosen by set_isa ------------------------------------------------------------------

struct Input {
  InputParams params;
  Input(Random* random, DType dtype, InputMode mode, const Bytes& x, int64_t slices)
      : scale_(slices, [&](int64_t) { return std::fabs(random->real(4, 30)); }), zero_(slices, [&](int64_t) {
          return static_cast<int32_t>(dtype == DType::kUInt8 ? random->between(0, 255) : random->between(-128, 127));
        }) {
    fill(x, dtype, random, 4, random->one_in(2) ? 0 : 200);
    params = {x.data(), dtype, mode, scale_.data(), slices > 1, zero_.data(), slices > 1, nullptr};
  }

 private:
  Edge<float> scale_;
  Edge<int32_t> zero_;
};

// The result of a driver, with all that may come before it.
struct Output {
  OutputParams params;
  Output(Random* random, DType dtype, int64_t columns, int64_t elements)
      : scale_(columns, [&](int64_t) { return std::fabs(random->real(4, 30)); }),
        bias_(columns, [&](int64_t) { return random->real(4, 30); }),
        y_(elements * dtype_bytes(dtype), [](int64_t) { return uint8_t{0xa5}; }),
        residual_dtype_(kOutputs[random->between(0, 4)]),
        residual_(elements * dtype_bytes(residual_dtype_)),
        out_scale_(out_scale_of(random)),
        residual_scale_(random->real(4, 30)),
        out_zero_(out_zero_of(dtype, random)),
        residual_zero_(out_zero_of(residual_dtype_, random)) {
    const bool codes = dtype_bytes(dtype) == 1, of_codes = dtype_bytes(residual_dtype_) == 1;
    fill(residual_, residual_dtype_, random, 4, random->one_in(2) ? 0 : 200);
    params = {.y = y_.data(),
              .dtype = dtype,
              .weight_scale = scale_.data(),
              .weight_scale_stride = 1,
              .bias = random->one_in(3) ? nullptr : bias_.data(),
              .out_scale = codes ? &out_scale_ : nullptr,
              .out_zero_point = codes ? &out_zero_ : nullptr};
    if (dtype == DType::kInt32) return;
    params.function = static_cast<Function>(random->between(0, kFunctions - 1));
    if (random->one_in(2))
      params.residual = {residual_.data(), residual_dtype_, of_codes ? &residual_scale_ : nullptr,
                         of_codes ? &residual_zero_ : nullptr};
  }
  Output(const Output&) = delete;
  void log(const std::string& name, Log* log) const { log->add(name, y_.data(), y_.bytes(), params.dtype); }

 private:
  Edge<float> scale_, bias_;
  Bytes y_;
  DType residual_dtype_;
  Bytes residual_;
  float out_scale_, residual_scale_;
  int32_t out_zero_, residual_zero_;
};

DType input_dtype(InputMode mode, int i) {
  return mode == InputMode::kQuantized ? (i % 2 ? DType::kInt8 : DType::kUInt8) : kFloats[i % 3];
}

void check_linear(Random* random, InputMode mode, int i, Log* log) {
  Int8LinearParams p{};
  p.M = random->between(1, 40);
  p.N = random->between(1, 140);
  p.K = random->between(1, 100);
  p.x_stride = p.K + random->between(0, 2);
  p.y_stride = p.N + random->between(0, 2);
  const DType dtype = input_dtype(mode, i);
  const Bytes x(((p.M - 1) * p.x_stride + p.K) * dtype_bytes(dtype));
  const Input in(random, dtype, mode, x, random->one_in(2) ? 1 : p.M);
  const Edge<int8_t> w(p.N * p.K, [&](int64_t) { return static_cast<int8_t>(random->between(-128, 127)); });
  const Output out(random, kOutputs[i % 6], p.N, (p.M - 1) * p.y_stride + p.N);
  const Edge<float> multiplier(p.K, [&](int64_t) { return random->real(4, 30); });
  p.in = in.params;
  if (mode != InputMode::kQuantized && random->one_in(3)) p.in.multiplier = multiplier.data();
  p.out = out.params;
  p.weight = w.data();
  const PackedLayout layout = packed_layout(p.N, p.K, 1, 1, 1);
  const Edge<int8_t> packed(layout.bytes);
  if (random->one_in(2)) {
    pack_weight_cpu(w.data(), layout, packed.data());
    p.packed = packed.data();
  }
  int8_linear_cpu(p);
  out.log(named("int8_linear: mode, M, N, K", {int64_t(mode), p.M, p.N, p.K}), log);
}

// All operands end at memory that may not be read. The products in float32 agree as well: the order of their sums is one.
void check_weight_only(Random* random, int i, Log* log) {
  WeightOnlyParams p{};
  p.M = random->between(1, 40);
  p.N = random->between(1, 140);
  p.K = random->between(1, 300);
  p.bits = i % 2 ? 4 : 8;
  p.group = random->one_in(4) ? p.K : int64_t{32} << random->between(0, 3);
  p.codes = i % 4 < 2;
  p.x_stride = p.K + random->between(0, 2);
  p.y_stride = p.N + random->between(0, 2);
  const WeightOnlyLayout layout = weight_only_layout(p.N, p.K, p.bits, p.group);
  p.group = layout.group;
  p.y_dtype = kFloats[random->between(0, 2)];
  p.in.dtype = kFloats[i % 3];
  p.in.mode = random->one_in(2) ? InputMode::kDynamic : InputMode::kDynamicAsymmetric;
  const int64_t x_elements = (p.M - 1) * p.x_stride + p.K, y_bytes = ((p.M - 1) * p.y_stride + p.N) * dtype_bytes(p.y_dtype);
  const Bytes x(x_elements * dtype_bytes(p.in.dtype));
  fill(x, p.in.dtype, random, 4, random->one_in(2) ? 0 : 200);
  p.in.x = x.data();
  const Edge<float> multiplier(p.K, [&](int64_t) { return random->real(4, 30); });
  if (random->one_in(3)) p.in.multiplier = multiplier.data();
  const int32_t low = p.bits == 4 ? -8 : -128;
  const Edge<int8_t> w(p.N * p.K, [&](int64_t) { return static_cast<int8_t>(random->between(low, -low - 1)); });
  const Edge<int8_t> packed(layout.bytes);
  pack_weight_only_cpu(w.data(), layout, packed.data());
  p.packed = packed.data();
  const int64_t columns = layout.groups * p.N;
  const bool by_groups = random->one_in(2);  // the layout that is read in place if 16 divides N
  const auto set_strides = [&](int64_t (&stride)[2]) {
    stride[0] = by_groups ? 1 : layout.groups;
    stride[1] = by_groups ? p.N : 1;
  };
  const Edge<float> scale(columns, [&](int64_t) { return std::fabs(random->real(4, 30)); });
  const Edge<float> float_zero(columns, [&](int64_t) { return random->real(4, 30); });
  const Edge<int8_t> zero(columns, [&](int64_t) { return static_cast<int8_t>(random->between(low, -low - 1)); });
  const Edge<float> bias(p.N, [&](int64_t) { return random->real(4, 30); });
  p.scale = scale.data();
  set_strides(p.scale_stride);
  const int64_t zeros = random->between(0, 2);
  p.zero_point = zeros == 1 ? zero.data() : nullptr;
  p.float_zero = zeros == 2 ? float_zero.data() : nullptr;
  set_strides(p.zero_stride);
  p.bias = random->one_in(3) ? nullptr : bias.data();
  const Bytes y(y_bytes, [](int64_t) { return uint8_t{0xa5}; });
  p.y = y.data();
  weight_only_linear_cpu(p);
  const Edge<int8_t> unpacked(p.N * p.K);
  unpack_weight_only_cpu(packed.data(), layout, unpacked.data());
  const std::string name = named("weight_only: bits, codes, M, N, K, group", {p.bits, p.codes, p.M, p.N, p.K, p.group});
  log->add(name, y.data(), y_bytes, p.y_dtype);
  log->add(name + " unpacked", unpacked.data(), p.N * p.K, DType::kInt8);

  WeightOnlyEmbeddingParams e{.M = 5, .N = p.N, .K = p.K, .group = p.group, .bits = p.bits};
  const Edge<int32_t> index(e.M, [&](int64_t m) { return static_cast<int32_t>(m == 0 ? p.N - 1 : random->between(0, p.N - 1)); });
  const int64_t rows_bytes = e.M * e.K * dtype_bytes(p.y_dtype);
  const Bytes rows(rows_bytes);
  e.index = index.data();
  e.packed = random->one_in(4) ? nullptr : packed.data();
  e.weight = w.data();
  e.weight_stride = e.K;
  e.scale = p.scale;
  e.zero_point = p.zero_point;
  e.float_zero = p.float_zero;
  set_strides(e.scale_stride);
  set_strides(e.zero_stride);
  e.y = rows.data();
  e.y_dtype = p.y_dtype;
  weight_only_embedding_cpu(e);
  log->add(name + " looked up", rows.data(), rows_bytes, e.y_dtype);
}

void check_conv2d(Random* random, InputMode mode, int i, Log* log) {
  Int8Conv2dParams p{};
  const int kind = i % 4;  // plain, plain, grouped, depthwise
  p.groups = kind < 2 ? 1 : kind == 2 ? random->between(2, 3) : random->between(2, 40);
  p.C = kind == 3 ? p.groups : p.groups * random->between(1, 9);
  p.O = kind == 3 ? p.groups : p.groups * random->between(1, kind < 2 ? 80 : 20);
  p.N = random->between(1, 3);
  p.H = random->between(1, 8);
  p.W = random->between(1, 8);
  p.R = random->between(1, 3);
  p.S = random->between(1, 3);
  for (int d = 0; d < 2; ++d) {
    p.stride[d] = random->between(1, 2);
    p.dilation[d] = random->between(1, 2);
    p.pad[d] = random->between(1, 2);
  }
  p.OH = std::max<int64_t>(1, (p.H + 2 * p.pad[0] - p.dilation[0] * (p.R - 1) - 1) / p.stride[0] + 1);
  p.OW = std::max<int64_t>(1, (p.W + 2 * p.pad[1] - p.dilation[1] * (p.S - 1) - 1) / p.stride[1] + 1);
  const bool channels_last = random->one_in(2);
  const int64_t strides[2][4] = {{p.C * p.H * p.W, p.H * p.W, p.W, 1}, {p.C * p.H * p.W, 1, p.W * p.C, p.C}};
  std::copy(strides[channels_last], strides[channels_last] + 4, p.x_stride);
  p.y_channels_last = random->one_in(2);
  const DType dtype = input_dtype(mode, i);
  const Bytes x(p.N * p.C * p.H * p.W * dtype_bytes(dtype));
  const Input in(random, dtype, mode, x, random->one_in(2) ? 1 : p.N);
  const Edge<int8_t> w(p.O * (p.C / p.groups) * p.R * p.S,
                       [&](int64_t) { return static_cast<int8_t>(random->between(-128, 127)); });
  const Output out(random, kOutputs[i % 6], p.O, p.N * p.O * p.OH * p.OW);
  p.in = in.params;
  p.out = out.params;
  p.weight = w.data();
  int8_conv2d_cpu(p);
  out.log(named("int8_conv2d: mode, N, C, O, groups, R, S", {int64_t(mode), p.N, p.C, p.O, p.groups, p.R, p.S}), log);
}

// Rows of codes or floats, with and without a residual or a factor; without a factor the result may have gaps between its rows.
void check_pointwise(Random* random, int i, Log* log) {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8, DType::kUInt8};
  PointwiseParams p{.rows = random->between(1, 5), .columns = random->between(1, random->one_in(4) ? 1500 : 300)};
  const int64_t n = p.rows * p.columns;
  p.x_dtype = dtypes[random->one_in(3) ? i % 3 : 3 + i % 2];
  p.out.dtype = dtypes[random->between(0, 4)];
  p.residual.dtype = dtypes[random->one_in(3) ? random->between(0, 2) : random->between(3, 4)];
  p.function = static_cast<Function>(random->one_in(2) ? random->between(0, 2) : random->between(0, kFunctions - 1));
  p.y_stride = p.columns + (random->one_in(2) ? 0 : random->between(1, 9));
  const bool plain = !random->one_in(4);
  const Bytes x(n * dtype_bytes(p.x_dtype)), r(n * dtype_bytes(p.residual.dtype));
  fill(x, p.x_dtype, random, 6, plain ? 0 : 20);
  fill(r, p.residual.dtype, random, 6, plain ? 0 : 20);
  const float scales[3] = {random->real(plain ? 3 : 60, plain ? 0 : 6), random->real(plain ? 3 : 60, plain ? 0 : 6),
                           random->real(plain ? 3 : 60, plain ? 0 : 6)};
  const auto zero_of = [&](DType dtype) {
    return static_cast<int32_t>(dtype == DType::kInt8 ? random->between(-128, 127) : random->between(0, 255));
  };
  const int32_t zeros[3] = {zero_of(p.x_dtype), zero_of(p.residual.dtype), zero_of(p.out.dtype)};
  p.x = x.data();
  p.x_scale = &scales[0];
  p.x_zero_point = &zeros[0];
  p.residual.r = random->one_in(2) ? r.data() : nullptr;
  p.residual.scale = &scales[1];
  p.residual.zero_point = &zeros[1];
  p.out.scale = &scales[2];
  p.out.zero_point = &zeros[2];
  if (p.residual.r != nullptr && dtype_bytes(p.x_dtype) == 1 && dtype_bytes(p.residual.dtype) == 1 && random->one_in(2)) {
    p.multiplies = true;
    p.shared_rows = random->between(1, p.rows);
    p.factor_is_column = random->one_in(3);
    p.y_stride = p.columns;
  }
  const int64_t y_bytes = ((p.rows - 1) * p.y_stride + p.columns) * dtype_bytes(p.out.dtype);
  const Bytes y(y_bytes, [](int64_t) { return uint8_t{0xa5}; });
  p.out.y = y.data();
  pointwise_cpu(p);
  log->add(named("pointwise: x, residual, function, result, rows, columns",
                 {int64_t(p.x_dtype), p.residual.r ? int64_t(p.residual.dtype) + 100 * p.multiplies : -1, int64_t(p.function),
                  int64_t(p.out.dtype), p.rows, p.columns}),
           y.data(), y_bytes, p.out.dtype);
}

PoolAxis any_axis(Random* random, bool dilates) {
  PoolAxis a{.size = random->between(1, 12), .dilation = dilates ? random->between(1, 2) : 1};
  if (!dilates && random->one_in(3)) {
    a.out = random->between(1, 13);
    return a;
  }
  a.stride = random->between(1, 3);
  do {
    a.kernel = random->between(1, 4);
    a.pad = random->between(0, a.kernel / 2);
    a.out = a.size + 2 * a.pad - a.dilation * (a.kernel - 1) - 1;
  } while (a.out < 0);
  a.out = a.out / a.stride + 1;
  return a;
}

void check_pools(Random* random, int i, Log* log) {
  const DType dtype = i % 2 ? DType::kInt8 : DType::kUInt8;
  PoolShape s{.N = random->between(1, 2), .C = random->one_in(2) ? random->between(1, 40) : random->between(1, 300)};
  const bool averages = i % 4 < 2;
  s.h = any_axis(random, !averages);
  do s.w = any_axis(random, !averages);
  while ((s.w.kernel == 0) != (s.h.kernel == 0));
  s.y_channels_last = random->one_in(2);
  const int64_t H = s.h.size, W = s.w.size;
  const int64_t strides[2][4] = {{s.C * H * W, H * W, W, 1}, {s.C * H * W, 1, W * s.C, s.C}};
  std::copy(strides[s.y_channels_last], strides[s.y_channels_last] + 4, s.x_stride);
  const Bytes x(s.N * s.C * H * W);
  fill(x, dtype, random, 6, 0);
  const int64_t results = s.N * s.C * s.h.out * s.w.out;
  const std::string name = named(averages ? "average: N, C, H, W, OH, OW, last" : "max: N, C, H, W, OH, OW, last",
                                 {s.N, s.C, H, W, s.h.out, s.w.out, s.y_channels_last});
  if (!averages) {
    const Bytes y(results);
    max_pool2d_cpu({.shape = s, .x = x.data(), .y = y.data(), .dtype = dtype});
    return log->add(name, y.data(), results, dtype);
  }
  const float scale = std::fabs(random->real(4, 0)), out_scale = std::fabs(random->real(4, 0));
  const int32_t zero = static_cast<int32_t>(dtype == DType::kInt8 ? random->between(-128, 127) : random->between(0, 255)),
                out_zero = 9;
  AvgPoolParams p{.shape = s, .x = x.data(), .dtype = dtype, .x_scale = &scale, .x_zero_point = &zero};
  p.counts_padding = random->one_in(2);
  p.divisor = random->one_in(3) ? random->between(1, 9) : 0;
  p.out = {.dtype = random->one_in(2) ? DType::kFloat32 : dtype, .scale = &out_scale, .zero_point = &out_zero};
  const Bytes y(results * dtype_bytes(p.out.dtype));
  p.out.y = y.data();
  avg_pool2d_cpu(p);
  log->add(name, y.data(), y.bytes(), p.out.dtype);
}

// The gradients of scale and zero point are sums in float64 in a fixed order.
void check_backward(Random* random, DType dtype, Log* log) {
  const int64_t n = random->between(1, 3000), odd = random->one_in(2) ? 0 : 50;
  const Bytes x(n * dtype_bytes(dtype)), grad(n * dtype_bytes(dtype)), dx(n * dtype_bytes(dtype));
  fill(x, dtype, random, 6, odd);
  fill(grad, dtype, random, 20, odd);
  const float scale = std::fabs(random->real(2, 0));
  const int32_t zero = static_cast<int32_t>(random->between(-20, 20));
  float gradients[2];
  QuantizeBackwardParams p{};
  p.it.ndim = p.scale_sum.reduced.ndim = 1;
  p.it.operands = p.scale_sum.kept.operands = 5;
  p.scale_sum.reduced.operands = 4;
  p.it.size[0] = p.scale_sum.reduced.size[0] = n;
  for (int o = 0; o < 3; ++o) p.it.stride[o][0] = 1;
  for (int o = 0; o < 2; ++o) p.scale_sum.reduced.stride[o][0] = 1;
  p.zero_sum = p.scale_sum;
  p.x = x.data();
  p.grad = grad.data();
  p.dx = dx.data();
  p.x_dtype = dtype;
  p.scale = &scale;
  p.zero_point = &zero;
  p.exact_in_float32 = random->one_in(2);
  p.qmin = -128;
  p.qmax = 127;
  p.dscale = &gradients[0];
  p.dzero = &gradients[1];
  quantize_backward_cpu(p);
  log->add(named("quant_tensor_backward: dtype, n", {int64_t(dtype), n}), dx.data(), dx.bytes(), dtype);
  log->add(named("gradients of scale and zero point: dtype, n", {int64_t(dtype), n}), gradients, sizeof(gradients),
           DType::kFloat32);
}

// With elements that are not neighbours, so that they are gathered, and random words.
void check_float_driver(Random* random, DType dtype, Log* log) {
  const int64_t n = random->between(1, 3000), step = random->between(1, 3), scale_step = random->between(0, 1);
  const Bytes x(((n - 1) * step + 1) * dtype_bytes(dtype)), y(n * dtype_bytes(dtype));
  fill(x, dtype, random, 12, 20);
  const Edge<float> scale(scale_step ? n : 1, [&](int64_t) { return std::fabs(random->real(4, 0)); });
  QuantizeFloatParams p{};
  p.it.ndim = 1;
  p.it.operands = 4;
  p.it.size[0] = n;
  const int64_t strides[4] = {step, 1, scale_step, random->between(1, 5)};
  for (int o = 0; o < 4; ++o) p.it.stride[o][0] = strides[o];
  p.x = x.data();
  p.y = y.data();
  p.dtype = dtype;
  p.scale = scale.data();
  p.format = any_format(random);
  p.seed.value = random->bits();
  quantize_float_cpu(p);
  log->add(named("quant_float_forward: dtype, n, step", {int64_t(dtype), n, step}), y.data(), y.bytes(), dtype);
}

void check_block_driver(Random* random, DType dtype, Log* log) {
  QuantizeBlockParams p{};
  p.outer = random->between(1, 4);
  p.length = random->between(1, 100);
  p.inner = random->one_in(2) ? 1 : random->between(1, 90);
  p.block = random->between(1, p.length);
  const int64_t n = p.outer * p.length * p.inner;
  const Bytes x(n * dtype_bytes(dtype)), y(n * dtype_bytes(dtype));
  fill(x, dtype, random, 12, 300);
  p.x = x.data();
  p.y = y.data();
  p.dtype = dtype;
  p.format = {any_format(random), static_cast<ScaleRule>(random->between(0, 6)), 7.0f};
  p.seed.value = random->bits();
  p.order.ndim = p.order.operands = 1;
  p.order.size[0] = n;
  p.order.stride[0][0] = random->between(1, 2);
  quantize_block_cpu(p);
  log->add(named("quant_block_forward: dtype, outer, length, inner, block", {int64_t(dtype), p.outer, p.length, p.inner, p.block}),
           y.data(), y.bytes(), dtype);
}

// ---- plans: functions of shapes and dtypes, which read no data ----------------------------------------------------------

bool expect(bool holds, const char* rule, const KernelTable& table) {
  if (!holds) std::fprintf(stderr, "isa_check: %s: the plan breaks the rule: %s\n", table.isa, rule);
  return holds;
}

bool check_linear_plans(const KernelTable& table) {
  const int8_t packed = 0;
  Int8LinearParams p{};
  p.M = 1000000;
  p.N = 100;
  p.K = 64;
  p.x_stride = 80;
  p.in.dtype = DType::kFloat32;
  p.in.mode = InputMode::kDynamic;
  const LinearPlan many = plan_linear(p, table, 3);
  bool good = expect(many.weight == WeightSource::kPackedOnUse && many.panel_bytes >= 64 * 64 + 64 * 4,
                     "many rows by a plain weight: each worker packs a panel", table);
  good &= expect(many.pass_rows * many.row_bytes <= 8 << 20 && many.pass_rows % 4 == 0, "a pass has at most 8 MiB of codes", table);
  good &= expect(many.scratch_bytes >= many.zero_at + many.pass_rows * 4, "scratch holds its last part", table);
  p.M = kDotRows;
  good &= expect((plan_linear(p, table, 3).weight == WeightSource::kPlain) == (table.dot != nullptr),
                 "few rows by a plain weight: dot products, where the table has them", table);
  p.packed = &packed;
  p.in.dtype = DType::kUInt8;
  p.in.mode = InputMode::kQuantized;
  const LinearPlan codes = plan_linear(p, table, 3);
  good &= expect(codes.weight == WeightSource::kPacked && codes.panel_bytes == 0, "a packed weight needs no panels", table);
  good &= expect(codes.in_place && codes.code_stride == p.x_stride && codes.codes_at == codes.scale_at,
                 "uint8 codes are read where they lie", table);
  p.K = 63;
  return good & expect(!plan_linear(p, table, 3).in_place, "unless K must be padded", table);
}

bool check_conv2d_plans(const KernelTable& table) {
  const int8_t packed = 0;
  Int8Conv2dParams p{};
  p.N = 2;
  p.C = 3;
  p.H = p.OH = 9;
  p.W = p.OW = 10;
  p.O = 40;
  p.R = p.S = 3;
  p.groups = 1;
  const int64_t nchw[4] = {270, 90, 10, 1};
  std::copy(nchw, nchw + 4, p.x_stride);
  for (int d = 0; d < 2; ++d) p.stride[d] = 1, p.pad[d] = 2, p.dilation[d] = 2;
  p.in.dtype = DType::kFloat32;
  p.in.mode = InputMode::kDynamic;
  p.packed = &packed;
  const Conv2dPlan plan = plan_conv2d(p, weight_layout(p), table, 3);
  bool good =
      expect(plan.layout.form == WeightForm::kRowTaps && plan.layout.taps == 3, "few channels: a kernel row is a tap", table);
  good &= expect(!plan.packs && plan.packed_at == plan.codes_at, "whatever the dilation, the packed weight serves", table);
  for (int64_t column = 0; column + 2 < 14; ++column)
    good &= expect(plan.column_offset(column + 2) == plan.column_offset(column) + p.C, "columns of a tap are neighbours", table);
  good &= expect(plan.row == 14 * p.C && plan.sample >= 10 * plan.row, "rows are padded, and one row is padding", table);
  p.C = p.O = p.groups = 40;
  const DepthwisePlan depthwise = plan_depthwise(p, weight_layout(p), table, 3);
  good &= expect(depthwise.band >= 1 && depthwise.band_input == depthwise.band - 1 + 5, "a band's input rows", table);
  good &= expect(depthwise.padding_own - depthwise.codes_own >= depthwise.band_input * depthwise.row, "they fit", table);
  return good &
         expect(depthwise.scratch_bytes >= depthwise.workers_at + 3 * depthwise.worker_bytes, "scratch of all workers", table);
}

bool run(const KernelTable& table, Log* log) {
  set_isa(table.isa);
  Random random(1);
  for (const DType y : kOutputs) {
    for (int i = 0; i < 4; ++i)
      for (const int64_t width : {16, 32, 48, 64})
        for (const int64_t taps : {1, 1, 2, 9}) {
          const int64_t k = random.between(1, taps == 1 ? 150 : 40), m_count = random.between(1, kMaxGemmRows + 8);
          if (!check_gemm(table, &random, y, width, taps, k, m_count, log)) return false;
        }
    if (!check_gemm(table, &random, y, 16, 1, 131071, 1, log)) return false;
  }
  for (int i = 0; i < 24; ++i) {
    for (const DType y : kOutputs) check_depthwise(table, &random, y, log);
    for (const DType x : kFloats) {
      for (const DType y : {DType::kInt8, DType::kUInt8, DType::kInt16, DType::kInt32})
        check_quantize(table, &random, x, y, false, log);
      check_quantize(table, &random, x, x, true, log);
      check_codes(table, &random, x, log);
      for (const DType q : {DType::kInt8, DType::kUInt8}) check_dequantize(table, &random, q, x, log);
      check_straight_through(table, &random, x, log);
      check_range(table, &random, x, log);
      for (int j = 0; j < 4; ++j) check_quantize_float(table, &random, x, log);
      for (int j = 0; j < 4; ++j) check_quantize_block(table, &random, x, j % 2 == 0, log);
    }
    check_random_words(table, &random, log);
  }
  for (int i = 0; i < 36; ++i)
    for (const InputMode mode : {InputMode::kDynamic, InputMode::kDynamicAsymmetric, InputMode::kStatic, InputMode::kQuantized}) {
      check_linear(&random, mode, i, log);
      check_conv2d(&random, mode, i, log);
    }
  for (int i = 0; i < 96; ++i) check_weight_only(&random, i, log);
  for (int i = 0; i < 240; ++i) check_pointwise(&random, i, log);
  for (int i = 0; i < 160; ++i) check_pools(&random, i, log);
  for (int i = 0; i < 18; ++i) {
    check_backward(&random, kFloats[i % 3], log);
    check_float_driver(&random, kFloats[i % 3], log);
    check_block_driver(&random, kFloats[i % 3], log);
  }
  return true;
}

}  // namespace
}  // namespace quant_ops

int main() {
  using namespace quant_ops;
  const KernelTable* tables[8];
  const int n = runnable_kernels(tables);
  Log expected;
  bool good = true;
  for (int i = 0; i < n; ++i) {
    Log log;
    good = run(*tables[i], &log) && good;
    good = check_linear_plans(*tables[i]) && check_conv2d_plans(*tables[i]) && good;
    if (i == 0) expected = log;
    good = expected.same(log, tables[i]->isa) && good;
    std::printf("%s %016llx\n", tables[i]->isa, static_cast<unsigned long long>(log.hash()));
    std::fflush(stdout);
  }
  return good ? 0 : 1;
}

// int8_conv2d on the CPU: the GEMM kernels over an indirection, never an im2col matrix.
//
//   y[n,o,oh,ow] = epilogue(sum_{c,r,s} a[n, c, oh*stride - pad + r*dilation, ...] b[o,c,r,s])
//
// A sample is quantized once into NHWC codes in scratch, channels of each group padded to a multiple of four, rows of the image
// with their horizontal padding. An output pixel is then R * S rows of codes, named by their offsets; a kernel row above or below
// the image reads one row filled with the zero point, so that borders need no special case and the plain column-sum correction is
// right everywhere. With few channels a whole kernel row is one tap. Depthwise convolutions: conv2d_depthwise.cpp.
#include "cpu/conv2d.h"

#include <algorithm>
#include <cstring>

#include "cpu/activations.h"
#include "cpu/parallel.h"

namespace quant_ops {
namespace {

constexpr int64_t kPassBytes = int64_t{1} << 20;     // codes of the samples in flight, a thread; at least one sample
constexpr int64_t kOffsetBytes = int64_t{48} << 10;  // indirection table of one block of pixels: stays in the L1/L2 cache
constexpr int64_t kBlockTiles = 8;
constexpr int64_t kMacsPerTask = int64_t{1} << 20;

constexpr int64_t kLinePixels = 256;  // pixels quantized together: their codes stay in the L1 cache

struct Plan {
  PackedLayout layout;
  bool in_place;           // the product reads x itself: 8-bit NHWC without padding
  int64_t group_channels;  // padded channels of one group in the codes
  int64_t pixel;           // bytes of one pixel in the codes
  int64_t left, row;       // bytes of the padding before a row of the image, and of a row
  int64_t sample;          // bytes of one sample: its rows and one of padding
  bool narrow;             // all panels are: so are all tiles
  int64_t block;           // output pixels of one task
  bool pointwise;          // every output pixel reads the input pixel of its own place
  bool nhwc_input;
  bool merged;    // the rows of an image follow each other: pixels can be taken across them
  int64_t line;   // pixels of a line, the unit of quantization: a piece of the image if merged, else a row
  int64_t lines;  // of a sample
};

Plan make_plan(const Int8Conv2dParams& p, const PackedLayout& layout, const KernelTable& table) {
  Plan plan;
  plan.layout = layout;
  plan.narrow = layout.panels() == 1 && layout.width(0) <= kSlimColumns;
  plan.group_channels = layout.rows ? p.C : layout.quads * kQuad;
  plan.nhwc_input = p.x_stride[1] == 1;
  const int64_t reach[2] = {(p.OH - 1) * p.stride[0] + p.dilation[0] * (p.R - 1) + 1,
                            (p.OW - 1) * p.stride[1] + p.dilation[1] * (p.S - 1) + 1};
  const bool padded = p.pad[0] > 0 || p.pad[1] > 0 || reach[0] > p.H || reach[1] > p.W;
  plan.in_place = plan.nhwc_input && !padded && !layout.rows && plan.group_channels == layout.k && reads_in_place(table, p.in);
  plan.left = 0;
  if (plan.in_place) {
    plan.pixel = p.x_stride[3];
    plan.row = p.x_stride[2];
    plan.sample = p.x_stride[0];
  } else {
    plan.pixel = layout.groups * plan.group_channels;
    plan.left = p.pad[1] * plan.pixel;
    plan.row = std::max(p.pad[1] + p.W, reach[1]) * plan.pixel;
    // one row of padding; the last group of four k of a kernel row may reach three bytes further, where the weight is zero
    plan.sample = round_up((p.H + 1) * plan.row + kQuad, 64);
  }
  const int64_t tile = plan.narrow ? table.slim_rows : table.gemm_rows;
  plan.block = std::clamp<int64_t>(kOffsetBytes / (layout.taps * 8) / tile, 1, kBlockTiles) * tile;
  const bool merged = plan.row == p.W * plan.pixel;
  plan.pointwise = p.R == 1 && p.S == 1 && p.stride[0] == 1 && p.stride[1] == 1 && !padded && merged && p.OH == p.H && p.OW == p.W;
  plan.merged = p.x_stride[2] == p.W * p.x_stride[3] && (!plan.nhwc_input || merged);
  plan.line = plan.merged ? std::min(p.H * p.W, kLinePixels) : p.W;
  plan.lines = plan.line == 0 || plan.in_place ? 0 : ceil_div(p.H * p.W, plan.line);
  return plan;
}

struct Line {
  int64_t offset;  // of its first pixel in x
  int64_t first, pixels;
};

Line line_of(const Int8Conv2dParams& p, const Plan& plan, int64_t n, int64_t i) {
  const int64_t first = i * plan.line;
  return {n * p.x_stride[0] + (plan.merged ? first * p.x_stride[3] : i * p.x_stride[2]), first,
          std::min(plan.line, p.H * p.W - first)};
}

// Calls run(offset in x, elements, place in [pixels][C] or [C][pixels]) for the contiguous runs of a line.
template <class Run>
void for_each_piece(const Int8Conv2dParams& p, const Plan& plan, const Line& line, const Run& run) {
  if (plan.nhwc_input && p.x_stride[3] == p.C) return run(line.offset, line.pixels * p.C, int64_t{0});
  if (plan.nhwc_input) {
    for (int64_t w = 0; w < line.pixels; ++w) run(line.offset + w * p.x_stride[3], p.C, w * p.C);
  } else if (p.x_stride[1] == line.pixels && p.x_stride[3] == 1) {  // the whole sample is one run
    run(line.offset, p.C * line.pixels, int64_t{0});
  } else {
    for (int64_t c = 0; c < p.C; ++c) run(line.offset + c * p.x_stride[1], line.pixels, c * line.pixels);
  }
}

// One line of x into the codes of its sample; `buffer` holds line * C bytes.
void quantize_line(const KernelTable& table, const Int8Conv2dParams& p, const Plan& plan, const Line& line, const RowCodes& row,
                   uint8_t* sample_codes, uint8_t* buffer) {
  const auto place_of = [&](int64_t pixel) { return sample_codes + pixel / p.W * plan.row + plan.left + pixel % p.W * plan.pixel; };
  uint8_t* codes = place_of(line.first);
  const bool in_place = plan.nhwc_input && plan.pixel == p.C;
  for_each_piece(p, plan, line, [&](int64_t offset, int64_t n, int64_t place) {
    write_codes(table, p.in, offset, n, row, (in_place ? codes : buffer) + place);
  });
  if (in_place) return;
  const int64_t channels = plan.layout.rows ? p.C : plan.layout.k, groups = p.C / channels;
  for (int64_t done = 0, count; done < line.pixels; done += count) {  // pixels of one row of the image
    count = std::min(line.pixels - done, p.W - (line.first + done) % p.W);
    codes = place_of(line.first + done);
    if (plan.pixel != p.C) std::memset(codes, 0, static_cast<size_t>(count * plan.pixel));
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* to = codes + g * plan.group_channels;
      if (plan.nhwc_input)
        for (int64_t w = 0; w < count; ++w)
          std::memcpy(to + w * plan.pixel, buffer + (done + w) * p.C + g * channels, static_cast<size_t>(channels));
      else
        transpose(buffer + g * channels * line.pixels + done, line.pixels, channels, count, to, plan.pixel);
    }
  }
}

// The offsets of `rows` output pixels from `first` on, in tiles: [tile][taps][rows of the tile].
void fill_offsets(const KernelTable& table, const Int8Conv2dParams& p, const Plan& plan, int64_t first, int64_t rows,
                  int64_t* offsets) {
  if (plan.pointwise) {
    for (int64_t i = 0; i < rows; ++i) offsets[i] = (first + i) * plan.pixel;
    return;
  }
  const int64_t tap_columns = plan.layout.rows ? 1 : p.S, tap_step = p.dilation[1] * plan.pixel;
  const int64_t step = p.stride[1] * plan.pixel;
  struct Piece {
    int64_t pixels, top, column;  // of one output row; the first input row, and the byte in it, of its first pixel
  } pieces[kMaxGemmRows];
  int64_t oh = first / p.OW, ow = first % p.OW;
  for (int64_t done = 0, count; done < rows; done += count) {
    count = tile_rows(table, rows - done, plan.narrow);
    int64_t n = 0;
    for (int64_t left = count; left > 0; ++n) {
      pieces[n] = {std::min(left, p.OW - ow), oh * p.stride[0] - p.pad[0], ow * step};
      left -= pieces[n].pixels;
      ow += pieces[n].pixels;
      if (ow == p.OW) {
        ow = 0;
        ++oh;
      }
    }
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < tap_columns; ++s)
        for (int64_t i = 0; i < n; ++i) {
          const int64_t h = pieces[i].top + r * p.dilation[0];
          const int64_t start = (h >= 0 && h < p.H ? h : p.H) * plan.row + pieces[i].column + s * tap_step;
          for (int64_t j = 0; j < pieces[i].pixels; ++j) *offsets++ = start + j * step;
        }
  }
}

// One block of output pixels of one sample, output columns [column, column + tile.columns) of the layer, by `multiply(tile output,
// y stride)`: straight into y when it is channels_last, through `block_y` and a transposition when it is not.
struct BlockOutput {
  const Int8Conv2dParams& p;
  int64_t n, first, rows;
  char* block_y;

  template <class Multiply>
  void store(int64_t channel, int64_t columns, const Multiply& multiply) const {
    const int64_t bytes = dtype_bytes(p.out.dtype), pixels = p.OH * p.OW;
    char* y = static_cast<char*>(p.out.y);
    if (p.y_channels_last) return multiply(y + ((n * pixels + first) * p.O + channel) * bytes, p.O);
    multiply(block_y, columns);
    transpose_store(bytes, block_y, rows, columns, columns, y + ((n * p.O + channel) * pixels + first) * bytes, pixels);
  }
};

}  // namespace

void int8_conv2d_cpu(const Int8Conv2dParams& p) {
  const int64_t pixels = p.OH * p.OW;
  if (p.N == 0 || p.O == 0 || pixels == 0) return;
  if (packed_layout(p.O, p.C / p.groups, p.R, p.S, p.groups).depthwise) return int8_conv2d_depthwise_cpu(p);
  const KernelTable& table = kernels();
  // A packed weight of few channels has no taps to dilate: it is packed anew.
  const bool dilated = p.dilation[1] != 1;
  const PackedLayout given = packed_layout(p.O, p.C / p.groups, p.R, p.S, p.groups);
  const Plan plan = make_plan(p, packed_layout(p.O, p.C / p.groups, p.R, p.S, p.groups, dilated), table);
  const PackedLayout& layout = plan.layout;
  const bool repack = p.packed && given.rows != layout.rows;
  const int64_t threads = parallel_threads(),
                samples = plan.in_place ? p.N : std::clamp<int64_t>(threads * kPassBytes / plan.sample, 1, p.N);
  const int64_t out_bytes = dtype_bytes(p.out.dtype), block_columns = std::min<int64_t>(kPanel, layout.n);

  Scratch scratch;
  Columns columns(p.out, layout, &scratch);
  const int64_t packed_at = p.packed && !repack ? 0 : scratch.add(layout.bytes);
  const int64_t unpacked_at = repack ? scratch.add(p.O * given.in_channels * p.R * p.S) : 0;
  const int64_t codes_at = scratch.add(plan.in_place ? 0 : samples * plan.sample),
                range_at = scratch.add(samples * plan.lines * int64_t{sizeof(Range)});
  const int64_t scale_at = scratch.add(samples * 4), zero_at = scratch.add(samples * 4);
  const int64_t buffer_bytes = round_up(plan.line * p.C, 64), buffers_at = scratch.add(threads * buffer_bytes);
  const int64_t table_bytes = round_up(plan.block * layout.taps * 8, 64), tables_at = scratch.add(threads * table_bytes);
  const int64_t y_bytes = p.y_channels_last ? 0 : round_up(plan.block * block_columns * out_bytes, 64);
  const int64_t blocks_at = scratch.add(threads * y_bytes);
  scratch.allocate();
  columns.fill(p.out, layout, scratch);
  const int8_t* packed = p.packed;
  if (packed == nullptr || repack) {
    if (repack) unpack_weight_cpu(p.packed, given, scratch.at<int8_t>(unpacked_at));
    pack_weight_cpu(repack ? scratch.at<int8_t>(unpacked_at) : p.weight, layout, scratch.at<int8_t>(packed_at));
    packed = scratch.at<int8_t>(packed_at);
  }
  uint8_t* const codes = scratch.at<uint8_t>(codes_at);
  float* sample_scale = scratch.at<float>(scale_at);
  int32_t* sample_zero = scratch.at<int32_t>(zero_at);

  // Work is cut into `threads` shares by hand, so that a share knows its own piece of scratch.
  const auto shares = [&](int64_t tasks, int64_t work_per_task, const auto& run) {
    const int64_t workers = std::clamp<int64_t>(tasks * work_per_task / kMacsPerTask, 1, std::min(threads, tasks));
    parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t task = worker * tasks / workers; task < (worker + 1) * tasks / workers; ++task) run(worker, task);
    });
  };

  for (int64_t n0 = 0; n0 < p.N; n0 += samples) {
    const int64_t count = std::min(samples, p.N - n0);

    // 1. scales of the samples
    Range* ranges = scratch.at<Range>(range_at);
    if (is_dynamic(p.in) && plan.lines > 0)
      shares(count * plan.lines, plan.line * p.C * 16, [&](int64_t, int64_t task) {
        ranges[task] = Range{0.0f, 0.0f, 0};
        const Line line = line_of(p, plan, n0 + task / plan.lines, task % plan.lines);
        for_each_piece(p, plan, line, [&](int64_t offset, int64_t n, int64_t) {
          table.range(static_cast<const char*>(p.in.x) + offset * dtype_bytes(p.in.dtype), p.in.dtype, n, only_magnitude(p.in),
                      &ranges[task]);
        });
      });
    for (int64_t n = 0; n < count; ++n) {
      Range range{0.0f, 0.0f, 0};
      if (is_dynamic(p.in))
        for (int64_t i = 0; i < plan.lines; ++i) {
          const Range& r = ranges[n * plan.lines + i];
          range = {std::min(range.min, r.min), std::max(range.max, r.max), std::max(range.abs_bits, r.abs_bits)};
        }
      const RowCodes row = row_codes(p.in, n0 + n, range);
      sample_scale[n] = row.scale;
      sample_zero[n] = row.zero_point;
      if (plan.in_place) continue;
      uint8_t* at = codes + n * plan.sample;
      const int64_t end = plan.left + p.W * plan.pixel;
      for (int64_t h = 0; h < p.H && plan.row != end - plan.left; ++h, at += plan.row) {
        std::memset(at, row.zero_point, static_cast<size_t>(plan.left));
        std::memset(at + end, row.zero_point, static_cast<size_t>(plan.row - end));
      }
      const int64_t last = p.H * plan.row;
      std::memset(codes + n * plan.sample + last, row.zero_point, static_cast<size_t>(plan.sample - last));
    }

    // 2. samples -> codes
    if (plan.lines > 0)
      shares(count * plan.lines, plan.line * p.C * 32, [&](int64_t worker, int64_t task) {
        const int64_t n = task / plan.lines;
        quantize_line(table, p, plan, line_of(p, plan, n0 + n, task % plan.lines), {sample_scale[n], sample_zero[n]},
                      codes + n * plan.sample, scratch.at<uint8_t>(buffers_at + worker * buffer_bytes));
      });

    // 3. blocks of output pixels
    const bool bounded = columns.bounded(p.out, sample_scale, count);
    const int64_t blocks = ceil_div(pixels, plan.block);
    shares(count * blocks, std::min(plan.block, pixels) * p.O * layout.k * layout.taps, [&](int64_t worker, int64_t task) {
      const int64_t n = task / blocks, first = task % blocks * plan.block, rows = std::min(plan.block, pixels - first);
      int64_t* offsets = scratch.at<int64_t>(tables_at + worker * table_bytes);
      fill_offsets(table, p, plan, first, rows, offsets);
      const BlockOutput block{p, n0 + n, first, rows, scratch.at<char>(blocks_at + worker * y_bytes)};
      const uint8_t* a = (plan.in_place ? static_cast<const uint8_t*>(p.in.x) + n0 * plan.sample : codes) + n * plan.sample;

      for (int64_t g = 0; g < layout.groups; ++g)
        for (int64_t panel = 0; panel < layout.panels(); ++panel) {
          const int64_t column = panel * kPanel, width = layout.width(panel), valid = std::min(width, layout.n - column);
          block.store(g * layout.n + column, valid, [&](char* y, int64_t y_stride) {
            GemmTile tile;
            tile.taps = layout.taps;
            tile.quads = layout.quads;
            tile.a = a + g * plan.group_channels;
            tile.flip = plan.in_place ? flip_of(p.in) : 0;
            tile.b = layout.panel(packed, g, panel);
            tile.out = columns.output(p.out, layout.column_sum(packed, g) + column, g * layout.padded_n + column);
            tile.out.columns = valid;
            tile.out.y_stride = y_stride;
            tile.out.row_scale = sample_scale + n;
            tile.out.row_zero = sample_zero + n;
            tile.out.row_step = 0;
            tile.out.bounded = bounded;
            tile.ahead = tile.b;
            // offsets that are not in tiles go with any
            const bool narrow = plan.pointwise ? width <= kSlimColumns : plan.narrow;
            for (int64_t m = 0, count; m < rows; m += count) {
              count = tile_rows(table, rows - m, narrow);
              tile.a_offset = offsets + m * layout.taps;
              tile.out.y = y + m * y_stride * out_bytes;
              table.gemm(tile, count, width);
            }
          });
        }
    });
  }
}

}  // namespace quant_ops

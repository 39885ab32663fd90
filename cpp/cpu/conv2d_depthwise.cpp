// Depthwise int8_conv2d on the CPU: one input and one output channel a group, so few products a byte that memory sets the pace.
//
//   y[n,c,oh,ow] = epilogue(sum_{r,s} a[n, c, oh*stride - pad + r*dilation, ...] b[c,r,s])
//
// A worker goes down the rows of its share of the output, a band at a time: the input rows of a band are quantized into NHWC codes
// that stay in the L2 cache, those that the next band needs again are kept, and 8-bit NHWC input is read where it lies. A row of
// the input in the padding is a row of zero points; padding at the ends of a row is the kernel's (kernels/generic/depthwise.h).
#include <algorithm>
#include <cstring>

#include "cpu/activations.h"
#include "cpu/conv2d.h"
#include "cpu/parallel.h"

namespace quant_ops {
namespace {

constexpr int64_t kBandBytes = int64_t{192} << 10;  // codes of the input rows of a band
constexpr int64_t kLineBytes = int64_t{16} << 10;   // interleaved columns: half of an L1 cache
constexpr int64_t kPiecePixels = 256;               // transposed together: they stay in the L1 cache
constexpr int64_t kWorkPerTask = int64_t{1} << 17;  // output elements times two and one for each four taps, worth a thread

struct Plan {
  PackedLayout layout;
  bool nhwc, in_place;
  int64_t pixel, row;  // bytes of a pixel and a row of codes
  int64_t reach;       // input rows of an output row
  int64_t piece;       // input rows that are quantized together
  int64_t band;        // output rows of a band
  int64_t run;         // output pixels of a call of the kernel
};

Plan make_plan(const Int8Conv2dParams& p) {
  Plan plan;
  plan.layout = packed_layout(p.O, 1, p.R, p.S, p.groups);
  plan.nhwc = p.x_stride[1] == 1;
  plan.pixel = plan.layout.padded_n;
  plan.in_place = p.in.mode == Activation::kQuantized && plan.nhwc && p.x_stride[3] == p.C && plan.pixel == p.C;
  plan.row = std::max<int64_t>(1, p.W) * plan.pixel;
  plan.reach = (p.R - 1) * p.dilation[0] + 1;
  plan.piece = std::clamp<int64_t>(kPiecePixels / std::max<int64_t>(1, p.W), 1, std::max<int64_t>(1, p.H));
  const int64_t rows = std::max(kBandBytes / plan.row, plan.reach);
  plan.band = std::min(p.OH, (rows - plan.reach) / p.stride[0] + 1);
  if (!p.y_channels_last) plan.band = std::clamp<int64_t>(kBandBytes / (p.OW * p.O * dtype_bytes(p.out.dtype)), 1, plan.band);
  DepthwiseRun run;
  run.r = p.R;
  run.s = p.S;
  run.stride = p.stride[1];
  run.dilation = p.dilation[1];
  run.pixels = 1;
  const int64_t one = run.line_bytes();
  run.pixels = 2;
  plan.run = std::clamp<int64_t>((kLineBytes - one) / (run.line_bytes() - one) + 1, 1, p.OW);
  return plan;
}

// Calls run(offset in x, elements, place in [rows][W][C] or [C][rows][W]) for the contiguous runs of rows [h, h + rows) of a
// sample.
template <class Run>
void for_each_piece(const Int8Conv2dParams& p, const Plan& plan, int64_t n, int64_t h, int64_t rows, const Run& run) {
  const int64_t start = n * p.x_stride[0] + h * p.x_stride[2], pixels = rows * p.W;
  const bool merged = p.x_stride[2] == p.W * p.x_stride[3];
  if (plan.nhwc && p.x_stride[3] == p.C) {
    if (merged) return run(start, pixels * p.C, int64_t{0});
    for (int64_t i = 0; i < rows; ++i) run(start + i * p.x_stride[2], p.W * p.C, i * p.W * p.C);
  } else if (plan.nhwc) {
    for (int64_t i = 0; i < pixels; ++i) run(start + i / p.W * p.x_stride[2] + i % p.W * p.x_stride[3], p.C, i * p.C);
  } else if (merged && p.x_stride[1] == pixels) {  // the whole sample is one run
    run(start, p.C * pixels, int64_t{0});
  } else {
    for (int64_t c = 0; c < p.C; ++c) {
      if (merged)
        run(start + c * p.x_stride[1], pixels, c * pixels);
      else
        for (int64_t i = 0; i < rows; ++i) run(start + c * p.x_stride[1] + i * p.x_stride[2], p.W, c * pixels + i * p.W);
    }
  }
}

// Input rows [h, h + rows), at most a piece, as codes; `buffer` holds as many elements.
void quantize_rows(const KernelTable& table, const Int8Conv2dParams& p, const Plan& plan, int64_t n, int64_t h, int64_t rows,
                   const RowCodes& code, uint8_t* codes, uint8_t* buffer) {
  const bool direct = plan.nhwc && plan.pixel == p.C;
  for_each_piece(p, plan, n, h, rows, [&](int64_t offset, int64_t count, int64_t place) {
    write_codes(table, p.in, offset, count, code, (direct ? codes : buffer) + place);
  });
  if (direct) return;
  const int64_t pixels = rows * p.W;
  if (!plan.nhwc) transpose(buffer, pixels, p.C, pixels, codes, plan.pixel);
  for (int64_t i = 0; i < pixels; ++i, codes += plan.pixel) {
    if (plan.nhwc) std::memcpy(codes, buffer + i * p.C, static_cast<size_t>(p.C));
    std::memset(codes + p.C, 0, static_cast<size_t>(plan.pixel - p.C));
  }
}

}  // namespace

void int8_conv2d_depthwise_cpu(const Int8Conv2dParams& p) {
  const KernelTable& table = kernels();
  const Plan plan = make_plan(p);
  const PackedLayout& layout = plan.layout;
  const int64_t threads = parallel_threads(), out_bytes = dtype_bytes(p.out.dtype);
  const int64_t band_rows = (plan.band - 1) * p.stride[0] + plan.reach, row_pointers = round_up(p.R, kQuad);
  const int64_t pieces = ceil_div(p.H, plan.piece);

  DepthwiseRun run;
  run.r = p.R;
  run.s = p.S;
  run.stride = p.stride[1];
  run.dilation = p.dilation[1];
  run.pixel = plan.pixel;
  run.width = p.W;
  run.flip = plan.in_place && p.in.dtype == DType::kInt8 ? 0x80 : 0;

  // Scratch of the call, then of each worker.
  Scratch scratch;
  Columns columns(p.out, layout, &scratch);
  const int64_t packed_at = p.packed ? 0 : scratch.add(layout.bytes);
  const int64_t range_at = is_dynamic(p.in) ? scratch.add(p.N * pieces * int64_t{sizeof(Range)}) : 0;
  const int64_t sample_at = scratch.add(p.N * int64_t{sizeof(RowCodes)});
  int64_t worker_bytes = 0;
  const auto own = [&](int64_t bytes) { return (worker_bytes += round_up(bytes, 64)) - round_up(bytes, 64); };
  run.pixels = plan.run;
  const int64_t codes_own = own(plan.in_place ? 0 : band_rows * plan.row), padding_own = own(plan.row);
  const int64_t buffer_own = own(plan.in_place ? 0 : plan.piece * p.W * p.C), line_own = own(run.line_bytes());
  const int64_t rows_own = own(row_pointers * int64_t{sizeof(uint8_t*)});
  const int64_t y_own = own(p.y_channels_last ? 0 : plan.band * p.OW * p.O * out_bytes);
  const int64_t workers_at = scratch.add(threads * worker_bytes);
  scratch.allocate();
  columns.fill(p.out, layout, scratch);
  const int8_t* packed = p.packed;
  if (packed == nullptr) {
    pack_weight_cpu(p.weight, layout, scratch.at<int8_t>(packed_at));
    packed = scratch.at<int8_t>(packed_at);
  }
  run.b = packed + layout.panels_offset;
  run.out = columns.output(p.out, layout.column_sum(packed, 0), 0);
  run.out.columns = p.O;
  run.out.row_step = 0;

  const auto shares = [&](int64_t tasks, int64_t work, const auto& body) {
    const int64_t workers = std::clamp<int64_t>(work / kWorkPerTask, 1, std::min(threads, tasks));
    parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(worker, worker * tasks / workers, (worker + 1) * tasks / workers);
    });
  };

  // 1. scales of the samples
  Range* ranges = scratch.at<Range>(range_at);
  if (is_dynamic(p.in) && p.H * p.W > 0)
    shares(p.N * pieces, p.N * p.H * p.W * p.C, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        ranges[task] = Range{0.0f, 0.0f, 0};
        const int64_t h = task % pieces * plan.piece;
        for_each_piece(p, plan, task / pieces, h, std::min(plan.piece, p.H - h), [&](int64_t offset, int64_t count, int64_t) {
          table.range(static_cast<const char*>(p.in.x) + offset * dtype_bytes(p.in.dtype), p.in.dtype, count, only_magnitude(p.in),
                      &ranges[task]);
        });
      }
    });
  RowCodes* samples = scratch.at<RowCodes>(sample_at);
  for (int64_t n = 0; n < p.N; ++n) {
    Range range{0.0f, 0.0f, 0};
    for (int64_t i = 0; is_dynamic(p.in) && p.W > 0 && i < pieces; ++i) {
      const Range& r = ranges[n * pieces + i];
      range = {std::min(range.min, r.min), std::max(range.max, r.max), std::max(range.abs_bits, r.abs_bits)};
    }
    samples[n] = row_codes(p.in, n, range);
  }

  // 2. bands of output rows
  run.out.bounded = true;
  for (int64_t n = 0; n < p.N && run.out.bounded; ++n) run.out.bounded = columns.bounded(p.out, &samples[n].scale, 1);
  shares(p.N * p.OH, p.N * p.OH * p.OW * p.O * (2 + ceil_div(layout.taps, kQuad)), [&](int64_t worker, int64_t begin, int64_t end) {
    const int64_t mine = workers_at + worker * worker_bytes;
    uint8_t* const codes = scratch.at<uint8_t>(mine + codes_own);
    uint8_t* const padding = scratch.at<uint8_t>(mine + padding_own);
    uint8_t* const buffer = scratch.at<uint8_t>(mine + buffer_own);
    const uint8_t** const rows = scratch.at<const uint8_t*>(mine + rows_own);
    char* const block_y = scratch.at<char>(mine + y_own);
    DepthwiseRun d = run;
    d.rows = rows;
    d.line = scratch.at<uint8_t>(mine + line_own);
    int64_t from = 0, to = 0;  // input rows whose codes are there
    for (int64_t task = begin, count; task < end; task += count) {
      const int64_t n = task / p.OH, oh = task % p.OH;
      count = std::min({plan.band, p.OH - oh, end - task});
      const RowCodes& sample = samples[n];
      if (task == begin || oh == 0) {
        from = to = 0;
        d.padding = static_cast<uint8_t>(sample.zero_point);
        std::memset(padding, d.padding ^ d.flip, static_cast<size_t>(plan.row));
      }
      const int64_t top = oh * p.stride[0] - p.pad[0], bottom = top + (count - 1) * p.stride[0] + plan.reach;
      const int64_t first = std::clamp<int64_t>(top, 0, p.H), last = std::clamp<int64_t>(bottom, first, p.H);
      const uint8_t* band = codes;
      if (plan.in_place) {
        band = static_cast<const uint8_t*>(p.in.x) + n * p.x_stride[0] + first * p.x_stride[2];
      } else {
        const int64_t kept = std::max<int64_t>(0, to - first);
        if (kept > 0) std::memmove(codes, codes + (first - from) * plan.row, static_cast<size_t>(kept * plan.row));
        for (int64_t h = first + kept, left; h < last; h += left) {
          left = std::min(plan.piece, last - h);
          quantize_rows(table, p, plan, n, h, left, sample, codes + (h - first) * plan.row, buffer);
        }
        from = first;
        to = last;
      }
      const int64_t row_step = plan.in_place ? p.x_stride[2] : plan.row, pixels = count * p.OW;
      char* const y = p.y_channels_last ? static_cast<char*>(p.out.y) + task * p.OW * p.O * out_bytes : block_y;
      d.out.y_stride = p.O;
      d.out.row_zero = &sample.zero_point;
      d.out.row_scale = &sample.scale;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < row_pointers; ++r) {
          const int64_t h = top + i * p.stride[0] + std::min(r, p.R - 1) * p.dilation[0];
          rows[r] = h >= 0 && h < p.H ? band + (h - first) * row_step : padding;
        }
        for (int64_t ow = 0; ow < p.OW; ow += plan.run) {
          d.first = ow * p.stride[1] - p.pad[1];
          d.pixels = std::min(plan.run, p.OW - ow);
          d.out.y = y + (i * p.OW + ow) * p.O * out_bytes;
          table.depthwise(d);
        }
      }
      if (!p.y_channels_last)
        transpose_store(out_bytes, block_y, pixels, p.O, p.O,
                        static_cast<char*>(p.out.y) + (n * p.O * p.OH + oh) * p.OW * out_bytes, p.OH * p.OW);
    }
  });
}

}  // namespace quant_ops

// Depthwise int8_conv2d on the CPU: one input and one output channel a group, so few products a byte that memory sets the pace.
//
//   y[n,c,oh,ow] = epilogue(sum_{r,s} a[n, c, oh*stride - pad + r*dilation, ...] b[c,r,s])
//
// A worker goes down the rows of its share of the output, a band at a time: the input rows of a band are quantized into NHWC codes
// that stay in the L2 cache, those that the next band needs again are kept, and 8-bit NHWC input is read where it lies. A row of
// the input in the padding is a row of zero points; padding at the ends of a row is the kernel's (kernels/generic/depthwise.h).
#include <algorithm>
#include <cstring>

#include "cpu/conv2d.h"

namespace quant_ops {
namespace {

constexpr int64_t kBandBytes = int64_t{192} << 10;    // codes of the input rows of a band
constexpr int64_t kLineBytes = int64_t{16} << 10;     // DepthwiseRun::line: half of an L1 cache
constexpr int64_t kStripPixels = 256;                 // transposed together: they stay in the L1 cache
constexpr int64_t kWorkPerThread = int64_t{1} << 17;  // elements of the input; of the output times 2 + R * S / 4

// The codes of input rows [first, last) of one sample, which slide down the image.
struct BandWindow {
  uint8_t* codes;
  int64_t row_bytes;
  int64_t first = 0, last = 0;

  // Moves to [new_first, new_last), neither of which is before the old one: keeps the rows of both, and has the others written by
  // write(first row, rows, codes), a strip at a time.
  template <class Write>
  void advance(int64_t new_first, int64_t new_last, int64_t strip_rows, const Write& write) {
    const int64_t kept = std::max<int64_t>(0, last - new_first);
    if (kept > 0) std::memmove(codes, codes + (new_first - first) * row_bytes, static_cast<size_t>(kept * row_bytes));
    for (int64_t h = new_first + kept, rows; h < new_last; h += rows) {
      rows = std::min(strip_rows, new_last - h);
      write(h, rows, codes + (h - new_first) * row_bytes);
    }
    first = new_first;
    last = new_last;
  }
};

class Depthwise {
 public:
  Depthwise(const DepthwisePlan& plan, const Int8Conv2dParams& p)
      : plan_(plan),
        p_(p),
        table_(*plan.table),
        scratch_(plan.scratch_bytes),
        columns_(plan.columns, p.out, plan.layout, scratch_),
        packed_(plan.packs ? scratch_.at<int8_t>(plan.packed_at) : p.packed),
        qparams_(scratch_.at<QParams<float>>(plan.qparams_at)) {
    if (plan.packs) pack_weight_cpu(p.weight, plan.layout, scratch_.at<int8_t>(plan.packed_at));
  }

  void run() {
    choose_scales();
    const int64_t rows = p_.N * p_.OH, work = rows * p_.OW * p_.O * (2 + ceil_div(plan_.layout.taps, kQuad));
    for_each_share(rows, plan_.threads, work, kWorkPerThread,
                   [&](int64_t worker, int64_t begin, int64_t end) { compute_share(worker, begin, end); });
  }

 private:
  void choose_scales() {
    Range* ranges = scratch_.at<Range>(plan_.ranges_at);
    const int64_t strips = is_dynamic(p_.in) && p_.H * p_.W > 0 ? plan_.strips : 0;
    for_each_share(p_.N * strips, plan_.threads, p_.N * p_.H * p_.W * p_.C, kWorkPerThread,
                   [&](int64_t, int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t h = i % strips * plan_.strip_rows, rows = std::min(plan_.strip_rows, p_.H - h);
                       find_range(table_, p_, plan_.channels_last, strip_of_rows(p_, i / strips, h, rows), &ranges[i]);
                     }
                   });
    for (int64_t n = 0; n < p_.N; ++n) {
      qparams_[n] = code_qparams(p_.in, n, join(ranges + n * strips, strips));
      const bool divide = n > 0 && codes_of_result_.divide;
      codes_of_result_ = columns_.codes(p_.out, &qparams_[n].scale, 1);
      codes_of_result_.divide |= divide;
    }
  }

  // Output rows [begin, end) of the batch, of all samples together.
  void compute_share(int64_t worker, int64_t begin, int64_t end) const {
    const int64_t own = plan_.workers_at + worker * plan_.worker_bytes, bytes = dtype_bytes(p_.out.dtype);
    uint8_t* padding = scratch_.at<uint8_t>(own + plan_.padding_own);
    uint8_t* buffer = scratch_.at<uint8_t>(own + plan_.buffer_own);
    BandWindow window{scratch_.at<uint8_t>(own + plan_.codes_own), plan_.row};
    DepthwiseRun run = kernel_run(own);
    for (int64_t row = begin, count; row < end; row += count) {
      const int64_t n = row / p_.OH, oh = row % p_.OH;
      count = std::min({plan_.band, p_.OH - oh, end - row});
      const QParams<float>& qparams = qparams_[n];
      if (row == begin || oh == 0) {  // a new sample
        window.first = window.last = 0;
        run.padding = static_cast<uint8_t>(qparams.zero_point);
        std::memset(padding, run.padding ^ run.flip, static_cast<size_t>(plan_.row));
        columns_.share(worker, plan_.layout.column_sum(packed_, 0), qparams.scale, qparams.zero_point, codes_of_result_, scratch_)
            .give(0, &run.out);
      }
      const int64_t top = oh * p_.stride[0] - p_.pad[0], bottom = top + (count - 1) * p_.stride[0] + plan_.reach;
      const int64_t first = std::clamp<int64_t>(top, 0, p_.H), last = std::clamp<int64_t>(bottom, first, p_.H);
      const uint8_t* input = window.codes;
      if (plan_.in_place)
        input = static_cast<const uint8_t*>(p_.in.x) + n * p_.x_stride[0] + first * p_.x_stride[2];
      else
        window.advance(first, last, plan_.strip_rows,
                       [&](int64_t h, int64_t rows, uint8_t* codes) { quantize_rows(n, h, rows, codes, buffer); });
      char* y = static_cast<char*>(p_.out.y);
      const int64_t pixels = count * p_.OW, channel_step = p_.OH * p_.OW, r_bytes = residual_bytes(p_.out);
      const int64_t offset = p_.y_channels_last ? row * p_.OW * p_.O : (n * p_.O * p_.OH + oh) * p_.OW;
      char* block = p_.y_channels_last ? y + offset * bytes : scratch_.at<char>(own + plan_.output_own);
      const char* residual = static_cast<const char*>(p_.out.residual.r) + offset * r_bytes;
      if (!p_.y_channels_last && r_bytes > 0) {
        char* r_block = scratch_.at<char>(own + plan_.residual_own);
        transpose_bytes(r_bytes, residual, channel_step, p_.O, pixels, r_block, p_.O);
        residual = r_block;
      }
      compute_band(&run, top, count, input, first, padding, scratch_.at<const uint8_t*>(own + plan_.rows_own), block, residual);
      if (!p_.y_channels_last) transpose_bytes(bytes, block, p_.O, pixels, p_.O, y + offset * bytes, channel_step);
    }
  }

  // All that the calls of one worker have in common.
  DepthwiseRun kernel_run(int64_t own) const {
    DepthwiseRun run;
    run.r = p_.R;
    run.s = p_.S;
    run.stride = p_.stride[1];
    run.dilation = p_.dilation[1];
    run.rows = scratch_.at<const uint8_t*>(own + plan_.rows_own);
    run.pixel = plan_.pixel;
    run.width = p_.W;
    run.flip = plan_.in_place && p_.in.dtype == DType::kInt8 ? 0x80 : 0;
    run.b = packed_ + plan_.layout.panels_offset;
    run.line = scratch_.at<uint8_t>(own + plan_.line_own);
    run.out = columns_.output(p_.out, plan_.layout.column_sum(packed_, 0), 0);
    run.y_row = p_.OW * p_.O;
    run.out.columns = p_.O;
    run.out.y_stride = p_.O;
    run.out.codes = codes_of_result_;
    return run;
  }

  // Input rows [h, h + rows) of sample n, at most a strip, as codes; `buffer` holds as many elements.
  void quantize_rows(int64_t n, int64_t h, int64_t rows, uint8_t* codes, uint8_t* buffer) const {
    const bool direct = plan_.channels_last && plan_.pixel == p_.C;
    for_each_run_of(p_, plan_.channels_last, strip_of_rows(p_, n, h, rows), [&](int64_t offset, int64_t count, int64_t place) {
      write_codes(table_, p_.in, offset, count, qparams_[n], (direct ? codes : buffer) + place);
    });
    if (direct) return;
    const int64_t pixels = rows * p_.W;
    if (!plan_.channels_last) transpose(buffer, pixels, p_.C, pixels, codes, plan_.pixel);
    for (int64_t i = 0; i < pixels; ++i, codes += plan_.pixel) {
      if (plan_.channels_last) std::memcpy(codes, buffer + i * p_.C, static_cast<size_t>(p_.C));
      std::memset(codes + p_.C, 0, static_cast<size_t>(plan_.pixel - p_.C));
    }
  }

  // `count` output rows, the first of which starts at input row `top`, into [rows][OW][O], as the residual lies. `input` is input
  // row `first`.
  void compute_band(DepthwiseRun* run, int64_t top, int64_t count, const uint8_t* input, int64_t first, const uint8_t* padding,
                    const uint8_t** rows, char* y, const char* residual) const {
    const int64_t row_step = plan_.in_place ? p_.x_stride[2] : plan_.row, bytes = dtype_bytes(p_.out.dtype);
    for (int64_t i = 0; i < count; i += run->out_rows) {
      run->out_rows = std::min(plan_.rows_together, count - i);
      const int64_t last = p_.R + run->out_rows - 2;
      for (int64_t r = 0; r < plan_.row_pointers; ++r) {
        const int64_t h = top + i * p_.stride[0] + std::min(r, last) * p_.dilation[0];
        rows[r] = h >= 0 && h < p_.H ? input + (h - first) * row_step : padding;
      }
      for (int64_t ow = 0; ow < p_.OW; ow += plan_.run) {
        run->first = ow * p_.stride[1] - p_.pad[1];
        run->pixels = std::min(plan_.run, p_.OW - ow);
        const int64_t offset = (i * p_.OW + ow) * p_.O;
        run->out.y = y + offset * bytes;
        if (p_.out.residual.r != nullptr) set_residual(p_.out, residual, offset, p_.O, &run->out);
        table_.depthwise(*run);
      }
    }
  }

  const DepthwisePlan& plan_;
  const Int8Conv2dParams& p_;
  const KernelTable& table_;
  const Scratch scratch_;
  const Columns columns_;
  const int8_t* const packed_;
  QParams<float>* const qparams_;
  CodeOutput codes_of_result_;  // of every sample
};

int64_t line_bytes(const Int8Conv2dParams& p, int64_t pixels) {
  DepthwiseRun run;
  run.r = p.R;
  run.s = p.S;
  run.stride = p.stride[1];
  run.dilation = p.dilation[1];
  run.pixels = pixels;
  return run.line_bytes();
}

}  // namespace

DepthwisePlan plan_depthwise(const Int8Conv2dParams& p, const PackedLayout& layout, const KernelTable& table, int64_t threads) {
  DepthwisePlan plan;
  plan.table = &table;
  plan.threads = threads;
  plan.layout = layout;
  plan.channels_last = p.x_stride[1] == 1;
  plan.pixel = layout.padded_n;
  plan.in_place = p.in.mode == InputMode::kQuantized && plan.channels_last && p.x_stride[3] == p.C && plan.pixel == p.C;
  const int64_t width = std::max<int64_t>(1, p.W), output_row = p.OW * p.O * dtype_bytes(p.out.dtype);
  plan.row = width * plan.pixel;
  plan.reach = (p.R - 1) * p.dilation[0] + 1;
  plan.strip_rows = std::clamp<int64_t>(kStripPixels / width, 1, std::max<int64_t>(1, p.H));
  plan.strips = ceil_div(p.H, plan.strip_rows);
  const int64_t rows = std::max(kBandBytes / plan.row, plan.reach);
  plan.band = std::min(p.OH, (rows - plan.reach) / p.stride[0] + 1);
  if (!p.y_channels_last) plan.band = std::clamp<int64_t>(kBandBytes / output_row, 1, plan.band);
  plan.band_input = (plan.band - 1) * p.stride[0] + plan.reach;
  const int64_t first_pixel = line_bytes(p, 1), each_further = line_bytes(p, 2) - first_pixel;
  plan.run = std::clamp<int64_t>((kLineBytes - first_pixel) / each_further + 1, 1, p.OW);
  plan.row_pointers = round_up(p.R, kQuad);
  plan.rows_together = p.R < kQuad && p.stride[0] == p.dilation[0] ? 2 : 1;

  ScratchLayout scratch, own;
  plan.codes_own = own.add(plan.in_place ? 0 : plan.band_input * plan.row);
  plan.padding_own = own.add(plan.row);
  plan.buffer_own = own.add(plan.in_place ? 0 : plan.strip_rows * p.W * p.C);
  plan.line_own = own.add(line_bytes(p, plan.run));
  plan.rows_own = own.add(plan.row_pointers * int64_t{sizeof(uint8_t*)});
  plan.output_own = own.add(p.y_channels_last ? 0 : plan.band * output_row);
  plan.residual_own = own.add(p.y_channels_last ? 0 : plan.band * p.OW * p.O * residual_bytes(p.out));
  plan.worker_bytes = own.bytes;
  plan.columns = plan_columns(p.out, layout, p.N * p.OH * p.OW, threads, &scratch);
  plan.packs = p.packed == nullptr;
  plan.packed_at = scratch.add(plan.packs ? layout.bytes : 0);
  plan.ranges_at = scratch.add(is_dynamic(p.in) ? p.N * plan.strips * int64_t{sizeof(Range)} : 0);
  plan.qparams_at = scratch.add(p.N * int64_t{sizeof(QParams<float>)});
  plan.workers_at = scratch.add(threads * plan.worker_bytes);
  plan.scratch_bytes = scratch.bytes;
  return plan;
}

void run_depthwise(const DepthwisePlan& plan, const Int8Conv2dParams& p) { Depthwise(plan, p).run(); }

}  // namespace quant_ops

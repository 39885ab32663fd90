// int8_conv2d on the CPU: the GEMM kernels over an indirection, never a whole im2col matrix.
//
//   y[n,o,oh,ow] = epilogue(sum_{c,r,s} a[n, c, oh*stride - pad + r*dilation, ...] b[o,c,r,s])
//
// A sample is quantized once into NHWC codes in scratch, channels of each product padded to a multiple of four, rows of the image
// with their horizontal padding. An output pixel is then R * S rows of codes, named by their offsets; a kernel row above or below
// the image reads one row filled with the zero point, so that borders need no special case and the plain column-sum correction is
// right everywhere. Where a whole kernel row is one tap (few channels), its S columns must be neighbours: columns that differ by
// the dilation are kept side by side (Conv2dPlan::phases). Kernels that read rows as tiles get those of a block of pixels gathered,
// a row for each (ProductKernels::gathers). Depthwise convolutions: conv2d_depthwise.cpp.
#include "cpu/conv2d.h"
#include "kernels/log.h"

#include <algorithm>
#include <cstring>

namespace quant_ops {
namespace {

constexpr int64_t kPassBytesPerThread = int64_t{1} << 20;  // codes of the samples of a pass; at least one sample
constexpr int64_t kOffsetBytes = int64_t{48} << 10;        // indirection table of one block of pixels: stays in the L1/L2 cache
constexpr int64_t kBlockTiles = 8;                         // tiles of a block
constexpr int64_t kPatchBytes = int64_t{512} << 10;        // gathered rows of a block: in the L2 cache
constexpr int64_t kStripPixels = 256;  // their codes stay in the L1 cache between quantization and transposition
// What an element costs, in multiply-accumulates.
constexpr int64_t kRangeCost = 16, kQuantizeCost = 32;

// Consecutive output pixels of one row.
struct PixelRun {
  int64_t pixels;
  int64_t top, column;  // the input row and column (in the padded row of codes) that kernel position (0, 0) of the first one reads
};

// Cuts `count` output pixels from row oh, column ow on into runs, and moves oh and ow behind them.
int64_t cut_at_rows(const Int8Conv2dParams& p, int64_t count, int64_t* oh, int64_t* ow, PixelRun (&runs)[kMaxCallRows]) {
  int64_t n = 0;
  for (; count > 0; ++n) {
    runs[n] = {std::min(count, p.OW - *ow), *oh * p.stride[0] - p.pad[0], *ow * p.stride[1]};
    count -= runs[n].pixels;
    *ow += runs[n].pixels;
    if (*ow == p.OW) {
      *ow = 0;
      ++*oh;
    }
  }
  return n;
}

// The offsets in the codes of `rows` output pixels from `first` on, for calls of `gemm`: [call][taps][rows of the call]. Those of a
// pointwise convolution are from pixel to pixel and the same for all blocks: multiply_block has them once.
void fill_offsets(const Conv2dPlan& plan, const Int8Conv2dParams& p, int64_t first, int64_t rows, int64_t* offsets) {
  const int64_t tap_columns = plan.layout.form == WeightForm::kRowTaps ? 1 : p.S;
  const int64_t pixel = plan.pixel, tap_step = p.dilation[1] * pixel, step = p.stride[1] * pixel;
  const bool by_phase = plan.phases > 1;
  PixelRun runs[kMaxCallRows];
  int64_t oh = first / p.OW, ow = first % p.OW;
  for (int64_t done = 0, count; done < rows; done += count) {
    count = call_rows(*plan.table, rows - done, plan.slim);
    const int64_t n = cut_at_rows(p, count, &oh, &ow, runs);
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < tap_columns; ++s)
        for (int64_t i = 0; i < n; ++i) {
          const int64_t h = runs[i].top + r * p.dilation[0], row = (h >= 0 && h < p.H ? h : p.H) * plan.row;
          const int64_t start = row + runs[i].column * pixel + s * tap_step;
          for (int64_t j = 0; j < runs[i].pixels; ++j)
            *offsets++ = by_phase ? row + plan.column_offset(runs[i].column + j * p.stride[1]) : start + j * step;
        }
  }
}

// Bytes in whole lines.
inline void copy_lines(const uint8_t* __restrict from, int64_t bytes, uint8_t* __restrict to) {
  constexpr int64_t kLine = 64;
  for (; bytes >= kLine; bytes -= kLine, from += kLine, to += kLine) std::memcpy(to, from, kLine);
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

class Conv2d {
 public:
  Conv2d(const Conv2dPlan& plan, const Int8Conv2dParams& p)
      : plan_(plan),
        p_(p),
        table_(*plan.table),
        scratch_(plan.scratch_bytes),
        columns_(plan.columns, p.out, plan.layout, scratch_),
        packed_(plan.packs ? scratch_.at<int8_t>(plan.packed_at) : p.packed),
        codes_(scratch_.at<uint8_t>(plan.codes_at)),
        scale_(scratch_.at<float>(plan.scale_at)),
        zero_(scratch_.at<int32_t>(plan.zero_at)) {
    if (plan.packs) pack_weight_cpu(p.weight, plan.layout, scratch_.at<int8_t>(plan.packed_at));
  }

  void run() {
    for (first_sample_ = 0; first_sample_ < p_.N; first_sample_ += plan_.samples) {
      samples_ = std::min(plan_.samples, p_.N - first_sample_);
      choose_scales();
      if (!plan_.in_place) quantize();
      multiply();
    }
  }

 private:
  void choose_scales() {
    Range* ranges = scratch_.at<Range>(plan_.ranges_at);
    const bool dynamic = is_dynamic(p_.in);
    const int64_t strips = dynamic ? samples_ * plan_.strips : 0;
    for_each_share(strips, plan_.threads, strips * plan_.strip * p_.C * kRangeCost, kMacsPerThread,
                   [&](int64_t, int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i)
                       find_range(table_, p_, plan_.channels_last, strip_at(i / plan_.strips, i % plan_.strips), &ranges[i]);
                   });
    for (int64_t n = 0; n < samples_; ++n) {
      const Range range = dynamic ? join(ranges + n * plan_.strips, plan_.strips) : kZeroRange;
      const QParams<float> qparams = code_qparams(p_.in, first_sample_ + n, range);
      scale_[n] = qparams.scale;
      zero_[n] = qparams.zero_point;
    }
    codes_of_result_ = columns_.codes(p_.out, scale_, samples_);
  }

  void quantize() {
    for (int64_t n = 0; n < samples_; ++n) pad(n);
    const int64_t strips = samples_ * plan_.strips;
    for_each_share(strips, plan_.threads, strips * plan_.strip * p_.C * kQuantizeCost, kMacsPerThread,
                   [&](int64_t worker, int64_t begin, int64_t end) {
                     uint8_t* buffer = scratch_.at<uint8_t>(plan_.buffers_at + worker * plan_.buffer_bytes);
                     for (int64_t i = begin; i < end; ++i) quantize_strip(i / plan_.strips, i % plan_.strips, buffer);
                   });
  }

  // Codes of the zero point around the image of sample n.
  void pad(int64_t n) const {
    uint8_t* codes = codes_ + n * plan_.sample;
    int64_t done = 0;  // bytes that are written here or by quantize_strip
    if (plan_.phases == 1) {
      const int64_t left = plan_.left * plan_.pixel, image = p_.W * plan_.pixel;
      done = p_.H * plan_.row;
      for (int64_t h = 0; h < p_.H && plan_.row != image; ++h) {
        uint8_t* row = codes + h * plan_.row;
        std::memset(row, zero_[n], static_cast<size_t>(left));
        std::memset(row + left + image, zero_[n], static_cast<size_t>(plan_.row - left - image));
      }
    }
    std::memset(codes + done, zero_[n], static_cast<size_t>(plan_.sample - done));
  }

  // Strip i of sample n of the pass.
  Strip strip_at(int64_t n, int64_t i) const {
    if (!plan_.rows_adjacent) return strip_of_rows(p_, first_sample_ + n, i, 1);
    const int64_t first = i * plan_.strip;
    return {(first_sample_ + n) * p_.x_stride[0] + first * p_.x_stride[3], 1, std::min(plan_.strip, p_.H * p_.W - first)};
  }

  // NHWC without padded channels is written where it belongs, anything else through `buffer`, which holds a strip's codes.
  void quantize_strip(int64_t n, int64_t i, uint8_t* buffer) const {
    const Strip strip = strip_at(n, i);
    const int64_t first = i * plan_.strip;
    const bool direct = plan_.channels_last && plan_.pixel == p_.C && plan_.phases == 1;
    uint8_t* to = direct ? place_of(n, first) : buffer;
    for_each_run_of(p_, plan_.channels_last, strip, [&](int64_t offset, int64_t count, int64_t place) {
      write_codes(table_, p_.in, offset, count, {scale_[n], zero_[n]}, to + place);
    });
    if (direct) return;
    for (int64_t done = 0, count; done < strip.pixels; done += count) {  // pixels of one row of the image
      count = std::min(strip.pixels - done, p_.W - (first + done) % p_.W);
      if (plan_.phases == 1)
        spread_channels(buffer, strip.pixels, done, count, place_of(n, first + done));
      else
        spread_columns(buffer, strip.pixels, done, count, (first + done) % p_.W, place_of(n, first + done));
    }
  }

  // The codes of a pixel of sample n; with phases, of its row.
  uint8_t* place_of(int64_t n, int64_t pixel) const {
    uint8_t* row = codes_ + n * plan_.sample + pixel / p_.W * plan_.row;
    return plan_.phases == 1 ? row + (plan_.left + pixel % p_.W) * plan_.pixel : row;
  }

  // Pixels [from, from + count) of a strip, with the channels of each product padded.
  void spread_channels(const uint8_t* buffer, int64_t strip_pixels, int64_t from, int64_t count, uint8_t* codes) const {
    const int64_t channels = std::min(plan_.layout.k, p_.C), products = p_.C / channels;
    if (plan_.pixel != p_.C) std::memset(codes, 0, static_cast<size_t>(count * plan_.pixel));
    for (int64_t g = 0; g < products; ++g) {
      uint8_t* to = codes + g * plan_.product_channels;
      if (plan_.channels_last)
        for (int64_t w = 0; w < count; ++w)
          std::memcpy(to + w * plan_.pixel, buffer + (from + w) * p_.C + g * channels, static_cast<size_t>(channels));
      else
        transpose(buffer + g * channels * strip_pixels + from, strip_pixels, channels, count, to, plan_.pixel);
    }
  }

  // The same pixels, which are columns `column` and following of the image, by phases.
  void spread_columns(const uint8_t* buffer, int64_t strip_pixels, int64_t from, int64_t count, int64_t column,
                      uint8_t* row) const {
    const int64_t pixel_step = plan_.channels_last ? p_.C : 1, channel_step = plan_.channels_last ? 1 : strip_pixels;
    for (int64_t w = 0; w < count; ++w) {
      const uint8_t* a = buffer + (from + w) * pixel_step;
      uint8_t* to = row + plan_.column_offset(plan_.left + column + w);
      for (int64_t c = 0; c < p_.C; ++c) to[c] = a[c * channel_step];
    }
  }

  // The panels of a block are tasks of their own: an image of few pixels has as few blocks.
  void multiply() const {
    const int64_t pixels = p_.OH * p_.OW, blocks = ceil_div(pixels, plan_.block);
    const int64_t panels = plan_.layout.products * plan_.layout.panels(), tasks = samples_ * blocks * panels;
    const int64_t macs = samples_ * pixels * p_.O * plan_.layout.k * plan_.layout.taps;
    for_each_share(tasks, plan_.threads, macs, kMacsPerThread, [&](int64_t worker, int64_t begin, int64_t end) {
      SharedColumns shared{};
      int64_t of = -1;  // a sample whose scale and zero point `shared` has
      int64_t filled = 0;
      for (int64_t task = begin, next; task < end; task = next) {
        const int64_t block = task / panels, n = block / blocks, first = block % blocks * plan_.block;
        next = std::min(end, (block + 1) * panels);
        if (of < 0 || scale_[n] != scale_[of] || zero_[n] != zero_[of])
          shared = columns_.share(worker, plan_.layout.column_sum(packed_, 0), scale_[n], zero_[n], codes_of_result_, scratch_);
        of = n;
        multiply_block(worker, n, shared, first, std::min(plan_.block, pixels - first), task % panels, next - block * panels,
                       &filled);
      }
    });
  }

  // Panels [begin, end), counted through all products, of `rows` output pixels of sample n from `first` on. `filled`: how many
  // offsets of a pointwise convolution this worker has.
  void multiply_block(int64_t worker, int64_t n, const SharedColumns& shared, int64_t first, int64_t rows, int64_t begin,
                      int64_t end, int64_t* filled) const {
    int64_t* offsets = scratch_.at<int64_t>(plan_.offsets_at + worker * plan_.offset_bytes);
    if (!plan_.pointwise)
      fill_offsets(plan_, p_, first, rows, offsets);
    else
      for (; *filled < rows; ++*filled) offsets[*filled] = *filled * plan_.pixel;
    const int64_t start = plan_.pointwise ? first * plan_.pixel : 0;
    const PackedLayout& layout = plan_.layout;
    const int64_t bytes = dtype_bytes(p_.out.dtype), pixels = p_.OH * p_.OW;
    const uint8_t* codes = plan_.in_place ? static_cast<const uint8_t*>(p_.in.x) + first_sample_ * plan_.sample : codes_;
    uint8_t* patches = scratch_.at<uint8_t>(plan_.patches_at + worker * plan_.patch_bytes);
    int64_t* patch_offsets = offsets + plan_.block * layout.taps;
    for (int64_t i = begin, gathered = -1; i < end; ++i) {
      const int64_t product = i / layout.panels(), panel = i % layout.panels();
      Source from{codes + n * plan_.sample + start + product * plan_.product_channels, layout.taps, layout.quads, offsets};
      if (plan_.patch > 0) {
        if (gathered != product) gather(from, rows, patches, patch_offsets);
        gathered = product;
        from = {patches, 1, layout.taps * layout.quads, patch_offsets};
      }
      const int64_t column = panel * kPanel, channel = product * layout.n + column;
      const int64_t columns = std::min(layout.width(panel), layout.n - column), sample = first_sample_ + n;
      if (p_.y_channels_last) {
        const int64_t offset = (sample * pixels + first) * p_.O + channel;
        multiply_panel(from, shared, product, panel, rows,
                       {static_cast<char*>(p_.out.y) + offset * bytes, p_.O, p_.out.residual.r, offset});
      } else {  // through blocks of [rows][columns]
        const int64_t offset = (sample * p_.O + channel) * pixels + first, r_bytes = residual_bytes(p_.out);
        char* block = scratch_.at<char>(plan_.outputs_at + worker * plan_.output_bytes);
        char* r_block = scratch_.at<char>(plan_.residuals_at + worker * plan_.residual_bytes);
        if (r_bytes > 0)
          transpose_bytes(r_bytes, static_cast<const char*>(p_.out.residual.r) + offset * r_bytes, pixels, columns, rows, r_block,
                          columns);
        multiply_panel(from, shared, product, panel, rows, {block, columns, r_block, 0});
        transpose_bytes(bytes, block, columns, rows, columns, static_cast<char*>(p_.out.y) + offset * bytes, pixels);
      }
    }
  }

  // What the pixels of a block read, as GemmTile has it; `offsets` are those of fill_offsets.
  struct Source {
    const uint8_t* a;
    int64_t taps, quads;
    const int64_t* offsets;
  };

  // The codes that each pixel reads beside each other, and the offsets of the pixels.
  void gather(const Source& from, int64_t rows, uint8_t* patches, int64_t* patch_offsets) const {
    const int64_t bytes = from.quads * kQuad;
    const int64_t* offset = from.offsets;
    for (int64_t m = 0, count; m < rows; m += count) {
      count = call_rows(table_, rows - m, plan_.slim);
      for (int64_t tap = 0; tap < from.taps; ++tap)
        for (int64_t r = 0; r < count; ++r) copy_lines(from.a + *offset++, bytes, patches + (m + r) * plan_.patch + tap * bytes);
    }
    for (int64_t r = 0; r < rows; ++r) patch_offsets[r] = r * plan_.patch;
  }

  // Where the results of some pixels go: element 0 is the first channel of the first one.
  struct Destination {
    char* y;
    int64_t stride;  // between pixels
    const void* residual;
    int64_t residual_offset;
  };

  void multiply_panel(const Source& from, const SharedColumns& shared, int64_t product, int64_t panel, int64_t rows,
                      const Destination& to) const {
    const PackedLayout& layout = plan_.layout;
    const int64_t column = panel * kPanel, width = layout.width(panel);
    GemmTile tile;
    tile.taps = from.taps;
    tile.quads = from.quads;
    tile.a = from.a;
    tile.flip = plan_.in_place ? flip_of(p_.in) : 0;
    tile.b = layout.panel(packed_, product, panel);
    tile.out = columns_.output(p_.out, layout.column_sum(packed_, product) + column, product * layout.padded_n + column);
    shared.give(product * layout.padded_n + column, &tile.out);
    tile.out.columns = std::min(width, layout.n - column);
    tile.out.y_stride = to.stride;
    tile.out.codes = codes_of_result_;
    tile.ahead = panel + 1 < layout.panels() ? layout.panel(packed_, product, panel + 1) : tile.b;
    // offsets of pointwise convolutions are not grouped by tile, so that each panel can have its own tiles
    const bool slim = plan_.pointwise ? width <= kSlimColumns : plan_.slim;
    for (int64_t m = 0, count; m < rows; m += count) {
      count = call_rows(table_, rows - m, slim);
      tile.a_offset = from.offsets + m * from.taps;
      if (m > 0) tile.ahead = tile.b;  // it is fetched
      tile.out.y = to.y + m * to.stride * dtype_bytes(p_.out.dtype);
      if (p_.out.residual.r != nullptr) set_residual(p_.out, to.residual, to.residual_offset + m * to.stride, to.stride, &tile.out);
      table_.gemm(tile, count, width);
    }
  }

  const Conv2dPlan& plan_;
  const Int8Conv2dParams& p_;
  const KernelTable& table_;
  const Scratch scratch_;
  const Columns columns_;
  const int8_t* const packed_;
  uint8_t* const codes_;
  float* const scale_;
  int32_t* const zero_;
  int64_t first_sample_ = 0, samples_ = 0;
  CodeOutput codes_of_result_;
};

// Where x is read and how codes are laid out.
void plan_codes(const Int8Conv2dParams& p, Conv2dPlan* plan) {
  const PackedLayout& layout = plan->layout;
  const bool row_taps = layout.form == WeightForm::kRowTaps;
  const int64_t reach_h = (p.OH - 1) * p.stride[0] + p.dilation[0] * (p.R - 1) + 1;
  const int64_t reach_w = (p.OW - 1) * p.stride[1] + p.dilation[1] * (p.S - 1) + 1;
  const bool padded = p.pad[0] > 0 || p.pad[1] > 0 || reach_h > p.H || reach_w > p.W;
  plan->channels_last = p.x_stride[1] == 1;
  plan->product_channels = row_taps ? p.C : layout.quads * kQuad;
  plan->in_place =
      plan->channels_last && !padded && !row_taps && plan->product_channels == layout.k && reads_in_place(*plan->table, p.in);
  plan->phases = row_taps ? p.dilation[1] : 1;
  plan->phase_columns = ceil_div(std::max(p.pad[1] + p.W, reach_w), plan->phases);
  plan->left = p.pad[1];
  if (plan->in_place) {
    plan->pixel = p.x_stride[3];
    plan->row = p.x_stride[2];
    plan->sample = p.x_stride[0];
  } else {
    plan->pixel = layout.products * plan->product_channels;
    plan->row = plan->phases * plan->phase_columns * plan->pixel;
    // one row of padding; the last quad of a kernel row may read three bytes more, where the weight is zero
    plan->sample = round_up((p.H + 1) * plan->row + kQuad, 64);
  }
  const bool unpadded_rows = plan->row == p.W * plan->pixel;
  plan->pointwise =
      p.R == 1 && p.S == 1 && p.stride[0] == 1 && p.stride[1] == 1 && !padded && unpadded_rows && p.OH == p.H && p.OW == p.W;
  plan->rows_adjacent = rows_follow(p) && (!plan->channels_last || unpadded_rows);
  plan->strip = plan->rows_adjacent ? std::min(p.H * p.W, kStripPixels) : p.W;
  plan->strips = plan->strip == 0 || plan->in_place ? 0 : ceil_div(p.H * p.W, plan->strip);
}

}  // namespace

Conv2dPlan plan_conv2d(const Int8Conv2dParams& p, const PackedLayout& layout, const KernelTable& table, int64_t threads) {
  Conv2dPlan plan;
  plan.table = &table;
  plan.threads = threads;
  plan.layout = layout;
  plan_codes(p, &plan);
  plan.slim = layout.panels() == 1 && layout.width(0) <= kSlimColumns;
  const int64_t tile = plan.slim ? table.slim_rows : table.gemm_rows;
  const int64_t patch = round_up(layout.taps * layout.quads * kQuad, 64);
  plan.patch = 0;
  // an odd number of lines, so that neighbouring rows do not meet in the same sets of a cache
  if (table.gathers > 0 && layout.quads >= table.gathers && !plan.pointwise) plan.patch = patch + (patch % 128 == 0 ? 64 : 0);
  int64_t rows = kOffsetBytes / (layout.taps * int64_t{sizeof(int64_t)});
  if (plan.patch > 0) rows = std::min(rows, kPatchBytes / plan.patch);
  const int64_t most = std::clamp<int64_t>(rows / tile, 1, kBlockTiles) * tile;
  const int64_t pixels = p.OH * p.OW, blocks = std::max<int64_t>(1, (pixels + most / 2) / most);  // even ones, about as large
  plan.block = round_up(ceil_div(pixels, blocks), tile);
  plan.samples = plan.in_place ? p.N : std::clamp<int64_t>(threads * kPassBytesPerThread / plan.sample, 1, p.N);

  ScratchLayout scratch;
  plan.columns = plan_columns(p.out, layout, p.N * p.OH * p.OW, threads, &scratch);
  plan.packs = p.packed == nullptr;
  plan.packed_at = scratch.add(plan.packs ? layout.bytes : 0);
  plan.codes_at = scratch.add(plan.in_place ? 0 : plan.samples * plan.sample);
  plan.ranges_at = scratch.add(is_dynamic(p.in) ? plan.samples * plan.strips * int64_t{sizeof(Range)} : 0);
  plan.scale_at = scratch.add(plan.samples * int64_t{sizeof(float)});
  plan.zero_at = scratch.add(plan.samples * int64_t{sizeof(int32_t)});
  const auto workers = [&](int64_t bytes, int64_t* own) {
    *own = round_up(bytes, 64);
    return scratch.add(threads * *own);
  };
  plan.buffers_at = workers(plan.strips > 0 ? plan.strip * p.C : 0, &plan.buffer_bytes);
  plan.offsets_at = workers(plan.block * (layout.taps + 1) * int64_t{sizeof(int64_t)}, &plan.offset_bytes);
  plan.patches_at = workers(plan.block * plan.patch, &plan.patch_bytes);
  const int64_t block = p.y_channels_last ? 0 : plan.block * std::min<int64_t>(kPanel, layout.n);
  plan.outputs_at = workers(block * dtype_bytes(p.out.dtype), &plan.output_bytes);
  plan.residuals_at = workers(block * residual_bytes(p.out), &plan.residual_bytes);
  plan.scratch_bytes = scratch.bytes;
  return plan;
}

void run_conv2d(const Conv2dPlan& plan, const Int8Conv2dParams& p) { Conv2d(plan, p).run(); }

void int8_conv2d_cpu(const Int8Conv2dParams& p) {
  if (p.N == 0 || p.O == 0 || p.OH * p.OW == 0) return;
  const PackedLayout layout = weight_layout(p);
  const KernelTable& table = kernels();
  const int64_t threads = parallel_threads();
  if (layout.form == WeightForm::kDepthwise) {
    log_entries({"depthwise"});
    return run_depthwise(plan_depthwise(p, layout, table, threads), p);
  }
  log_kernel([&] { return first_tile_name(table, p.N * p.OH * p.OW, layout.width(0)); });
  run_conv2d(plan_conv2d(p, layout, table, threads), p);
}

}  // namespace quant_ops

// The two convolutions of the CPU: their plans, made of shapes, dtypes and the kernel table before data is read, and the reading of
// images that they share. Read next: conv2d.cpp, conv2d_depthwise.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/activations.h"
#include "cpu/columns.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"

namespace quant_ops {

// Convolutions by GEMM tiles. Codes are [samples][rows, one of padding][columns with padding][channels].
struct Conv2dPlan {
  const KernelTable* table;
  int64_t threads;
  PackedLayout layout;
  // x
  bool in_place;       // the product reads x itself: 8-bit NHWC without padding
  bool channels_last;  // channels of x step by 1, else columns do
  bool rows_adjacent;  // a strip can span rows: they follow each other in x, and in the codes where these are written directly
  int64_t strip;       // pixels of a strip, the unit of quantization
  int64_t strips;      // of a sample; 0 where nothing is quantized
  // codes
  int64_t product_channels;       // bytes of the channels of one product: k padded to a multiple of four
  int64_t pixel, row, sample;     // bytes of each
  int64_t phases, phase_columns;  // columns of a row are kept as [phases][phase_columns], by column modulo phases
  int64_t left;                   // columns of padding before those of the image
  // output
  bool slim;        // the only panel has at most kSlimColumns columns, so tiles are those of slim panels
  bool pointwise;   // every output pixel reads the input pixel of its own place
  int64_t block;    // output pixels whose indirection table is made at a time
  int64_t patch;    // bytes from the codes that an output pixel reads to those of the next one, if they are gathered, else 0
  int64_t samples;  // of a pass
  // scratch: a part that is not needed has no bytes; each worker has bytes of its own
  ColumnsPlan columns;
  bool packs;  // the weight is packed into scratch
  int64_t packed_at, codes_at, ranges_at, scale_at, zero_at;
  int64_t buffers_at, buffer_bytes, offsets_at, offset_bytes, patches_at, patch_bytes, outputs_at, output_bytes, residuals_at,
      residual_bytes;
  int64_t scratch_bytes;

  int64_t column_offset(int64_t column) const {
    return phases == 1 ? column * pixel : (column % phases * phase_columns + column / phases) * pixel;
  }
};

// groups == C == O. A band is the output rows that one worker computes from input rows that are in its scratch together.
struct DepthwisePlan {
  const KernelTable* table;
  int64_t threads;
  PackedLayout layout;
  bool in_place, channels_last;  // as in Conv2dPlan
  int64_t pixel, row;            // bytes of a pixel and a row of codes
  int64_t reach;                 // input rows from the first to the last that an output row reads
  int64_t strip_rows, strips;    // input rows of a strip, the unit of quantization; strips of a sample
  int64_t band, band_input;      // output rows of a band, and their input rows
  int64_t run;                   // output pixels of a call of the kernel
  int64_t row_pointers;          // R rounded up to a multiple of four
  int64_t rows_together;  // output rows of a call: 2 where the one below reads the next input rows, all of them together four
  ColumnsPlan columns;
  bool packs;
  int64_t packed_at, ranges_at, qparams_at;
  int64_t workers_at, worker_bytes;  // worker_bytes for each worker, with the following parts
  int64_t codes_own, padding_own, buffer_own, line_own, rows_own, output_own, residual_own;
  int64_t scratch_bytes;
};

// `layout` is weight_layout(p). The output is not empty.
Conv2dPlan plan_conv2d(const Int8Conv2dParams& p, const PackedLayout& layout, const KernelTable& table, int64_t threads);
void run_conv2d(const Conv2dPlan& plan, const Int8Conv2dParams& p);
DepthwisePlan plan_depthwise(const Int8Conv2dParams& p, const PackedLayout& layout, const KernelTable& table, int64_t threads);
void run_depthwise(const DepthwisePlan& plan, const Int8Conv2dParams& p);

inline PackedLayout weight_layout(const Int8Conv2dParams& p) {
  return packed_layout(p.O, p.groups == 1 ? p.C : p.C / p.groups, p.R, p.S, p.groups);
}

// ---- images ---------------------------------------------------------------------------------------------------------

// Pixels of a sample that are read together: `rows` times `pixels` neighbours, all channels. Where rows follow each other in x they
// are one row of a strip.
struct Strip {
  int64_t offset;  // of its first pixel in x
  int64_t rows, pixels;
};

inline bool rows_follow(const Int8Conv2dParams& p) { return p.x_stride[2] == p.W * p.x_stride[3]; }

inline Strip strip_of_rows(const Int8Conv2dParams& p, int64_t n, int64_t h, int64_t rows) {
  const int64_t offset = n * p.x_stride[0] + h * p.x_stride[2];
  return rows_follow(p) ? Strip{offset, 1, rows * p.W} : Strip{offset, rows, p.W};
}

// Calls run(offset in x, elements, place) for the contiguous runs of a strip; place is where the run starts in [rows * pixels][C]
// for channels_last, else in [C][rows * pixels].
template <class Run>
void for_each_run_of(const Int8Conv2dParams& p, bool channels_last, const Strip& strip, const Run& run) {
  const int64_t pixels = strip.rows * strip.pixels;
  if (channels_last) {
    for (int64_t i = 0; i < strip.rows; ++i) {
      const int64_t offset = strip.offset + i * p.x_stride[2], place = i * strip.pixels * p.C;
      if (p.x_stride[3] == p.C)
        run(offset, strip.pixels * p.C, place);
      else
        for (int64_t w = 0; w < strip.pixels; ++w) run(offset + w * p.x_stride[3], p.C, place + w * p.C);
    }
  } else if (strip.rows == 1 && p.x_stride[1] == pixels) {  // channels follow each other: the strip is a whole sample
    run(strip.offset, p.C * pixels, int64_t{0});
  } else {
    for (int64_t c = 0; c < p.C; ++c)
      for (int64_t i = 0; i < strip.rows; ++i)
        run(strip.offset + c * p.x_stride[1] + i * p.x_stride[2], strip.pixels, c * pixels + i * strip.pixels);
  }
}

inline void find_range(const KernelTable& table, const Int8Conv2dParams& p, bool channels_last, const Strip& strip, Range* range) {
  *range = kZeroRange;
  for_each_run_of(p, channels_last, strip,
                  [&](int64_t offset, int64_t count, int64_t) { find_range(table, p.in, offset, count, range); });
}

// The range of a sample from those of its strips.
inline Range join(const Range* ranges, int64_t count) {
  Range all = kZeroRange;
  for (int64_t i = 0; i < count; ++i)
    all = {std::min(all.min, ranges[i].min), std::max(all.max, ranges[i].max), std::max(all.abs_bits, ranges[i].abs_bits)};
  return all;
}

// to[c * to_stride + r] = from[r * from_stride + c] for elements of so many bytes.
inline void transpose_bytes(int64_t bytes, const void* from, int64_t from_stride, int64_t rows, int64_t columns, void* to,
                            int64_t to_stride) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    transpose(static_cast<const T*>(from), from_stride, rows, columns, static_cast<T*>(to), to_stride);
  };
  if (bytes == 4) return run(static_cast<uint32_t*>(nullptr));
  if (bytes == 2) return run(static_cast<uint16_t*>(nullptr));
  run(static_cast<uint8_t*>(nullptr));
}

// The bytes that an element of the residual takes; 0 without one.
inline int64_t residual_bytes(const OutputParams& out) { return out.residual.r == nullptr ? 0 : dtype_bytes(out.residual.dtype); }

}  // namespace quant_ops

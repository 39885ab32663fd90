// Depthwise convolution, written once: a run of output pixels of one row. `Taps` is how an instruction set multiplies four rows of
// the kernel at once:
//   kBlocks                                           blocks of sixteen channels that are interleaved at once
//   kLineBytes                                        bytes of a block of the line: of bytes, or of words for instructions on those
//   kOnes                                             a lane of the line whose elements are all 1
//   interleave<kBlocks>(row, flip, to, block_stride)  of four rows: the codes row[r][16 i + c] ^ flip go to block i of the line
//   weights<kShift>(const int8_t*)                    N channels of four weights, as dot takes them, from row kShift of four on
//   offset(const int32_t* sum)                        may be missing: what is added to N sums, given those of their weights
//   dot(I acc, const uint8_t* codes, W weights)       acc + the four products of each channel
//
// Channels are lanes, and the four elements of a lane are four rows of the image in one of its columns. Each column is interleaved
// once, into a line that stays in the L1 cache, and then read by every output pixel that needs it, whatever the stride and the
// dilation are. Of a kernel of three rows or fewer two output rows read the same line, if they read neighbouring rows.
#pragma once

#include "kernels/generic/epilogue.h"

namespace quant_ops::QO_ISA {
namespace {

constexpr int64_t kBlockBytes = kPanelStep * kQuad;  // sixteen channels of four weights

// Blocks of the line that are padding.
template <class Taps>
QO_INLINE void pad_line(uint8_t* line, int64_t bytes, uint8_t padding) {
  const auto lanes = Simd::set_int(static_cast<int32_t>(Taps::kOnes * padding));
  for (int64_t i = 0; i < bytes; i += Simd::N * kQuad) Simd::store(reinterpret_cast<int32_t*>(line + i), lanes);
}

// All input columns, for kBlocks blocks from `channel` on: [block][column][groups][kLineBytes].
template <class Taps, int kBlocks>
void interleave_columns(const DepthwiseRun& d, int64_t channel, int64_t groups) {
  const int64_t columns = d.columns(), pixel = d.pixel, step = groups * Taps::kLineBytes, block_stride = columns * step;
  const uint8_t flip = d.flip;
  const int64_t before = d.first >= 0 ? 0 : -d.first < columns ? -d.first : columns;
  const int64_t left = d.width - d.first, inside = left < before ? before : left < columns ? left : columns;
  for (int64_t i = 0; i < kBlocks; ++i) {
    uint8_t* line = d.line + i * block_stride;
    pad_line<Taps>(line, before * step, d.padding);
    pad_line<Taps>(line + inside * step, (columns - inside) * step, d.padding);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* row[kQuad];
    unroll<kQuad>([&](auto r) QO_LAMBDA { row[r.value] = d.rows[g * kQuad + r.value] + (d.first + before) * pixel + channel; });
    uint8_t* to = d.line + before * step + g * Taps::kLineBytes;
    for (int64_t w = before; w < inside; ++w, to += step) {
      Taps::template interleave<kBlocks>(row, flip, to, block_stride);
      unroll<kQuad>([&](auto r) QO_LAMBDA { row[r.value] += pixel; });
    }
  }
}

// Of a vector of channels of as many pixels.
template <int kCount>
struct PixelSums {
  typename Simd::I acc[kCount];
};

// One output row: channels [column, column + N) of all pixels, from their line, four pixels at a time, so that each weight is
// loaded once for four; the last four may overlap the ones before. kShift: the place of the output row among those that share the
// line. kS, kGroups: columns and groups of rows of the kernel if both are known at compile time, which removes the loops, or 0.
template <class Taps, class Y, class Column, bool kWhole, int kShift, int kS, int kGroups>
void sum_taps(const DepthwiseRun& d, const TileOutput& row, const Rounding<Y>& of_row, int64_t column, const uint8_t* line,
              const int8_t* b) {
  // copies that no store can change
  Y* const y = static_cast<Y*>(row.y) + column;
  const int64_t y_stride = row.y_stride, valid = row.columns - column;
  const Rounding<Y> rounding = of_row;
  const Column parameters[1] = {Column(row, column)};
  const int64_t groups = kGroups > 0 ? kGroups : d.groups(), columns = d.s;
  const int64_t step = d.stride * groups * Taps::kLineBytes, tap_step = d.dilation * groups * Taps::kLineBytes;
  auto start = Simd::load_int(row.start + column);
  if constexpr (requires { Taps::offset(row.column_sum); }) start = Simd::add(start, Taps::offset(row.column_sum + column));
  constexpr int kHeld = kS * kGroups;  // weights that are loaded once for all pixels
  decltype(Taps::template weights<kShift>(b)) held[kHeld > 0 ? kHeld : 1];
  unroll<kHeld>([&](auto i) QO_LAMBDA { held[i.value] = Taps::template weights<kShift>(b + i.value * kBlockBytes); });
  const auto sum = [&]<int kCount>(PixelSums<kCount>& sums, int64_t pixel) QO_LAMBDA {  // of the pixels from this one on
    auto& acc = sums.acc;
    unroll<kCount>([&](auto p) QO_LAMBDA { acc[p.value] = start; });
    const uint8_t* a = line + pixel * step;
    const auto add = [&](const uint8_t* from, const auto& w) QO_LAMBDA {
      unroll<kCount>([&](auto p) QO_LAMBDA { acc[p.value] = Taps::dot(acc[p.value], from + p.value * step, w); });
    };
    if constexpr (kHeld > 0) {
      unroll<kHeld>([&](auto i)
                        QO_LAMBDA { add(a + i.value / kGroups * tap_step + i.value % kGroups * Taps::kLineBytes, held[i.value]); });
    } else {
      const int8_t* weights = b;
      for (int64_t s = 0; s < columns; ++s, a += tap_step)
        for (int64_t g = 0; g < groups; ++g, weights += kBlockBytes)
          add(a + g * Taps::kLineBytes, Taps::template weights<kShift>(weights));
    }
  };
  const auto finish = [&]<int kCount>(const PixelSums<kCount>& sums, int64_t pixel) QO_LAMBDA {
    finish_block<Y, kCount, 1, kWhole>(row, rounding, parameters, column, y + pixel * y_stride, y_stride, 0, valid,
                                       [&](auto p, auto) QO_LAMBDA { return sums.acc[p.value]; });
  };
  constexpr int kPixels = 4;
  const int64_t pixels = d.pixels;
  if (!kWhole || pixels < kPixels) {
    for (int64_t i = 0; i < pixels; ++i) {
      PixelSums<1> one;
      sum(one, i);
      finish(one, i);
    }
    return;
  }
  // the next pixels are summed before these are finished, which would wait for their own sums
  PixelSums<kPixels> now, next;
  int64_t pixel = 0;
  sum(now, 0);
  for (int64_t i = kPixels; i < pixels; i += kPixels) {
    const int64_t following = i + kPixels <= pixels ? i : pixels - kPixels;
    sum(next, following);
    finish(now, pixel);
    now = next;
    pixel = following;
  }
  finish(now, pixel);
}

// One vector of channels of an output row with TileExtras: sum(run, out, line) gives the values of some pixels, which are finished
// in memory.
template <class Taps, class Sum>
void finish_pixels(const DepthwiseRun& d, const TileOutput& row, int64_t column, const uint8_t* line, const Sum& sum) {
  constexpr int64_t kPixels = 64;
  alignas(64) float values[kPixels * Simd::N];
  const int64_t step = d.stride * d.groups() * Taps::kLineBytes;
  TileOutput out = row.from_column(column);
  if (out.columns > Simd::N) out.columns = Simd::N;
  DepthwiseRun part = d;
  const TileOutput plain = plain_output(out, values, Simd::N);
  char* y = static_cast<char*>(out.y);
  const char* residual = static_cast<const char*>(out.residual);
  for (int64_t first = 0; first < d.pixels; first += kPixels) {
    part.pixels = d.pixels - first < kPixels ? d.pixels - first : kPixels;
    sum(part, plain, line + first * step);
    out.y = y + first * out.y_stride * dtype_bytes(out.dtype);
    if (residual != nullptr) out.residual = residual + first * out.residual_stride * dtype_bytes(out.extras->residual_dtype);
    finish_values(out, values, part.pixels, Simd::N);
  }
}

template <class Taps, class Y, class Column = ColumnOf<Y, true>>
void depthwise_typed(const DepthwiseRun& d) {
  constexpr int64_t kBlocks = Taps::kBlocks;
  const int64_t groups = d.groups(), block_stride = d.columns() * groups * Taps::kLineBytes;
  const bool three_by_three = groups == 1 && d.s == 3;
  const Rounding<Y> rounding(d.out);
  const TileOutput below = d.out_rows > 1 ? d.out.from_row(d.y_row) : d.out;
  for (int64_t channel = 0, blocks; channel < d.out.columns; channel += blocks * kPanelStep) {
    blocks = channel + (kBlocks - 1) * kPanelStep < d.out.columns ? kBlocks : 1;
    blocks == kBlocks ? interleave_columns<Taps, kBlocks>(d, channel, groups) : interleave_columns<Taps, 1>(d, channel, groups);
    for (int64_t i = 0; i < blocks * kPanelStep && channel + i < d.out.columns; i += Simd::N) {
      const int64_t column = channel + i, lane = i % kPanelStep * kQuad;
      const uint8_t* line = d.line + i / kPanelStep * block_stride + lane;
      const int8_t* b = d.b + column / kPanelStep * d.s * groups * kBlockBytes + lane;
      const bool whole = column + Simd::N <= d.out.columns;
      const auto sum = [&](auto shift, const DepthwiseRun& run, const TileOutput& row, int64_t from, const uint8_t* codes)
                           QO_LAMBDA {
                             if (!whole)
                               sum_taps<Taps, Y, Column, false, shift.value, 0, 0>(run, row, rounding, from, codes, b);
                             else if (three_by_three)
                               sum_taps<Taps, Y, Column, true, shift.value, 3, 1>(run, row, rounding, from, codes, b);
                             else if (shift.value == 0 && groups == 2)
                               sum_taps<Taps, Y, Column, true, 0, 0, 2>(run, row, rounding, from, codes, b);
                             else
                               sum_taps<Taps, Y, Column, true, shift.value, 0, 0>(run, row, rounding, from, codes, b);
                           };
      const auto finish_row = [&](auto shift, const TileOutput& row) QO_LAMBDA {
        if constexpr (std::is_same_v<Y, float>)
          if (row.extras != nullptr)
            return finish_pixels<Taps>(
                d, row, column, line,
                [&](const DepthwiseRun& run, const TileOutput& out, const uint8_t* codes) { sum(shift, run, out, 0, codes); });
        sum(shift, d, row, column, line);
      };
      finish_row(Int<0>{}, d.out);
      if (d.out_rows > 1) finish_row(Int<1>{}, below);
    }
  }
}

template <class Taps>
void depthwise(const DepthwiseRun& d) {
  // codes with a function are finished in registers, where there are enough of them
  if constexpr (Simd::kRegisters >= 32)
    if (d.out.extras != nullptr && d.out.residual == nullptr && dtype_bytes(d.out.dtype) == 1 &&
        d.out.extras->function >= Function::kHardswish)
      return with_function(d.out.extras->function, [&](auto function) QO_LAMBDA {
        if constexpr (function.value >= Function::kHardswish) depthwise_typed<Taps, Code, OneFunctionSteps<function.value>>(d);
      });
  if (d.out.extras != nullptr) return depthwise_typed<Taps, float>(d);
  with_result_type(d.out.dtype, [&](auto* type) QO_LAMBDA { depthwise_typed<Taps, std::remove_pointer_t<decltype(type)>>(d); });
}

}  // namespace
}  // namespace quant_ops::QO_ISA

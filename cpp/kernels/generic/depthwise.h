// Depthwise convolution, written once: a run of output pixels of one row. `Taps` is how an instruction set multiplies four rows of
// the kernel at once:
//   kBlocks                                           blocks of sixteen channels that are interleaved at once
//   interleave<kBlocks>(row, flip, to, block_stride)  of four rows: to[i * block_stride + 4 c + r] = row[r][16 i + c] ^ flip
//   weights(const int8_t*)                            N channels of four weights, as dot takes them
//   start(const int32_t* sum)                         the initial sums of N channels, given the sums of their weights
//   dot(I acc, const uint8_t* codes, W weights)       acc + the four products of each channel
//
// Channels are lanes, and the four bytes of a lane are four rows of the kernel in one of its columns. Each column of the image is
// interleaved once, into a line that stays in the L1 cache, and then read by every output pixel that needs it, whatever the stride
// and the dilation are.
#pragma once

#include "kernels/generic/epilogue.h"

namespace quant_ops::QO_ISA {
namespace {

constexpr int64_t kBlockBytes = kPanelStep * kQuad;  // sixteen channels of four taps

// All input columns, for kBlocks blocks from `channel` on: [block][column][groups][16][4].
template <class Taps, int kBlocks>
void interleave_columns(const DepthwiseRun& d, int64_t channel, int64_t groups) {
  const int64_t columns = d.columns(), pixel = d.pixel, step = groups * kBlockBytes, block_stride = columns * step;
  const uint8_t flip = d.flip;
  const int64_t before = d.first >= 0 ? 0 : -d.first < columns ? -d.first : columns;
  const int64_t left = d.width - d.first, inside = left < before ? before : left < columns ? left : columns;
  for (int64_t i = 0; i < kBlocks; ++i) {
    uint8_t* line = d.line + i * block_stride;
    std::memset(line, d.padding, static_cast<size_t>(before * step));
    std::memset(line + inside * step, d.padding, static_cast<size_t>((columns - inside) * step));
  }
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* row[kQuad];
    unroll<kQuad>([&](auto r) QO_LAMBDA { row[r.value] = d.rows[g * kQuad + r.value] + (d.first + before) * pixel + channel; });
    uint8_t* to = d.line + before * step + g * kBlockBytes;
    for (int64_t w = before; w < inside; ++w, to += step) {
      Taps::template interleave<kBlocks>(row, flip, to, block_stride);
      unroll<kQuad>([&](auto r) QO_LAMBDA { row[r.value] += pixel; });
    }
  }
}

// Channels [column, column + N) of all pixels, from their line, four pixels at a time, so that each weight is loaded once for four;
// the last four may overlap the ones before. kS, kGroups: columns and groups of rows of the kernel if they are known at compile
// time, which removes the loops, or 0.
template <class Taps, class Y, bool kWhole, int kS, int kGroups>
void sum_taps(const DepthwiseRun& d, int64_t column, const uint8_t* line, const int8_t* b) {
  const TileOutput out = d.out.from_column(column);  // a copy that no store can change
  const Rounding<Y> rounding(out);
  using Column = ColumnOf<Y, true>;
  const Column parameters[1] = {Column(out, 0)};
  const int64_t groups = kGroups > 0 ? kGroups : d.groups(), columns = kS > 0 ? kS : d.s;
  const int64_t step = d.stride * groups * kBlockBytes, tap_step = d.dilation * groups * kBlockBytes;
  const auto start = Taps::start(out.column_sum);
  const auto finish = [&](auto count, int64_t pixel) QO_LAMBDA {
    typename Simd::I acc[count.value];
    unroll<count.value>([&](auto p) QO_LAMBDA { acc[p.value] = start; });
    const uint8_t* a = line + pixel * step;
    const int8_t* weights = b;
    const auto tap = [&](const uint8_t* from) QO_LAMBDA {
      const auto w = Taps::weights(weights);
      unroll<count.value>([&](auto p) QO_LAMBDA { acc[p.value] = Taps::dot(acc[p.value], from + p.value * step, w); });
      weights += kBlockBytes;
    };
    const auto taps_of_column = [&](const uint8_t* from) QO_LAMBDA {
      if constexpr (kGroups > 0)
        unroll<kGroups>([&](auto g) QO_LAMBDA { tap(from + g.value * kBlockBytes); });
      else
        for (int64_t g = 0; g < groups; ++g) tap(from + g * kBlockBytes);
    };
    if constexpr (kS > 0)
      unroll<kS>([&](auto s) QO_LAMBDA { taps_of_column(a + s.value * tap_step); });
    else
      for (int64_t s = 0; s < columns; ++s, a += tap_step) taps_of_column(a);
    finish_block<Y, count.value, 1, kWhole>(out, rounding, parameters, 0, static_cast<Y*>(out.y) + pixel * out.y_stride, 0,
                                            out.columns, [&](auto p, auto) QO_LAMBDA { return acc[p.value]; });
  };
  constexpr int kPixels = 4;
  const int64_t pixels = d.pixels;
  if (kWhole && pixels >= kPixels)
    for (int64_t i = 0; i < pixels; i += kPixels) finish(Int<kPixels>{}, i + kPixels <= pixels ? i : pixels - kPixels);
  else
    for (int64_t i = 0; i < pixels; ++i) finish(Int<1>{}, i);
}

// One vector of channels of an epilogue with TileExtras: sum(run, column, line) gives the values of some pixels, which are finished
// in memory.
template <class Sum>
void finish_pixels(const DepthwiseRun& d, int64_t column, const uint8_t* line, const Sum& sum) {
  constexpr int64_t kPixels = 64;
  alignas(64) float values[kPixels * Simd::N];
  const int64_t step = d.stride * d.groups() * kBlockBytes;
  TileOutput out = d.out.from_column(column);
  if (out.columns > Simd::N) out.columns = Simd::N;
  DepthwiseRun part = d;
  part.out = plain_output(out, values, Simd::N);
  char* y = static_cast<char*>(out.y);
  const char* residual = static_cast<const char*>(out.residual);
  for (int64_t first = 0; first < d.pixels; first += kPixels) {
    part.pixels = d.pixels - first < kPixels ? d.pixels - first : kPixels;
    sum(part, 0, line + first * step);
    out.y = y + first * out.y_stride * dtype_bytes(out.dtype);
    if (residual != nullptr) out.residual = residual + first * out.residual_stride * dtype_bytes(out.extras->residual_dtype);
    finish_values(out, values, part.pixels, Simd::N);
  }
}

template <class Taps, class Y>
void depthwise_typed(const DepthwiseRun& d) {
  constexpr int64_t kBlocks = Taps::kBlocks;
  const int64_t groups = d.groups(), block_stride = d.columns() * groups * kBlockBytes;
  const bool three_by_three = groups == 1 && d.s == 3;
  for (int64_t channel = 0, blocks; channel < d.out.columns; channel += blocks * kPanelStep) {
    blocks = channel + (kBlocks - 1) * kPanelStep < d.out.columns ? kBlocks : 1;
    blocks == kBlocks ? interleave_columns<Taps, kBlocks>(d, channel, groups) : interleave_columns<Taps, 1>(d, channel, groups);
    for (int64_t i = 0; i < blocks * kPanelStep && channel + i < d.out.columns; i += Simd::N) {
      const int64_t column = channel + i, lane = i % kPanelStep * kQuad;
      const uint8_t* line = d.line + i / kPanelStep * block_stride + lane;
      const int8_t* b = d.b + column / kPanelStep * d.s * groups * kBlockBytes + lane;
      const auto sum = [&](const DepthwiseRun& run, int64_t from, const uint8_t* codes) {
        if (column + Simd::N > d.out.columns)
          sum_taps<Taps, Y, false, 0, 0>(run, from, codes, b);
        else if (three_by_three)
          sum_taps<Taps, Y, true, 3, 1>(run, from, codes, b);
        else if (groups == 2)
          sum_taps<Taps, Y, true, 0, 2>(run, from, codes, b);
        else
          sum_taps<Taps, Y, true, 0, 0>(run, from, codes, b);
      };
      if constexpr (std::is_same_v<Y, float>)
        if (d.out.extras != nullptr) {
          finish_pixels(d, column, line, sum);
          continue;
        }
      sum(d, column, line);
    }
  }
}

template <class Taps>
void depthwise(const DepthwiseRun& d) {
  if (d.out.extras != nullptr) return depthwise_typed<Taps, float>(d);
  with_output_type(d.out.dtype, [&](auto* type) QO_LAMBDA { depthwise_typed<Taps, std::remove_pointer_t<decltype(type)>>(d); });
}

}  // namespace
}  // namespace quant_ops::QO_ISA

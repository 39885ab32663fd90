// The packed weight: what the micro-kernels read, the same bytes for every instruction set.
//
//   header     64 bytes that name the shape it was made for
//   column sum int32 [groups][padded columns]                 sum over k of the weight, for the zero-point correction
//   panels     int8  [groups][columns / 64][taps][k / 4][width][4]   width 64, the last panel rounded up to 16; k padded with zeros
//
// A linear weight [N, K] has one group and one tap. A convolution weight [O, C/groups, R, S] has R * S taps, with two exceptions
// that keep products long:
//   few channels   a kernel row is one tap: R taps of S * C neighbouring bytes of the image (for a horizontal dilation of 1)
//   small groups   several groups make one with a block-diagonal weight; the zeros cost less than tiles of four columns
// A depthwise weight (one input and one output channel a group) is kept as [channels / 16][s][r / 4][16][4], four rows of the
// kernel together; channels and rows that do not exist are zeros. Derived, never saved.
#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace quant_ops {

struct PackedLayout {
  int64_t out_channels, in_channels, r, s, conv_groups;  // of the weight; in_channels of one group
  bool depthwise, rows;                                  // kept as above; rows: of few channels
  int64_t merged;                                        // groups of the weight in one of the product
  int64_t groups, n, k, taps;                            // of the product: n columns and k inputs of one group and tap
  int64_t quads, padded_n, column_sum_offset, panels_offset, group_bytes, bytes;

  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t width(int64_t panel) const { return panel * kPanel + kPanel <= padded_n ? kPanel : padded_n - panel * kPanel; }

  const int32_t* column_sum(const int8_t* packed, int64_t group) const {
    return reinterpret_cast<const int32_t*>(packed + column_sum_offset) + group * padded_n;
  }
  const int8_t* panel(const int8_t* packed, int64_t group, int64_t panel) const {
    return packed + panels_offset + group * group_bytes + panel * kPanel * taps * quads * kQuad;
  }
  // Where the weight of a channel of a depthwise convolution at row i and column j of its kernel is, after panels_offset.
  int64_t depthwise_place(int64_t channel, int64_t i, int64_t j) const {
    const int64_t groups_of_rows = (r + kQuad - 1) / kQuad;
    return (((channel / kPanelStep * s + j) * groups_of_rows + i / kQuad) * kPanelStep + channel % kPanelStep) * kQuad + i % kQuad;
  }
};

// `dilated`: no rows.
PackedLayout packed_layout(int64_t out_channels, int64_t in_channels_per_group, int64_t r, int64_t s, int64_t groups,
                           bool dilated = false);

// weight: contiguous [out_channels, in_channels_per_group, r, s].
void pack_weight_cpu(const int8_t* weight, const PackedLayout& layout, int8_t* packed);

// One panel of it: [taps][k / 4][width][4] and the sums of its columns.
void pack_panel(const int8_t* weight, const PackedLayout& layout, int64_t group, int64_t panel, int8_t* packed_panel,
                int32_t* column_sum);

// The plain weight again.
void unpack_weight_cpu(const int8_t* packed, const PackedLayout& layout, int8_t* weight);

// Whether a buffer of `bytes` bytes was made by pack_weight_cpu for this layout (its shape; contents cannot be told).
bool is_packed_for(const int8_t* packed, int64_t bytes, const PackedLayout& layout);

}  // namespace quant_ops

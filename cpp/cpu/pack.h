// The packed weight: the bytes that the micro-kernels read, the same for every instruction set.
//
//   header      64 bytes that name the shape it was made for
//   column sums int32 [products][padded columns]              sum over k of the weight, for the zero-point correction
//   panels      int8  [products][columns / 64][taps][k / 4][width][4]   width 64, the last panel rounded up to 16; k padded with
//   zeros
//
// A linear weight [N, K] is one product with one tap. A convolution weight [O, C/groups, R, S] is one product a group with R * S
// taps, with exceptions that keep the loops over k and over columns long:
//   few channels   a kernel row is one tap (WeightForm::kRowTaps)
//   small groups   several groups are joined into one product with a block-diagonal weight: its zeros cost less than tiles of
//                  four columns
//   depthwise      channels are columns, and the kernel lies along k (WeightForm::kDepthwise)
// A packed weight is derived from a plain one and never saved.
#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace quant_ops {

enum class WeightForm : int32_t {
  kPanels,     // every position (r, s) of the kernel is a tap with the channels of a group
  kRowTaps,    // R taps of S * C bytes: one row of the kernel, all channels of each of its columns
  kDepthwise,  // [channels / 16][s][r / 4][16][4]: quads are four rows of the kernel; missing channels and rows are zeros
};

struct PackedLayout {
  WeightForm form;
  // The weight. in_channels are those of one group.
  int64_t out_channels, in_channels, r, s, conv_groups;
  // The products that it is cut into: n columns and k bytes a tap of each.
  int64_t joined;    // groups of the convolution in one product
  int64_t products;  // conv_groups / joined
  int64_t n, k, taps;
  int64_t quads;     // of a tap: k rounded up to 4, over 4
  int64_t padded_n;  // columns of a product rounded up to 16; of a depthwise convolution all channels
  // The buffer.
  int64_t column_sums_offset, panels_offset, product_bytes, bytes;

  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t width(int64_t panel) const { return panel * kPanel + kPanel <= padded_n ? kPanel : padded_n - panel * kPanel; }

  int64_t column_sum_offset(int64_t product) const { return column_sums_offset + product * padded_n * int64_t{sizeof(int32_t)}; }
  int64_t panel_offset(int64_t product, int64_t panel) const {
    return panels_offset + product * product_bytes + panel * kPanel * taps * quads * kQuad;
  }
  const int32_t* column_sum(const int8_t* packed, int64_t product) const {
    return reinterpret_cast<const int32_t*>(packed + column_sum_offset(product));
  }
  const int8_t* panel(const int8_t* packed, int64_t product, int64_t panel) const { return packed + panel_offset(product, panel); }
};

// A function of the weight's shape alone, so that one packed weight serves every stride, padding and dilation.
PackedLayout packed_layout(int64_t out_channels, int64_t in_channels_per_group, int64_t r, int64_t s, int64_t groups);

// weight: contiguous [out_channels, in_channels_per_group, r, s].
void pack_weight_cpu(const int8_t* weight, const PackedLayout& layout, int8_t* packed);

// One panel of it: [taps][k / 4][width][4] and the sums of its columns.
void pack_panel(const int8_t* weight, const PackedLayout& layout, int64_t product, int64_t panel, int8_t* packed_panel,
                int32_t* column_sum);

// The plain weight again.
void unpack_weight_cpu(const int8_t* packed, const PackedLayout& layout, int8_t* weight);

// The packed copy of the transposed weight: `to` is the layout of [N, K] where `from` is that of [K, N], both linear weights.
void transpose_packed_weight_cpu(const int8_t* packed, const PackedLayout& from, const PackedLayout& to, int8_t* transposed);

// Whether pack_weight_cpu made this buffer of `bytes` bytes for this layout. It compares shapes; it cannot compare contents.
bool is_packed_for(const int8_t* packed, int64_t bytes, const PackedLayout& layout);

}  // namespace quant_ops

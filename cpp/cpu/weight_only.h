// The packed weight of weight_only_linear, the same for every instruction set. Its scales and zero points are not in it.
//
//   header    64 bytes that name the shape it was made for
//   sums      int32 [groups][padded columns]        sums over the k of a group of the codes, of four bits plus 8
//   codes     4 bits: [columns / 16][k / 8][16][4]  a byte is the codes of k and k + 4, plus 8 each (NibbleTile in table.h)
//             8 bits: panels as in pack.h           [columns / 64][k / 4][width][4]
// Padded k and columns are zero bytes. A weight without k has one group.
#pragma once

#include "kernels/table.h"

namespace quant_ops {

struct WeightOnlyLayout {
  int64_t n, k, group;
  int bits;
  int64_t groups, padded_n, padded_k;
  int64_t column_bytes;  // of the codes of one column
  int64_t codes_offset, bytes;

  int64_t panels() const { return (padded_n + kPanel - 1) / kPanel; }
  int64_t width(int64_t panel) const { return padded_n - panel * kPanel < kPanel ? padded_n - panel * kPanel : kPanel; }
  int64_t group_end(int64_t g) const { return k - g * group < group ? k : (g + 1) * group; }

  const int32_t* sums(const int8_t* packed) const { return reinterpret_cast<const int32_t*>(packed + kSumsOffset); }
  const int8_t* codes(const int8_t* packed, int64_t column) const { return packed + codes_offset + column * column_bytes; }

  static constexpr int64_t kSumsOffset = 64;
};

// group: at least 1, and a multiple of 32 or not less than k.
WeightOnlyLayout weight_only_layout(int64_t n, int64_t k, int bits, int64_t group);

// weight: contiguous [n, k].
void pack_weight_only_cpu(const int8_t* weight, const WeightOnlyLayout& layout, int8_t* packed);
void unpack_weight_only_cpu(const int8_t* packed, const WeightOnlyLayout& layout, int8_t* weight);

// Whether pack_weight_only_cpu made this buffer of `bytes` bytes for this layout. It compares shapes; it cannot compare contents.
bool is_packed_for(const int8_t* packed, int64_t bytes, const WeightOnlyLayout& layout);

}  // namespace quant_ops

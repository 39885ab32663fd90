// The packed weight of the weight-only operators, the same for every device and instruction set. Its scales and zero points are not
// in it.
//
//   header    64 bytes that name the shape it was made for
//   sums      4 bits: int32 [columns / 16][groups][16]     sums over the k of a group of the codes, of four bits plus 8
//             8 bits: int32 [columns / 64][groups][width]  (sum_place)
//   codes     4 bits: [columns / 16][k / 8][16][4]  a byte is the codes of k and k + 4, plus 8 each (NibbleTile in table.h)
//             8 bits: panels as in pack.h           [columns / 64][k / 4][width][4]
// Padded k and columns are zero bytes. A weight without k has one group. Read next: cpu/weight_only.h.
#pragma once

#include <cstdint>

#include "contract/arithmetic.h"

namespace quant_ops {

struct WeightOnlyLayout {
  int64_t n, k, group;
  int bits;
  int64_t groups, padded_n, padded_k;
  int64_t column_bytes;  // of the codes of one column
  int64_t codes_offset, bytes;

  static constexpr int64_t kSumsOffset = 64;
  static constexpr int64_t kColumns = 64, kColumnStep = 16;  // of a panel; of the last one, and of a block of four bits
  static constexpr int64_t kWord = 4, kNibblePad = 16;       // bytes of a column that lie together; k that four bits are padded to

  int64_t panels() const { return (padded_n + kColumns - 1) / kColumns; }
  int64_t width(int64_t panel) const { return padded_n - panel * kColumns < kColumns ? padded_n - panel * kColumns : kColumns; }
  int64_t group_end(int64_t g) const { return k - g * group < group ? k : (g + 1) * group; }

  const int32_t* sums(const int8_t* packed) const { return reinterpret_cast<const int32_t*>(packed + kSumsOffset); }
  const int8_t* codes(const int8_t* packed, int64_t column) const { return packed + codes_offset + column * column_bytes; }
};

// group: at least 1, and a multiple of 32 or not less than k.
inline WeightOnlyLayout weight_only_layout(int64_t n, int64_t k, int bits, int64_t group) {
  const auto up = [](int64_t a, int64_t to) { return (a + to - 1) / to * to; };
  WeightOnlyLayout l;
  l.n = n;
  l.k = k;
  l.bits = bits;
  const int64_t whole = k > 0 ? k : 1;
  l.group = group < whole ? group : whole;
  l.groups = (whole + l.group - 1) / l.group;
  l.padded_n = up(n, l.kColumnStep);
  l.padded_k = up(k, bits == 4 ? l.kNibblePad : l.kWord);
  l.column_bytes = bits == 4 ? l.padded_k / 2 : l.padded_k;
  l.codes_offset = up(l.kSumsOffset + l.groups * l.padded_n * int64_t{sizeof(int32_t)}, 64);
  l.bytes = l.codes_offset + l.padded_n * l.column_bytes;
  return l;
}

// What a packed weight begins with.
struct WeightOnlyHeader {
  char magic[8];  // "qogroup1": the last character is the version of the layout
  int64_t n, k, bits, group;
};
static_assert(sizeof(WeightOnlyHeader) <= WeightOnlyLayout::kSumsOffset);

inline WeightOnlyHeader header_of(const WeightOnlyLayout& l) {
  return {.magic = {'q', 'o', 'g', 'r', 'o', 'u', 'p', '1'}, .n = l.n, .k = l.k, .bits = l.bits, .group = l.group};
}

// Where the sum of a column's group lies among the sums.
QO_HD int64_t sum_place(int bits, int64_t groups, int64_t padded_n, int64_t group, int64_t column) {
  const int64_t columns = bits == 4 ? WeightOnlyLayout::kColumnStep : WeightOnlyLayout::kColumns;
  const int64_t first = column / columns * columns, width = padded_n - first < columns ? padded_n - first : columns;
  return first * groups + group * width + column - first;
}

// The codes of one column, as words of 32 bits that lie `step` bytes apart: eight k each (4 bits), or four.
struct ColumnWords {
  const int8_t* first;
  int64_t step;
};

QO_HD ColumnWords column_words(const int8_t* codes, int bits, int64_t column_bytes, int64_t padded_n, int64_t column) {
  constexpr int64_t kStep = WeightOnlyLayout::kColumnStep, kColumns = WeightOnlyLayout::kColumns, kWord = WeightOnlyLayout::kWord;
  if (bits == 4) return {codes + column / kStep * kStep * column_bytes + column % kStep * kWord, kStep * kWord};
  const int64_t panel = column / kColumns * kColumns, width = padded_n - panel < kColumns ? padded_n - panel : kColumns;
  return {codes + panel * column_bytes + column % kColumns * kWord, width * kWord};
}

}  // namespace quant_ops

// pack_weight: plain int8 weights into the layout of pack.h. One pass, parallel over panels. And back, and from the packed copy of
// a linear weight to that of its transpose, for the gradient of its input.
#include "cpu/pack.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace quant_ops {
namespace {

constexpr int64_t kHeaderBytes = 64;  // one cache line

struct Header {
  char magic[8];  // "qopack2": the last character is the version of the layout
  int64_t out_channels, in_channels, r, s, groups, row_taps;
};
static_assert(sizeof(Header) <= kHeaderBytes);

Header header_of(const PackedLayout& l) {
  return {.magic = {'q', 'o', 'p', 'a', 'c', 'k', '2', 0},
          .out_channels = l.out_channels,
          .in_channels = l.in_channels,
          .r = l.r,
          .s = l.s,
          .groups = l.conv_groups,
          .row_taps = l.form == WeightForm::kRowTaps};
}

// Whether the k of a tap are the input channels of one group, in their order.
bool taps_are_positions(const PackedLayout& l) { return l.joined == 1 && l.form == WeightForm::kPanels; }

// Which element of the weight is element k of tap t of a product's column; -1 where column and k belong to different groups.
int64_t source(const PackedLayout& l, int64_t product, int64_t column, int64_t t, int64_t k) {
  const int64_t o = product * l.n + column;
  if (l.form == WeightForm::kRowTaps) return ((o * l.in_channels + k % l.in_channels) * l.r + t) * l.s + k / l.in_channels;
  const int64_t group = column / (l.n / l.joined);
  if (k / l.in_channels != group) return -1;
  return (o * l.in_channels + k - group * l.in_channels) * l.taps + t;
}

// Four bytes of a column whose k step by `step` in memory; beyond k zeros.
void copy_quad(const int8_t* from, int64_t quad, int64_t k, int64_t step, int8_t* to) {
  for (int64_t i = 0; i < kQuad; ++i) to[i] = quad * kQuad + i < k ? from[(quad * kQuad + i) * step] : int8_t{0};
}

// Where row i and column j of the kernel of a channel are, after panels_offset.
int64_t depthwise_place(const PackedLayout& l, int64_t channel, int64_t i, int64_t j) {
  const int64_t quad = (channel / kPanelStep * l.s + j) * ceil_div(l.r, kQuad) + i / kQuad;
  return (quad * kPanelStep + channel % kPanelStep) * kQuad + i % kQuad;
}

// The header, and zeros up to the panels.
void begin_packed(const PackedLayout& l, int8_t* packed) {
  std::memset(packed, 0, static_cast<size_t>(l.panels_offset));
  const Header header = header_of(l);
  std::memcpy(packed, &header, sizeof(header));
}

int32_t* column_sums(const PackedLayout& l, int64_t product, int8_t* packed) {
  return reinterpret_cast<int32_t*>(packed + l.column_sum_offset(product));
}

void pack_depthwise(const int8_t* weight, const PackedLayout& l, int8_t* packed) {
  int8_t* b = packed + l.panels_offset;
  std::memset(b, 0, static_cast<size_t>(l.bytes - l.panels_offset));
  int32_t* column_sum = column_sums(l, 0, packed);
  for (int64_t c = 0; c < l.out_channels; ++c)
    for (int64_t i = 0; i < l.r; ++i)
      for (int64_t j = 0; j < l.s; ++j) column_sum[c] += b[depthwise_place(l, c, i, j)] = *weight++;
}

// A linear weight's column in [k] of the plain weight, from a panel whose quads are `row` bytes apart.
void unpack_column(const int8_t* column, int64_t row, int64_t k, int8_t* to) {
  int64_t quad = 0;
  for (; (quad + 1) * kQuad <= k; ++quad) std::memcpy(to + quad * kQuad, column + quad * row, kQuad);
  for (int64_t i = quad * kQuad; i < k; ++i) to[i] = column[quad * row + i % kQuad];
}

// Bytes [4][4] to their transpose: both matrices are four neighbouring quads.
void transpose_quads(const int8_t* from, int8_t* to) {
  static_assert(kQuad == 4);
  constexpr uint32_t kEven = 0x00ff00ff, kLow = 0x0000ffff;
  uint32_t a[4];
  std::memcpy(a, from, sizeof(a));
  const uint32_t even01 = (a[0] & kEven) | (a[1] & kEven) << 8, odd01 = (a[0] >> 8 & kEven) | (a[1] & ~kEven);
  const uint32_t even23 = (a[2] & kEven) | (a[3] & kEven) << 8, odd23 = (a[2] >> 8 & kEven) | (a[3] & ~kEven);
  const uint32_t b[4] = {(even01 & kLow) | even23 << 16, (odd01 & kLow) | odd23 << 16, even01 >> 16 | (even23 & ~kLow),
                         odd01 >> 16 | (odd23 & ~kLow)};
  std::memcpy(to, b, sizeof(b));
}

}  // namespace

void pack_panel(const int8_t* weight, const PackedLayout& l, int64_t product, int64_t panel, int8_t* packed_panel,
                int32_t* column_sum) {
  const int64_t width = l.width(panel), columns = std::min(width, l.n - panel * kPanel), row = width * kQuad;
  const int64_t first = product * l.n + panel * kPanel, column_step = l.in_channels * l.r * l.s;
  const int8_t* w = weight + first * column_step;
  if (l.taps == 1 && taps_are_positions(l))
    return kernels().pack({.weight = w,
                           .column_step = column_step,
                           .columns = columns,
                           .width = width,
                           .k = l.k,
                           .packed = packed_panel,
                           .column_sum = column_sum});
  for (int64_t j = 0; j < width; ++j) {
    int32_t sum = 0;
    for (int64_t i = 0; j < columns && i < column_step; ++i) sum += w[j * column_step + i];
    column_sum[j] = sum;
  }
  std::memset(packed_panel, 0, static_cast<size_t>(l.taps * l.quads * row));
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t quad = 0; quad < l.quads; ++quad)
      for (int64_t t = 0; t < l.taps; ++t) {
        int8_t* to = packed_panel + (t * l.quads + quad) * row + j * kQuad;
        if (taps_are_positions(l)) {
          copy_quad(w + j * column_step + t, quad, l.k, l.taps, to);
          continue;
        }
        for (int64_t i = 0; i < kQuad && quad * kQuad + i < l.k; ++i) {
          const int64_t from = source(l, product, panel * kPanel + j, t, quad * kQuad + i);
          if (from >= 0) to[i] = weight[from];
        }
      }
}

PackedLayout packed_layout(int64_t out_channels, int64_t in_channels_per_group, int64_t r, int64_t s, int64_t groups) {
  constexpr int64_t kFewChannels = 16;  // with as many, a tap is four quads: long enough
  const int64_t in_channels = in_channels_per_group, group_columns = groups == 1 ? out_channels : out_channels / groups;
  PackedLayout l;
  l.form = groups > 1 && group_columns == 1 && in_channels == 1 ? WeightForm::kDepthwise
           : groups == 1 && in_channels < kFewChannels && s > 1 ? WeightForm::kRowTaps
                                                                : WeightForm::kPanels;
  const bool row_taps = l.form == WeightForm::kRowTaps, depthwise = l.form == WeightForm::kDepthwise;
  l.out_channels = out_channels;
  l.in_channels = in_channels;
  l.r = r;
  l.s = s;
  l.conv_groups = groups;
  l.joined = 1;
  const int64_t most_joined = depthwise || group_columns == 0 ? 1 : std::min(groups, kPanelStep / group_columns);
  for (int64_t m = 2; m <= most_joined; ++m)
    if (groups % m == 0) l.joined = m;
  l.products = l.joined == 1 ? groups : groups / l.joined;
  l.n = group_columns * l.joined;
  l.k = row_taps ? s * in_channels : in_channels * l.joined;
  l.taps = row_taps ? r : r * s;
  l.quads = ceil_div(l.k, kQuad);
  l.padded_n = round_up(depthwise ? groups : l.n, kPanelStep);
  const int64_t sums = depthwise ? l.padded_n : l.products * l.padded_n;
  l.column_sums_offset = kHeaderBytes;
  l.panels_offset = round_up(l.column_sums_offset + sums * int64_t{sizeof(int32_t)}, 64);
  l.product_bytes = l.padded_n * l.taps * l.quads * kQuad;
  l.bytes = l.panels_offset + (depthwise ? l.padded_n * round_up(r, kQuad) * s : l.products * l.product_bytes);
  return l;
}

void pack_weight_cpu(const int8_t* weight, const PackedLayout& l, int8_t* packed) {
  begin_packed(l, packed);
  if (l.form == WeightForm::kDepthwise) return pack_depthwise(weight, l, packed);
  const int64_t panels = l.panels();
  parallel_for(l.products * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t product = i / panels, panel = i % panels;
      pack_panel(weight, l, product, panel, packed + l.panel_offset(product, panel),
                 column_sums(l, product, packed) + panel * kPanel);
    }
  });
}

void unpack_weight_cpu(const int8_t* packed, const PackedLayout& l, int8_t* weight) {
  if (l.out_channels == 0) return;
  if (l.form == WeightForm::kDepthwise) {
    for (int64_t c = 0; c < l.out_channels; ++c)
      for (int64_t t = 0; t < l.taps; ++t)
        weight[c * l.taps + t] = packed[l.panels_offset + depthwise_place(l, c, t / l.s, t % l.s)];
    return;
  }
  if (l.taps == 1 && l.products == 1 && taps_are_positions(l)) {
    parallel_for(l.n, kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t panel = j / kPanel;
        unpack_column(l.panel(packed, 0, panel) + j % kPanel * kQuad, l.width(panel) * kQuad, l.k, weight + j * l.k);
      }
    });
    return;
  }
  for (int64_t product = 0; product < l.products; ++product)
    for (int64_t j = 0; j < l.n; ++j) {
      const int64_t panel = j / kPanel, row = l.width(panel) * kQuad;
      const int8_t* column = l.panel(packed, product, panel) + j % kPanel * kQuad;
      for (int64_t t = 0; t < l.taps; ++t)
        for (int64_t k = 0; k < l.k; ++k) {
          const int64_t to = source(l, product, j, t, k);
          if (to >= 0) weight[to] = column[(t * l.quads + k / kQuad) * row + k % kQuad];
        }
    }
}

// Quads of four neighbouring columns are the transpose of quads of four neighbouring k, so 16 bytes become 16 bytes. Neither weight
// has fewer columns, with its padding, than the other has quads of k, and padding is zeros on both sides.
void transpose_packed_weight_cpu(const int8_t* packed, const PackedLayout& from, const PackedLayout& to, int8_t* transposed) {
  begin_packed(to, transposed);
  parallel_for(to.panels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t width = to.width(panel), row = width * kQuad,
                    quads = std::min(width / kQuad, from.quads - panel * kPanel / kQuad);
      int32_t* sums = column_sums(to, 0, transposed) + panel * kPanel;
      int8_t* to_row = transposed + to.panel_offset(0, panel);
      for (int64_t quad = 0; quad < to.quads; ++quad, to_row += row) {
        const int64_t source_panel = quad * kQuad / kPanel, source_row = from.width(source_panel) * kQuad;
        const int8_t* source =
            from.panel(packed, 0, source_panel) + panel * kPanel / kQuad * source_row + quad * kQuad % kPanel * kQuad;
        for (int64_t i = 0; i < quads; ++i) transpose_quads(source + i * source_row, to_row + i * kQuad * kQuad);
        std::memset(to_row + quads * kQuad * kQuad, 0, static_cast<size_t>(row - quads * kQuad * kQuad));
        for (int64_t j = 0; j < width; ++j)
          for (int64_t i = 0; i < kQuad; ++i) sums[j] += to_row[j * kQuad + i];
      }
    }
  });
}

bool is_packed_for(const int8_t* packed, int64_t bytes, const PackedLayout& l) {
  const Header header = header_of(l);
  return bytes == l.bytes && reinterpret_cast<uintptr_t>(packed) % 4 == 0 && std::memcmp(packed, &header, sizeof(header)) == 0;
}

}  // namespace quant_ops

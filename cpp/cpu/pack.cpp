// pack_weight: plain int8 weights into the layout of pack.h. One pass, parallel over panels.
#include "cpu/pack.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace quant_ops {
namespace {

struct Header {
  char magic[8];  // "qopack2": the last character is the version of the layout
  int64_t out_channels, in_channels, r, s, groups, rows;
};
static_assert(sizeof(Header) <= 64, "the header is one cache line");

Header header_of(const PackedLayout& l) {
  return {{'q', 'o', 'p', 'a', 'c', 'k', '2', 0}, l.out_channels, l.in_channels, l.r, l.s, l.conv_groups, l.rows};
}

// Where the product's element k of tap t of column j is in the weight; -1 beside the diagonal of merged groups.
int64_t source(const PackedLayout& l, int64_t group, int64_t j, int64_t t, int64_t k) {
  const int64_t o = group * l.n + j;
  if (l.rows) return ((o * l.in_channels + k % l.in_channels) * l.r + t) * l.s + k / l.in_channels;
  const int64_t column_group = j / (l.n / l.merged);
  if (k / l.in_channels != column_group) return -1;
  return (o * l.in_channels + k - column_group * l.in_channels) * l.taps + t;
}

// Four bytes of a column whose k step by `step` in memory; beyond k zeros.
void copy_group(const int8_t* from, int64_t quads, int64_t k, int64_t step, int8_t* to) {
  for (int64_t i = 0; i < kQuad; ++i) to[i] = quads * kQuad + i < k ? from[(quads * kQuad + i) * step] : int8_t{0};
}

}  // namespace

void pack_panel(const int8_t* weight, const PackedLayout& l, int64_t group, int64_t panel, int8_t* packed_panel,
                int32_t* column_sum) {
  const int64_t width = l.width(panel), columns = std::min(width, l.n - panel * kPanel), row = width * kQuad;
  const int64_t first = group * l.n + panel * kPanel, column_step = l.in_channels * l.r * l.s;
  const int8_t* w = weight + first * column_step;
  if (l.taps == 1 && l.merged == 1 && !l.rows)
    return kernels().pack({w, column_step, columns, width, l.k, packed_panel, column_sum});
  for (int64_t j = 0; j < width; ++j) {
    int32_t sum = 0;
    for (int64_t i = 0; j < columns && i < column_step; ++i) sum += w[j * column_step + i];
    column_sum[j] = sum;
  }
  std::memset(packed_panel, 0, static_cast<size_t>(l.taps * l.quads * row));
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t quads = 0; quads < l.quads; ++quads)
      for (int64_t t = 0; t < l.taps; ++t) {
        int8_t* to = packed_panel + (t * l.quads + quads) * row + j * kQuad;
        if (l.merged == 1 && !l.rows) {
          copy_group(w + j * column_step + t, quads, l.k, l.taps, to);
          continue;
        }
        for (int64_t i = 0; i < kQuad && quads * kQuad + i < l.k; ++i) {
          const int64_t from = source(l, group, panel * kPanel + j, t, quads * kQuad + i);
          if (from >= 0) to[i] = weight[from];
        }
      }
}

namespace {

void pack_depthwise(const int8_t* weight, const PackedLayout& l, int8_t* packed) {
  int8_t* b = packed + l.panels_offset;
  std::memset(b, 0, static_cast<size_t>(l.bytes - l.panels_offset));
  int32_t* column_sum = reinterpret_cast<int32_t*>(packed + l.column_sum_offset);
  for (int64_t c = 0; c < l.groups; ++c)
    for (int64_t i = 0; i < l.r; ++i)
      for (int64_t j = 0; j < l.s; ++j) column_sum[c] += b[l.depthwise_place(c, i, j)] = *weight++;
}

}  // namespace

PackedLayout packed_layout(int64_t out_channels, int64_t in_channels_per_group, int64_t r, int64_t s, int64_t groups,
                           bool dilated) {
  constexpr int64_t kFewChannels = 16;  // from here on a tap is four groups of k: long enough
  PackedLayout l;
  l.out_channels = out_channels;
  l.in_channels = in_channels_per_group;
  l.r = r;
  l.s = s;
  l.conv_groups = groups;
  const int64_t n = out_channels / groups;
  l.depthwise = groups > 1 && n == 1 && l.in_channels == 1;
  l.rows = groups == 1 && l.in_channels < kFewChannels && s > 1 && !dilated;
  l.merged = 1;
  for (int64_t m = 2; !l.depthwise && m <= groups && m * n <= kPanelStep; ++m)
    if (groups % m == 0) l.merged = m;
  l.groups = groups / l.merged;
  l.n = n * l.merged;
  l.k = l.rows ? s * l.in_channels : l.in_channels * l.merged;
  l.taps = l.rows ? r : r * s;
  l.quads = ceil_div(l.k, kQuad);
  l.padded_n = round_up(l.depthwise ? groups : l.n, kPanelStep);
  const int64_t sums = l.depthwise ? l.padded_n : l.groups * l.padded_n;
  l.column_sum_offset = 64;
  l.panels_offset = round_up(l.column_sum_offset + sums * 4, 64);
  l.group_bytes = l.padded_n * l.taps * l.quads * kQuad;
  l.bytes = l.panels_offset + (l.depthwise ? l.padded_n * round_up(r, kQuad) * s : l.groups * l.group_bytes);
  return l;
}

void pack_weight_cpu(const int8_t* weight, const PackedLayout& l, int8_t* packed) {
  std::memset(packed, 0, static_cast<size_t>(l.panels_offset));
  const Header header = header_of(l);
  std::memcpy(packed, &header, sizeof(header));
  if (l.depthwise) return pack_depthwise(weight, l, packed);
  const int64_t panels = l.panels();
  parallel_for(l.groups * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / panels, panel = i % panels;
      pack_panel(weight, l, group, panel, const_cast<int8_t*>(l.panel(packed, group, panel)),
                 const_cast<int32_t*>(l.column_sum(packed, group)) + panel * kPanel);
    }
  });
}

void unpack_weight_cpu(const int8_t* packed, const PackedLayout& l, int8_t* weight) {
  if (l.depthwise) {
    for (int64_t c = 0; c < l.groups; ++c)
      for (int64_t t = 0; t < l.taps; ++t)
        weight[c * l.taps + t] = packed[l.panels_offset + l.depthwise_place(c, t / l.s, t % l.s)];
    return;
  }
  for (int64_t group = 0; group < l.groups; ++group)
    for (int64_t j = 0; j < l.n; ++j) {
      const int64_t panel = j / kPanel, row = l.width(panel) * kQuad;
      const int8_t* column = l.panel(packed, group, panel) + j % kPanel * kQuad;
      for (int64_t t = 0; t < l.taps; ++t)
        for (int64_t k = 0; k < l.k; ++k) {
          const int64_t to = source(l, group, j, t, k);
          if (to >= 0) weight[to] = column[(t * l.quads + k / kQuad) * row + k % kQuad];
        }
    }
}

bool is_packed_for(const int8_t* packed, int64_t bytes, const PackedLayout& l) {
  const Header header = header_of(l);
  return bytes == l.bytes && reinterpret_cast<uintptr_t>(packed) % 4 == 0 && std::memcmp(packed, &header, sizeof(header)) == 0;
}

}  // namespace quant_ops

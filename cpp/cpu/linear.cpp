// int8_linear and int8_gemm on the CPU: start reading here.
//
//   y[m,n] = fma(float(sum_k a[m,k] b[n,k] - z[m] sum_k b[n,k]), scale_a[m] * scale_b[n], bias[n])
//
// Rows of x are quantized into a bounded scratch, then 6 x 64 tiles are multiplied, corrected, scaled and stored from registers.
// Blocking, threads and edges live here; the inner loops are the table's (kernels/table.h); the weight layout is pack.h's.
#include "cpu/activations.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/parallel.h"

namespace quant_ops {
namespace {

// Codes of one pass over the rows: bounds the scratch, whatever M is.
constexpr int64_t kPassBytes = int64_t{8} << 20;
// Rows multiplied against one weight panel before the next panel is fetched: with the panel (64 K bytes) they stay in the L2 cache.
constexpr int64_t kBlockBytes = int64_t{256} << 10;
// Multiply-accumulates worth a thread of their own; below, a fork costs more than it brings.
constexpr int64_t kMacsPerTask = int64_t{1} << 20;

struct Split {
  int64_t rows, panels;  // parts of each; their product is the number of workers
};

// At most `workers` parts with the least work for the busiest, in tiles; more parts of panels where that is equal, since every part
// reads its panels once.
Split split_work(int64_t tiles, int64_t panels, int64_t workers) {
  Split best{1, 1};
  int64_t least = tiles * panels;
  for (int64_t parts = 1; parts <= std::min(workers, panels); ++parts) {
    const int64_t row_parts = std::min(workers / parts, tiles);
    const int64_t busiest = ceil_div(panels, parts) * ceil_div(tiles, row_parts);
    if (busiest <= least) {
      best = {row_parts, parts};
      least = busiest;
    }
  }
  return best;
}

}  // namespace

RowCodes row_codes(const InputParams& in, int64_t i, const Range& range) {
  if (is_dynamic(in)) {
    const bool asymmetric = in.mode == Activation::kDynamicAsymmetric, finite = range.abs_bits < 0x7f800000u;
    const float absmax = bits_float(range.abs_bits);
    const auto p = asymmetric ? choose_qparams_of(range.min, range.max, finite, -128, 127, true)
                              : choose_qparams_of(-absmax, absmax, finite, -127, 127, false);
    return {p.scale, p.zero_point + kSignedOffset};
  }
  const int32_t offset = in.dtype == DType::kUInt8 ? 0 : kSignedOffset;
  return {in.scale ? in.scale[i * in.scale_stride] : 1.0f, offset + (in.zero_point ? in.zero_point[i * in.zero_point_stride] : 0)};
}

void write_codes(const KernelTable& table, const InputParams& in, int64_t offset, int64_t n, const RowCodes& row, uint8_t* codes) {
  if (in.dtype == DType::kUInt8) {
    std::memcpy(codes, static_cast<const uint8_t*>(in.x) + offset, static_cast<size_t>(n));
  } else if (in.dtype == DType::kInt8) {
    const int8_t* x = static_cast<const int8_t*>(in.x) + offset;
    for (int64_t k = 0; k < n; ++k) codes[k] = static_cast<uint8_t>(x[k]) ^ 0x80u;
  } else {
    // symmetric codes need no clamp to [1, 255]: |x| <= absmax, so none is 0
    table.codes(static_cast<const char*>(in.x) + offset * dtype_bytes(in.dtype), in.dtype, n, row.scale, row.zero_point, codes);
  }
}

bool is_bounded(float out_scale, const float* row_scale, int64_t rows, const float* column_scale, const float* bias,
                int64_t columns) {
  const auto largest = [](const float* x, int64_t n) {
    Range range{0.0f, 0.0f, 0};
    kernels().range(x, DType::kFloat32, n, true, &range);
    return double{bits_float(range.abs_bits)};  // NaN, for which nothing is bounded, if there is one
  };
  return out_scale > 0x1p-100f && out_scale < 0x1p100f &&
         0x1p31 * largest(row_scale, rows) * largest(column_scale, columns) + largest(bias, columns) < 0x1p30 * out_scale;
}

Columns::Columns(const OutputParams& out, const PackedLayout& l, Scratch* scratch) {
  const int64_t columns = count_ = l.depthwise ? l.padded_n : l.groups * l.padded_n;
  const bool whole = columns == l.groups * l.n;
  if (whole && out.weight_scale_stride == 1) {
    scale_ = out.weight_scale;
  } else {
    scale_offset_ = scratch->add(columns * 4);
  }
  if (whole && out.bias != nullptr) {
    bias_ = out.bias;
  } else {
    bias_offset_ = scratch->add(columns * 4);
  }
}

void Columns::fill(const OutputParams& out, const PackedLayout& l, const Scratch& scratch) {
  const int64_t groups = l.depthwise ? 1 : l.groups, n = l.depthwise ? l.groups : l.n;
  const auto spread = [&](int64_t offset, const float* from, int64_t stride, float missing) {
    float* to = scratch.at<float>(offset);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t j = 0; j < l.padded_n; ++j) to[g * l.padded_n + j] = j < n && from ? from[(g * n + j) * stride] : missing;
    return to;
  };
  if (scale_offset_ >= 0) scale_ = spread(scale_offset_, out.weight_scale, out.weight_scale_stride, 0.0f);
  if (bias_offset_ >= 0) bias_ = spread(bias_offset_, out.bias, 1, -0.0f);  // adding -0 changes nothing
}

TileOutput Columns::output(const OutputParams& out, const int32_t* column_sum, int64_t column) const {
  TileOutput o;
  o.dtype = out.dtype;
  o.column_sum = column_sum;
  o.column_scale = scale_ + column;
  o.bias = bias_ + column;
  o.floor = out.relu ? 0.0f : -INFINITY;
  o.out_scale = out.out_scale ? *out.out_scale : 1.0f;
  o.out_zero_point = out.out_zero_point ? *out.out_zero_point : 0;
  return o;
}

void int8_linear_cpu(const Int8LinearParams& p) {
  if (p.M == 0 || p.N == 0) return;
  const KernelTable& table = kernels();
  const PackedLayout layout = packed_layout(p.N, p.K, 1, 1, 1);
  const int64_t row_bytes = layout.quads * kQuad;
  const bool in_place = p.K == row_bytes && reads_in_place(table, p.in);
  const int64_t pass_rows = std::min(p.M, std::max(table.gemm_rows, kPassBytes / std::max<int64_t>(row_bytes, 1)));
  const int64_t threads = parallel_threads();

  Scratch scratch;
  Columns columns(p.out, layout, &scratch);
  // A weight that is not packed is read as it is for a few rows; else it is packed panel by panel, each worker into its own, which
  // stays in the cache while all rows use it.
  const bool dot = !in_place && p.packed == nullptr && p.M <= kDotRows && table.dot != nullptr;
  const int64_t panel_bytes = p.packed || dot ? 0 : round_up(kPanel * (row_bytes + int64_t{sizeof(int32_t)}), 64);
  const int64_t panels_at = scratch.add(threads * panel_bytes);
  const int64_t codes_at = scratch.add(in_place ? 0 : pass_rows * row_bytes);
  const int64_t scale_at = scratch.add(pass_rows * 4), zero_at = scratch.add(pass_rows * 4);
  scratch.allocate();
  columns.fill(p.out, layout, scratch);
  uint8_t* const codes = scratch.at<uint8_t>(codes_at);
  const int64_t code_stride = in_place ? p.x_stride : row_bytes;
  float* row_scale = scratch.at<float>(scale_at);
  int32_t* row_zero = scratch.at<int32_t>(zero_at);

  const int64_t element = dtype_bytes(p.in.dtype), panels = layout.panels();
  const int64_t block = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(row_bytes, 1) / table.gemm_rows * table.gemm_rows,
                                            table.gemm_rows, 32 * table.gemm_rows);

  for (int64_t m0 = 0; m0 < p.M; m0 += pass_rows) {
    const int64_t rows = std::min(pass_rows, p.M - m0);

    // rows of x -> unsigned codes, each row read once from memory
    parallel_for(rows, std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(p.K, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int64_t offset = (m0 + m) * p.x_stride;
        Range range{0.0f, 0.0f, 0};
        if (is_dynamic(p.in))
          table.range(static_cast<const char*>(p.in.x) + offset * element, p.in.dtype, p.K, only_magnitude(p.in), &range);
        const RowCodes row = row_codes(p.in, m0 + m, range);
        row_scale[m] = row.scale;
        row_zero[m] = row.zero_point;
        if (in_place) continue;
        uint8_t* out = codes + m * row_bytes;
        write_codes(table, p.in, offset, p.K, row, out);
        std::memset(out + p.K, 0, static_cast<size_t>(row_bytes - p.K));  // meets the zeros of the packed weight
      }
    });

    const bool bounded = columns.bounded(p.out, row_scale, rows);
    const auto output = [&](const int32_t* column_sum, int64_t panel, int64_t m) {
      const int64_t column = panel * kPanel;
      TileOutput out = columns.output(p.out, column_sum, column);
      out.bounded = bounded;
      out.columns = std::min<int64_t>(kPanel, p.N - column);
      out.y = static_cast<char*>(p.out.y) + ((m0 + m) * p.y_stride + column) * dtype_bytes(p.out.dtype);
      out.y_stride = p.y_stride;
      out.row_scale = row_scale + m;
      out.row_zero = row_zero + m;
      out.row_step = 1;
      return out;
    };

    // tiles: every worker has a range of rows and a range of panels, and takes its rows in blocks that fit the cache
    const Split split = split_work(ceil_div(rows, table.gemm_rows), panels, std::min(threads, 1 + rows * p.N * p.K / kMacsPerTask));
    parallel_for(split.rows * split.panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / split.panels, column_range = task % split.panels;
        const int64_t row_from = row * rows / split.rows, row_to = (row + 1) * rows / split.rows;
        const int64_t from = column_range * panels / split.panels, to = (column_range + 1) * panels / split.panels;
        const int64_t blocks = p.packed ? ceil_div(row_to - row_from, block) : 1;
        const int64_t even = round_up(ceil_div(row_to - row_from, blocks), table.gemm_rows);
        for (int64_t first = row_from, last; first < row_to; first = last) {
          last = std::min(first + even, row_to);
          for (int64_t panel = from; panel < to; ++panel) {
            const int64_t column = panel * kPanel, width = layout.width(panel);
            if (dot) {
              const int8_t* b = p.weight + column * p.K;
              table.dot({p.K, codes + first * row_bytes, row_bytes, b, p.K, output(nullptr, panel, first)}, last - first);
              continue;
            }
            GemmTile tile;
            tile.taps = 1;
            tile.quads = layout.quads;
            tile.a = in_place ? static_cast<const uint8_t*>(p.in.x) + m0 * p.x_stride : codes;
            tile.flip = in_place ? flip_of(p.in) : 0;
            const int32_t* column_sum;
            if (p.packed) {
              tile.b = layout.panel(p.packed, 0, panel);
              column_sum = layout.column_sum(p.packed, 0) + column;
            } else {
              int32_t* sums = scratch.at<int32_t>(panels_at + task * panel_bytes);
              int8_t* b = reinterpret_cast<int8_t*>(sums + kPanel);
              pack_panel(p.weight, layout, 0, panel, b, sums);
              tile.b = b;
              column_sum = sums;
            }
            // the next panel is fetched while this one is used, a quarter by each of the first four tiles
            const int8_t* ahead = p.packed && panel + 1 < to ? tile.b + width * row_bytes : tile.b;
            const int64_t quarter = width * row_bytes / kQuad;
            for (int64_t m = first, count; m < last; m += count) {
              count = tile_rows(table, last - m, width <= kSlimColumns);
              int64_t a_offset[kMaxGemmRows];
              for (int64_t r = 0; r < count; ++r) a_offset[r] = (m + r) * code_stride;
              tile.a_offset = a_offset;
              tile.ahead = ahead + std::min<int64_t>((m - first) / table.gemm_rows, 3) * quarter;
              tile.out = output(column_sum, panel, m);
              table.gemm(tile, count, width);
            }
          }
        }
      }
    });
  }
}

}  // namespace quant_ops

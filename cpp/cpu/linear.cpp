// int8_linear and int8_gemm on the CPU: start reading here.
//
//   y[m,n] = fma(float(sum_k a[m,k] b[n,k] - z[m] sum_k b[n,k]), scale_a[m] * scale_b[n], bias[n])
//
// Rows of x are quantized into a bounded scratch, a pass at a time; then tiles are multiplied, corrected, scaled and stored from
// registers. Blocking, threads and edges live here; the inner loops are the table's (kernels/table.h); the weight layout is
// pack.h's.
#include "cpu/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/activations.h"
#include "cpu/parallel.h"
#include "kernels/log.h"

namespace quant_ops {
namespace {

constexpr int64_t kPassBytes = int64_t{8} << 20;           // codes of a pass: bounds the scratch, whatever M is
constexpr int64_t kBlockBytes = int64_t{256} << 10;        // codes of a block of rows: with a panel they stay in the L2 cache
constexpr int64_t kQuantizedPerThread = int64_t{1} << 16;  // elements that are worth a thread

class Linear {
 public:
  Linear(const LinearPlan& plan, const Int8LinearParams& p)
      : plan_(plan),
        p_(p),
        table_(*plan.table),
        scratch_(plan.scratch_bytes),
        columns_(plan.columns, p.out, plan.layout, scratch_),
        codes_(scratch_.at<uint8_t>(plan.codes_at)),
        row_scale_(scratch_.at<float>(plan.scale_at)),
        row_zero_(scratch_.at<int32_t>(plan.zero_at)) {}

  void run() {
    for (pass_first_ = 0; pass_first_ < p_.M; pass_first_ += plan_.pass_rows) {
      pass_rows_ = std::min(plan_.pass_rows, p_.M - pass_first_);
      quantize();
      multiply();
    }
  }

 private:
  // Rows of x -> codes, each row read once from memory.
  void quantize() {
    parallel_for(pass_rows_, std::max<int64_t>(1, kQuantizedPerThread / std::max<int64_t>(p_.K, 1)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t m = begin; m < end; ++m) quantize_row(m);
                 });
    codes_of_result_ = columns_.codes(p_.out, row_scale_, pass_rows_);
    if (plan_.shares)
      shared_ = columns_.share(0, plan_.layout.column_sum(p_.packed, 0), row_scale_[0], row_zero_[0], codes_of_result_, scratch_);
  }

  void quantize_row(int64_t m) const {
    const int64_t offset = (pass_first_ + m) * p_.x_stride;
    Range range = kZeroRange;
    if (is_dynamic(p_.in)) find_range(table_, p_.in, offset, p_.K, &range);
    const QParams<float> qparams = code_qparams(p_.in, pass_first_ + m, range);
    row_scale_[m] = qparams.scale;
    row_zero_[m] = qparams.zero_point;
    if (plan_.in_place) return;
    uint8_t* codes = codes_ + m * plan_.row_bytes;
    write_codes(table_, p_.in, offset, p_.K, qparams, codes);
    std::memset(codes + p_.K, 0, static_cast<size_t>(plan_.row_bytes - p_.K));  // meets the zeros of the packed weight
  }

  void multiply() const {
    const int64_t workers = std::min(plan_.threads, 1 + pass_rows_ * p_.N * p_.K / kMacsPerThread);
    const Shares shares = cut_pass(ceil_div(pass_rows_, table_.gemm_rows), plan_.layout.panels(), workers);
    parallel_for(shares.rows * shares.panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) multiply_share(shares, worker);
    });
  }

  // A worker takes its rows in blocks of even height, which stay in the cache while its panels pass by. A weight that is packed on
  // use is packed once for all rows.
  void multiply_share(const Shares& shares, int64_t worker) const {
    const int64_t row_share = worker / shares.panels, panel_share = worker % shares.panels, panels = plan_.layout.panels();
    const int64_t row_begin = row_share * pass_rows_ / shares.rows, row_end = (row_share + 1) * pass_rows_ / shares.rows;
    const int64_t panel_begin = panel_share * panels / shares.panels, panel_end = (panel_share + 1) * panels / shares.panels;
    const int64_t blocks = plan_.weight == WeightSource::kPacked ? ceil_div(row_end - row_begin, plan_.block_rows) : 1;
    const int64_t block_rows = round_up(ceil_div(row_end - row_begin, blocks), table_.gemm_rows);
    for (int64_t first = row_begin, last; first < row_end; first = last) {
      last = std::min(first + block_rows, row_end);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        if (plan_.weight == WeightSource::kPlain)
          multiply_plain(first, last, panel);
        else
          multiply_panel(first, last, panel, panel + 1 < panel_end, worker);
      }
    }
  }

  void multiply_plain(int64_t first, int64_t last, int64_t panel) const {
    table_.dot({.k = p_.K,
                .a = codes_ + first * plan_.row_bytes,
                .a_stride = plan_.row_bytes,
                .b = p_.weight + panel * kPanel * p_.K,
                .b_stride = p_.K,
                .out = output(nullptr, panel, first)},
               last - first);
  }

  // `more`: the worker multiplies by the next panel afterwards.
  void multiply_panel(int64_t first, int64_t last, int64_t panel, bool more, int64_t worker) const {
    const int64_t width = plan_.layout.width(panel), panel_bytes = width * plan_.row_bytes;
    GemmTile tile;
    tile.taps = 1;
    tile.quads = plan_.layout.quads;
    tile.flip = plan_.in_place ? flip_of(p_.in) : 0;
    tile.a = plan_.in_place ? static_cast<const uint8_t*>(p_.in.x) + pass_first_ * p_.x_stride : codes_;
    const int32_t* column_sum;
    if (plan_.weight == WeightSource::kPacked) {
      tile.b = plan_.layout.panel(p_.packed, 0, panel);
      column_sum = plan_.layout.column_sum(p_.packed, 0) + panel * kPanel;
    } else {
      int32_t* sums = scratch_.at<int32_t>(plan_.panels_at + worker * plan_.panel_bytes);
      int8_t* b = reinterpret_cast<int8_t*>(sums + kPanel);
      pack_panel(p_.weight, plan_.layout, 0, panel, b, sums);
      tile.b = b;
      column_sum = sums;
    }
    // the next panel is fetched while this one is used, a quarter by each of the first four tiles
    const int8_t* ahead = plan_.weight == WeightSource::kPacked && more ? tile.b + panel_bytes : tile.b;
    for (int64_t m = first, count; m < last; m += count) {
      count = call_rows(table_, last - m, width <= kSlimColumns);
      int64_t a_offset[kMaxCallRows];
      for (int64_t r = 0; r < count; ++r) a_offset[r] = (m + r) * plan_.code_stride;
      tile.a_offset = a_offset;
      const int64_t tiles = (m - first) / table_.gemm_rows;
      tile.ahead = tiles < 4 ? ahead + tiles * (panel_bytes / 4) : tile.b;
      tile.out = output(column_sum, panel, m);
      table_.gemm(tile, count, width);
    }
  }

  // The epilogue of a tile of this panel from row m of the pass on.
  TileOutput output(const int32_t* column_sum, int64_t panel, int64_t m) const {
    const int64_t column = panel * kPanel;
    TileOutput out = columns_.output(p_.out, column_sum, column);
    out.codes = codes_of_result_;
    out.columns = std::min<int64_t>(kPanel, p_.N - column);
    const int64_t offset = (pass_first_ + m) * p_.y_stride + column;
    out.y = static_cast<char*>(p_.out.y) + offset * dtype_bytes(p_.out.dtype);
    out.y_stride = p_.y_stride;
    if (p_.out.residual.r != nullptr) set_residual(p_.out, p_.out.residual.r, offset, p_.y_stride, &out);
    if (plan_.shares) shared_.give(column, &out);
    out.row_scale = row_scale_ + m * plan_.row_step;
    out.row_zero = row_zero_ + m * plan_.row_step;
    out.row_step = plan_.row_step;
    return out;
  }

  const LinearPlan& plan_;
  const Int8LinearParams& p_;
  const KernelTable& table_;
  const Scratch scratch_;
  const Columns columns_;
  uint8_t* const codes_;
  float* const row_scale_;
  int32_t* const row_zero_;
  int64_t pass_first_ = 0, pass_rows_ = 0;
  CodeOutput codes_of_result_;
  SharedColumns shared_{};
};

}  // namespace

LinearPlan plan_linear(const Int8LinearParams& p, const KernelTable& table, int64_t threads) {
  LinearPlan plan;
  plan.table = &table;
  plan.threads = threads;
  plan.layout = packed_layout(p.N, p.K, 1, 1, 1);
  plan.row_bytes = plan.layout.quads * kQuad;
  plan.in_place = p.K == plan.row_bytes && reads_in_place(table, p.in);
  plan.code_stride = plan.in_place ? p.x_stride : plan.row_bytes;
  plan.weight = p.packed != nullptr                                         ? WeightSource::kPacked
                : !plan.in_place && p.M <= kDotRows && table.dot != nullptr ? WeightSource::kPlain
                                                                            : WeightSource::kPackedOnUse;
  const int64_t row_bytes = std::max<int64_t>(plan.row_bytes, 1), tile = table.gemm_rows;
  plan.row_step = is_dynamic(p.in) || p.in.scale_stride != 0 || p.in.zero_point_stride != 0 ? 1 : 0;
  plan.shares = plan.row_step == 0 && plan.weight == WeightSource::kPacked && p.M > tile;
  plan.pass_rows = std::min(p.M, std::max(tile, kPassBytes / row_bytes));
  plan.block_rows = std::clamp<int64_t>(kBlockBytes / row_bytes / tile * tile, tile, 32 * tile);

  ScratchLayout scratch;
  plan.columns = plan_columns(p.out, plan.layout, p.M, plan.shares ? 1 : 0, &scratch);
  plan.panel_bytes =
      plan.weight == WeightSource::kPackedOnUse ? round_up(kPanel * (plan.row_bytes + int64_t{sizeof(int32_t)}), 64) : 0;
  plan.panels_at = scratch.add(threads * plan.panel_bytes);
  plan.codes_at = scratch.add(plan.in_place ? 0 : plan.pass_rows * plan.row_bytes);
  plan.scale_at = scratch.add(plan.pass_rows * int64_t{sizeof(float)});
  plan.zero_at = scratch.add(plan.pass_rows * int64_t{sizeof(int32_t)});
  plan.scratch_bytes = scratch.bytes;
  return plan;
}

void run_linear(const LinearPlan& plan, const Int8LinearParams& p) { Linear(plan, p).run(); }

void int8_linear_cpu(const Int8LinearParams& p) {
  if (p.M == 0 || p.N == 0) return;
  const LinearPlan plan = plan_linear(p, kernels(), parallel_threads());
  if (plan.weight == WeightSource::kPlain)
    log_entries({"dot"});
  else
    log_kernel([&] { return first_tile_name(*plan.table, p.M, plan.layout.width(0)); });
  run_linear(plan, p);
}

}  // namespace quant_ops

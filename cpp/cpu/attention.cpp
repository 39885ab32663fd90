// int8_attention on the CPU: AttentionParams in ops.h has the arithmetic.
//
// A unit is one head of k and v in one sample. Its k and v become packed weights (pack.h), of S columns of D and of DV columns of
// S. Then a block of rows of q becomes codes, is multiplied by k to scores in scratch, the softmax turns these into codes, and the
// product of those with v is the result. A pass is the units whose packed weights are in scratch at one time: one with a single
// thread, so that they stay in the cache; with several threads enough for all of them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/activations.h"
#include "cpu/columns.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/staging.h"
#include "kernels/log.h"

namespace quant_ops {
namespace {

constexpr int64_t kScoreBytes = int64_t{16} << 10;  // scores of a block of rows: in the L1 cache, beside a panel
constexpr int64_t kPassBytes = int64_t{8} << 20;    // packed weights of a pass of several threads
constexpr int32_t kTopCode = 255;                   // of a probability

// What differs between the two products of a block.
struct Product {
  const uint8_t* codes;  // [rows][row_bytes]
  int64_t row_bytes;
  const int8_t* packed;
  const PackedLayout* layout;
  const float* column_scale;  // [padded_n], as is the next one
  const float* bias;
  const int32_t* row_zero;
  const float* row_scale;
  int64_t quads;    // of the rows' codes that are multiplied
  int64_t columns;  // that are computed
  void* y;
  int64_t y_stride;
  DType dtype;
};

// The offsets of a unit's data, and of a worker's, in scratch.
struct AttentionPlan {
  const KernelTable* table;
  int64_t threads;
  PackedLayout k, v;     // of k as a weight [S, D], of v as a weight [DV, S]
  int64_t score_stride;  // elements between rows of scores, and between rows of their codes
  int64_t block_rows;    // of q
  int64_t pass_units;
  int64_t units_at, unit_bytes;
  int64_t k_packed, k_scale, k_bias, v_packed, v_scale, v_mean;  // in a unit
  int64_t workers_at, worker_bytes;
  // In a worker. To pack: numbers of rows or columns, a panel's rows as floats and codes. To multiply: codes, scores.
  int64_t mean, reciprocal, least, most, magnitude, centered, panel;
  int64_t q_codes, q_magnitude, q_scale, q_reciprocal, q_zero, scores, p_codes, p_scale, p_zero, mask;
  int64_t scratch_bytes;
};

AttentionPlan plan_attention(const AttentionParams& p, const KernelTable& table, int64_t threads) {
  constexpr int64_t kFloat = sizeof(float);
  AttentionPlan plan;
  plan.table = &table;
  plan.threads = threads;
  plan.k = packed_layout(p.S, p.D, 1, 1, 1);
  plan.v = packed_layout(p.DV, p.S, 1, 1, 1);
  plan.score_stride = round_up(p.S, kSumLanes);
  const int64_t tile = table.gemm_rows;
  plan.block_rows = std::min(p.L, std::max(tile, kScoreBytes / (plan.score_stride * kFloat) / tile * tile));

  ScratchLayout unit;
  plan.k_packed = unit.add(plan.k.bytes);
  plan.k_scale = unit.add(plan.k.padded_n * kFloat);
  plan.k_bias = unit.add(plan.k.padded_n * kFloat);
  plan.v_packed = unit.add(plan.v.bytes);
  plan.v_scale = unit.add(plan.v.padded_n * kFloat);
  plan.v_mean = unit.add(plan.v.padded_n * kFloat);
  plan.unit_bytes = unit.bytes;
  const int64_t units = p.batch * p.kv_heads;
  plan.pass_units = threads == 1 ? 1 : std::min(units, std::max(threads, kPassBytes / plan.unit_bytes));

  ScratchLayout packing, multiplying;
  const int64_t columns = std::max<int64_t>({kPanel, p.D, p.DV}) * kFloat;
  plan.mean = packing.add(columns);
  plan.reciprocal = packing.add(columns);
  plan.least = packing.add(columns);
  plan.most = packing.add(columns);
  plan.magnitude = packing.add(columns);
  plan.centered = packing.add(kPanel * std::max(p.D, p.DV) * kFloat);
  plan.panel = packing.add(kPanel * std::max(p.D, plan.v.padded_n));
  plan.q_codes = multiplying.add(plan.block_rows * plan.k.quads * kQuad);
  plan.q_magnitude = multiplying.add(plan.block_rows * int64_t{sizeof(uint32_t)});
  plan.q_scale = multiplying.add(plan.block_rows * kFloat);
  plan.q_reciprocal = multiplying.add(plan.block_rows * kFloat);
  plan.q_zero = multiplying.add(plan.block_rows * kFloat);
  plan.scores = multiplying.add(plan.block_rows * plan.score_stride * kFloat);
  plan.p_codes = multiplying.add(plan.block_rows * plan.score_stride);
  plan.p_scale = multiplying.add(plan.block_rows * kFloat);
  plan.p_zero = multiplying.add(plan.block_rows * kFloat);
  plan.mask = multiplying.add(p.S * kFloat);
  plan.worker_bytes = std::max(packing.bytes, multiplying.bytes);

  ScratchLayout scratch;
  plan.units_at = scratch.add(plan.pass_units * plan.unit_bytes);
  plan.workers_at = scratch.add(threads * plan.worker_bytes);
  plan.scratch_bytes = scratch.bytes;
  return plan;
}

// Rows of q, or of k or v of a unit.
struct Matrix {
  const void* x;
  DType dtype;
  int64_t rows, columns, stride;
};

// Rows [first, first + rows) less the means, without gaps, and their largest magnitudes; without means the magnitudes alone.
void center(const KernelTable& table, const Matrix& m, int64_t first, int64_t rows, const float* mean, float* centered,
            uint32_t* magnitude) {
  table.center({.x = element(m.x, m.dtype, first * m.stride),
                .dtype = m.dtype,
                .rows = rows,
                .columns = m.columns,
                .x_row = m.stride,
                .less = mean,
                .y = centered,
                .abs_bits = magnitude});
}

// Sums of columns in the order of the rows, over their number.
void column_means(const KernelTable& table, const Matrix& m, float* mean) {
  table.column_sums({.x = m.x, .dtype = m.dtype, .rows = m.rows, .columns = m.columns, .x_row = m.stride, .sums = mean});
  const float count = static_cast<float>(m.rows);
  for (int64_t d = 0; d < m.columns; ++d) mean[d] = mean[d] / count;
}

// The scales of rows' symmetric codes, and their reciprocals.
void row_scales(const uint32_t* magnitude, int64_t rows, float* scale, float* reciprocal) {
  for (int64_t r = 0; r < rows; ++r) {
    scale[r] = dynamic_qparams({.min = 0.0f, .max = 0.0f, .abs_bits = magnitude[r]}, false).scale;
    reciprocal[r] = reciprocal_of(scale[r]);
  }
}

class Attention {
 public:
  Attention(const AttentionPlan& plan, const AttentionParams& p)
      : plan_(plan), p_(p), table_(*plan.table), scratch_(plan.scratch_bytes) {}

  void run() {
    const int64_t units = p_.batch * p_.kv_heads, heads = p_.heads / p_.kv_heads, blocks = ceil_div(p_.L, plan_.block_rows);
    for (pass_first_ = 0; pass_first_ < units; pass_first_ += plan_.pass_units) {
      const int64_t count = std::min(plan_.pass_units, units - pass_first_), tasks = count * heads * blocks;
      const int64_t packed = p_.S * (p_.D + p_.DV);
      for_each_share(count, plan_.threads, count * packed * 16, kMacsPerThread, [&](int64_t worker, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) pack_unit(i, worker);
      });
      for_each_share(tasks, plan_.threads, count * heads * p_.L * packed, kMacsPerThread,
                     [&](int64_t worker, int64_t begin, int64_t end) {
                       for (int64_t task = begin; task < end; ++task)
                         attend(task / blocks / heads, task / blocks % heads, task % blocks * plan_.block_rows, worker);
                     });
    }
  }

 private:
  template <class T>
  T* of_unit(int64_t unit, int64_t at) const {
    return scratch_.at<T>(plan_.units_at + unit * plan_.unit_bytes + at);
  }
  template <class T>
  T* of_worker(int64_t worker, int64_t at) const {
    return scratch_.at<T>(plan_.workers_at + worker * plan_.worker_bytes + at);
  }

  Matrix matrix(const void* x, const int64_t* stride, int64_t unit, int64_t rows, int64_t columns) const {
    const int64_t i = pass_first_ + unit, at = i / p_.kv_heads * stride[0] + i % p_.kv_heads * stride[1];
    return {.x = element(x, p_.dtype, at), .dtype = p_.dtype, .rows = rows, .columns = columns, .stride = stride[2]};
  }

  void pack_unit(int64_t unit, int64_t worker) const {
    pack_k(unit, worker);
    pack_v(unit, worker);
  }

  // k less its means as int8 rows, which are the columns of a packed weight.
  void pack_k(int64_t unit, int64_t worker) const {
    const Matrix k = matrix(p_.k, p_.k_stride, unit, p_.S, p_.D);
    float *mean = of_worker<float>(worker, plan_.mean), *centered = of_worker<float>(worker, plan_.centered);
    float* reciprocal = of_worker<float>(worker, plan_.reciprocal);
    uint32_t* magnitude = of_worker<uint32_t>(worker, plan_.magnitude);
    int8_t *codes = of_worker<int8_t>(worker, plan_.panel), *packed = of_unit<int8_t>(unit, plan_.k_packed);
    float *scale = of_unit<float>(unit, plan_.k_scale), *bias = of_unit<float>(unit, plan_.k_bias);
    std::fill_n(bias, plan_.k.padded_n, -0.0f);  // adding -0 changes nothing
    std::fill_n(scale, plan_.k.padded_n, 0.0f);
    column_means(table_, k, mean);
    for (int64_t panel = 0; panel < plan_.k.panels(); ++panel) {
      const int64_t first = panel * kPanel, columns = std::min<int64_t>(kPanel, p_.S - first);
      center(table_, k, first, columns, mean, centered, magnitude);
      row_scales(magnitude, columns, scale + first, reciprocal);
      quantize({.x = centered, .dtype = DType::kFloat32, .rows = columns, .columns = p_.D, .stride = p_.D}, kRows, scale + first,
               reciprocal, codes, p_.D);
      table_.pack({.weight = codes,
                   .column_step = p_.D,
                   .columns = columns,
                   .width = plan_.k.width(panel),
                   .k = p_.D,
                   .packed = packed + plan_.k.panel_offset(0, panel),
                   .column_sum = reinterpret_cast<int32_t*>(packed + plan_.k.column_sum_offset(0)) + first});
    }
  }

  // v less its means as int8 columns. Four of its rows are a quad of every column.
  void pack_v(int64_t unit, int64_t worker) const {
    const Matrix v = matrix(p_.v, p_.v_stride, unit, p_.S, p_.DV);
    const int64_t padded = plan_.v.padded_n;
    float *centered = of_worker<float>(worker, plan_.centered), *reciprocal = of_worker<float>(worker, plan_.reciprocal);
    float *mean = of_unit<float>(unit, plan_.v_mean), *scale = of_unit<float>(unit, plan_.v_scale);
    int8_t *codes = of_worker<int8_t>(worker, plan_.panel), *packed = of_unit<int8_t>(unit, plan_.v_packed);
    std::fill_n(mean, padded, 0.0f);
    std::fill_n(scale, padded, 0.0f);
    column_means(table_, v, mean);
    column_scales(v, worker, mean, scale);
    for (int64_t d = 0; d < p_.DV; ++d) reciprocal[d] = reciprocal_of(scale[d]);
    std::memset(packed, 0, static_cast<size_t>(plan_.v.panels_offset));  // no code of p has a zero point: the sums are not needed
    std::memset(codes, 0, static_cast<size_t>(kPanel * padded));
    for (int64_t first = 0; first < p_.S; first += kPanel) {
      const int64_t rows = std::min<int64_t>(kPanel, p_.S - first), quads = ceil_div(rows, kQuad);
      center(table_, v, first, rows, mean, centered, of_worker<uint32_t>(worker, plan_.magnitude));
      quantize({.x = centered, .dtype = DType::kFloat32, .rows = rows, .columns = p_.DV, .stride = p_.DV}, kColumns, scale,
               reciprocal, codes, padded);
      for (int64_t r = rows; r < quads * kQuad; ++r) std::memset(codes + r * padded, 0, static_cast<size_t>(padded));
      for (int64_t quad = 0; quad < quads; ++quad)
        for (int64_t panel = 0; panel < plan_.v.panels(); ++panel) {
          const int64_t width = plan_.v.width(panel);
          interleave(codes + quad * kQuad * padded + panel * kPanel, padded, width,
                     packed + plan_.v.panel_offset(0, panel) + (first / kQuad + quad) * width * kQuad);
        }
    }
  }

  // Four rows to quads of bytes.
  static void interleave(const int8_t* from, int64_t stride, int64_t width, int8_t* to) {
    const uint8_t* x = reinterpret_cast<const uint8_t*>(from);
    for (int64_t d = 0; d < width; ++d) {
      const uint32_t quad =
          x[d] | uint32_t{x[stride + d]} << 8 | uint32_t{x[2 * stride + d]} << 16 | uint32_t{x[3 * stride + d]} << 24;
      std::memcpy(to + d * kQuad, &quad, kQuad);
    }
  }

  // Rounding is monotone, so the largest |v - mean| of a column is that of its least or largest v.
  void column_scales(const Matrix& v, int64_t worker, const float* mean, float* scale) const {
    float *least = of_worker<float>(worker, plan_.least), *most = of_worker<float>(worker, plan_.most);
    uint32_t* magnitude = of_worker<uint32_t>(worker, plan_.magnitude);
    std::fill_n(least, p_.DV, INFINITY);
    std::fill_n(most, p_.DV, -INFINITY);
    std::fill_n(magnitude, p_.DV, 0u);
    table_.range_columns({.x = v.x,
                          .dtype = v.dtype,
                          .rows = v.rows,
                          .columns = v.columns,
                          .x_row = v.stride,
                          .min = least,
                          .max = most,
                          .abs_bits = magnitude});
    for (int64_t d = 0; d < p_.DV; ++d) {
      const float above = most[d] - mean[d], below = mean[d] - least[d], absmax = std::max(above, below);
      const bool finite = magnitude[d] < 0x7f800000u && absmax < INFINITY;  // NaN is not
      scale[d] = choose_qparams_of(-absmax, absmax, finite, -127, 127, false).scale;
    }
  }

  enum ScaleOf { kRows, kColumns };

  // Rows to symmetric codes, with a scale for each row or for each column: int8, or uint8 with kSignedOffset added.
  template <class Code>
  void quantize(const Matrix& m, ScaleOf scale_of, const float* scale, const float* reciprocal, Code* codes,
                int64_t code_stride) const {
    static constexpr bool kUnsigned = std::is_same_v<Code, uint8_t>;
    static constexpr int32_t kZero = kUnsigned ? kSignedOffset : 0;
    QuantizeRun run;
    run.n = m.columns;
    run.rows = m.rows;
    run.from_row = m.stride;
    run.to_row = code_stride;
    run.scale = scale;
    run.scale_step = scale_of == kColumns;
    run.scale_row = scale_of == kRows;
    run.zero_point = &kZero;
    run.zero_step = 0;
    run.x = m.x;
    run.y = codes;
    run.reciprocal = reciprocal;
    run.tie = tie_for(127);
    run.qmin = kZero - 127;
    run.qmax = kZero + 127;
    run.x_dtype = m.dtype;
    run.y_dtype = kUnsigned ? DType::kUInt8 : DType::kInt8;
    run.simulate = false;
    table_.quantize(run);
  }

  // Rows of q from `first` on, of a head of those that read the unit.
  void attend(int64_t unit, int64_t head_of_unit, int64_t first, int64_t worker) const {
    const int64_t i = pass_first_ + unit, batch = i / p_.kv_heads;
    const int64_t head = i % p_.kv_heads * (p_.heads / p_.kv_heads) + head_of_unit;
    const int64_t rows = std::min(plan_.block_rows, p_.L - first);
    const int64_t keys = p_.causal ? std::min(p_.S, first + rows) : p_.S;  // that the last row sees
    float* scores = of_worker<float>(worker, plan_.scores);
    int32_t *q_zero = of_worker<int32_t>(worker, plan_.q_zero), *p_zero = of_worker<int32_t>(worker, plan_.p_zero);
    std::fill_n(q_zero, rows, kSignedOffset);
    std::fill_n(p_zero, rows, 0);
    quantize_q(batch, head, first, rows, worker);
    multiply({.codes = of_worker<uint8_t>(worker, plan_.q_codes),
              .row_bytes = plan_.k.quads * kQuad,
              .packed = of_unit<int8_t>(unit, plan_.k_packed),
              .layout = &plan_.k,
              .column_scale = of_unit<float>(unit, plan_.k_scale),
              .bias = of_unit<float>(unit, plan_.k_bias),
              .row_zero = q_zero,
              .row_scale = of_worker<float>(worker, plan_.q_scale),
              .quads = plan_.k.quads,
              .columns = keys,
              .y = scores,
              .y_stride = plan_.score_stride,
              .dtype = DType::kFloat32},
             rows);
    softmax(batch, head, first, rows, keys, worker);
    void* y = element(p_.y, p_.dtype, batch * p_.y_stride[0] + head * p_.y_stride[1] + first * p_.y_stride[2]);
    const float* p_scale = of_worker<float>(worker, plan_.p_scale);
    multiply({.codes = of_worker<uint8_t>(worker, plan_.p_codes),
              .row_bytes = plan_.score_stride,
              .packed = of_unit<int8_t>(unit, plan_.v_packed),
              .layout = &plan_.v,
              .column_scale = of_unit<float>(unit, plan_.v_scale),
              .bias = of_unit<float>(unit, plan_.v_mean),
              .row_zero = p_zero,
              .row_scale = p_scale,
              .quads = ceil_div(keys, kQuad),
              .columns = p_.DV,
              .y = y,
              .y_stride = p_.y_stride[2],
              .dtype = p_.dtype},
             rows);
    for (int64_t r = 0; r < rows; ++r)
      if (p_scale[r] == 0.0f)
        std::memset(element(y, p_.dtype, r * p_.y_stride[2]), 0, static_cast<size_t>(p_.DV * dtype_bytes(p_.dtype)));
  }

  void quantize_q(int64_t batch, int64_t head, int64_t first, int64_t rows, int64_t worker) const {
    const int64_t row_bytes = plan_.k.quads * kQuad, stride = p_.q_stride[2];
    const void* x = element(p_.q, p_.dtype, batch * p_.q_stride[0] + head * p_.q_stride[1] + first * stride);
    uint8_t* codes = of_worker<uint8_t>(worker, plan_.q_codes);
    float *scale = of_worker<float>(worker, plan_.q_scale), *reciprocal = of_worker<float>(worker, plan_.q_reciprocal);
    uint32_t* magnitude = of_worker<uint32_t>(worker, plan_.q_magnitude);
    const Matrix q{.x = x, .dtype = p_.dtype, .rows = rows, .columns = p_.D, .stride = stride};
    center(table_, q, 0, rows, nullptr, nullptr, magnitude);
    row_scales(magnitude, rows, scale, reciprocal);
    quantize(q, kRows, scale, reciprocal, codes, row_bytes);
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(codes + r * row_bytes + p_.D, 0, static_cast<size_t>(row_bytes - p_.D));  // meets zeros of k
      scale[r] = scale[r] * p_.scale;
    }
  }

  // Scores to codes, and to the factor of the rows of the second product.
  void softmax(int64_t batch, int64_t head, int64_t first, int64_t rows, int64_t keys, int64_t worker) const {
    uint8_t* codes = of_worker<uint8_t>(worker, plan_.p_codes);
    float *scores = of_worker<float>(worker, plan_.scores), *scale = of_worker<float>(worker, plan_.p_scale);
    const float* mask = nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      if (p_.mask != nullptr && (r == 0 || p_.mask_stride[2] != 0)) mask = mask_row(batch, head, first + r, worker);
      const int64_t n = p_.causal ? std::min(keys, first + r + 1) : keys;
      uint8_t* row = codes + r * plan_.score_stride;
      const float sum = table_.softmax({.scores = scores + r * plan_.score_stride, .mask = mask, .n = n, .codes = row});
      const int64_t end = round_up(n, kSumLanes), wanted = round_up(keys, kQuad);
      if (wanted > end) std::memset(row + end, 0, static_cast<size_t>(wanted - end));
      scale[r] = sum == 0.0f ? 0.0f : 1.0f / (static_cast<float>(kTopCode) * sum);
    }
  }

  // A row of the mask as what is added to the scores.
  const float* mask_row(int64_t batch, int64_t head, int64_t row, int64_t worker) const {
    const int64_t* stride = p_.mask_stride;
    const void* from = element(p_.mask, p_.mask_dtype, batch * stride[0] + head * stride[1] + row * stride[2]);
    if (p_.mask_dtype == DType::kFloat32 && stride[3] == 1) return static_cast<const float*>(from);
    float* to = of_worker<float>(worker, plan_.mask);
    if (p_.mask_dtype == DType::kUInt8) {
      const uint8_t* attend = static_cast<const uint8_t*>(from);
      for (int64_t s = 0; s < p_.S; ++s) to[s] = attend[s * stride[3]] != 0 ? 0.0f : -INFINITY;
    } else if (p_.mask_dtype == DType::kFloat32) {
      gather(static_cast<const float*>(from), stride[3], p_.S, to);
    } else if (stride[3] == 1) {
      table_.widen(from, p_.mask_dtype, p_.S, to);
    } else {
      for (int64_t s = 0; s < p_.S; ++s) table_.widen(element(from, p_.mask_dtype, s * stride[3]), p_.mask_dtype, 1, to + s);
    }
    return to;
  }

  void multiply(const Product& a, int64_t rows) const {
    const PackedLayout& layout = *a.layout;
    const int32_t* column_sum = layout.column_sum(a.packed, 0);
    for (int64_t panel = 0; panel * kPanel < a.columns; ++panel) {
      const int64_t column = panel * kPanel, width = layout.width(panel);
      GemmTile tile;
      tile.taps = 1;
      tile.quads = a.quads;
      tile.a = a.codes;
      tile.b = tile.ahead = layout.panel(a.packed, 0, panel);
      tile.out.y_stride = a.y_stride;
      tile.out.dtype = a.dtype;
      tile.out.columns = std::min<int64_t>(kPanel, a.columns - column);
      tile.out.column_sum = column_sum + column;
      tile.out.column_scale = a.column_scale + column;
      tile.out.bias = a.bias + column;
      tile.out.row_step = 1;
      tile.out.floor = -INFINITY;
      for (int64_t m = 0, count; m < rows; m += count) {
        count = tile_rows(table_, rows - m, width <= kSlimColumns);
        int64_t offset[kMaxGemmRows];
        for (int64_t r = 0; r < count; ++r) offset[r] = (m + r) * a.row_bytes;
        tile.a_offset = offset;
        tile.out.y = element(a.y, a.dtype, m * a.y_stride + column);
        tile.out.row_zero = a.row_zero + m;
        tile.out.row_scale = a.row_scale + m;
        table_.gemm(tile, count, width);
      }
    }
  }

  const AttentionPlan& plan_;
  const AttentionParams& p_;
  const KernelTable& table_;
  const Scratch scratch_;
  int64_t pass_first_ = 0;
};

// The result without keys.
void clear(const AttentionParams& p) {
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t l = 0; l < p.L; ++l)
        std::memset(element(p.y, p.dtype, b * p.y_stride[0] + h * p.y_stride[1] + l * p.y_stride[2]), 0,
                    static_cast<size_t>(p.DV * dtype_bytes(p.dtype)));
}

}  // namespace

void int8_attention_cpu(const AttentionParams& p) {
  if (p.batch == 0 || p.heads == 0 || p.L == 0 || p.DV == 0) return;
  if (p.S == 0) return clear(p);
  const AttentionPlan plan = plan_attention(p, kernels(), parallel_threads());
  log_kernel([&] {
    return first_tile_name(*plan.table, std::min(plan.block_rows, p.L), plan.k.width(0)) + ", " + std::string(plan.table->vectors) +
           "::softmax";
  });
  Attention(plan, p).run();
}

}  // namespace quant_ops

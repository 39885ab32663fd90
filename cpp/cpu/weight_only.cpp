// weight_only_linear on the CPU (the formula is in ops.h) and its packed weight. Rows of x become codes, or floats, in a bounded
// scratch, a pass at a time. Then, by what the weight and x are:
//   4 bits, codes   KernelTable::nibbles multiplies 16 columns and folds the groups in registers
//   8 bits, codes   KernelTable::gemm multiplies a group of a panel, KernelTable::fold adds it to the result
//   floats          KernelTable::few_rows reads the packed weight; for more rows KernelTable::expand dequantizes a chunk of k of 16
//                   columns, once for a block of rows
#include "cpu/weight_only.h"

#include <algorithm>
#include <cstring>

#include "cpu/activations.h"
#include "cpu/columns.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"
#include "kernels/log.h"

namespace quant_ops {

// ---- the packed weight ------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kOctet = 8;         // k of the byte pairs of four bits
constexpr int32_t kNibbleOffset = 8;  // of a code

// The byte of four bits that holds element k of a column, from the start of its block of 16 columns; element k is in its high half
// if k % 8 >= 4.
int64_t nibble_place(int64_t column, int64_t k) {
  return (k / kOctet * kNibbleColumns + column % kNibbleColumns) * kQuad + k % kQuad;
}

void pack_nibbles(const int8_t* weight, const WeightOnlyLayout& l, int64_t column, int8_t* block, int32_t* sums) {
  const int8_t* w = weight + column * l.k;
  for (int64_t g = 0; g < l.groups; ++g) {
    int32_t sum = 0;
    for (int64_t k = g * l.group; k < l.group_end(g); ++k) {
      const int32_t code = w[k] + kNibbleOffset;
      sum += code;
      int8_t& to = block[nibble_place(column, k)];
      to = static_cast<int8_t>(to | (k % kOctet < kQuad ? code : code << 4));
    }
    sums[sum_place(4, l.groups, l.padded_n, g, column)] = sum;
  }
}

}  // namespace

void pack_weight_only_cpu(const int8_t* weight, const WeightOnlyLayout& l, int8_t* packed) {
  std::memset(packed, 0, static_cast<size_t>(l.codes_offset));
  const WeightOnlyHeader header = header_of(l);
  std::memcpy(packed, &header, sizeof(header));
  int32_t* sums = reinterpret_cast<int32_t*>(packed + l.kSumsOffset);
  if (l.bits == 4) {
    parallel_for(l.padded_n / kNibbleColumns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kNibbleColumns; first < end * kNibbleColumns; first += kNibbleColumns) {
        int8_t* block = packed + l.codes_offset + first * l.column_bytes;
        std::memset(block, 0, static_cast<size_t>(kNibbleColumns * l.column_bytes));
        for (int64_t n = first; n < std::min(first + kNibbleColumns, l.n); ++n) pack_nibbles(weight, l, n, block, sums);
      }
    });
    return;
  }
  parallel_for(l.panels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t width = l.width(panel);
      int8_t* to = packed + l.codes_offset + panel * kPanel * l.column_bytes;
      for (int64_t g = 0; g < l.groups; ++g)
        kernels().pack({.weight = weight + panel * kPanel * l.k + g * l.group,
                        .column_step = l.k,
                        .columns = std::min(width, l.n - panel * kPanel),
                        .width = width,
                        .k = l.group_end(g) - g * l.group,
                        .packed = to + g * l.group * width,
                        .column_sum = sums + sum_place(8, l.groups, l.padded_n, g, panel * kPanel)});
    }
  });
}

void unpack_weight_only_cpu(const int8_t* packed, const WeightOnlyLayout& l, int8_t* weight) {
  parallel_for(l.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int8_t* to = weight + n * l.k;
      if (l.bits == 4) {
        const int8_t* block = l.codes(packed, n / kNibbleColumns * kNibbleColumns);
        for (int64_t k = 0; k < l.k; ++k) {
          const int32_t both = static_cast<uint8_t>(block[nibble_place(n, k)]);
          to[k] = static_cast<int8_t>((k % kOctet < kQuad ? both & 15 : both >> 4) - kNibbleOffset);
        }
      } else {
        const int64_t panel = n / kPanel, row = l.width(panel) * kQuad;
        const int8_t* column = l.codes(packed, panel * kPanel) + n % kPanel * kQuad;
        for (int64_t k = 0; k < l.k; ++k) to[k] = column[k / kQuad * row + k % kQuad];
      }
    }
  });
}

bool is_packed_for(const int8_t* packed, int64_t bytes, const WeightOnlyLayout& l) {
  const WeightOnlyHeader header = header_of(l);
  return bytes == l.bytes && reinterpret_cast<uintptr_t>(packed) % 4 == 0 && std::memcmp(packed, &header, sizeof(header)) == 0;
}

// ---- the product ------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kPassBytes = int64_t{8} << 20;          // of the rows of a pass: bounds the scratch, whatever M is
constexpr int64_t kBlockBytes = int64_t{256} << 10;       // codes of a block of rows: they stay in the L2 cache
constexpr int64_t kFloatBlock = 240;                      // rows that share a dequantized chunk; a multiple of kFloatRows
constexpr int64_t kPreparedPerThread = int64_t{1} << 16;  // elements that are worth a thread

struct Plan {
  const KernelTable* table;
  int64_t threads;
  WeightOnlyLayout layout;
  bool few_rows;      // KernelTable::few_rows multiplies, unless x is very large
  bool in_place;      // the product reads the floats of x itself
  int64_t row_bytes;  // of the codes or floats of a row in scratch
  int64_t pass_rows, block_rows, tile_rows;
  bool sums_rows;  // the fold reads sums of the codes of x
  // scratch: what is not needed has no bytes; kNoCopy: the caller's array
  int64_t bias_at;
  int64_t rows_at, row_scale_at, row_zero_at, row_sum_at;
  int64_t workers_at, worker_bytes, parameter_bytes;
  int64_t scratch_bytes;

  static constexpr int64_t kNoCopy = -1;
};

// A worker's piece of scratch.
struct Worker {
  float* y;       // a tile of the result, or kFloatBlock rows of 16 columns
  int32_t* sums;  // a tile's
  float* w;       // a dequantized chunk
  float* part;    // sums of kChunksTogether chunks, of kFloatBlock rows of 16 columns
  void* scale;    // of up to kPanel columns, [groups][columns]
  void* zero;     // likewise; integers or floats
};

// The scales and zero points of some columns, [groups][count]. The kernels read one group after the other; in the caller's tensors
// the columns of a group may lie a page or more apart.
struct Columns {
  int64_t first, count;
  const float* scale;
  const int8_t* zero;
  const float* float_zero;
};

// An expanded chunk may end in up to seven k more than it has.
constexpr int64_t kTileFloats = std::max<int64_t>(kMaxGemmRows * kPanel, kFloatBlock* kNibbleColumns);
constexpr int64_t kSumsBytes = kMaxGemmRows * kPanel * int64_t{sizeof(int32_t)};
constexpr int64_t kWorkerBytes =
    kTileFloats * int64_t{sizeof(float)} + kSumsBytes + (kWeightChunk + 8 + kFloatBlock) * kNibbleColumns * int64_t{sizeof(float)};
// Float32 sums of chunks are added up on their own before they meet the others, so that no chain of additions is long.
constexpr int64_t kChunksTogether = 16;

// Rows that lie a multiple of 4096 bytes apart would share a set of the cache.
int64_t apart(int64_t row_bytes) { return row_bytes % 2048 == 0 ? row_bytes + 64 : row_bytes; }

Plan make_plan(const WeightOnlyParams& p, const KernelTable& table, int64_t threads) {
  Plan plan;
  plan.table = &table;
  plan.threads = threads;
  const WeightOnlyLayout l = plan.layout = weight_only_layout(p.N, p.K, p.bits, p.group);
  plan.few_rows = !p.codes && p.M <= kFewRows;
  const bool as_they_are = p.in.dtype == DType::kFloat32 && p.in.multiplier == nullptr;
  plan.in_place = !p.codes && as_they_are && (!plan.few_rows || p.K % kOctet == 0);
  plan.row_bytes = apart(p.codes ? l.padded_k : round_up(p.K, kOctet) * int64_t{sizeof(float)});
  plan.tile_rows = !p.codes ? kFloatRows : p.bits == 4 ? table.nibble_rows : table.gemm_rows;
  const int64_t row_bytes = std::max<int64_t>(plan.row_bytes, 1), tile = plan.tile_rows;
  plan.pass_rows = std::min(p.M, std::max(p.codes ? tile : kFloatBlock, kPassBytes / row_bytes));
  plan.block_rows = p.codes ? std::clamp<int64_t>(kBlockBytes / row_bytes / tile * tile, tile, 32 * tile) : kFloatBlock;
  plan.sums_rows = p.codes && (p.bits == 4 || p.zero_point != nullptr || p.float_zero != nullptr);

  ScratchLayout scratch;
  const bool pads_bias = p.bias == nullptr || l.padded_n != l.n;
  plan.bias_at = pads_bias ? scratch.add(l.padded_n * int64_t{sizeof(float)}) : Plan::kNoCopy;
  plan.rows_at = scratch.add(plan.in_place ? 0 : plan.pass_rows * plan.row_bytes);
  plan.row_scale_at = scratch.add(plan.pass_rows * int64_t{sizeof(float)});
  plan.row_zero_at = scratch.add(plan.pass_rows * int64_t{sizeof(int32_t)});
  plan.row_sum_at = scratch.add(plan.sums_rows ? plan.pass_rows * l.groups * int64_t{sizeof(int32_t)} : 0);
  plan.parameter_bytes = l.groups * kPanel * int64_t{sizeof(float)};
  plan.worker_bytes = kWorkerBytes + 2 * plan.parameter_bytes;
  plan.workers_at = scratch.add(threads * plan.worker_bytes);
  plan.scratch_bytes = scratch.bytes;
  return plan;
}

constexpr float kOnes[kNibbleColumns] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

class WeightOnly {
 public:
  WeightOnly(const Plan& plan, const WeightOnlyParams& p)
      : plan_(plan),
        p_(p),
        l_(plan.layout),
        table_(*plan.table),
        scratch_(plan.scratch_bytes),
        rows_(scratch_.at<char>(plan.rows_at)),
        row_scale_(scratch_.at<float>(plan.row_scale_at)),
        row_zero_(scratch_.at<int32_t>(plan.row_zero_at)),
        row_sum_(scratch_.at<int32_t>(plan.row_sum_at)) {
    bias_ = p.bias;
    if (plan.bias_at != Plan::kNoCopy) {
      float* to = scratch_.at<float>(plan.bias_at);
      for (int64_t n = 0; n < l_.padded_n; ++n) to[n] = n < l_.n && p.bias ? p.bias[n] : -0.0f;  // adding -0 changes nothing
      bias_ = to;
    }
  }

  void run() {
    for (pass_first_ = 0; pass_first_ < p_.M; pass_first_ += plan_.pass_rows) {
      pass_rows_ = std::min(plan_.pass_rows, p_.M - pass_first_);
      prepare();
      multiply();
    }
  }

 private:
  // Elements of columns [n, n + count) and all groups, as [groups][count]; zeros beyond the weight.
  template <class T>
  const T* take(const T* from, const int64_t (&stride)[2], int64_t n, int64_t count, void* scratch) const {
    if (from == nullptr) return nullptr;
    const int64_t real = std::min(count, l_.n - n);
    from += n * stride[0];
    if (l_.groups == 1 && stride[0] == 1 && real == count) return from;
    T* to = static_cast<T*>(scratch);
    if (stride[1] == 1) {
      transpose(from, stride[0], real, l_.groups, to, count);
    } else {
      for (int64_t g = 0; g < l_.groups; ++g)
        for (int64_t c = 0; c < real; ++c) to[g * count + c] = from[c * stride[0] + g * stride[1]];
    }
    for (int64_t g = 0; real < count && g < l_.groups; ++g) std::fill(to + g * count + real, to + (g + 1) * count, T{0});
    return to;
  }

  Columns take_columns(int64_t n, int64_t count, const Worker& worker) const {
    return {.first = n,
            .count = count,
            .scale = take(p_.scale, p_.scale_stride, n, count, worker.scale),
            .zero = take(p_.zero_point, p_.zero_stride, n, count, worker.zero),
            .float_zero = take(p_.float_zero, p_.zero_stride, n, count, worker.zero)};
  }

  // ---- rows of x ------------------------------------------------------------------------------------------------------

  void prepare() {
    few_rows_ = plan_.few_rows && largest() < kFewLimit;
    if (plan_.in_place) return;
    any_row_zero_ = p_.in.mode == InputMode::kDynamicAsymmetric;
    parallel_for(pass_rows_, std::max<int64_t>(1, kPreparedPerThread / std::max<int64_t>(p_.K, 1)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t m = begin; m < end; ++m) p_.codes ? write_codes_of(m) : write_floats(m);
                 });
  }

  float largest() const {
    Range range = kZeroRange;
    for (int64_t m = 0; m < pass_rows_; ++m) find_range(table_, p_.in, (pass_first_ + m) * p_.x_stride, p_.K, &range);
    return bits_float(range.abs_bits);
  }

  const float* floats(int64_t m) const {
    return plan_.in_place ? static_cast<const float*>(p_.in.x) + (pass_first_ + m) * p_.x_stride
                          : reinterpret_cast<const float*>(rows_ + m * plan_.row_bytes);
  }
  int64_t float_stride() const { return plan_.in_place ? p_.x_stride : plan_.row_bytes / int64_t{sizeof(float)}; }

  void write_floats(int64_t m) const {
    const char* x = static_cast<const char*>(p_.in.x) + (pass_first_ + m) * p_.x_stride * dtype_bytes(p_.in.dtype);
    float* to = reinterpret_cast<float*>(rows_ + m * plan_.row_bytes);
    if (p_.in.multiplier != nullptr)
      table_.multiply(x, p_.in.dtype, p_.in.multiplier, p_.K, to);
    else if (p_.in.dtype == DType::kFloat32)
      std::memcpy(to, x, static_cast<size_t>(p_.K) * sizeof(float));
    else
      table_.widen(x, p_.in.dtype, p_.K, to);
    for (int64_t k = p_.K; k < round_up(p_.K, kOctet); ++k) to[k] = 0.0f;
  }

  // Signed codes for the nibbles, unsigned ones for the GEMM; either with zeros beyond K.
  void write_codes_of(int64_t m) const {
    const int64_t offset = (pass_first_ + m) * p_.x_stride;
    Range range = kZeroRange;
    find_range(table_, p_.in, offset, p_.K, &range);
    const QParams<float> qparams = code_qparams(p_.in, 0, range);
    uint8_t* codes = reinterpret_cast<uint8_t*>(rows_ + m * plan_.row_bytes);
    write_codes(table_, p_.in, offset, p_.K, qparams, codes);
    std::memset(codes + p_.K, 0, static_cast<size_t>(plan_.row_bytes - p_.K));
    row_scale_[m] = qparams.scale;
    row_zero_[m] = qparams.zero_point;
    for (int64_t g = 0; plan_.sums_rows && g < l_.groups; ++g) {
      const int64_t count = l_.group_end(g) - g * l_.group;
      const int32_t sum = table_.sum_codes(codes + g * l_.group, count, p_.bits == 4);
      row_sum_[m * l_.groups + g] = sum - qparams.zero_point * static_cast<int32_t>(count);
    }
    if (p_.bits == 4) row_zero_[m] -= kSignedOffset;
  }

  // ---- products -------------------------------------------------------------------------------------------------------

  // A worker takes its rows in blocks of even height, which stay in the cache while its panels pass by.
  void multiply() const {
    const int64_t workers = std::min(plan_.threads, 1 + pass_rows_ * p_.N * p_.K / kMacsPerThread);
    const Shares shares = cut_pass(ceil_div(pass_rows_, plan_.tile_rows), l_.panels(), workers);
    parallel_for(shares.rows * shares.panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) multiply_share(shares, worker);
    });
  }

  void multiply_share(const Shares& shares, int64_t number) const {
    const int64_t row_share = number / shares.panels, panel_share = number % shares.panels, panels = l_.panels();
    const int64_t row_begin = row_share * pass_rows_ / shares.rows, row_end = (row_share + 1) * pass_rows_ / shares.rows;
    const int64_t panel_begin = panel_share * panels / shares.panels, panel_end = (panel_share + 1) * panels / shares.panels;
    const int64_t blocks = std::max<int64_t>(1, ceil_div(row_end - row_begin, plan_.block_rows));
    const int64_t block_rows = std::min(plan_.block_rows, round_up(ceil_div(row_end - row_begin, blocks), plan_.tile_rows));
    Worker worker;
    worker.y = scratch_.at<float>(plan_.workers_at + number * plan_.worker_bytes);
    worker.sums = reinterpret_cast<int32_t*>(worker.y + kTileFloats);
    worker.w = reinterpret_cast<float*>(worker.sums + kSumsBytes / int64_t{sizeof(int32_t)});
    worker.part = worker.w + (kWeightChunk + 8) * kNibbleColumns;
    worker.scale = worker.part + kFloatBlock * kNibbleColumns;
    worker.zero = static_cast<char*>(worker.scale) + plan_.parameter_bytes;
    for (int64_t first = row_begin, last; first < row_end; first = last) {
      last = std::min(first + block_rows, row_end);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        if (p_.codes && p_.bits == 8) {
          multiply_panel(first, last, panel, worker);
          continue;
        }
        if (few_rows_) {
          multiply_few(first, last, panel, worker);
          continue;
        }
        const int64_t begin = panel * kPanel, end = begin + l_.width(panel);
        for (int64_t n = begin; n < end; n += kNibbleColumns)
          p_.codes ? multiply_nibbles(first, last, n, worker) : multiply_floats(first, last, n, worker);
      }
    }
  }

  // Of the codes of the columns from the first of a panel, or of a block of four bits, on: [groups][columns].
  const int32_t* sums_of(int64_t column) const {
    return l_.sums(p_.packed) + sum_place(p_.bits, l_.groups, l_.padded_n, 0, column);
  }

  GroupFold fold(const Columns& columns, int64_t row) const {
    const GroupFold all{.scale = columns.scale,
                        .zero = columns.zero,
                        .float_zero = columns.float_zero,
                        // the GEMM corrects its sums itself
                        .code_sum = p_.bits == 4 && any_row_zero_ ? sums_of(columns.first) : nullptr,
                        .stride = columns.count,
                        .offset = p_.bits == 4 ? kNibbleOffset : 0,
                        .row_scale = row_scale_,
                        .row_zero = row_zero_,
                        .row_sum = plan_.sums_rows ? row_sum_ : nullptr,
                        .groups = l_.groups};
    return all.from_row(row);
  }

  void start(float* y, int64_t stride, int64_t rows, int64_t column, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(y + r * stride, bias_ + column, static_cast<size_t>(columns) * sizeof(float));
  }

  void store(const float* y, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const int64_t at = (pass_first_ + row) * p_.y_stride + column;
    table_.store({.from = y,
                  .from_stride = stride,
                  .rows = rows,
                  .columns = std::min(columns, p_.N - column),
                  .y = static_cast<char*>(p_.y) + at * dtype_bytes(p_.y_dtype),
                  .dtype = p_.y_dtype,
                  .y_stride = p_.y_stride});
  }

  void multiply_nibbles(int64_t first, int64_t last, int64_t n, const Worker& worker) const {
    const Columns columns = take_columns(n, kNibbleColumns, worker);
    NibbleTile tile{.k = l_.padded_k,
                    .group = l_.groups == 1 ? l_.padded_k : l_.group,
                    .a = nullptr,
                    .a_stride = plan_.row_bytes,
                    .b = l_.codes(p_.packed, n),
                    .fold = {},
                    .y = worker.y,
                    .y_stride = kNibbleColumns};
    for (int64_t m = first, rows; m < last; m += rows) {
      rows = quant_ops::tile_rows(last - m, plan_.tile_rows);
      tile.a = reinterpret_cast<const int8_t*>(rows_) + m * plan_.row_bytes;
      tile.fold = fold(columns, m);
      start(worker.y, kNibbleColumns, rows, n, kNibbleColumns);
      table_.nibbles(tile, rows);
      store(worker.y, kNibbleColumns, m, rows, n, kNibbleColumns);
    }
  }

  void multiply_panel(int64_t first, int64_t last, int64_t panel, const Worker& worker) const {
    const int64_t width = l_.width(panel), column = panel * kPanel;
    const Columns columns = take_columns(column, width, worker);
    const int32_t* sums = sums_of(column);
    GemmTile tile;
    tile.taps = 1;
    tile.a = reinterpret_cast<const uint8_t*>(rows_);
    tile.out = {};
    tile.out.y = worker.sums;
    tile.out.y_stride = kPanel;
    tile.out.dtype = DType::kInt32;
    tile.out.columns = width;
    tile.out.column_scale = columns.scale;  // read, not used
    tile.out.bias = bias_ + column;         // likewise
    tile.out.row_step = 1;
    for (int64_t m = first, rows; m < last; m += rows) {
      rows = quant_ops::tile_rows(table_, last - m, width <= kSlimColumns);
      start(worker.y, kPanel, rows, column, width);
      tile.out.row_scale = row_scale_ + m;
      tile.out.row_zero = row_zero_ + m;
      for (int64_t g = 0; g < l_.groups; ++g) {
        int64_t a_offset[kMaxGemmRows];
        for (int64_t r = 0; r < rows; ++r) a_offset[r] = (m + r) * plan_.row_bytes + g * l_.group;
        tile.a_offset = a_offset;
        tile.quads = ceil_div(l_.group_end(g) - g * l_.group, kQuad);
        tile.b = l_.codes(p_.packed, column) + g * l_.group * width;
        tile.ahead = g + 1 < l_.groups ? tile.b + l_.group * width : tile.b;
        tile.out.column_sum = sums + g * width;
        table_.gemm(tile, rows, width);
        table_.fold({.sums = worker.sums,
                     .stride = kPanel,
                     .rows = rows,
                     .columns = width,
                     .group = g,
                     .fold = fold(columns, m),
                     .y = worker.y});
      }
      store(worker.y, kPanel, m, rows, column, width);
    }
  }

  // Chunk by chunk of the columns' k: multiply(chunk of the weight, sums) adds to sums [rows][stride], which are added to y
  // kChunksTogether at a time.
  template <class Multiply>
  void sum_chunks(int64_t n, int64_t count, int64_t elements, const Worker& worker, const Multiply& multiply) const {
    const Columns columns = take_columns(n, count, worker);
    std::memset(worker.part, 0, static_cast<size_t>(elements) * sizeof(float));
    const int64_t panel = n / kPanel, block_bytes = kNibbleColumns * l_.column_bytes;
    int64_t chunks = 0;
    for (int64_t g = 0; g < l_.groups; ++g) {
      const int64_t at = g * count;
      WeightChunk chunk{.bits = p_.bits,
                        .b = p_.bits == 4 ? l_.codes(p_.packed, n) : l_.codes(p_.packed, panel * kPanel) + n % kPanel * kQuad,
                        .block_step = p_.bits == 4 ? block_bytes : kNibbleColumns * kQuad,
                        .quad_step = l_.width(panel) * kQuad,
                        .first = 0,
                        .last = 0,
                        .columns = count,
                        .scale = columns.scale + at,
                        .zero = columns.zero ? columns.zero + at : nullptr,
                        .float_zero = columns.float_zero ? columns.float_zero + at : nullptr};
      for (int64_t k = g * l_.group; k < l_.group_end(g); k = chunk.last) {
        chunk.first = k;
        chunk.last = std::min(k + kWeightChunk, l_.group_end(g));
        multiply(chunk, worker.part);
        if (++chunks % kChunksTogether != 0 && chunk.last < p_.K) continue;
        for (int64_t i = 0; i < elements; ++i) {
          worker.y[i] += worker.part[i];
          worker.part[i] = 0.0f;
        }
      }
    }
  }

  void multiply_few(int64_t first, int64_t last, int64_t panel, const Worker& worker) const {
    const int64_t rows = last - first, n = panel * kPanel, columns = l_.width(panel);
    start(worker.y, kPanel, rows, n, columns);
    sum_chunks(n, columns, rows * kPanel, worker, [&](const WeightChunk& chunk, float* y) {
      table_.few_rows({.weight = chunk, .a = floats(first), .a_stride = float_stride(), .y = y, .y_stride = kPanel}, rows);
    });
    store(worker.y, kPanel, first, rows, n, columns);
  }

  void multiply_floats(int64_t first, int64_t last, int64_t n, const Worker& worker) const {
    start(worker.y, kNibbleColumns, last - first, n, kNibbleColumns);
    sum_chunks(n, kNibbleColumns, (last - first) * kNibbleColumns, worker, [&](const WeightChunk& chunk, float* y) {
      table_.expand(chunk, worker.w);
      for (int64_t m = first, rows; m < last; m += rows) {
        rows = quant_ops::tile_rows(last - m, kFloatRows);
        table_.float_tile({.k = chunk.last - chunk.first,
                           .a = floats(m) + chunk.first,
                           .a_stride = float_stride(),
                           .w = worker.w,
                           .column_scale = chunk.float_zero ? kOnes : chunk.scale,
                           .y = y + (m - first) * kNibbleColumns,
                           .y_stride = kNibbleColumns},
                          rows);
      }
    });
    store(worker.y, kNibbleColumns, first, last - first, n, kNibbleColumns);
  }

  const Plan& plan_;
  const WeightOnlyParams& p_;
  const WeightOnlyLayout& l_;
  const KernelTable& table_;
  const Scratch scratch_;
  char* const rows_;
  float* const row_scale_;
  int32_t* const row_zero_;
  int32_t* const row_sum_;
  const float* bias_;
  bool any_row_zero_ = false;
  bool few_rows_ = false;  // of this pass
  int64_t pass_first_ = 0, pass_rows_ = 0;
};

// Floats beyond kFewLimit are met later, and take the other kernel.
void log_product(const Plan& plan, const WeightOnlyParams& p) {
  if (p.codes && p.bits == 8)
    log_kernel([&] { return first_tile_name(*plan.table, p.M, plan.layout.width(0)); });
  else if (p.codes)
    log_entries({"nibbles"});
  else if (plan.few_rows)
    log_entries({"few_rows"});
  else
    log_entries({"expand", "float_tile"});
}

}  // namespace

void weight_only_linear_cpu(const WeightOnlyParams& p) {
  if (p.M == 0 || p.N == 0) return;
  const Plan plan = make_plan(p, kernels(), parallel_threads());
  log_product(plan, p);
  WeightOnly(plan, p).run();
}

}  // namespace quant_ops

// quant_block_forward and quant_block_backward on the CPU: every block of elements gets a scale from its largest magnitude.
//
//   y = round_to_format(x / scale) * scale;  backward y = grad where |x / scale| <= largest, else 0
//
// A tensor is [outer][length][inner] in memory, with blocks along `length`. With inner = 1 a block is contiguous; otherwise blocks
// lie side by side, and a vector has an element of each. Read next: kernels/generic/quantize_block.h.
#include <algorithm>

#include "contract/iteration.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/staging.h"
#include "kernels/log.h"
#include "kernels/table.h"

namespace quant_ops {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 15;
constexpr int64_t kTile = int64_t{1} << 13;  // elements of a tile of columns: its second reading is from the first cache
constexpr int64_t kLeastColumns = 64;

// Tiles of one or more blocks. What a tile covers lies in memory as `rows` rows of `columns` elements, `p.inner` apart.
struct Tiles {
  int64_t blocks;         // of a length
  int64_t columns;        // of a tile
  int64_t across;         // tiles side by side
  int64_t most_elements;  // of a tile
};

Tiles plan_tiles(const QuantizeBlockParams& p) {
  const int64_t block = std::min(p.block, p.length);
  Tiles t;
  t.blocks = ceil_div(p.length, p.block);
  t.columns = p.inner == 1 ? 1 : std::min(p.inner, round_up(std::max(kTile / block, kLeastColumns), kLeastColumns));
  t.across = ceil_div(p.inner, t.columns);
  t.most_elements = block * t.columns;
  return t;
}

class Blocks {
 public:
  explicit Blocks(const QuantizeBlockParams& p) : p_(p), table_(kernels()), tiles_(plan_tiles(p)) {
    shared_.dtype = p.dtype;
    shared_.format = p.format;
    if (p.tensor_scale != nullptr) shared_.tensor_scale = *p.tensor_scale;
  }

  void run() const {
    const bool random = p_.grad == nullptr && p_.format.element.rounding == Rounding::kStochastic;
    const int64_t tasks = p_.outer * tiles_.blocks * tiles_.across, threads = parallel_threads();
    const int64_t words = random ? round_up(tiles_.most_elements * 4, 64) : 0;
    const Scratch scratch(words * std::max<int64_t>(1, threads));
    for_each_share(tasks, threads, p_.outer * p_.length * p_.inner, kElementsPerThread,
                   [&](int64_t worker, int64_t begin, int64_t end) {
                     uint32_t* memory = random ? scratch.at<uint32_t>(worker * words) : nullptr;
                     if (p_.inner == 1 && memory == nullptr) return contiguous(begin, end, nullptr);
                     for (int64_t task = begin; task < end; ++task) tile(task, memory);
                   });
  }

 private:
  // Contiguous blocks [begin, end), counted over all lengths.
  void contiguous(int64_t begin, int64_t end, const uint32_t* words) const {
    BlockRun run = at(begin / tiles_.blocks * p_.length + begin % tiles_.blocks * p_.block, words);
    run.length = p_.length;
    run.block = p_.block;
    run.first = begin % tiles_.blocks;
    run.blocks = end - begin;
    table_.quantize_blocks(run);
  }

  void tile(int64_t task, uint32_t* words) const {
    const int64_t column = task % tiles_.across * tiles_.columns, block = task / tiles_.across;
    const int64_t outer = block / tiles_.blocks, row = block % tiles_.blocks * p_.block;
    const int64_t rows = std::min(p_.block, p_.length - row), columns = std::min(tiles_.columns, p_.inner - column);
    const int64_t first = (outer * p_.length + row) * p_.inner + column;
    if (words != nullptr) {
      for (int64_t i = 0; i < rows; ++i) draw(first + i * p_.inner, columns, words + i * columns);
    }
    if (p_.inner == 1) return contiguous(task, task + 1, words);
    BlockRun run = at(first, words);
    run.length = rows;
    run.columns = columns;
    run.row = p_.inner;
    table_.quantize_block_columns(run);
  }

  // The random words of n elements that follow one another in memory.
  void draw(int64_t first, int64_t n, uint32_t* words) const {
    for_each_run(p_.order, first, first + n, [&](const int64_t* offset, int64_t count) {
      const int64_t step = inner_stride(p_.order, 0);
      if (step == 1)
        table_.random_words(p_.seed.value, static_cast<uint64_t>(offset[0]), count, words);
      else
        for (int64_t i = 0; i < count; ++i) words[i] = random_word(static_cast<uint64_t>(offset[0] + i * step), p_.seed.value);
      words += count;
    });
  }

  BlockRun at(int64_t first, const uint32_t* words) const {
    BlockRun run = shared_;
    run.x = element(p_.x, p_.dtype, first);
    run.grad = p_.grad != nullptr ? element(p_.grad, p_.dtype, first) : nullptr;
    run.y = element(p_.y, p_.dtype, first);
    run.random = words;
    return run;
  }

  const QuantizeBlockParams& p_;
  const KernelTable& table_;
  const Tiles tiles_;
  BlockRun shared_;
};

}  // namespace

void quantize_block_cpu(const QuantizeBlockParams& p) {
  log_entries({p.inner == 1 ? "quantize_blocks" : "quantize_block_columns"});
  Blocks(p).run();
}

}  // namespace quant_ops

// The kernel of weight_only_linear of many rows on Hopper. A block computes `rows` x 64 or 128 of the result. One thread of its
// last warps fills a ring of stages in shared memory, each with 128 k of the rows of x, by TMA, and of the packed weight as it is.
// Each warpgroup multiplies 64 columns: these are the rows of wgmma's first operand, which comes from registers, so that a warp
// makes it of the packed words of its 16 columns just before; rows of x are the second operand, from shared memory.
//
// While the products of a step of 32, 64 or 128 k run, a warp folds the sums of the step before and makes the operands of the next
// one. Exact sums are folded in ascending order of the groups, with the bits of the CPU. Lane (g, t) =
// (lane / 4, lane % 4) has columns 2 g and 2 g + 1 of its warp's, as rows g and g + 8 of the operand, and of every eight rows of x
// the results of 2 t and 2 t + 1. Read first: weight_only.h, device/weight_only.cuh; next: instructions.cuh.
#pragma once

#include "device/common.cuh"
#include "device/weight_only.cuh"
#include "engine/sm90/instructions.cuh"
#include "engine/sm90/weight_only.h"

namespace quant_ops::sm90 {

struct WeightOnlyTileArgs : WeightOnlyArgs {
  CUtensorMap map;    // of x
  int32_t row_load;   // rows of x that a load brings
  int32_t last_row;   // where the last tile begins: it ends with x
  int32_t row_tiles;  // of x
  int32_t stages;     // of K
  int32_t splits, split_stages;
  bool y_pairs;  // two neighbouring columns from an even one on are one aligned vector
};

// What a warpgroup does while the products of a step run.
enum class WhileProductsRun {
  kFoldsAndMakes,  // folds the sums of the step before, for which it has other registers, and makes the operands of the next step
  kMakes,          // makes those operands; sums stay in place until their group ends or, of floats, the stage
  kWaits,          // the other warpgroup of its block makes and folds meanwhile
};

// kStepUnits: of 32 k each, that a step has.
template <class X_, int kBitsOfCode, int kTileNumber, int kStepUnits, WhileProductsRun kDoes>
struct WeightOnlyShape {
  using X = X_;
  static constexpr WeightOnlyTile kTile = kWeightOnlyTiles[kTileNumber];
  static constexpr int kBits = kBitsOfCode, kRows = kTile.rows, kXBytes = static_cast<int>(sizeof(X));
  static constexpr bool kCodes = std::is_same_v<X, int8_t>, kTwoSums = kDoes == WhileProductsRun::kFoldsAndMakes;
  static constexpr bool kAhead = kDoes != WhileProductsRun::kWaits;
  static constexpr int kStages = kTile.stages(kBits, kXBytes), kStageBytes = kTile.stage_bytes(kBits, kXBytes);
  static constexpr int kBoxes = kXBytes, kBoxBytes = kRows * 128;  // loads of x of a stage
  static constexpr int kUnits = kStepUnits;
  static constexpr int kSteps = kWeightStageK / (kUnits * kStepK);       // of a stage
  static constexpr int kProducts = kCodes ? 1 : 2;                       // matrix instructions of a unit
  static constexpr int kStageWords = kWeightStageK * kBits / 32;         // of a column
  static constexpr int kColumnsTogether = kBits == 4 ? 16 : 64;          // of the packed weight
  static constexpr int kCopies = kTile.columns() / kColumnsTogether;     // of the packed weight, of a stage
  static constexpr int kCopyBytes = kColumnsTogether * 4 * kStageWords;  // room for one
};

// ---- loads ----------------------------------------------------------------------------------------------------------

// A copy of neighbouring columns of the packed weight: those from column n on that exist.
template <class S>
struct WeightCopy {
  const int8_t* from;
  int word_bytes;  // of all columns, of a word each

  __device__ __forceinline__ WeightCopy(const WeightOnlyArgs& a, int64_t n) {
    const int64_t left = a.padded_n - n, width = left < S::kColumnsTogether ? left : S::kColumnsTogether;
    word_bytes = left > 0 ? static_cast<int>(width) * 4 : 0;
    from = a.codes + n * a.column_bytes;
  }
};

// Executed by one thread.
template <class S>
__device__ __forceinline__ void load_stages(const WeightOnlyTileArgs& a, uint32_t ring, uint32_t full, uint32_t empty, int64_t n0,
                                            int32_t row, int begin, int end) {
  const int words = static_cast<int>(a.column_bytes / 4);
  int words_of_all = 0;
#pragma unroll
  for (int i = 0; i < S::kCopies; ++i) words_of_all += WeightCopy<S>(a, n0 + i * S::kColumnsTogether).word_bytes;
  const auto load_weight = [&](int stage, int place) {
    const int left = words - stage * S::kStageWords, count = left < S::kStageWords ? left : S::kStageWords;
    const uint32_t to = ring + place * S::kStageBytes + S::kBoxes * S::kBoxBytes;
    barrier_arrive_and_expect(full + place * 8, a.row_load * 128 * S::kBoxes + count * words_of_all);
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      const WeightCopy<S> copy(a, n0 + i * S::kColumnsTogether);
      if (copy.word_bytes > 0)
        load_bytes(to + i * S::kCopyBytes, copy.from + int64_t{stage} * S::kStageWords * copy.word_bytes, count * copy.word_bytes,
                   full + place * 8);
    }
  };
  const auto load_rows = [&](int stage, int place) {
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box)
      load_matrix(ring + place * S::kStageBytes + box * S::kBoxBytes, &a.map, full + place * 8, (stage * S::kBoxes + box) * 128,
                  row, 0);
  };
  const int ahead = end - begin < S::kStages ? end : begin + S::kStages;
  for (int stage = begin; stage < ahead; ++stage) load_weight(stage, stage - begin);  // which the kernel before does not write
  wait_for_kernel_before();
  for (int stage = begin; stage < ahead; ++stage) load_rows(stage, stage - begin);
  RingPosition<S::kStages> at;
  for (int stage = ahead; stage < end; ++stage, at.advance()) {
    barrier_wait(empty + at.stage * 8, at.phase);
    load_weight(stage, at.stage);
    load_rows(stage, at.stage);
  }
}

// ---- the first operand ----------------------------------------------------------------------------------------------

// What a lane takes of its columns' words in shared memory.
template <class S>
struct LaneOfWeight {
  uint32_t first;  // address in a stage
  int word_bytes;  // from a word of a column to its next one
  int t;
  uint32_t select;  // floats: of pick_bytes

  __device__ __forceinline__ LaneOfWeight(const WeightOnlyArgs& a, int64_t n0, int warpgroup, int warp, int lane)
      : t(lane % 4), select(lane % 2 == 0 ? 0x4140u : 0x4342u) {
    const int g = lane / 4;
    if constexpr (S::kBits == 4) {
      word_bytes = 64;
      first = (warpgroup * 4 + warp) * S::kCopyBytes + g * 8;
    } else {
      word_bytes = WeightCopy<S>(a, n0 + warpgroup * 64).word_bytes;
      const int column = warp * 16 * 4 < word_bytes ? warp * 16 : 0;  // of those that do not exist nothing becomes
      first = warpgroup * S::kCopyBytes + (column + g * 2) * 4;
    }
  }

  // Numbers 2 t and 2 t + 1 of eight k of a column, of whose words this is the one.
  __device__ __forceinline__ uint32_t pair(uint32_t word, uint32_t addend) const {
    using X = typename S::X;
    constexpr bool kHalf = std::is_same_v<X, Half>;
    if constexpr (S::kBits == 4) {  // the last two lanes of four have the upper nibbles
      const uint32_t low = kHalf ? 0u : 30u, high = kHalf ? 4u : 2u;
      const uint32_t quad = __funnelshift_r(word, word, t < 2 ? low : high) & (kHalf ? 0x0f0f0f0fu : 0x3c3c3c3cu);
      return add_pairs<X>(pick_bytes(quad, kHalf ? 0x64646464u : 0x42424242u, select), addend);
    } else {
      const uint32_t quad = word ^ 0x80808080u;
      if constexpr (kHalf) return add_pairs<X>(pick_bytes(quad, 0x64646464u, select), addend);
      const int i = t % 2 * 2;
      const float low = float_of_byte(quad, i) + bits_float(addend), high = float_of_byte(quad, i + 1) + bits_float(addend);
      return pick_bytes(float_bits(low), float_bits(high), 0x7632u);
    }
  }

  // The operands of 32 k, of a stage whose weight is at `stage`.
  __device__ __forceinline__ void operands(uint32_t stage, int unit, const uint32_t (&addends)[2],
                                           uint32_t (&a)[S::kProducts][4]) const {
#pragma unroll
    for (int p = 0; p < S::kProducts; ++p)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        constexpr int kWords = S::kBits == 4 ? 4 : 8;  // of a unit
        const int of_product = kWords / S::kProducts, word = unit * kWords + p * of_product + half * (of_product / 2);
        // Four k of a lane fill a word of eight bits, and half of one of four; two k of it half and a quarter.
        const int own = S::kCodes && S::kBits == 8 ? t : !S::kCodes && S::kBits == 4 ? 0 : t / 2;
        uint32_t words[2];
        load_shared(stage + first + (word + own) * word_bytes, words);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if constexpr (!S::kCodes)
            a[p][half * 2 + c] = pair(words[c], addends[c]);
          else if constexpr (S::kBits == 4)
            a[p][half * 2 + c] = masked_and_flipped(words[c] << (t % 2 == 0 ? 4 : 0));
          else
            a[p][half * 2 + c] = words[c];
        }
      }
  }
};

// ---- the fold -------------------------------------------------------------------------------------------------------

// What a group of the lane's two columns has.
struct GroupOfColumns {
  float scale[2];
  int32_t extra[2];  // codes: the sum of the codes plus `added` each, for zero points of the rows; floats: the zero point
  int32_t added;
};

// Reads one group after the other. What it reads is not used before it is needed, so that nothing waits for it.
template <class S>
struct GroupReader {
  using Extra = std::conditional_t<S::kCodes, int32_t, int8_t>;
  const float* scale[2];  // of columns that do not exist: those of the last one
  const Extra* extra[2];  // null: none
  int64_t scale_step, extra_step;
  int32_t left;  // groups behind the next one
  int32_t added, last_added;

  __device__ __forceinline__ GroupReader(const WeightOnlyArgs& a, int group, int64_t n) : left(a.groups - 1 - group) {
    scale_step = a.scale_stride[1];
    const auto sum_at = [&](int64_t g, int64_t column) { return sum_place(S::kBits, a.groups, a.padded_n, g, column); };
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t column = n + c < a.N ? n + c : a.N - 1;
      scale[c] = a.scale + column * a.scale_stride[0] + group * a.scale_stride[1];
      if constexpr (S::kCodes) {
        extra_step = sum_at(1, column) - sum_at(0, column);
        extra[c] = a.row_zero != nullptr ? a.code_sums + sum_at(group, column) : nullptr;
      } else {
        extra_step = a.zero_stride[1];
        extra[c] = a.zero_point != nullptr ? a.zero_point + column * a.zero_stride[0] + group * a.zero_stride[1] : nullptr;
      }
    }
    const int64_t size = a.groups == 1 ? a.weight_k : int64_t{kStepK} << a.group_shift;
    added = S::kBits == 4 ? 8 * static_cast<int32_t>(size) : 0;
    last_added = S::kBits == 4 ? 8 * static_cast<int32_t>(a.weight_k - (a.groups - 1) * size) : 0;
  }
  // The next group; behind the last one that one again. A column's scales of later groups are fetched to the L2 cache: from memory
  // they would take longer than a stage.
  __device__ __forceinline__ void next(GroupOfColumns* to) {
    constexpr int kFetched = 16;
    const bool moves = left > 0;
    to->added = moves ? added : last_added;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (left > kFetched) asm volatile("prefetch.global.L2 [%0];" ::"l"(scale[c] + kFetched * scale_step));
      to->scale[c] = *scale[c];
      to->extra[c] = extra[c] != nullptr ? *extra[c] : 0;
      scale[c] += moves ? scale_step : 0;
      extra[c] += moves && extra[c] != nullptr ? extra_step : 0;
    }
    --left;
  }
};

// Of a row of codes.
struct alignas(8) RowOfCodes {
  float scale;
  int32_t zero;
};

template <class S>
struct WeightOnlyResults {
  static constexpr int kCount = S::kRows / 2;
  using Sum = SumOf<typename S::X>;
  float y[kCount];  // [rows / 8][column][row]

  __device__ __forceinline__ void start(const WeightOnlyArgs& a, int64_t n) {
    const float bias[2] = {S::kCodes ? bias_of(a, n) : 0.0f, S::kCodes ? bias_of(a, n + 1) : 0.0f};
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = bias[i / 2 % 2];
  }

  template <bool kPlain>
  __device__ __forceinline__ void fold(const Sum (&sums)[kCount], const GroupOfColumns& columns, const RowOfCodes* rows, int t) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      float row_scale[2] = {};
      uint32_t row_zero[2] = {};
      if constexpr (S::kCodes) {
        const auto words = load_vector<4>(reinterpret_cast<const uint32_t*>(rows + j * 8 + t * 2));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          row_scale[r] = bits_float(words.get(r * 2));
          row_zero[r] = words.get(r * 2 + 1);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = i / 2, r = i % 2;
        if constexpr (S::kCodes) {
          uint32_t exact = static_cast<uint32_t>(sums[j * 4 + i] >> kCodeShift<S::kBits>);  // modulo 2^32 in between
          if constexpr (!kPlain) exact -= row_zero[r] * static_cast<uint32_t>(columns.extra[c] - columns.added);
          y[j * 4 + i] = fused(static_cast<float>(static_cast<int32_t>(exact)), row_scale[r] * columns.scale[c], y[j * 4 + i]);
        } else {
          y[j * 4 + i] = fused(sums[j * 4 + i], columns.scale[c], y[j * 4 + i]);
        }
      }
    }
  }

  // Rows before `own` are another tile's.
  __device__ __forceinline__ void store(const WeightOnlyTileArgs& a, void* y_of_split, int64_t n, int64_t row, int64_t own,
                                        int t) const {
    const float bias[2] = {S::kCodes ? -0.0f : bias_of(a, n), S::kCodes ? -0.0f : bias_of(a, n + 1)};
    with_result_type(a.y_dtype, [&](auto* type) {
      using Y = std::remove_pointer_t<decltype(type)>;
      const int64_t left = a.N - n;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int64_t m = row + j * 8 + t * 2 + r;
          if (m < own || m >= a.M) continue;
          const Y two[2] = {rounded_to<Y>(y[j * 4 + r] + bias[0]), rounded_to<Y>(y[j * 4 + 2 + r] + bias[1])};
          Y* const to = static_cast<Y*>(y_of_split) + m * a.y_stride + n;
          if (a.y_pairs && left >= 2) {
            store_vector<2>(to, two);
          } else {
            if (left >= 1) to[0] = two[0];
            if (left >= 2) to[1] = two[1];
          }
        }
    });
  }
};

// ---- products -------------------------------------------------------------------------------------------------------

// The operands of a step, and the products that take them.
template <class S>
struct StepOfWeight {
  uint32_t first[S::kUnits][S::kProducts][4];

  __device__ __forceinline__ void make(const LaneOfWeight<S>& weight, uint32_t words, int step, const GroupOfColumns& columns) {
    uint32_t addends[2] = {};
    if constexpr (!S::kCodes)
      for (int c = 0; c < 2; ++c) addends[c] = CodePairs<typename S::X, S::kBits>::addend(columns.extra[c]);
#pragma unroll
    for (int unit = 0; unit < S::kUnits; ++unit) weight.operands(words, step * S::kUnits + unit, addends, first[unit]);
  }

  // Starts the products with the rows of x of the stage at `x`.
  __device__ __forceinline__ void multiply(uint32_t x, int step, bool accumulate,
                                           typename WeightOnlyResults<S>::Sum (&sums)[WeightOnlyResults<S>::kCount]) {
    const uint64_t second = operand<128>(x);
    multiply_fence();
#pragma unroll
    for (int unit = 0; unit < S::kUnits; ++unit)
#pragma unroll
      for (int p = 0; p < S::kProducts; ++p) {
        const int k32 = (step * S::kUnits + unit) * S::kProducts + p;  // 32 bytes of a row of x
        WgmmaOfRegisters<typename S::X, S::kRows>::run(sums, first[unit][p], second + (k32 / 4 * S::kBoxBytes + k32 % 4 * 32) / 16,
                                                       accumulate || unit + p > 0);
      }
    multiply_commit();
  }
};

// Steps of a warpgroup: which stage, and which step of it.
template <class S>
struct StepPosition {
  RingPosition<S::kStages> ring;
  int step = 0;
  __device__ __forceinline__ void advance() {
    if (++step < S::kSteps) return;
    step = 0;
    ring.advance();
  }
};

// The tile of a block: its first column, its first row and the first one that it stores, its stages of K, and where its results go.
struct WeightOnlyTileOfBlock {
  int64_t n0;
  int32_t row, own, begin, end;
  void* y;
};

template <class S>
__device__ __forceinline__ void multiply_stages(const WeightOnlyTileArgs& a, const WeightOnlyTileOfBlock& tile, uint32_t ring,
                                                uint32_t full, uint32_t empty, const RowOfCodes* rows) {
  using Results = WeightOnlyResults<S>;
  const int warpgroup = S::kTile.warpgroups == 1 ? 0 : __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = static_cast<int>(threadIdx.x) / kWarp % 4, lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
  const int64_t n = tile.n0 + warpgroup * 64 + warp * 16 + lane / 4 * 2;
  const LaneOfWeight<S> weight(a, tile.n0, warpgroup, warp, lane);
  const int first_step = tile.begin * S::kSteps, all_steps = (a.steps + S::kUnits - 1) / S::kUnits - first_step;
  const int steps = all_steps < (tile.end - tile.begin) * S::kSteps ? all_steps : (tile.end - tile.begin) * S::kSteps;
  const auto group_of = [&](int i) { return ((first_step + i) * S::kUnits) >> a.group_shift; };
  Results results;
  typename Results::Sum sums[S::kTwoSums ? 2 : 1][Results::kCount];
  StepOfWeight<S> operands[S::kAhead ? 2 : 1];
  GroupReader<S> reader(a, group_of(0), n);
  GroupOfColumns columns[2], ahead;
  reader.next(&columns[0]);
  reader.next(&ahead);
  results.start(a, n);
  StepPosition<S> made, started, done;
  const auto make = [&](StepOfWeight<S>& to, const GroupOfColumns& of) {
    if (made.step == 0) barrier_wait(full + made.ring.stage * 8, made.ring.phase);
    to.make(weight, ring + made.ring.stage * S::kStageBytes + S::kBoxes * S::kBoxBytes, made.step, of);
    made.advance();
  };
  const auto release = [&] {
    if (done.step == S::kSteps - 1) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + done.ring.stage * 8);
    }
    done.advance();
  };
  const auto fold = [&](const typename Results::Sum(&of)[Results::kCount], const GroupOfColumns& group) {
    if (S::kCodes && a.row_zero != nullptr)
      results.template fold<false>(of, group, rows, t);
    else
      results.template fold<true>(of, group, rows, t);
  };
  bool accumulate = false;
  // Step i. Everything that the compiler must know of its products in flight is constant: the parity of i, and whether a step comes
  // before and after.
  const auto run = [&](int i, auto parity, auto is_first, auto is_last) {
    constexpr int p = decltype(parity)::value, other = 1 - p, own_sums = S::kTwoSums ? p : 0;
    constexpr bool kFirst = decltype(is_first)::value, kLast = decltype(is_last)::value;
    if constexpr (!S::kAhead) make(operands[0], columns[p]);
    operands[S::kAhead ? p : 0].multiply(ring + started.ring.stage * S::kStageBytes, started.step, accumulate, sums[own_sums]);
    started.advance();
    if constexpr (!kFirst && S::kAhead) {
      multiply_wait<1>();
      if constexpr (S::kTwoSums) keep(sums[1 - own_sums]);
      release();
      if constexpr (S::kTwoSums) fold(sums[1 - own_sums], columns[other]);
    }
    const bool ends_group = kLast || group_of(i + 1) != group_of(i);
    if constexpr (!kLast) {
      columns[other] = ends_group ? ahead : columns[p];
      if (ends_group) reader.next(&ahead);
      if constexpr (S::kAhead) make(operands[other], columns[other]);
    }
    const bool folds = ends_group || (!S::kCodes && (i + 1) % S::kSteps == 0);
    if (!S::kAhead || (S::kTwoSums ? kLast : folds)) {
      multiply_wait<0>();
      keep(sums[own_sums]);
      if constexpr (!S::kAhead) release();
      if (S::kTwoSums || folds) fold(sums[own_sums], columns[p]);
    }
    accumulate = !S::kTwoSums && !folds;
  };
  constexpr std::true_type kYes;
  constexpr std::false_type kNo;
  constexpr std::integral_constant<int, 0> kEven;
  constexpr std::integral_constant<int, 1> kOdd;
  if constexpr (S::kAhead) make(operands[0], columns[0]);
  if (steps == 1) {
    run(0, kEven, kYes, kYes);
  } else {
    run(0, kEven, kYes, kNo);
    int i = 1;
    for (; i + 2 < steps; i += 2) {
      run(i, kOdd, kNo, kNo);
      run(i + 1, kEven, kNo, kNo);
    }
    if (i + 2 == steps) {
      run(i, kOdd, kNo, kNo);
      run(i + 1, kEven, kNo, kYes);
    } else {
      run(i, kOdd, kNo, kYes);
    }
  }
  results.store(a, tile.y, n, tile.row, tile.own, t);
}

template <class S>
__global__ void __launch_bounds__(S::kTile.threads(), S::kTile.blocks_per_sm)
    weight_only_kernel(const __grid_constant__ WeightOnlyTileArgs a) {
  extern __shared__ char memory[];
  __shared__ uint64_t barriers[2 * S::kStages];
  __shared__ alignas(16) RowOfCodes rows[S::kRows];
  const uint32_t ring = (shared_address(memory) + 1023) / 1024 * 1024;
  const uint32_t full = shared_address(barriers), empty = full + S::kStages * 8;
  const int32_t part = static_cast<int32_t>(blockIdx.x) / a.row_tiles;  // neighbouring blocks share columns
  const int32_t column_tile = part / a.splits, split = part - column_tile * a.splits;
  WeightOnlyTileOfBlock tile;
  tile.n0 = int64_t{column_tile} * S::kTile.columns();
  tile.own = (static_cast<int32_t>(blockIdx.x) - part * a.row_tiles) * S::kRows;
  tile.row = tile.own < a.last_row ? tile.own : a.last_row;
  tile.begin = split * a.split_stages;
  tile.end = tile.begin + a.split_stages < a.stages ? tile.begin + a.split_stages : a.stages;
  tile.y = split == 0 ? a.y : static_cast<float*>(a.y) + split * a.M * a.N;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, 4 * S::kTile.warpgroups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 128 * S::kTile.warpgroups) {
    give_registers<S::kTile.load_registers()>();
    if (threadIdx.x < 128 * S::kTile.warpgroups + kWarp && elected()) {
      prefetch_map(&a.map);
      load_stages<S>(a, ring, full, empty, tile.n0, tile.row, tile.begin, tile.end);
    }
    return;
  }
  take_registers<S::kTile.multiply_registers()>();
  if constexpr (S::kCodes) {
    wait_for_kernel_before();
    const int64_t m = tile.row + static_cast<int64_t>(threadIdx.x);
    if (threadIdx.x < S::kRows && m < a.M) rows[threadIdx.x] = {a.row_scale[m], a.row_zero != nullptr ? a.row_zero[m] : 0};
    consumers_sync<128 * S::kTile.warpgroups>();
  }
  multiply_stages<S>(a, tile, ring, full, empty, rows);
}

// ---- launches -------------------------------------------------------------------------------------------------------

using WeightOnlyKernel = void (*)(WeightOnlyTileArgs);

// For groups of so many k; 0: longer than a stage.
template <class X, int kBits>
WeightOnlyKernel weight_only_kernel_of(int tile, int group);

template <class X, int kBits, int kTile>
WeightOnlyKernel weight_only_tile_of(int group) {
  constexpr int kRows = kWeightOnlyTiles[kTile].rows;
  constexpr bool kCodes = std::is_same_v<X, int8_t>;
  using Does = WhileProductsRun;
  constexpr Does kDoes = kRows > 64 ? (kCodes ? Does::kMakes : Does::kWaits)  // there are no registers for more
                                    : (kCodes ? Does::kFoldsAndMakes : Does::kMakes);
  if (group == 32) return weight_only_kernel<WeightOnlyShape<X, kBits, kTile, 1, kDoes>>;
  if (group == 64) return weight_only_kernel<WeightOnlyShape<X, kBits, kTile, 2, kDoes>>;
  if constexpr (kCodes)
    if (group == 0) return weight_only_kernel<WeightOnlyShape<X, kBits, kTile, 4, Does::kMakes>>;
  return weight_only_kernel<WeightOnlyShape<X, kBits, kTile, 4, kDoes>>;
}

}  // namespace quant_ops::sm90

// Instantiates the kernels of one type of x and number of bits.
#define QO_WEIGHT_ONLY_KERNELS(X, BITS)                                                                    \
  template <>                                                                                              \
  quant_ops::sm90::WeightOnlyKernel quant_ops::sm90::weight_only_kernel_of<X, BITS>(int tile, int group) { \
    static_assert(kWeightOnlyTileCount == 3);                                                              \
    return tile == 0   ? weight_only_tile_of<X, BITS, 0>(group)                                            \
           : tile == 1 ? weight_only_tile_of<X, BITS, 1>(group)                                            \
                       : weight_only_tile_of<X, BITS, 2>(group);                                           \
  }

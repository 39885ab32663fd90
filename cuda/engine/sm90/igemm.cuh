// The kernel of the Hopper engine. A block takes tiles in turn, and its last warpgroup loads for the others. One thread waits for a
// free stage of the ring in shared memory and lets TMA fill it with a step's codes of both operands. Three warps bring what the
// epilogue reads per row and per column of y. The other warpgroups multiply: each waits for a full stage, starts wgmma on its 64 or
// 128 rows, and frees the stage before as soon as its multiplications are done. Sums stay in registers; the epilogue stores results
// from there, while the loads of the next tile already run.
//
// K may be split over blocks. Up to eight of them are a cluster, which adds its sums through its shared memory. More of them, or
// those of a tile whose blocks share loads, write int32 sums, and join_kernel (portable.cu) adds and finishes them. Read next:
// igemm.h for the operands' layout, instructions.cuh, epilogue.cuh.
#pragma once

#include "device/epilogue.cuh"
#include "engine/sm90/instructions.cuh"
#include "engine/sm90/kernels.cuh"

namespace quant_ops::sm90 {

// A kernel whose clusters join splits of K (kJoined) has one tile a cluster, and each block a part of K; any other takes tiles in
// turn.
template <int kKernel, bool kJoined>
struct Turns {
  static constexpr int kCluster = kTiles[kKernel].cluster;
  int32_t index, total, stride;

  __device__ __forceinline__ explicit Turns(const Schedule& s)
      : index(kJoined ? cluster_index() : static_cast<int32_t>(blockIdx.x) / kCluster),
        total(static_cast<int32_t>(clusters_of(s))),
        stride(kJoined ? total : static_cast<int32_t>(gridDim.x) / kCluster) {}
  __device__ __forceinline__ bool left() const { return index < total; }
  __device__ __forceinline__ void next() { index += stride; }
  __device__ __forceinline__ Work work(const Schedule& s) const {
    Work w = work_of(s, index);
    if constexpr (kJoined) w.split = static_cast<int32_t>(block_of_cluster());
    return w;
  }
};

// A block's ring and barriers, by their addresses in shared memory.
template <int kStages>
struct Shared {
  uint32_t ring, barriers;

  static constexpr int kBarriers = 2 * kStages + 4;
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + (kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t sides_full(int i) const { return barriers + (2 * kStages + i) * 8; }
  __device__ __forceinline__ uint32_t sides_empty(int i) const { return barriers + (2 * kStages + 2 + i) * 8; }
};
template <int kKernel>
using SharedOf = Shared<kTiles[kKernel].stages>;

// ---- loads ----------------------------------------------------------------------------------------------------------

template <int kKernel, bool kJoined>
__device__ __forceinline__ void load_tiles(const Args& a, const SharedOf<kKernel>& shared) {
  constexpr Tile kTile = kTiles[kKernel];
  constexpr int kShare = kTile.second / kTile.cluster;  // rows of the second operand that this block loads for its cluster
  const uint32_t rank = kTile.cluster > 1 ? block_of_cluster() : 0;
  const Schedule& schedule = a.schedule;
  // a weight whose rows are ordered is a tensor of sixteens of rows
  const bool sixteens[2] = {kTile.swapped && schedule.ordered, !kTile.swapped && schedule.ordered};
  Turns<kKernel, kJoined> turns(schedule);
  const int loads = kStepBytes / schedule.load;
  const int bytes = (schedule.first_load + schedule.second_load * kTile.cluster) * kStepBytes;
  RingPosition<kTile.stages> at;
  for (; turns.left(); turns.next()) {
    const Work w = turns.work(schedule);
    const int32_t first_row = tile_begin(w.first + static_cast<int32_t>(rank), kTile.first, schedule.first_last);
    const int32_t second_row = tile_begin(w.second, kTile.second, schedule.second_last) + static_cast<int32_t>(rank) * kShare;
    // the weight's rows of all groups follow each other
    const int32_t first = first_row + (kTile.swapped ? w.group * schedule.first_rows : 0);
    const int32_t second = second_row + (kTile.swapped ? 0 : w.group * schedule.second_rows);
    ImageLoad image = schedule.gathers ? image_load(schedule, first_row) : ImageLoad{};
    const int begin = w.split * schedule.split_steps, end = min(begin + schedule.split_steps, schedule.steps);
    LoadPosition position(schedule, begin * loads);
    for (int step = begin; step < end; ++step, at.advance()) {
      const uint32_t full = shared.full(at.stage), to = shared.ring + at.stage * kTile.stage_bytes();
      barrier_wait(shared.empty(at.stage), at.phase ^ 1);
      barrier_arrive_and_expect(full, bytes);
      for (int i = 0; i < loads; ++i, position.advance(schedule)) {
        const uint32_t first_to = to + i * kTile.first * schedule.load;
        const uint32_t second_to = to + kTile.first * kStepBytes + i * kTile.second * schedule.load;
        if (schedule.gathers) {
          move_to(schedule, w.group, position, &image);
          load_image(first_to, &a.first, full, image);
        } else {
          load_matrix(first_to, &a.first, full, position.k, sixteens[0] ? 0 : first, sixteens[0] ? first / 16 : 0);
        }
        constexpr uint16_t kAll = (1 << kTile.cluster) - 1;
        const int row = sixteens[1] ? 0 : second, sixteen = sixteens[1] ? second / 16 : 0;
        if constexpr (kTile.cluster > 1)
          load_matrix_to(kAll, second_to + rank * kShare * schedule.load, &a.second, full, position.k, row, sixteen);
        else
          load_matrix(second_to, &a.second, full, position.k, row, sixteen);
      }
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// Rows of the first operand that a warpgroup multiplies, 64 by an instruction.
template <int kKernel>
constexpr int kParts = kTiles[kKernel].first / 64 / kTiles[kKernel].warpgroups;
template <int kKernel>
using Sums = int32_t[kParts<kKernel>][kTiles[kKernel].second / 2];

// Starts the multiplications of a stage, whose codes came by loads of kLoad bytes of K. `part` is the first of the warpgroup's.
template <int kKernel, int kLoad>
__device__ __forceinline__ void multiply_stage(uint32_t stage, int part, bool accumulate, Sums<kKernel>& sums) {
  constexpr Tile kTile = kTiles[kKernel];
  const uint64_t first = operand<kLoad>(stage + part * 64 * kLoad), second = operand<kLoad>(stage + kTile.first * kStepBytes);
#pragma unroll
  for (int k = 0; k < kStepBytes / 32; ++k) {
    const int load = k * 32 / kLoad, within = k * 32 % kLoad;
#pragma unroll
    for (int i = 0; i < kParts<kKernel>; ++i)
      Wgmma<kTile.second>::run(sums[i], first + ((load * kTile.first + i * 64) * kLoad + within) / 16,
                               second + (load * kTile.second * kLoad + within) / 16, accumulate || k > 0);
  }
}

// Tells the loading thread of every block of the cluster that this warp has read a stage.
template <int kKernel>
__device__ __forceinline__ void release_stage(uint32_t empty) {
  constexpr int kCluster = kTiles[kKernel].cluster;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (kCluster == 1) {
    if (lane == 0) barrier_arrive(empty);
  } else {
    if (lane < kCluster) barrier_arrive_at(empty, static_cast<uint32_t>(lane));
  }
}

// The sums of `steps` steps.
template <int kKernel, int kLoad>
__device__ __forceinline__ void multiply_steps(const SharedOf<kKernel>& shared, int part, int steps,
                                               RingPosition<kTiles[kKernel].stages>& at, Sums<kKernel>& sums) {
  constexpr Tile kTile = kTiles[kKernel];
  int before = 0;
  for (int step = 0; step < steps; ++step, at.advance()) {
    barrier_wait(shared.full(at.stage), at.phase);
    multiply_fence();
    multiply_stage<kKernel, kLoad>(shared.ring + at.stage * kTile.stage_bytes(), part, step > 0, sums);
    multiply_commit();
    if (step > 0) {
      multiply_wait<1>();
      release_stage<kKernel>(shared.empty(before));
    }
    before = at.stage;
  }
  multiply_wait<0>();
  release_stage<kKernel>(shared.empty(before));
#pragma unroll
  for (int i = 0; i < kParts<kKernel>; ++i) keep(sums[i]);
}

// ---- results --------------------------------------------------------------------------------------------------------

// What the epilogue reads for a tile. Blocks have two of these, one of which is being filled.
template <int kKernel>
struct Sides {
  static constexpr int kRows = kTiles[kKernel].swapped ? kTiles[kKernel].second : kTiles[kKernel].first;
  static constexpr int kColumns = kTiles[kKernel].swapped ? kTiles[kKernel].first : kTiles[kKernel].second;
  OutputRow rows[kRows];  // a negative offset: beyond the last row, or another tile's
  alignas(16) float scale[kColumns];
  alignas(16) float bias[kColumns];
  alignas(16) int32_t sum[kColumns];
};
constexpr int kSideThreads = 3 * kWarp;

// Executed by the last three warps.
template <int kKernel, bool kJoined>
__device__ __forceinline__ void load_sides(const Args& a, Sides<kKernel>* sides, const SharedOf<kKernel>& shared) {
  constexpr Tile kTile = kTiles[kKernel];
  using Both = Sides<kKernel>;
  const uint32_t rank = kTile.cluster > 1 ? block_of_cluster() : 0;
  const int thread = static_cast<int>(threadIdx.x) - (kTile.threads() - kSideThreads);
  Turns<kKernel, kJoined> turns(a.schedule);
  RingPosition<2> at;
  for (; turns.left(); turns.next(), at.advance()) {
    const Work w = turns.work(a.schedule);
    const int first_tile = w.first + static_cast<int>(rank);
    const int first = tile_begin(first_tile, kTile.first, a.schedule.first_last);
    const int second = tile_begin(w.second, kTile.second, a.schedule.second_last);
    const int row = kTile.swapped ? second : first, rows = kTile.swapped ? a.schedule.second_rows : a.schedule.first_rows;
    const int column = kTile.swapped ? first : second, columns = kTile.swapped ? a.schedule.first_rows : a.schedule.second_rows;
    const int own_row = kTile.swapped ? w.second * kTile.second : first_tile * kTile.first;  // those before are another tile's
    Both& to = sides[at.stage];
    barrier_wait(shared.sides_empty(at.stage), at.phase ^ 1);
    for (int i = thread; i < Both::kRows; i += kSideThreads)
      to.rows[i] = row + i >= own_row && row + i < rows ? output_row(a.out, row + i) : OutputRow{0.0f, 0, -1};
    for (int i = thread; i < Both::kColumns; i += kSideThreads) {
      const OutputColumns<1> one = output_columns<1>(a.out, int64_t{w.group} * columns + column + i, columns - column - i);
      to.scale[i] = one.scale[0];
      to.bias[i] = one.bias[0];
      to.sum[i] = one.sum[0];
    }
    barrier_arrive(shared.sides_full(at.stage));
  }
}

template <int kKernel, int kCount>
__device__ __forceinline__ OutputColumns<kCount> columns_of(const Sides<kKernel>& sides, int column) {
  const auto scale = load_vector<kCount>(sides.scale + column), bias = load_vector<kCount>(sides.bias + column);
  const auto sum = load_vector<kCount>(sides.sum + column);
  OutputColumns<kCount> c;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    c.scale[i] = scale.get(i);
    c.bias[i] = bias.get(i);
    c.sum[i] = sum.get(i);
  }
  return c;
}

// ---- splits of K within a cluster -----------------------------------------------------------------------------------

// The columns of the second operand whose results this block of the cluster stores, in units of kUnit; without splits all of them.
template <int kKernel, bool kJoined>
struct Share {
  static constexpr int kUnit = kTiles[kKernel].swapped ? 8 : 16, kUnits = kTiles[kKernel].second / kUnit;
  int rank = 0, count = 1, begin = 0, end = kUnits;

  __device__ __forceinline__ explicit Share(const Schedule& s) {
    if constexpr (kJoined) {
      rank = static_cast<int>(block_of_cluster());
      count = s.joined;
      const int each = (kUnits + count - 1) / count;
      begin = rank * each;
      end = begin + each;
    }
  }
  __device__ __forceinline__ bool owns(int unit) const { return !kJoined || (unit >= begin && unit < end); }
};

// Where a thread leaves four of its sums for the block that owns their columns: in the ring, which nothing fills any more. A thread
// of that block finds them at the same place.
template <int kKernel>
__device__ __forceinline__ uint32_t place_of(const SharedOf<kKernel>& shared, int i, int eight) {
  constexpr int kThreads = 128 * kTiles[kKernel].warpgroups;
  return shared.ring + ((eight * kParts<kKernel> + i) * kThreads + static_cast<int>(threadIdx.x)) * 16;
}

template <int kKernel>
__device__ __forceinline__ void leave_sums(const SharedOf<kKernel>& shared, const Share<kKernel, true>& share,
                                           const Sums<kKernel>& sums) {
  consumers_sync<128 * kTiles[kKernel].warpgroups>();  // the other warpgroup has read the ring too
#pragma unroll
  for (int eight = 0; eight < kTiles[kKernel].second / 8; ++eight) {
    if (share.owns(eight * 8 / Share<kKernel, true>::kUnit)) continue;
#pragma unroll
    for (int i = 0; i < kParts<kKernel>; ++i)
      store_shared(place_of<kKernel>(shared, i, eight), sums[i][eight * 4], sums[i][eight * 4 + 1], sums[i][eight * 4 + 2],
                   sums[i][eight * 4 + 3]);
  }
  cluster_sync();
}

// The thread's sums of eight columns for part i: two neighbours of a row, and two of the row 8 below. With those of the cluster.
template <int kKernel, bool kJoined>
__device__ __forceinline__ void take_sums(const SharedOf<kKernel>& shared, const Share<kKernel, kJoined>& share, int i, int eight,
                                          const Sums<kKernel>& sums, int32_t (&four)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) four[c] = sums[i][eight * 4 + c];
  if constexpr (kJoined)
    for (int other = 1; other < share.count; ++other) {
      const int block = share.rank + other < share.count ? share.rank + other : share.rank + other - share.count;
      int32_t more[4];
      load_cluster(place_of<kKernel>(shared, i, eight), static_cast<uint32_t>(block), more);
#pragma unroll
      for (int c = 0; c < 4; ++c) four[c] += more[c];
    }
}

// ---- from sums to y -------------------------------------------------------------------------------------------------

// A thread's sums are of rows 16 warp + g and + 8 of every 64, and of two neighbours of every 8 columns, 2 t and 2 t + 1, where
// g = lane / 4 and t = lane % 4. What these are of y depends on the order in which the operands lie (thread_columns). `part` is the
// warpgroup's first 64 rows of the first operand.

// Columns along the second operand, 16 at a time: by Order::kFours a thread has four neighbours of them.
template <class Y, bool kVectors, int kKernel, bool kJoined>
__device__ __forceinline__ void store_tile(const Args& a, const Epilogue& e, const Work& w, const Sides<kKernel>& sides,
                                           const SharedOf<kKernel>& shared, int part, const Share<kKernel, kJoined>& share,
                                           const Sums<kKernel>& sums) {
  constexpr Tile kTile = kTiles[kKernel];
  constexpr int kNeighbours = kVectors ? kFour : 2;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp % 4;
  const OutputCodes codes = output_codes(e);
  const ThreadColumns of = thread_columns(false, kVectors || a.schedule.ordered, lane);
  OutputRow rows[kParts<kKernel>][2];
#pragma unroll
  for (int i = 0; i < kParts<kKernel>; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[i][h] = sides.rows[(part + i) * 64 + warp * 16 + h * 8 + lane / 4];
  const int begin = tile_begin(w.second, kTile.second, a.schedule.second_last);
#pragma unroll
  for (int j = 0; j < kTile.second / 16; ++j) {
    const int left = a.schedule.second_rows - (begin + j * 16);  // columns from here on
    if (left <= 0) break;
    if (!share.owns(j) || begin + j * 16 < w.second * kTile.second) continue;
#pragma unroll
    for (int eight = 0; eight < 2; eight += kNeighbours / 2) {
      const int column = of.first + eight * of.next_eight, within = j * 16 + column;
      const int n = w.group * a.schedule.second_rows + begin + within;
      const OutputColumns<kNeighbours> columns = columns_of<kKernel, kNeighbours>(sides, within);
#pragma unroll
      for (int i = 0; i < kParts<kKernel>; ++i) {
        int32_t taken[kNeighbours / 2][4];
#pragma unroll
        for (int k = 0; k < kNeighbours / 2; ++k) take_sums<kKernel, kJoined>(shared, share, i, j * 2 + eight + k, sums, taken[k]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          int32_t neighbours[kNeighbours];
#pragma unroll
          for (int k = 0; k < kNeighbours; ++k) neighbours[k] = taken[k / 2][h * 2 + k % 2];
          const int count = rows[i][h].offset < 0 ? 0 : left - column;
          finish_straight<Y, kVectors>(e, rows[i][h], columns, n, count, codes, neighbours);
        }
      }
    }
  }
}

// Columns along the first operand, 16 at a time: by Order::kPairs a thread has two neighbours of them.
template <class Y, bool kVectors, int kKernel, bool kJoined>
__device__ __forceinline__ void store_swapped_tile(const Args& a, const Epilogue& e, const Work& w, const Sides<kKernel>& sides,
                                                   const SharedOf<kKernel>& shared, int part, const Share<kKernel, kJoined>& share,
                                                   const Sums<kKernel>& sums) {
  constexpr Tile kTile = kTiles[kKernel];
  constexpr int kNeighbours = kVectors ? 2 : 1;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp % 4;
  const OutputCodes codes = output_codes(e);
  const ThreadColumns of = thread_columns(true, kVectors || a.schedule.ordered, lane);
  const int begin = tile_begin(w.first, kTile.first, a.schedule.first_last);
#pragma unroll
  for (int i = 0; i < kParts<kKernel>; ++i) {
    const int sixteen = (part + i) * 64 + warp * 16, left = a.schedule.first_rows - (begin + sixteen);
    if (left <= 0 || begin + sixteen < w.first * kTile.first) continue;
    const int n = w.group * a.schedule.first_rows + begin + sixteen;
    OutputColumns<kNeighbours> columns[2 / kNeighbours];
#pragma unroll
    for (int c = 0; c < 2 / kNeighbours; ++c)
      columns[c] = columns_of<kKernel, kNeighbours>(sides, sixteen + of.first + c * of.next_eight);
#pragma unroll
    for (int j = 0; j < kTile.second / 8; ++j) {
      if (!share.owns(j)) continue;
      int32_t four[4];
      take_sums<kKernel, kJoined>(shared, share, i, j, sums, four);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const OutputRow row = sides.rows[j * 8 + lane % 4 * 2 + k];
#pragma unroll
        for (int c = 0; c < 2 / kNeighbours; ++c) {
          const int column = of.first + c * of.next_eight, count = row.offset < 0 ? 0 : left - column;
          int32_t neighbours[kNeighbours];
#pragma unroll
          for (int h = 0; h < kNeighbours; ++h) neighbours[h] = four[(c + h) * 2 + k];
          finish_straight<Y, kVectors>(e, row, columns[c], n + column, count, codes, neighbours);
        }
      }
    }
  }
}

template <class Y, bool kVectors, int kKernel, bool kJoined>
__device__ __forceinline__ void store(const Args& a, const Epilogue& e, const Work& w, const Sides<kKernel>& sides,
                                      const SharedOf<kKernel>& shared, int part, const Share<kKernel, kJoined>& share,
                                      const Sums<kKernel>& sums) {
  if constexpr (kTiles[kKernel].swapped)
    store_swapped_tile<Y, kVectors, kKernel, kJoined>(a, e, w, sides, shared, part, share, sums);
  else
    store_tile<Y, kVectors, kKernel, kJoined>(a, e, w, sides, shared, part, share, sums);
}

template <int kKernel, bool kJoined>
__device__ __forceinline__ void multiply_tiles(const Args& a, const SharedOf<kKernel>& shared, const Sides<kKernel>* sides) {
  constexpr Tile kTile = kTiles[kKernel];
  // the same in all lanes, which the compiler is told, because wgmma takes its operands from uniform registers
  const int part = kTile.warpgroups == 1 ? 0 : __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) * kParts<kKernel>;
  Turns<kKernel, kJoined> turns(a.schedule);
  const Share<kKernel, kJoined> share(a.schedule);
  RingPosition<kTile.stages> at;
  RingPosition<2> sides_at;
  for (; turns.left(); turns.next(), sides_at.advance()) {
    const Work w = turns.work(a.schedule);
    const int begin = w.split * a.schedule.split_steps, end = min(begin + a.schedule.split_steps, a.schedule.steps);
    Sums<kKernel> sums;
    if (a.schedule.load == kStepBytes)
      multiply_steps<kKernel, kStepBytes>(shared, part, end - begin, at, sums);
    else
      multiply_steps<kKernel, kStepBytes / 2>(shared, part, end - begin, at, sums);

    if constexpr (kJoined) leave_sums<kKernel>(shared, share, sums);

    Epilogue e = a.out;
    if (a.schedule.splits > 1) e.y = static_cast<int32_t*>(e.y) + w.split * a.split_stride;
    barrier_wait(shared.sides_full(sides_at.stage), sides_at.phase);
    with_output_type(e.dtype, [&](auto* type) {
      using Y = std::remove_pointer_t<decltype(type)>;
      if (e.vectors)
        store<Y, true, kKernel, kJoined>(a, e, w, sides[sides_at.stage], shared, part, share, sums);
      else
        store<Y, false, kKernel, kJoined>(a, e, w, sides[sides_at.stage], shared, part, share, sums);
    });
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared.sides_empty(sides_at.stage));
  }
}

template <int kKernel, bool kJoined>
__global__ void __launch_bounds__(kTiles[kKernel].threads(), kTiles[kKernel].blocks_per_sm)
    igemm_kernel(const __grid_constant__ Args a) {
  constexpr Tile kTile = kTiles[kKernel];
  static_assert(
      (kTile.shared_bytes() + sizeof(Sides<kKernel>) * 2 + SharedOf<kKernel>::kBarriers * 8 + 1024) * kTile.blocks_per_sm <=
          228 * 1024,
      "the blocks of a multiprocessor fit in it");
  extern __shared__ char memory[];
  __shared__ uint64_t barriers[SharedOf<kKernel>::kBarriers];
  __shared__ Sides<kKernel> sides[2];
  const SharedOf<kKernel> shared{(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTile.stages; ++i) {
      barrier_init(shared.full(i), 1);
      barrier_init(shared.empty(i), 4 * kTile.warpgroups * kTile.cluster);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.sides_full(i), kSideThreads);
      barrier_init(shared.sides_empty(i), 4 * kTile.warpgroups);
    }
    barrier_init_fence();
  }
  if (threadIdx.x == kWarp) {
    prefetch_map(&a.first);
    prefetch_map(&a.second);
  }
  if constexpr (kTile.cluster > 1)
    cluster_sync();
  else
    __syncthreads();

  if (threadIdx.x < 128 * kTile.warpgroups) {
    if constexpr (kTile.moves_registers()) take_registers<kTile.multiply_registers()>();
    multiply_tiles<kKernel, kJoined>(a, shared, sides);
  } else {
    if constexpr (kTile.moves_registers()) give_registers<kTile.load_registers()>();
    if (threadIdx.x % 128 >= kWarp) {
      wait_for_kernel_before();
      load_sides<kKernel, kJoined>(a, sides, shared);
    } else if (elected()) {
      wait_for_kernel_before();
      load_tiles<kKernel, kJoined>(a, shared);
    }
    if constexpr (kJoined) {  // leave_sums of the others
      __syncwarp();
      cluster_sync();
    }
  }
  // no block leaves while others of its cluster write to its memory or read from it
  if constexpr (kTile.cluster > 1 || kJoined) {
    __syncwarp();
    cluster_sync();
  }
}

template <int kKernel, bool kJoined>
cudaError_t launch_kernel(const Args& a, int blocks, cudaStream_t stream) {
  constexpr Tile kTile = kTiles[kKernel];
  const cudaError_t allowed =
      allow_shared_memory(reinterpret_cast<const void*>(igemm_kernel<kKernel, kJoined>), kTile.shared_bytes());
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(cluster_blocks(a.schedule));
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchAttribute attributes[2] = {cluster, early_start()};
  constexpr int kClusterAttributes = kTile.cluster > 1 || kJoined ? 1 : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kTile.threads());
  config.dynamicSmemBytes = kTile.shared_bytes();
  config.stream = stream;
  config.attrs = attributes + 1 - kClusterAttributes;
  config.numAttrs = kClusterAttributes + kEarlyAttributes;
  return cudaLaunchKernelEx(&config, igemm_kernel<kKernel, kJoined>, a);
}

template <int kKernel>
cudaError_t launch(const Args& a, int blocks, cudaStream_t stream) {
  if constexpr (kTiles[kKernel].cluster == 1)
    if (a.schedule.joined > 1) return launch_kernel<kKernel, true>(a, blocks, stream);
  return launch_kernel<kKernel, false>(a, blocks, stream);
}

}  // namespace quant_ops::sm90

// Instantiates the kernel of that name.
#define QO_SM90_KERNEL(name)                                                                                           \
  template cudaError_t quant_ops::sm90::launch<quant_ops::sm90::kernel_named(name)>(const quant_ops::sm90::Args&, int, \
                                                                                    cudaStream_t);

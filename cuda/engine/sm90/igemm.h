// The Hopper engine: integer products and implicit-GEMM convolutions by wgmma and TMA. Plain host code: the table of tiles, which
// problems they take, and what the memory accelerator is told about the operands. The portable engine computes what is refused.
//
//   sums[first, second] = sum over k of codes of the first operand times codes of the second
//
// The first operand is the rows of a product or the output pixels of a convolution, the second the weight. In a swapped tile they
// change places, so that few rows fill the short side of the matrix instruction (64 x 16..256). K goes by in steps of 128 bytes:
// one load of 128, or two of 64 where the channels of a tap fill these better. Read next: igemm.cuh for the kernel.
#pragma once

#include <algorithm>
#include <iterator>
#include <string_view>

#include "engine/choose.h"
#include "engine/problem.h"

namespace quant_ops::sm90 {

constexpr int kStepBytes = 128;

struct Tile {
  const char* name;
  int first, second;  // rows of each operand
  int stages;         // of a step's codes in shared memory
  int warpgroups;     // that multiply, each some of the first operand's rows
  int cluster;        // neighbouring blocks along the first operand, which share their loads of the second
  bool swapped;
  int blocks_per_sm;  // resident at once

  constexpr int threads() const { return 128 * (warpgroups + 1); }  // one warpgroup loads
  // Registers of a thread: when the block starts, of the warpgroup that loads, and of one that multiplies once that one has given
  // up its share. Multiples of 8.
  constexpr int registers() const { return std::min(255, 65536 / (threads() * blocks_per_sm)) / 8 * 8; }
  constexpr int load_registers() const { return 40; }
  constexpr bool moves_registers() const { return warpgroups > 1 || blocks_per_sm > 1; }
  constexpr int multiply_registers() const {
    return std::min(240, (registers() * (warpgroups + 1) - load_registers()) / warpgroups / 8 * 8);
  }
  constexpr int stage_bytes() const { return (first + second) * kStepBytes; }
  constexpr int shared_bytes() const { return stages * stage_bytes() + 1024; }  // the ring starts at a multiple of 1024
};

constexpr Tile kTiles[] = {
    // name, first, second, stages, warpgroups, cluster, swapped, blocks_per_sm
    {"igemm_s8s8_64x16x128_swapped_wgmma", 64, 16, 8, 1, 1, true, 2},
    {"igemm_s8s8_64x32x128_swapped_wgmma", 64, 32, 8, 1, 1, true, 2},
    {"igemm_s8s8_64x48x128_swapped_wgmma", 64, 48, 7, 1, 1, true, 2},
    {"igemm_s8s8_64x64x128_swapped_wgmma", 64, 64, 6, 1, 1, true, 2},
    {"igemm_s8s8_64x96x128_swapped_wgmma", 64, 96, 5, 1, 1, true, 2},
    {"igemm_s8s8_64x192x128_swapped_wgmma", 64, 192, 3, 1, 1, true, 2},
    {"igemm_s8s8_64x64x128_wgmma", 64, 64, 4, 1, 1, false, 3},
    {"igemm_s8s8_64x128x128_wgmma", 64, 128, 4, 1, 1, false, 2},
    {"igemm_s8s8_64x160x128_wgmma", 64, 160, 3, 1, 1, false, 2},
    {"igemm_s8s8_64x256x128_wgmma", 64, 256, 5, 1, 1, false, 1},
    {"igemm_s8s8_128x128x128_wgmma", 128, 128, 3, 1, 1, false, 2},
    {"igemm_s8s8_128x160x128_wgmma", 128, 160, 5, 2, 1, false, 1},
    {"igemm_s8s8_128x256x128_wgmma", 128, 256, 4, 2, 2, false, 1},
};
constexpr int kKernels = sizeof(kTiles) / sizeof(kTiles[0]);

// The number of a kernel; kKernels if none has that name.
constexpr int kernel_named(std::string_view name) {
  int kernel = 0;
  while (kernel < kKernels && name != kTiles[kernel].name) ++kernel;
  return kernel;
}

// ---- operands -------------------------------------------------------------------------------------------------------

// In which order a box of rows lies in shared memory. A thread's sums belong to rows (8 apart) and columns (2 neighbours of every
// 8); these orders of 16 rows make neighbours in y of what a thread has, so that its stores are vectors. They take whole sixteens:
// behind the last one TMA would read rows that do not exist. A weight of any other number of rows has the plain order.
enum class Order : int32_t {
  kPlain,
  kFours,  // second operand: row 16 J + 4 t + 2 j + e lies at 16 J + 8 j + 2 t + e, e, j < 2, t < 4
  kPairs,  // first operand: row 16 W + 2 g + h lies at 16 W + 8 h + g, h < 2, g < 8
};

// Of every 16 columns of y, in the order of a weight: the first one of which a thread has sums, and how far the sums of the next 8
// rows of the box are behind it. In a tile that is not swapped, the column after each is the thread's as well.
struct ThreadColumns {
  int first, next_eight;
};
QO_HD_MEMBER ThreadColumns thread_columns(bool swapped, bool ordered, int lane) {
  if (swapped) return ordered ? ThreadColumns{lane / 4 * 2, 1} : ThreadColumns{lane / 4, 8};
  return ordered ? ThreadColumns{lane % 4 * 4, 2} : ThreadColumns{lane % 4 * 2, 8};
}

// A matrix as a tensor of five dimensions for TMA, the contiguous one first: sizes, strides in bytes of all but the first, and the
// box of one load.
struct MatrixMap {
  uint64_t size[5], stride[4];
  uint32_t box[5];
};
inline MatrixMap matrix_map(int64_t k, int64_t rows, int64_t stride, Order order, int box_k, int box_rows) {
  const auto whole = static_cast<uint64_t>(rows), sixteens = whole / 16, s = static_cast<uint64_t>(stride);
  const auto wide = static_cast<uint64_t>(k);
  const auto box = static_cast<uint32_t>(box_rows), load = static_cast<uint32_t>(box_k);
  if (order == Order::kFours) return {{wide, 2, 4, 2, sixteens}, {s, 4 * s, 2 * s, 16 * s}, {load, 2, 4, 2, box / 16}};
  if (order == Order::kPairs) return {{wide, 8, 2, 1, sixteens}, {2 * s, s, 16 * s, 16 * s}, {load, 8, 2, 1, box / 16}};
  return {{wide, whole, 1, 1, 1}, {s, s, s, s}, {load, box, 1, 1, 1}};
}

// An image of NHWC codes for TMA's im2col mode: a load takes `pixels` output pixels, in the order of y, under one tap. Positions
// are those of tap (0, 0), from `lower` before the first pixel to `upper` behind the last one; pixels outside of the image are
// zeros.
struct ImageMap {
  uint64_t size[4], stride[3];  // channels, width, height, samples
  int lower[2], upper[2];       // width, height
  uint32_t channels, pixels;    // of a load
  uint32_t step[4];
};
inline ImageMap image_map(const Gather& g, int64_t channels, int64_t samples, int box_channels, int box_pixels) {
  const auto u = [](int64_t n) { return static_cast<uint64_t>(n); };
  const auto step = [&](int d) { return static_cast<uint32_t>(g.stride[d]); };
  const int64_t columns = g.columns.divisor, rows = g.pixels.divisor / columns;
  const auto last = [&](int d, int64_t count, int64_t size) {  // the last position, seen from the last pixel
    return static_cast<int>((count - 1) * g.stride[d] - g.pad[d] - (size - 1));
  };
  return {.size = {u(channels), u(g.width), u(g.height), u(samples)},
          .stride = {u(g.pixel), u(g.row), u(g.sample)},
          .lower = {-g.pad[1], -g.pad[0]},
          .upper = {last(1, columns, g.width), last(0, rows, g.height)},
          .channels = static_cast<uint32_t>(box_channels),
          .pixels = static_cast<uint32_t>(box_pixels),
          .step = {1, step(1), step(0), 1}};
}

// ---- problems -------------------------------------------------------------------------------------------------------

// A product of any engine, or a convolution: then `a` and M of the product are those of gathered pixels.
struct Problem {
  int64_t M = 0, N = 0, K = 0, groups = 1;  // N and K of a group; K counts the padding of each tap
  const int8_t* a = nullptr;                // or gather.codes
  int64_t a_stride = 0;
  const int8_t* b = nullptr;  // [groups * N, K]
  int64_t b_stride = 0;
  bool gathers = false;
  Gather gather{};
  int64_t samples = 0;  // of the gathered codes
  Epilogue out;         // of N * groups columns
};

inline bool is_ordered(const Problem& p) { return p.N % 16 == 0; }
inline Order weight_order(const Problem& p, const Tile& t) {
  return !is_ordered(p) ? Order::kPlain : t.swapped ? Order::kPairs : Order::kFours;
}
// Whether stores are vectors of four neighbouring columns, or of two in a swapped tile.
inline bool stores_vectors(const Problem& p) { return is_ordered(p) && p.out.vectors; }

// Bytes of a load of a tap of that many bytes: what leaves the fewest bytes of the last one unused.
inline int load_bytes(int64_t tap) {
  const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  return up(tap, 64) < up(tap, 128) ? 64 : 128;
}

inline int64_t steps_of(const Problem& p) {
  if (!p.gathers) return (p.K + kStepBytes - 1) / kStepBytes;
  const int64_t tap = p.gather.group, load = load_bytes(tap);
  return (p.K / tap * ((tap + load - 1) / load) * load + kStepBytes - 1) / kStepBytes;
}

// ---- order of the work ----------------------------------------------------------------------------------------------

constexpr int32_t kBand = 8;

// Loads stay within their operands, because TMA takes about nine clocks for each row of a box that is outside, and less than one
// for a row inside (H200: 65 rows by 14336x4096 took 45 us where 128 rows took 27, by as many tiles). So the last tile of an
// operand begins early enough to end with it, and leaves the results that the tile before has to that one; and an operand that is
// smaller than a tile is loaded by smaller boxes, behind which the stage keeps anything, for sums that nobody stores. A weight's
// tiles begin at multiples of 16 rows: up to 15 rows may be outside.
QO_HD_MEMBER int32_t tile_begin(int32_t tile, int32_t rows, int32_t last) {
  const int32_t begin = tile * rows;
  return begin < last ? begin : last;
}

// How the blocks share a problem, and what they load for it; a kernel parameter.
struct Schedule {
  int32_t first_blocks, second_blocks, groups, splits;  // tiles along each operand, of one group
  int32_t cluster;                                      // blocks that share loads
  int32_t joined;                                       // splits that a cluster joins itself, which `splits` does not count
  FastDiv plane, band, last_band, split;                // divisions of a block's index
  int32_t steps, split_steps;                           // of K, and of a split of it
  int32_t load;                                         // bytes of K of a load: 128 or 64
  int32_t first_rows, second_rows;                      // of one group
  int32_t first_last, second_last;                      // where the last tile begins
  int32_t first_load, second_load;                      // rows of a load of a block
  int32_t k;                                            // bytes of K of one group: what is behind is zeros
  bool gathers;
  bool ordered;                            // the rows of the weight, by weight_order
  int32_t tap, tap_loads, kernel_columns;  // of a convolution: bytes of a tap, and loads that cover it
  FastDiv columns, pixels;                 // of the output, of a sample
  int32_t stride[2], pad[2], dilation[2];
};
Schedule schedule_of(const Problem& p, const KernelPlan& plan);

// Whether the splits of a plan are those of a cluster.
inline bool joins_in_cluster(const KernelPlan& plan) { return plan.splits > 1 && plan.sums == 0; }

// Blocks of a cluster, by either reason.
QO_HD_MEMBER int32_t cluster_blocks(const Schedule& s) { return s.cluster * s.joined; }

QO_HD_MEMBER int64_t clusters_of(const Schedule& w) {
  return int64_t{w.first_blocks} / w.cluster * w.second_blocks * w.groups * w.splits;
}

// What a cluster computes: its first tile. Tiles along the first operand change fastest within a band of kBand clusters, so that
// blocks that run at the same time share operands in the L2 cache.
struct Work {
  int32_t group, split, first, second;
};
QO_HD_MEMBER Work work_of(const Schedule& a, int32_t index) {
  const auto outer = static_cast<int32_t>(a.plane.quotient(index));
  const int32_t within = index - outer * static_cast<int32_t>(a.plane.divisor);
  const auto band = static_cast<int32_t>(a.band.quotient(within));
  const int32_t place = within - band * static_cast<int32_t>(a.band.divisor), left = a.first_blocks / a.cluster - band * kBand;
  Work w;
  w.group = static_cast<int32_t>(a.split.quotient(outer));
  w.split = outer - w.group * a.splits;
  w.second = left >= kBand ? place / kBand : static_cast<int32_t>(a.last_band.quotient(place));
  w.first = (band * kBand + place - w.second * (left < kBand ? left : kBand)) * a.cluster;
  return w;
}

// Where the codes under one tap of a run of output pixels are.
struct ImageLoad {
  int channel, w, h, sample;  // of the first pixel, for tap (0, 0)
  int tap_w, tap_h;           // offsets of the tap, not negative
};

// The loads of a tile along K, one after the other.
struct LoadPosition {
  int k;              // of the weight, and of a dense first operand
  int channel, r, s;  // of a gathered one
  int left;           // loads of this tap

  QO_HD_MEMBER LoadPosition(const Schedule& a, int load) : k(load * a.load), channel(0), r(0), s(0), left(a.tap_loads) {
    if (!a.gathers || load == 0) return;
    const int tap = load / a.tap_loads, chunk = load - tap * a.tap_loads;
    channel = chunk * a.load;
    k = tap * a.tap + channel;
    left -= chunk;
    r = tap / a.kernel_columns;
    s = tap - r * a.kernel_columns;
  }
  QO_HD_MEMBER void advance(const Schedule& a) {
    k += a.load;
    if (!a.gathers) return;
    channel += a.load;
    if (--left > 0) return;
    k += a.tap - channel;
    channel = 0;
    left = a.tap_loads;
    if (++s == a.kernel_columns) {
      s = 0;
      ++r;
    }
  }
};

// The pixels from output pixel `m` on, for tap (0, 0) of the first channels.
QO_HD_MEMBER ImageLoad image_load(const Schedule& a, int m) {
  ImageLoad at{};
  at.sample = static_cast<int>(a.pixels.quotient(m));
  const int pixel = m - at.sample * static_cast<int>(a.pixels.divisor), row = static_cast<int>(a.columns.quotient(pixel));
  at.h = row * a.stride[0] - a.pad[0];
  at.w = (pixel - row * static_cast<int>(a.columns.divisor)) * a.stride[1] - a.pad[1];
  return at;
}
QO_HD_MEMBER void move_to(const Schedule& a, int group, const LoadPosition& position, ImageLoad* at) {
  const bool exists = position.k < a.k;  // a last load may only fill the step: the weight's zeros make it count for nothing
  at->channel = group * a.tap + position.channel;
  at->tap_h = exists ? position.r * a.dilation[0] : 0;
  at->tap_w = exists ? position.s * a.dilation[1] : 0;
}

// ---- plans ----------------------------------------------------------------------------------------------------------

// A dense product as a Problem.
Problem problem_of(const IgemmProblem& p);

// Whether the tile computes a problem, but for the addresses of its operands.
bool takes(const Problem& p, int kernel);

// Runs on the current device, which has compute capability 9.0. `sums` is memory for plan.sums values. Throws std::runtime_error
// where a launch fails.
void run(const Problem& p, const KernelPlan& plan, int32_t* sums, const Launch& at);

}  // namespace quant_ops::sm90

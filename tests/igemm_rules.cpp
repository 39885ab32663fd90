// The address arithmetic, fragment maps and tile choice of the portable CUDA engine, and the plans of its operators, on the host
// (test_cuda_igemm_build.py). Nothing is launched. Prints what is wrong and exits with 1.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "contract/cuda_weights.h"
#include "device/common.cuh"
#include "device/encode.cuh"
#include "engine/choose.h"
#include "launch.h"

using namespace quant_ops;

#define EXPECT(condition, ...)         \
  do {                                 \
    if (!(condition)) {                \
      std::printf("%s: ", #condition); \
      std::printf(__VA_ARGS__);        \
      std::printf("\n");               \
      std::exit(1);                    \
    }                                  \
  } while (0)

// ---- shared memory --------------------------------------------------------------------------------------------------

// Eight lanes that are served at once lie in eight different groups of four banks.
static void expect_no_conflict(const int (&offsets)[8], const char* what) {
  std::set<int> places;
  for (int offset : offsets) places.insert(offset % 128 / 16);
  EXPECT(places.size() == 8, "%s, first offset %d", what, offsets[0]);
}

template <int kRowBytes>
static void check_swizzle() {
  constexpr int kRows = 256, kVectors = kRowBytes / 16;
  std::set<int> places;
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector) {
      const int offset = tile_offset<kRowBytes>(row, vector);
      EXPECT(offset % 16 == 0 && offset >= row * kRowBytes && offset < (row + 1) * kRowBytes, "row %d vector %d", row, vector);
      places.insert(offset);
    }
  EXPECT(places.size() == size_t{kRows} * kVectors, "one place for each");
  int offsets[8];
  for (int first = 0; first < kRows; first += 8)  // ldmatrix: a matrix at a time
    for (int vector = 0; vector < kVectors; ++vector) {
      for (int r = 0; r < 8; ++r) offsets[r] = tile_offset<kRowBytes>(first + r, vector);
      expect_no_conflict(offsets, "ldmatrix");
    }
  for (int first = 0; first < kRows * kVectors; first += 8) {  // copies: neighbouring lanes, along rows
    for (int lane = 0; lane < 8; ++lane)
      offsets[lane] = tile_offset<kRowBytes>((first + lane) / kVectors, (first + lane) % kVectors);
    expect_no_conflict(offsets, "copy");
  }
}

// Pairs of sums are written by half a warp at once, in 32 banks of four bytes.
static void check_staging() {
  for (const IgemmTile& t : kIgemmTiles)
    for (int half = 0; half < 2; ++half) {
      std::set<int> banks;
      const int pitch = t.n / t.warps_n + 8;
      for (int lane = half * 16; lane < half * 16 + 16; ++lane)
        for (int word = 0; word < 2; ++word) banks.insert((c_row(lane) * pitch + c_column(lane) + word) % 32);
      EXPECT(banks.size() == 32, "%s", t.name);
    }
  for (int64_t k = 16; k < 20000; k += 16)
    for (int phase = 0; phase < 4; ++phase) {
      int offsets[8];
      for (int i = 0; i < 8; ++i) {
        const int lane = phase * 8 + i;
        offsets[i] = static_cast<int>(lane / 4 * gemv_pitch(k) + lane % 4 * 16);
      }
      expect_no_conflict(offsets, "gemv");
    }
}

// ---- fragments: the tables of the PTX manual for mma.m16n8k32 with .s8 ----------------------------------------------

static void check_fragments() {
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, thread = lane % 4;
    // what ldmatrix.x4 gives: word w of a lane is word lane % 4 of row lane / 4 of matrix w, whose rows lanes 8 w + r name
    for (int w = 0; w < 4; ++w)
      for (int byte = 0; byte < 4; ++byte) {
        const int namer = w * 8 + lane / 4, column = lane % 4 * 4 + byte;
        const int a = w * 4 + byte;  // a0 .. a15
        const bool top = a < 4 || (a >= 8 && a < 12);
        EXPECT(a_row(namer) == (top ? group : group + 8), "row of a%d, lane %d", a, lane);
        EXPECT(a_vector(namer) * 16 + column == thread * 4 + (a & 3) + (a < 8 ? 0 : 16), "k of a%d, lane %d", a, lane);
        const int b = w % 2 * 4 + byte, block = w / 2;  // b0 .. b7 of columns 0 .. 7, then of 8 .. 15
        EXPECT(b_row(namer) == group + block * 8, "column of b%d, lane %d", b, lane);
        EXPECT(b_vector(namer) * 16 + column == thread * 4 + (b & 3) + (b < 4 ? 0 : 16), "k of b%d, lane %d", b, lane);
      }
    for (int c = 0; c < 4; ++c) {
      EXPECT(c_row(lane) + c / 2 * 8 == (c < 2 ? group : group + 8), "row of c%d", c);
      EXPECT(c_column(lane) + c % 2 == thread * 2 + (c & 1), "column of c%d", c);
    }
  }
}

// ---- convolution ----------------------------------------------------------------------------------------------------

static void check_gather(std::mt19937_64& random) {
  const auto pick = [&](int64_t low, int64_t high) { return low + static_cast<int64_t>(random() % (high - low + 1)); };
  for (int round = 0; round < 300; ++round) {
    const int64_t N = pick(1, 3), H = pick(1, 9), W = pick(1, 9), R = pick(1, 4), S = pick(1, 4), groups = pick(1, 3),
                  tap = pick(1, 5) * 4;
    int64_t stride[2], pad[2], dilation[2];
    for (int d = 0; d < 2; ++d) {
      stride[d] = pick(1, 3);
      pad[d] = pick(0, 4);
      dilation[d] = pick(1, 3);
    }
    const int64_t reach_h = H + 2 * pad[0] - dilation[0] * (R - 1) - 1, reach_w = W + 2 * pad[1] - dilation[1] * (S - 1) - 1;
    if (reach_h < 0 || reach_w < 0) continue;
    const int64_t OH = reach_h / stride[0] + 1, OW = reach_w / stride[1] + 1, pixel = groups * tap;
    std::vector<int8_t> codes(static_cast<size_t>(N * H * W * pixel)), padding(static_cast<size_t>(N * 16));
    Gather g;
    g.codes = codes.data();
    g.padding = padding.data();
    g.sample = H * W * pixel;
    g.row = W * pixel;
    g.pixel = pixel;
    g.group = tap;
    g.height = static_cast<int32_t>(H);
    g.width = static_cast<int32_t>(W);
    for (int d = 0; d < 2; ++d) {
      g.stride[d] = static_cast<int32_t>(stride[d]);
      g.pad[d] = static_cast<int32_t>(pad[d]);
      g.dilation[d] = static_cast<int32_t>(dilation[d]);
    }
    g.pixels = FastDiv(OH * OW);
    g.columns = FastDiv(OW);
    g.tap = FastDiv(tap);
    g.kernel_columns = FastDiv(S);
    int64_t m = 0;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t oh = 0; oh < OH; ++oh)
        for (int64_t ow = 0; ow < OW; ++ow, ++m)
          for (int64_t group = 0; group < groups; ++group) {
            const GatherRow row = gather_row(g, m, group);
            EXPECT(row.sample == n, "sample %d", int(n));
            int64_t k = 0;
            for (int64_t r = 0; r < R; ++r)
              for (int64_t s = 0; s < S; ++s)
                for (int64_t c = 0; c < tap; ++c, ++k) {
                  const int64_t h = oh * stride[0] - pad[0] + r * dilation[0], w = ow * stride[1] - pad[1] + s * dilation[1];
                  const GatherTap at = gather_tap(g, k);
                  const bool exists = h >= 0 && h < H && w >= 0 && w < W;
                  EXPECT(inside(g, row, at) == exists, "m %d k %d", int(m), int(k));
                  if (exists)
                    EXPECT(row.at + at.offset == codes.data() + ((n * H + h) * W + w) * pixel + group * tap + c, "m %d k %d",
                           int(m), int(k));
                }
          }
  }
}

static void check_weights(std::mt19937_64& random) {
  for (int round = 0; round < 20000; ++round) {
    const int64_t groups = 1 + static_cast<int64_t>(random() % 40), n = 1 + static_cast<int64_t>(random() % 100);
    const int64_t c = static_cast<int64_t>(random() % 200), r = 1 + static_cast<int64_t>(random() % 5),
                  s = 1 + static_cast<int64_t>(random() % 5);
    const CudaWeights w = cuda_weights(groups * n, c, r, s, groups);
    EXPECT(w.groups * w.joined_groups == groups && w.n == n * w.joined_groups, "groups");
    EXPECT(w.n <= 64 || w.joined_groups == 1, "joined groups fit a tile");
    EXPECT(w.row_bytes % 16 == 0 && w.k % 16 == 0 && w.k <= w.row_bytes && w.rows_offset % 16 == 0, "alignment");
    EXPECT(w.tap_bytes >= w.channels() && w.tap_bytes % (w.taps == 1 ? 16 : 4) == 0 && w.taps * w.tap_bytes <= w.k, "tap");
    EXPECT(!w.plain || (w.row_bytes == c && w.taps == 1 && groups == 1), "plain");
  }
}

// ---- tile choice ----------------------------------------------------------------------------------------------------

static void check_dispatch(std::mt19937_64& random) {
  // arch, multiprocessors, shared memory of a block and of a multiprocessor (CUDA programming guide, technical specifications)
  const GpuLimits gpus[] = {{80, 108, 163 << 10, 164 << 10}, {86, 84, 99 << 10, 100 << 10},    {89, 142, 99 << 10, 100 << 10},
                            {90, 132, 227 << 10, 228 << 10}, {100, 148, 227 << 10, 228 << 10}, {120, 170, 99 << 10, 100 << 10},
                            {86, 2, 99 << 10, 100 << 10}};
  for (const GpuLimits& gpu : gpus) {
    for (const IgemmTile& t : kIgemmTiles) {
      EXPECT(tile_fits(t, gpu), "%s on %d: every portable tile runs everywhere", t.name, gpu.arch);
      EXPECT(t.threads() <= 1024 && resident_blocks(t, gpu) >= 1, "%s", t.name);
    }
    for (int round = 0; round < 4000; ++round) {
      const auto size = [&](int bits) { return 1 + static_cast<int64_t>(random() >> (64 - 1 - random() % bits)); };
      const IgemmShape shape{size(22), size(17), size(17) / 16 * 16, random() % 4 ? 1 : size(6), random() % 4 ? 16 : 4};
      const KernelPlan c = choose_tile(shape, gpu, KernelChoice());
      EXPECT(c.engine == Engine::kPortable && c.kernel >= 0 && c.kernel < kIgemmTileCount, "a tile");
      const IgemmTile& t = kIgemmTiles[c.kernel];
      EXPECT(c.split_k >= t.k && c.split_k % t.k == 0, "splits are whole steps");
      EXPECT(c.splits >= 1 && c.splits <= kMostSplits && c.splits * c.split_k >= shape.K, "splits cover K");
      EXPECT(c.splits == 1 || (c.splits - 1) * c.split_k < shape.K, "no split is empty");
      EXPECT(c.sums == (c.splits == 1 ? 0 : c.splits * shape.M * shape.N * shape.groups), "sums of splits");
      EXPECT(c.sums * 4 <= int64_t{64} << 20, "sums of splits are few");
      const KernelPlan wanted = choose_tile(shape, gpu, KernelChoice(std::string(t.name) + ":3"));
      EXPECT(wanted.kernel == c.kernel && wanted.splits <= 3 && wanted.splits * wanted.split_k >= shape.K, "wanted");
    }
    EXPECT(choose_tile({5, 5, 16, 1}, gpu, KernelChoice("nothing")).engine == Engine::kNone, "an unknown name");
    if (gpu.multiprocessors < 50) continue;
    // no cliffs: one row more is at most a row of tiles more, less what smaller tiles save of it
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
             {4096, 4096}, {14336, 4096}, {4096, 14336}, {1024, 1024}, {768, 3072}, {64, 576}, {1000, 2048}, {8192, 28672}}) {
      double before = 0;
      for (int64_t m = 1; m <= 4200; m += m < 400 ? 1 : 16) {
        double time = choose_tile({m, n, k, 1}, gpu, KernelChoice()).time;
        if (gemv_fits(m, k, gpu)) time = std::min(time, gemv_time(m, n, k, 0, gpu));
        EXPECT(m == 1 || time <= before * 1.6, "M %d N %d K %d on %d: %.0f after %.0f", int(m), int(n), int(k), gpu.arch, time,
               before);
        before = time;
      }
    }
  }
}

// ---- plans ----------------------------------------------------------------------------------------------------------

// The slots of a workspace: aligned, apart from each other, and all of its bytes.
struct Slots {
  std::vector<std::pair<int64_t, int64_t>> ranges;  // begin, end

  template <class T>
  void add(const Slot<T>& slot, int64_t count) {
    if (!slot) return;
    EXPECT(slot.offset % 256 == 0, "aligned");
    EXPECT(slot.in(nullptr) == reinterpret_cast<T*>(slot.offset), "an address from an offset");
    ranges.emplace_back(slot.offset, slot.offset + count * static_cast<int64_t>(sizeof(T)));
  }
  void expect_to_fill(int64_t bytes) {
    std::sort(ranges.begin(), ranges.end());
    int64_t end = 0;
    for (const auto& [begin, range_end] : ranges) {
      EXPECT(begin >= end && begin - end < 256, "apart, and next to each other");
      end = range_end;
    }
    EXPECT(end <= bytes && bytes - end < 256, "%d bytes, of which %d are used", int(bytes), int(end));
  }
};

static const GpuLimits kGpu{80, 108, 163 << 10, 164 << 10};

struct Random {
  std::mt19937_64& engine;
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
  template <class T>
  T* address() {  // of nothing; a plan looks at its alignment alone
    return reinterpret_cast<T*>(0x10000 + (below(4) == 0 ? 1 : 64) * below(100));
  }
  InputParams input() {
    static const DType floats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
    InputParams in{};
    in.mode = static_cast<InputMode>(below(4));
    in.dtype = in.mode != InputMode::kQuantized ? floats[below(3)] : below(2) ? DType::kInt8 : DType::kUInt8;
    in.x = address<void>();
    if (is_dynamic(in)) return in;
    in.scale = address<float>();
    in.scale_stride = below(2);
    if (below(2)) in.zero_point = address<int32_t>();
    in.zero_point_stride = below(2);
    return in;
  }
};

static void check_linear_plans(Random random) {
  for (int round = 0; round < 20000; ++round) {
    Int8LinearParams p{};
    p.M = 1 + random.below(random.below(2) ? 9 : 300);
    p.N = 1 + random.below(500);
    p.K = random.below(random.below(2) ? 40 : 2000) * (random.below(2) ? 16 : 1);
    p.in = random.input();
    p.x_stride = p.K + random.below(20);
    p.weight = random.address<int8_t>();
    if (random.below(2)) p.packed = reinterpret_cast<int8_t*>(0x100000);
    p.y_stride = p.N;
    p.out.y = random.address<void>();
    p.out.dtype = DType::kFloat32;
    const LinearPlan plan = plan_linear(p, kGpu, KernelChoice()), again = plan_linear(p, kGpu, KernelChoice());
    const CudaWeights& w = plan.weight.layout;
    EXPECT(again.bytes == plan.bytes && kernel_text(again.kernel) == kernel_text(plan.kernel), "a plan depends on its arguments");
    EXPECT(plan.kernel.engine != Engine::kNone, "a kernel");
    EXPECT(plan.product.K == w.k && plan.product.a_stride % 16 == 0 && plan.product.b_stride % 16 == 0, "whole vectors");
    EXPECT(plan.product.a == nullptr && plan.product.b == nullptr && plan.product.row_scale == nullptr, "addresses come later");

    const bool dynamic = is_dynamic(p.in), corrected = has_zero_points(p.in), own = plan.encoder == Encoder::kProduct;
    EXPECT(!own || dynamic, "rows that the kernel quantizes");
    EXPECT(plan.kernel.engine != Engine::kGemv || p.M <= kGemvRows, "few rows");
    EXPECT(own || plan.kernel.engine != Engine::kFused, "a kernel that reads codes");
    EXPECT(own || dynamic == (plan.encoder == Encoder::kRange), "rows with a scale from their data");
    EXPECT(bool(plan.codes) == (plan.encoder == Encoder::kRange || plan.encoder == Encoder::kGiven), "codes");
    EXPECT(plan.encoder != Encoder::kNone || (p.in.dtype == DType::kInt8 && p.K % 16 == 0 && plan.product.K == p.K), "in place");
    EXPECT(bool(plan.row_zero) == (bool(plan.row_scale) && corrected), "zero points");
    EXPECT(!plan.row_scale || plan.product.row_step == 1, "arrays have one element a row");
    EXPECT(own || plan.row_scale || !p.in.zero_point || p.in.scale_stride == p.in.zero_point_stride, "one stride for both");
    EXPECT(bool(plan.weight.sums) == (corrected && !p.packed), "sums of the weight");
    EXPECT(bool(plan.sums) == (plan.kernel.splits > 1 && !own), "sums of splits");

    Slots slots;
    slots.add(plan.weight.sums, p.N);
    slots.add(plan.weight.rows, w.rows_bytes);
    slots.add(plan.codes, p.M * w.k);
    slots.add(plan.row_scale, p.M);
    slots.add(plan.row_zero, p.M);
    slots.add(plan.sums, plan.kernel.sums);
    slots.expect_to_fill(plan.bytes);
  }
  Int8LinearParams p{};
  p.M = p.N = p.K = 64;
  p.in.mode = InputMode::kQuantized;
  p.in.dtype = DType::kInt8;
  EXPECT(plan_linear(p, kGpu, KernelChoice("igemm_s8s8_32x64x128_mma")).bytes == 0, "codes in place need no memory");
  EXPECT(kernel_text(plan_linear(p, kGpu, KernelChoice("igemm_s8s8_32x64x128_mma")).kernel) == "igemm_s8s8_32x64x128_mma",
         "wanted");
  EXPECT(plan_linear(p, kGpu, KernelChoice("nothing")).kernel.engine == Engine::kNone, "no such kernel");
}

static Int8Conv2dParams random_convolution(Random random) {
  Int8Conv2dParams p{};
  p.groups = random.below(2) ? 1 : 1 + random.below(40);
  p.N = 1 + random.below(3);
  p.C = p.groups * (random.below(3) ? 1 + random.below(70) : 1);
  p.O = p.groups * (random.below(3) ? 1 + random.below(70) : 1);
  p.H = random.below(9);
  p.W = random.below(9);
  p.R = p.S = random.below(2) ? 1 : 1 + random.below(3);
  for (int d = 0; d < 2; ++d) {
    p.stride[d] = p.dilation[d] = 1 + random.below(2);
    p.pad[d] = random.below(2) ? 0 : p.dilation[d] * p.R;
  }
  p.OH = (p.H + 2 * p.pad[0] - p.dilation[0] * (p.R - 1) - 1) / p.stride[0] + 1;
  p.OW = (p.W + 2 * p.pad[1] - p.dilation[1] * (p.S - 1) - 1) / p.stride[1] + 1;
  p.in = random.input();
  const bool last = random.below(2);
  const int64_t strides[2][4] = {{p.C * p.H * p.W, p.H * p.W, p.W, 1}, {p.C * p.H * p.W, 1, p.W * p.C, p.C}};
  std::copy_n(strides[last], 4, p.x_stride);
  p.weight = random.address<int8_t>();
  if (random.below(2)) p.packed = reinterpret_cast<int8_t*>(0x100000);
  p.out.y = random.address<void>();
  p.out.dtype = DType::kFloat32;
  p.y_channels_last = last;
  return p;
}

static void check_conv2d_plans(Random random) {
  int dense = 0, depthwise = 0, ranges = 0;
  for (int round = 0; round < 50000; ++round) {
    const Int8Conv2dParams p = random_convolution(random);
    if (p.OH < 1 || p.OW < 1) continue;
    const Conv2dPlan plan = plan_conv2d(p, kGpu, KernelChoice());
    const CudaWeights& w = plan.weight.layout;
    const bool dynamic = is_dynamic(p.in), corrected = has_zero_points(p.in);
    EXPECT(!plan.patches, "windows overlap or leave the image");
    EXPECT((plan.kernel.engine == Engine::kDirect) == (plan.direct.tile_rows > 0), "a tile");
    EXPECT((plan.kernel.engine == Engine::kDepthwise) == w.depthwise && plan.kernel.engine != Engine::kNone, "a kernel");
    EXPECT(!plan.dense || (w.taps == 1 && w.groups == 1 && plan.product.M == p.N * p.OH * p.OW), "a plain product");
    EXPECT(!plan.dense || plan.product.a_stride == plan.gather.pixel, "rows are pixels");
    EXPECT(bool(plan.codes) == (plan.encoder != Encoder::kNone), "codes");
    EXPECT(plan.range.has_value() == (dynamic && p.H * p.W > 0), "ranges of samples that have pixels");
    const bool rewritten = corrected && (p.in.dtype == DType::kUInt8 || p.in.scale_stride != p.in.zero_point_stride);
    EXPECT(bool(plan.scale) == (dynamic || rewritten) && bool(plan.zero_point) == bool(plan.scale), "parameters of samples");
    const bool quantizes = plan.depthwise.rows > 0 || plan.direct.tile_rows > 0;
    EXPECT(bool(plan.padding) == (corrected && (!quantizes || p.in.mode == InputMode::kQuantized)), "padding");
    EXPECT(!quantizes || plan.encoder == Encoder::kNone, "no codes in memory");
    EXPECT(plan.gather.codes == nullptr && plan.gather.padding == nullptr, "addresses come later");
    EXPECT(bool(plan.sums) == (plan.kernel.splits > 1), "sums of splits");

    Slots slots;
    slots.add(plan.weight.sums, p.O);
    slots.add(plan.weight.rows, w.rows_bytes);
    slots.add(plan.codes, p.N * plan.gather.height * plan.gather.width * plan.gather.pixel);
    const bool within = (p.OH - 1) * p.stride[0] < p.H && (p.OW - 1) * p.stride[1] < p.W;
    const bool skips = p.R * p.S == 1 && p.x_stride[1] == 1 && p.pad[0] == 0 && p.pad[1] == 0 && within;
    EXPECT(plan.gather.height == (skips ? p.OH : p.H) && plan.gather.width == (skips ? p.OW : p.W), "pixels that are read");
    slots.add(plan.scale, p.N);
    slots.add(plan.zero_point, p.N);
    slots.add(plan.padding, p.N * 16);
    if (plan.range) slots.add(plan.range_memory, plan.encoder == Encoder::kRange ? ranges_bytes(*plan.range) : plan.range->bytes);
    slots.add(plan.sums, plan.kernel.sums);
    slots.expect_to_fill(plan.bytes);
    dense += plan.dense;
    depthwise += w.depthwise;
    ranges += plan.range.has_value() && plan.range->bytes > 0;
  }
  EXPECT(dense > 100 && depthwise > 100 && ranges > 100, "%d dense, %d depthwise, %d with ranges", dense, depthwise, ranges);
}

static void check_patches_plans(Random random) {
  for (int round = 0; round < 5000; ++round) {
    Int8Conv2dParams p = random_convolution(random);
    p.C = 1 + random.below(8);
    p.O = 1 + random.below(70);
    p.groups = 1;
    p.R = p.stride[0] = 2 + random.below(3);
    p.S = p.stride[1] = 1 + random.below(16);
    p.pad[0] = p.pad[1] = 0;
    p.dilation[0] = p.dilation[1] = 1;
    p.OH = 1 + random.below(5);
    p.OW = 1 + random.below(5);
    p.H = p.OH * p.R + random.below(p.R);
    p.W = p.OW * p.S + random.below(p.S);
    p.y_channels_last = true;
    const Conv2dPlan plan = plan_conv2d(p, kGpu, KernelChoice());
    EXPECT(plan.patches.has_value(), "windows side by side");
    const LinearPlan& linear = plan.patches->linear;
    const int64_t M = p.N * p.OH * p.OW, K = p.C * p.R * p.S;
    EXPECT(linear.product.M == M && linear.product.N == p.O && linear.product.K == (K + 15) / 16 * 16, "rows are patches");
    EXPECT(K % 16 != 0 || linear.encoder == Encoder::kNone, "codes are read where they are written");
    EXPECT(bool(plan.scale) == is_dynamic(p.in) && plan.range.has_value() == is_dynamic(p.in), "scales from the data");
    EXPECT(bool(plan.patches->row_zero) == (bool(plan.patches->row_scale) && has_zero_points(p.in)), "zero points");
    EXPECT(linear.row_scale || linear.product.row_step == (plan.patches->row_scale ? 1 : 0), "one scale, or one for each row");
    Slots slots;
    slots.add(plan.codes, M * ((K + 15) / 16 * 16));
    slots.add(plan.scale, p.N);
    slots.add(plan.zero_point, p.N);
    if (plan.range) slots.add(plan.range_memory, plan.encoder == Encoder::kRange ? ranges_bytes(*plan.range) : plan.range->bytes);
    slots.add(plan.patches->row_scale, M);
    slots.add(plan.patches->row_zero, M);
    slots.add(plan.patches->linear_memory, linear.bytes);
    slots.expect_to_fill(plan.bytes);
  }
}

// ---- codes in registers ---------------------------------------------------------------------------------------------

// Every bfloat16, by scales of any size, powers of two (many ties), and scales by which one must divide.
static void check_codes(std::mt19937_64& random) {
  for (int round = 0; round < 60; ++round) {
    const int32_t zero = static_cast<int32_t>(random() % 256) - 128;
    const float any = bits_float(static_cast<uint32_t>(random())),
                near = std::ldexp(1.0f + static_cast<float>(random() % 128) / 128, -5);
    const float scale = round % 3 == 0 ? any : round % 3 == 1 ? near : std::ldexp(1.0f, static_cast<int>(random() % 12) - 8);
    const InputParams in{.x = nullptr,
                         .dtype = DType::kBFloat16,
                         .mode = InputMode::kStatic,
                         .scale = &scale,
                         .scale_stride = 0,
                         .zero_point = &zero,
                         .zero_point_stride = 0};
    const CodesOf<BFloat16> encode(in, 0, 0);
    for (uint32_t first = 0; first < 65536; first += 4) {
      Vector<BFloat16, 4> x[1];
      const uint16_t bits[4] = {static_cast<uint16_t>(first), static_cast<uint16_t>(first + 1), static_cast<uint16_t>(first + 2),
                                static_cast<uint16_t>(first + 3)};
      memcpy(&x[0].words, bits, sizeof(bits));
      uint32_t codes[1][4];
      encode(x, codes);
      for (uint32_t i = 0; i < 4; ++i) {
        const float steps = clamp_steps<float>(quantize_steps(bits_float((first + i) << 16), scale),
                                               static_cast<float>(-128 - zero), static_cast<float>(127 - zero));
        EXPECT(static_cast<int8_t>(codes[0][i]) == steps_to_code(steps, zero, -128, 127), "bits %x, scale %g, zero point %d",
               first + i, static_cast<double>(scale), zero);
      }
    }
  }
}

int main() {
  std::mt19937_64 random(1);
  check_swizzle<64>();
  check_swizzle<128>();
  check_staging();
  check_fragments();
  check_gather(random);
  check_weights(random);
  check_dispatch(random);
  check_linear_plans({random});
  check_conv2d_plans({random});
  check_patches_plans({random});
  check_codes(random);
  return 0;
}

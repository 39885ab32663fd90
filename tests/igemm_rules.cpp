// The address arithmetic, fragment maps and tile choice of the portable CUDA engine, on the host (test_cuda_igemm_build.py).
// Prints what is wrong and exits with 1.
#include <cstdio>
#include <random>
#include <set>
#include <vector>

#include "contract/cuda_weights.h"
#include "device/common.cuh"
#include "engine/choose.h"

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
  std::set<int> groups;
  for (int offset : offsets) groups.insert(offset % 128 / 16);
  EXPECT(groups.size() == 8, "%s, first offset %d", what, offsets[0]);
}

template <int kRowBytes>
static void check_swizzle() {
  constexpr int kRows = 256, kChunks = kRowBytes / 16;
  std::set<int> places;
  for (int row = 0; row < kRows; ++row)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int offset = tile_offset<kRowBytes>(row, chunk);
      EXPECT(offset % 16 == 0 && offset >= row * kRowBytes && offset < (row + 1) * kRowBytes, "row %d chunk %d", row, chunk);
      places.insert(offset);
    }
  EXPECT(places.size() == size_t{kRows} * kChunks, "one place for each");
  int offsets[8];
  for (int first = 0; first < kRows; first += 8)  // ldmatrix: a matrix at a time
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int r = 0; r < 8; ++r) offsets[r] = tile_offset<kRowBytes>(first + r, chunk);
      expect_no_conflict(offsets, "ldmatrix");
    }
  for (int first = 0; first < kRows * kChunks; first += 8) {  // copies: neighbouring lanes, along rows
    for (int lane = 0; lane < 8; ++lane) offsets[lane] = tile_offset<kRowBytes>((first + lane) / kChunks, (first + lane) % kChunks);
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
        EXPECT(a_chunk(namer) * 16 + column == thread * 4 + (a & 3) + (a < 8 ? 0 : 16), "k of a%d, lane %d", a, lane);
        const int b = w % 2 * 4 + byte, block = w / 2;  // b0 .. b7 of columns 0 .. 7, then of 8 .. 15
        EXPECT(b_row(namer) == group + block * 8, "column of b%d, lane %d", b, lane);
        EXPECT(b_chunk(namer) * 16 + column == thread * 4 + (b & 3) + (b < 4 ? 0 : 16), "k of b%d, lane %d", b, lane);
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
    EXPECT(w.groups * w.merged == groups && w.n == n * w.merged, "groups");
    EXPECT(w.n <= 64 || w.merged == 1, "merged groups fit a tile");
    EXPECT(w.row % 16 == 0 && w.k % 16 == 0 && w.k <= w.row && w.rows_offset % 16 == 0, "alignment");
    EXPECT(w.tap >= w.channels() && w.tap % (w.taps == 1 ? 16 : 4) == 0 && w.taps * w.tap <= w.k, "tap");
    EXPECT(!w.plain || (w.row == c && w.taps == 1 && groups == 1), "plain");
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
      const IgemmChoice c = choose_igemm(shape, gpu, ForcedKernel(nullptr));
      EXPECT(c.tile >= 0 && c.tile < kIgemmTileCount, "a tile");
      const IgemmTile& t = kIgemmTiles[c.tile];
      EXPECT(c.part_k >= t.k && c.part_k % t.k == 0, "parts are whole steps");
      EXPECT(c.parts >= 1 && c.parts <= kMostParts && c.parts * c.part_k >= shape.K, "parts cover K");
      EXPECT(c.parts == 1 || (c.parts - 1) * c.part_k < shape.K, "no part is empty");
      EXPECT(c.parts == 1 || c.parts * shape.M * shape.N * shape.groups * 4 <= int64_t{64} << 20, "sums of parts are few");
      const IgemmChoice forced = choose_igemm(shape, gpu, ForcedKernel((std::string(t.name) + ":3").c_str()));
      EXPECT(forced.tile == c.tile && forced.parts <= 3 && forced.parts * forced.part_k >= shape.K, "forced");
    }
    EXPECT(choose_igemm({5, 5, 16, 1}, gpu, ForcedKernel("nothing")).tile < 0, "an unknown name");
    if (gpu.multiprocessors < 50) continue;
    // no cliffs: one row more is at most a row of tiles more, less what smaller tiles save of it
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
             {4096, 4096}, {14336, 4096}, {4096, 14336}, {1024, 1024}, {768, 3072}, {64, 576}, {1000, 2048}, {8192, 28672}}) {
      double before = 0;
      for (int64_t m = 1; m <= 4200; m += m < 400 ? 1 : 16) {
        double time = choose_igemm({m, n, k, 1}, gpu, ForcedKernel(nullptr)).time;
        if (gemv_fits(m, k, gpu)) time = std::min(time, gemv_time(m, n, k, 0, gpu));
        EXPECT(m == 1 || time <= before * 1.6, "M %d N %d K %d on %d: %.0f after %.0f", int(m), int(n), int(k), gpu.arch, time,
               before);
        before = time;
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
  return 0;
}

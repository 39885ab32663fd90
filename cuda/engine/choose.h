// Which tile, and how many parts of K, an integer product gets on a GPU: plain host code, a model of the time that each would take.
//
//   blocks = tiles * groups * parts;   time = waves * (start + steps * step) + parts' extra traffic
//
// A step (block_k elements of K) costs the larger of its multiplications and its bytes; a wave is what is resident at once, its
// last one counted in part, so that one row more never costs a jump. QUANT_OPS_CUDA_KERNEL names a tile to use instead. Read next:
// portable.cuh.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace quant_ops {

// X(rows, columns, k, warps along rows, warps along columns, stages): of a block. Each instance is a kernel per loader.
#define QO_IGEMM_TILES(X)  \
  X(16, 64, 128, 1, 4, 4)  \
  X(32, 64, 128, 1, 4, 4)  \
  X(64, 64, 128, 2, 2, 3)  \
  X(64, 128, 64, 2, 2, 4)  \
  X(128, 128, 64, 2, 2, 4) \
  X(128, 256, 64, 2, 4, 4)

struct IgemmTile {
  const char* name;
  int m, n, k, warps_m, warps_n, stages;

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int ring_bytes() const { return stages * (m + n) * k; }
  // The epilogue passes 16 rows of each warp's sums through the same memory; eight more columns spread the banks.
  constexpr int staging_bytes() const { return warps_m * warps_n * 16 * (n / warps_n + 8) * 4; }
  constexpr int shared_bytes() const { return ring_bytes() > staging_bytes() ? ring_bytes() : staging_bytes(); }
};

#define QO_IGEMM_TILE(m, n, k, wm, wn, s) {"igemm_s8s8_" #m "x" #n "x" #k "_mma", m, n, k, wm, wn, s},
constexpr IgemmTile kIgemmTiles[] = {QO_IGEMM_TILES(QO_IGEMM_TILE)};
#undef QO_IGEMM_TILE
constexpr int kIgemmTileCount = sizeof(kIgemmTiles) / sizeof(kIgemmTiles[0]);

struct GpuLimits {
  int arch;  // 80, 86, 89, 90, 100, 120
  int64_t multiprocessors;
  int64_t block_bytes, shared_bytes;  // shared memory that a block may have, that a multiprocessor has
};

struct IgemmShape {
  int64_t M, N, K, groups;
  int load_bytes = 16;  // at once, of a
};

struct IgemmChoice {
  int tile;
  int64_t parts;   // of K
  int64_t part_k;  // elements of each, a multiple of the tile's k
  double time;     // in clocks, of the model
};

inline bool tile_fits(const IgemmTile& t, const GpuLimits& gpu) { return t.shared_bytes() <= gpu.block_bytes; }

// Blocks that a multiprocessor holds: by shared memory (1 KiB of each block is the system's) and by registers, of which a thread
// with a warp's sums needs those and about 90 more.
inline int64_t resident_blocks(const IgemmTile& t, const GpuLimits& gpu) {
  const int64_t sums = int64_t{t.m} * t.n / t.threads(), registers = std::min<int64_t>(255, sums + 90) * t.threads();
  return std::max<int64_t>(
      1, std::min({gpu.shared_bytes / (t.shared_bytes() + 1024), 65536 / registers, int64_t{1536} / t.threads()}));
}

constexpr double kLaunchClocks = 2500;                 // a kernel after another one
constexpr double kCacheBytes = 48, kMemoryBytes = 18;  // per clock and multiprocessor, from the L2 cache and from memory
constexpr int64_t kMostParts = 16;
constexpr int64_t kLeastSteps = 4;  // of a part: fewer do not fill the pipeline

// The model's clocks of `shape` with a tile, K in `parts` of `steps` steps each.
inline double igemm_time(const IgemmShape& shape, const IgemmTile& t, const GpuLimits& gpu, int64_t parts, int64_t steps) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const double rate = gpu.arch == 80 || gpu.arch == 90 || gpu.arch == 100 ? 2048 : 1024;  // multiplications by mma.sync a clock
  const double start = 1500, finish = 4.0 * t.m * t.n / 128;

  const int64_t tiles = ceil_div(shape.M, t.m) * ceil_div(shape.N, t.n) * shape.groups, blocks = tiles * parts;
  const int64_t resident = resident_blocks(t, gpu), slots = resident * gpu.multiprocessors;
  // what a multiprocessor's blocks, side by side, take for a step of each
  const double active = std::min<double>(static_cast<double>(resident), static_cast<double>(blocks) / gpu.multiprocessors);
  const double side_by_side = std::max(1.0, active);
  // narrow warp tiles read more of shared memory per multiplication than it can give
  const double warp_m = static_cast<double>(t.m) / t.warps_m, warp_n = static_cast<double>(t.n) / t.warps_n;
  const double share = std::min(1.0, 128.0 * warp_m * warp_n / (warp_m + warp_n) / rate);
  const double multiply = static_cast<double>(t.m) * t.n * t.k / (rate * share) * side_by_side;
  const double fetch = static_cast<double>(t.m + t.n) * t.k / kCacheBytes * side_by_side * (shape.load_bytes < 16 ? 2.0 : 1.0);
  const double latency = 700.0 / (t.stages - 1);  // of a load, shared by the stages in flight
  const double block_time = start + static_cast<double>(steps) * std::max({multiply, fetch, latency}) + finish * side_by_side;
  const double waves = std::max(1.0, static_cast<double>(blocks) / static_cast<double>(slots));
  const double compute = block_time * waves;

  const double operands = static_cast<double>(shape.groups) * shape.K * static_cast<double>(shape.M + shape.N);
  const double bandwidth = kMemoryBytes * static_cast<double>(gpu.multiprocessors);
  const double sums = parts == 1 ? 0.0 : 8.0 * static_cast<double>(parts) * shape.M * shape.N * shape.groups;
  const double joining = parts == 1 ? 0.0 : kLaunchClocks + sums / (kCacheBytes * static_cast<double>(gpu.multiprocessors));
  return kLaunchClocks + std::max(compute, operands / bandwidth) + joining;
}

// ---- up to eight rows (gemv.cu) -------------------------------------------------------------------------------------

constexpr int kGemvRows = 8, kGemvColumns = 16, kGemvWarps = 8;
constexpr const char* kGemvName = "gemv_s8s8_16x8_mma";

// Bytes between rows in shared memory: 64 modulo the 128 of all banks, so that the eight lanes that read at once do not meet.
inline int64_t gemv_pitch(int64_t K) { return (K + 127) / 128 * 128 + 64; }
inline int64_t gemv_shared_bytes(int64_t K) {
  return kGemvRows * gemv_pitch(K) + kGemvWarps * kGemvColumns * kGemvRows * 4 + kGemvRows * 8;
}
inline bool gemv_fits(int64_t M, int64_t K, const GpuLimits& gpu) {
  return M <= kGemvRows && gemv_shared_bytes(K) <= gpu.block_bytes;
}

// Clocks; x_bytes: of an element of floating rows, which every block quantizes for itself, 0 for codes.
inline double gemv_time(int64_t M, int64_t N, int64_t K, int64_t x_bytes, const GpuLimits& gpu) {
  const double blocks = static_cast<double>((N + kGemvColumns - 1) / kGemvColumns), sms = static_cast<double>(gpu.multiprocessors);
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(gpu.shared_bytes / (gemv_shared_bytes(K) + 1024), 4));
  const double waves = std::max(1.0, blocks / (sms * static_cast<double>(resident)));
  const double rows = static_cast<double>(M) * static_cast<double>(K);
  // of a block: rows to shared memory (floating ones are read twice and cost some twenty instructions), then loads of 512 bytes of
  // K
  const double staging = x_bytes == 0 ? 400 + rows / 48 : 1500 + rows * (2.0 * static_cast<double>(x_bytes) / 48 + 20.0 / 128);
  const double loads = 700.0 * static_cast<double>(K) / (64.0 * kGemvWarps * 4) + 700;
  const double memory = static_cast<double>(N) * static_cast<double>(K) / (kMemoryBytes * std::min(blocks, sms));
  return kLaunchClocks + std::max((staging + loads) * waves, memory + staging) + 500;
}

// ---- choice ---------------------------------------------------------------------------------------------------------

// A kernel and its parts as text: "igemm_s8s8_64x64x128_mma", with ":4" for four parts.
inline std::string kernel_text(const char* name, int64_t parts) {
  return parts == 1 ? std::string(name) : std::string(name) + ":" + std::to_string(parts);
}

// Of `forced`, which is as kernel_text gives it, or null or empty.
struct ForcedKernel {
  std::string name;
  int64_t parts = 0;  // 0: as the model likes

  explicit ForcedKernel(const char* forced) : name(forced == nullptr ? "" : forced) {
    const size_t colon = name.find(':');
    if (colon == std::string::npos) return;
    parts = std::max<int64_t>(1, std::atoll(name.c_str() + colon + 1));
    name.resize(colon);
  }
};

// The best tile for the shape, or the forced one; tile -1: no tile of this table has that name. M, N, groups >= 1.
inline IgemmChoice choose_igemm(const IgemmShape& shape, const GpuLimits& gpu, const ForcedKernel& forced) {
  constexpr int64_t kMostPartBytes = int64_t{64} << 20;  // of the sums of all parts
  IgemmChoice best{-1, 1, 0, 0.0};
  for (int i = 0; i < kIgemmTileCount; ++i) {
    const IgemmTile& t = kIgemmTiles[i];
    if (!tile_fits(t, gpu) || (!forced.name.empty() && forced.name != t.name)) continue;
    const int64_t steps = (shape.K + t.k - 1) / t.k;
    const auto consider = [&](int64_t wanted) {
      const int64_t part_steps = std::max<int64_t>(1, (steps + wanted - 1) / wanted);
      const int64_t parts = std::max<int64_t>(1, (steps + part_steps - 1) / part_steps);
      const double time = igemm_time(shape, t, gpu, parts, part_steps);
      if (best.tile < 0 || time < best.time) best = {i, parts, part_steps * t.k, time};
    };
    if (forced.parts > 0) {
      consider(forced.parts);
      continue;
    }
    const int64_t part_bytes = 4 * shape.M * shape.N * shape.groups;
    consider(1);
    for (int64_t parts = 2; parts <= kMostParts && steps / parts >= kLeastSteps && parts * part_bytes <= kMostPartBytes; ++parts)
      consider(parts);
  }
  return best;
}

// What QUANT_OPS_CUDA_KERNEL says.
inline const char* forced_kernel() { return std::getenv("QUANT_OPS_CUDA_KERNEL"); }

// Whether a name, with or without parts, is of the table of tiles, or unknown to all tables: those that start with "igemm".
inline bool is_igemm_tile(const char* name) { return name != nullptr && std::strncmp(name, "igemm", 5) == 0; }

[[noreturn]] inline void refuse_forced_kernel(const char* op, const char* forced) {
  std::string names = kGemvName;
  for (const IgemmTile& t : kIgemmTiles) names += std::string(", ") + t.name;
  throw std::runtime_error(std::string("quant_ops.") + op +
                           ": expected QUANT_OPS_CUDA_KERNEL to name a kernel that takes these shapes on "
                           "this GPU, got " +
                           forced + ". Unset it, or name one of " + names + ".");
}

}  // namespace quant_ops

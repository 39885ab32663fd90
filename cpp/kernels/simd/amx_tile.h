// The eight AMX tile registers as an object: the instructions themselves, or with QUANT_OPS_AMX_EMULATED an emulator in plain C++
// with which the same kernel source is tested on machines without AMX. A tile is a number
// known at compile time; bytes and rows are what configure() gave it.
//
// Own inline assembly instead of the compiler's intrinsics: g++'s are macros that do not tell that memory is read or written
// (GCC bug 122446), so stores to a buffer may be moved behind the load of a tile from it.
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

struct alignas(64) TileConfig {  // the operand of ldtilecfg; tiles that are not used have no rows
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t tile_row_bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(tile_row_bytes);
  }
};
static_assert(sizeof(TileConfig) == 64, "fixed by the processor");

#if defined(QUANT_OPS_AMX_EMULATED)

// Where the processor would raise a fault this aborts; what it leaves zero is zero here.
class Tiles {
 public:
  void configure(const TileConfig& config) {
    check(config.palette == 1 && config.start_row == 0);
    for (int i = 0; i < 8; ++i) check(config.rows[i] <= 16 && config.row_bytes[i] <= 64 && !config.rows[i] == !config.row_bytes[i]);
    for (int i = 8; i < 16; ++i) check(config.rows[i] == 0 && config.row_bytes[i] == 0);
    config_ = config;
    configured_ = true;
    std::memset(data_, 0, sizeof(data_));
  }
  void release() { configured_ = false; }

  template <int kTile>
  void load(const void* base, int64_t stride) {
    check(used(kTile));
    std::memset(data_[kTile], 0, sizeof(data_[kTile]));
    for (int r = 0; r < config_.rows[kTile]; ++r)
      std::memcpy(data_[kTile][r], static_cast<const uint8_t*>(base) + r * stride, config_.row_bytes[kTile]);
  }
  template <int kTile>
  void store(void* base, int64_t stride) const {
    check(used(kTile));
    for (int r = 0; r < config_.rows[kTile]; ++r)
      std::memcpy(static_cast<uint8_t*>(base) + r * stride, data_[kTile][r], config_.row_bytes[kTile]);
  }
  template <int kSum, int kA, int kB>  // tdpbusd: a unsigned, b signed
  void multiply_add() {
    static_assert(kSum != kA && kSum != kB && kA != kB, "an invalid instruction");
    check(used(kSum) && used(kA) && used(kB) && config_.rows[kSum] == config_.rows[kA] &&
          config_.row_bytes[kSum] == config_.row_bytes[kB] && config_.row_bytes[kA] == 4 * config_.rows[kB]);
    for (int m = 0; m < config_.rows[kSum]; ++m)
      for (int k = 0; k < config_.rows[kB]; ++k)
        for (int n = 0; n < config_.row_bytes[kB]; n += 4) {
          uint32_t sum;
          std::memcpy(&sum, &data_[kSum][m][n], sizeof(sum));
          for (int i = 0; i < 4; ++i)
            sum += static_cast<uint32_t>(int32_t{data_[kA][m][4 * k + i]} * static_cast<int8_t>(data_[kB][k][n + i]));
          std::memcpy(&data_[kSum][m][n], &sum, sizeof(sum));
        }
  }

 private:
  static void check(bool valid) {
    if (!valid) std::abort();
  }
  bool used(int tile) const { return configured_ && config_.rows[tile] > 0; }

  TileConfig config_;
  bool configured_ = false;
  uint8_t data_[8][16][64];
};

#else

struct Tiles {
  QO_INLINE void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  QO_INLINE void release() { asm volatile("tilerelease"); }
  template <int kTile>
  QO_INLINE void load(const void* base, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  QO_INLINE void store(void* base, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kA, int kB>  // tdpbusd: a unsigned, b signed; in AT&T order the last operand is the sum
  QO_INLINE void multiply_add() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};

#endif

}  // namespace
}  // namespace quant_ops::QO_ISA

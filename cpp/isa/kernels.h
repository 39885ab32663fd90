// The micro-kernels: one table per instruction set, every entry a plain function on plain pointers. dispatch.cpp picks a table at
// run time; drivers only ever call through it; kernels_module.cpp shows every table to the tests. All tables give the same bits.
//
// To add a kernel: a function in elementwise.inl (written once, against each file's Simd) or in the isa/*.cpp, and a field here.
#pragma once

#include <cstdint>

#include "../ops.h"

namespace quant_ops {

constexpr int kMaxGemmRows = 32;  // rows of the largest tile of any table
constexpr int kPanel = 64;        // columns of a packed weight panel; the last one is rounded up to kPanelStep only
constexpr int kPanelStep = 16;
constexpr int kGroupK = 4;           // consecutive k of one column: the four bytes of a vpdpbusd lane
constexpr int kDepthwiseBlocks = 2;  // blocks of kPanelStep channels that any table takes at once

// The epilogue of one tile. Arrays over columns have `width` readable elements.
struct TileOutput {
  void* y;           // first element of the tile
  int64_t y_stride;  // between rows; columns are contiguous
  DType dtype;
  int64_t columns;            // valid ones, 1 .. width
  const int32_t* column_sum;  // sum_k b[n,k]
  const float* column_scale;
  const float* bias;        // -0 where there is none
  const int32_t* row_zero;  // zero point of each row's unsigned codes; stride row_step
  const float* row_scale;
  int64_t row_step;  // 0 or 1
  float floor;       // 0 for ReLU, else -inf
  float out_scale;   // int8 / uint8 output
  int32_t out_zero_point;

  // The same tile from column n on.
  __attribute__((always_inline)) inline TileOutput from_column(int64_t n) const {
    TileOutput o = *this;
    const int64_t bytes = dtype == DType::kInt8 || dtype == DType::kUInt8         ? 1
                          : dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 2
                                                                                  : 4;
    o.y = static_cast<char*>(y) + n * bytes;
    o.columns -= n;
    o.column_sum += n;
    o.column_scale += n;
    o.bias += n;
    return o;
  }
};

// acc[r][n] = sum over taps t and k of a[a_offset[t * rows + r] + k] * b[t][k][n], a unsigned, b signed, exact modulo 2^32, then
// acc -= row_zero[r] * column_sum[n] and the epilogue. A GEMM has one tap; a convolution one per kernel position.
// b is one packed panel: [taps * k4][width][4].
struct GemmTile {
  int64_t taps;
  int64_t k4;  // groups of four k per tap
  const uint8_t* a;
  const int64_t* a_offset;  // [taps][rows]
  const int8_t* b;
  const int8_t* ahead;  // fetched into the cache meanwhile: a quarter as many bytes as are read of b, of the next panel
  TileOutput out;
};

// A run of output pixels of one row of a depthwise convolution, over all channels:
//   acc[i][c] = sum over r and s of a(row r, column first + i * stride + s * dilation)[c] * b[c][r][s]
// A column outside [0, width) is padding. b is [channels / 16][s][r / 4][16][4]: four rows of the kernel are a lane.
struct DepthwiseRun {
  int64_t r, s;                // of the kernel
  int64_t stride, dilation;    // along the row
  const uint8_t* const* rows;  // [r rounded up to 4] of the input, from its column 0 on; those beyond r can be any
  int64_t pixel;               // bytes between columns; as many can be read of each as there are channels, rounded up to 16
  int64_t first, width;
  uint8_t flip;     // what is read, xor this, is the unsigned code
  uint8_t padding;  // an unsigned code
  const int8_t* b;
  uint8_t* line;  // scratch of line_bytes()
  int64_t pixels;
  TileOutput out;  // a row for each pixel; row_step 0

  int64_t groups() const { return (r + kGroupK - 1) / kGroupK; }
  int64_t columns() const { return (pixels - 1) * stride + (s - 1) * dilation + 1; }
  int64_t line_bytes() const { return kDepthwiseBlocks * columns() * groups() * kPanelStep * kGroupK; }
};

// One panel of a weight whose k are contiguous: [k / 4][width][4] from `columns` columns, and their sums. Zeros where either ends.
struct PackRun {
  const int8_t* weight;
  int64_t column_step;  // bytes between columns
  int64_t columns, width, k;
  int8_t* packed;
  int32_t* column_sum;  // [width]
};
constexpr int64_t kPackAhead = 256;  // bytes of a column fetched ahead

// A few rows by a few columns of a weight that is not packed: acc[r][n] = sum_k a[r * a_stride + k] b[n * b_stride + k], corrected
// and finished as a GemmTile's; the sums of the columns are made on the way.
struct DotTile {
  int64_t k;
  const uint8_t* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t b_stride;
  TileOutput out;  // at most kPanel columns; column_sum is not read
};
constexpr int64_t kDotRows = 4;

// A contiguous run of n elements; scale and zero point step by 0 (one for all) or 1. Needs |qmin - zero_point| <= 2^24.
struct QuantizeRun {
  const void* x;
  void* y;
  int64_t n;
  const float* scale;
  const int32_t* zero_point;
  int scale_step, zero_step;
  int32_t qmin, qmax;
  DType x_dtype, y_dtype;
  bool simulate;
};

struct DequantizeRun {
  const void* q;
  void* y;
  int64_t n;
  const float* scale;
  const int32_t* zero_point;
  int scale_step, zero_step;
  DType q_dtype, y_dtype;  // q_dtype int8 or uint8
};

// The straight-through gradient of a contiguous run: dx = grad where qmin <= rne(x / scale) + zero_point <= qmax, else 0.
struct StraightThroughRun {
  const void* x;
  const void* grad;
  void* dx;
  int64_t n;
  const float* scale;
  const int32_t* zero_point;
  int scale_step, zero_step;
  int32_t qmin, qmax;
  DType dtype;  // of x, grad and dx
};

// Minimum and maximum of a run (NaN ignored) and whether all of it is finite; folded into what `range` holds already.
struct Range {
  float min, max;
  uint32_t abs_bits;  // bits of the largest magnitude, as an integer; >= 0x7f800000 if any element is Inf or NaN
};

struct KernelTable {
  const char* isa;
  const char* gemm_name;                                            // of the full tile
  int64_t gemm_rows;                                                // of the full tile, at most kMaxGemmRows
  void (*gemm)(const GemmTile& tile, int64_t rows, int64_t width);  // 1 <= rows <= gemm_rows; width 16, 32, 48 or 64
  void (*depthwise)(const DepthwiseRun&);
  void (*quantize)(const QuantizeRun&);
  void (*dequantize)(const DequantizeRun&);
  void (*straight_through)(const StraightThroughRun&);
  void (*range)(const void* x, DType dtype, int64_t n, bool only_magnitude, Range* range);  // then min and max are not touched
  // Activations for the GEMM: clamp(rne(x / scale) + zero_point, 0, 255), as QuantizeRun gives it.
  void (*codes)(const void* x, DType dtype, int64_t n, float scale, int32_t zero_point, uint8_t* codes);
  void (*pack)(const PackRun&);
  void (*dot)(const DotTile& tile, int64_t rows);  // 1 <= rows <= kDotRows; null: there is none, packing is as fast
  int64_t (*peak)(int64_t iterations);  // runs the multiply-accumulate instructions alone; returns how many MACs that were
};

extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvxVnniKernels;
extern const KernelTable kAvx512VnniKernels;
extern const KernelTable kAmxKernels;
extern const KernelTable kAmxEmulatedKernels;  // in _kernels only
#elif defined(__aarch64__)
extern const KernelTable kNeonDotKernels;
extern const KernelTable kNeonI8mmKernels;
#endif

// The table in use: the best this machine runs, or what QUANT_OPS_ISA or set_isa names.
// Throws std::runtime_error for a name that is unknown or that this machine cannot run.
const KernelTable& kernels();
void set_isa(const char* name);                      // "" = automatic again
int runnable_kernels(const KernelTable* tables[8]);  // all tables this machine runs, worst first

}  // namespace quant_ops

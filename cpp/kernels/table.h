// The micro-kernels: one table per instruction set, every entry a plain function on plain pointers. dispatch.cpp chooses a table at
// run time, drivers call the kernels through it only, and module.cpp shows every table to the tests. All tables give the same bits.
//
// To add a kernel: a field here, its name in dispatch.cpp, and either one function in generic/ with a line in generic/vectors.h, or
// a function and a line in every kernels/<isa>.cpp. Read next: avx512vnni.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "contract/ops.h"

namespace quant_ops {

constexpr int kMaxGemmRows = 32;  // rows of the largest tile of any table
constexpr int kMaxCallRows = 96;  // rows of the longest call of `gemm`, which may have several tiles
constexpr int kPanel = 64;        // columns of a packed weight panel; the last one is rounded up to kPanelStep only
constexpr int kPanelStep = 16;
constexpr int kSlimColumns = 32;     // panels of at most so many columns use the taller tile
constexpr int kQuad = 4;             // consecutive k of one column: the four bytes of a vpdpbusd lane
constexpr int kDepthwiseBlocks = 2;  // blocks of kPanelStep channels, of four bytes each, in the line of any table

// How values become codes of eight bits: clamp(rne(y / scale) + zero_point), in [least, most]. Made once for many tiles
// (code_output in cpu/columns.h). All of it is in unsigned codes; signed ones are 128 less.
struct CodeOutput {
  float scale = 1.0f, reciprocal = 1.0f;
  // The kernels compute y / scale + zero_point as one sum of products with 1 / scale, which is less than `slack` away from the
  // exact quotient where the code does not saturate. Only where an integer and a half is as close as that is y itself computed and
  // divided.
  float slack = 0.0f;
  bool divide = true;  // always: y may be infinite, NaN or so large that no int32 holds the quotient, or the slack is too large
  int32_t zero_point = 0;
  int32_t least = 0, most = 0;
  uint8_t flip = 0;  // the bytes of the codes, xor this, are those of the result: 0x80 for signed ones

  // What is added to a value in steps of the scale, so that it rounds to its code: the zero point, and the slack.
  __attribute__((always_inline)) inline float offset() const { return static_cast<float>(zero_point) + slack; }
};

// What few epilogues do: a residual, and a function that TileOutput's floor and ceiling do not give.
struct TileExtras {
  Function function;
  DType residual_dtype;
  float residual_scale;  // with residual_zero: of a residual of codes
  int32_t residual_zero;
};

alignas(64) inline constexpr int32_t kFromZero[kPanel] = {};

// The epilogue of one tile. Arrays over columns have `width` readable elements.
//
// Rows that share one scale and one zero point, such as the pixels of an image, have them in the arrays over columns, which are
// made once for many tiles (Columns::share in cpu/columns.h). Else each row has its own, row_step apart.
struct TileOutput {
  void* y;           // first element of the tile
  int64_t y_stride;  // between rows; columns are contiguous
  DType dtype;
  int64_t columns;                   // valid ones, 1 .. width
  bool shared = false;               // whether the rows share them
  const int32_t* start = kFromZero;  // what the sums start from; shared: -row_zero * column_sum
  const int32_t* column_sum;         // sum_k b[n,k]
  const float* column_scale;         // shared: times row_scale
  const float* bias;                 // -0 without a bias
  // shared, and the result is codes: codes = sum * steps_scale + steps_bias, before they are rounded, and `slack` more
  const float* steps_scale = nullptr;
  const float* steps_bias = nullptr;
  const int32_t* row_zero;  // not shared: the zero point of each row's unsigned codes
  const float* row_scale;
  int64_t row_step;                    // 0 or 1
  float floor;                         // 0 for ReLU and ReLU6, else -inf
  CodeOutput codes;                    // int8 / uint8 output
  const TileExtras* extras = nullptr;  // null: neither a residual nor a function
  const void* residual = nullptr;      // first element of the tile, its columns contiguous; null: none
  int64_t residual_stride = 0;         // between rows
  bool far = false;                    // y is not in a cache: a kernel may fetch its lines while the sums are made

  // The same tile from column n on.
  __attribute__((always_inline)) inline TileOutput from_column(int64_t n) const {
    TileOutput o = *this;
    o.y = static_cast<char*>(y) + n * dtype_bytes(dtype);
    if (residual != nullptr) o.residual = static_cast<const char*>(residual) + n * dtype_bytes(extras->residual_dtype);
    o.columns -= n;
    o.start += n;
    o.column_sum += n;
    o.column_scale += n;
    o.bias += n;
    if (steps_scale != nullptr) {
      o.steps_scale += n;
      o.steps_bias += n;
    }
    return o;
  }

  // The same columns from row r on.
  __attribute__((always_inline)) inline TileOutput from_tile_row(int64_t r) const {
    TileOutput o = *this;
    o.y = static_cast<char*>(y) + r * y_stride * dtype_bytes(dtype);
    if (residual != nullptr)
      o.residual = static_cast<const char*>(residual) + r * residual_stride * dtype_bytes(extras->residual_dtype);
    if (!shared) {
      o.row_zero += r * row_step;
      o.row_scale += r * row_step;
    }
    return o;
  }

  // The same columns of y from so many elements on.
  __attribute__((always_inline)) inline TileOutput from_row(int64_t elements) const {
    TileOutput o = *this;
    o.y = static_cast<char*>(y) + elements * dtype_bytes(dtype);
    if (residual != nullptr) o.residual = static_cast<const char*>(residual) + elements * dtype_bytes(extras->residual_dtype);
    return o;
  }
};

// acc[r][n] = start[n] + sum over taps t and k of a[a_offset[t * rows + r] + k] * b[t][k][n], a unsigned, b signed, exact modulo
// 2^32, then acc -= row_zero[r] * column_sum[n] where rows have their own, and the epilogue. A GEMM has one tap; a convolution one
// per kernel position. b is one packed panel: [taps * quads][width][4].
struct GemmTile {
  int64_t taps;
  int64_t quads;      // groups of four k per tap
  uint32_t flip = 0;  // the bytes of a, xor this, are the unsigned codes; 0 unless the table has `flips`
  const uint8_t* a;
  const int64_t* a_offset;  // [taps][rows]
  const int8_t* b;
  // what is prefetched during the product, of the next panel: a quarter of b's bytes, and the next ones by the second to the fourth
  // tile of a call
  const int8_t* ahead;
  TileOutput out;
};

// A run of output pixels of one row of a depthwise convolution, over all channels:
//   acc[i][c] = sum over r and s of a(row r, column first + i * stride + s * dilation)[c] * b[c][r][s]
// A column outside [0, width) is padding. b is [channels / 16][s][r / 4][16][4]: four rows of the kernel are a lane. With out_rows
// 2 the output row below is computed too, which reads rows 1 to r: they are fewer than four.
struct DepthwiseRun {
  int64_t r, s;                // of the kernel
  int64_t stride, dilation;    // along the row
  const uint8_t* const* rows;  // [r rounded up to 4] of the input, from its column 0 on; those beyond r may repeat another one
  int64_t pixel;               // bytes between columns, of which the channels, rounded up to 16, are readable
  int64_t first, width;
  uint8_t flip;     // the bytes of the rows, xor this, are the unsigned codes
  uint8_t padding;  // an unsigned code
  const int8_t* b;
  uint8_t* line;  // scratch of line_bytes()
  int64_t pixels;
  int64_t out_rows = 1;
  int64_t y_row = 0;  // elements of y from an output row to the one below
  TileOutput out;     // a row for each pixel; shared

  int64_t groups() const { return (r + kQuad - 1) / kQuad; }
  int64_t columns() const { return (pixels - 1) * stride + (s - 1) * dilation + 1; }
  int64_t line_bytes() const { return kDepthwiseBlocks * columns() * groups() * kPanelStep * kQuad; }
};

// One panel of a weight whose k are contiguous: [k / 4][width][4] from `columns` columns, and the sums of the columns. Columns up
// to `width`, and k up to a multiple of four, are filled with zeros.
struct PackRun {
  const int8_t* weight;
  int64_t column_step;  // bytes between columns
  int64_t columns, width, k;
  int8_t* packed;
  int32_t* column_sum;  // [width]
};
constexpr int64_t kPackAhead = 256;  // bytes of a column fetched ahead

// A few rows by a few columns of a weight that is not packed: acc[r][n] = sum_k a[r * a_stride + k] b[n * b_stride + k], with the
// correction and the epilogue of a GemmTile. The kernel computes the sums of the columns itself.
struct DotTile {
  int64_t k;
  const uint8_t* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t b_stride;
  TileOutput out;  // at most kPanel columns; not shared; column_sum is not read
};
constexpr int64_t kDotRows = 4;

// ---- weights in groups (WeightOnlyParams in ops.h) ---------------------------------------------------------------------

constexpr int64_t kNibbleColumns = 16;  // of a block of a packed weight of four bits, and of a tile of the kernels below
constexpr int64_t kNibbleStep = 16;     // k that a nibbles kernel takes at once: what the k of a column are padded to
constexpr int64_t kWeightChunk = 128;   // most k that are summed in float32 before the sum is added to the others

// What becomes of the exact sum of row r, column n and group g:
//   sum -= (zero[g][n] + offset) * row_sum[r][g] + row_zero[r] * code_sum[g][n]
//   y = fma(float(sum), row_scale[r] * scale[g][n], y), and with float_zero y = fma(float(row_sum[r][g]), row_scale[r] *
//   float_zero[g][n], y)
// Arrays over columns have a multiple of 16 readable elements.
struct GroupFold {
  const float* scale;       // [groups][stride], as are the next three
  const int8_t* zero;       // null: 0
  const float* float_zero;  // null: none
  const int32_t* code_sum;  // null: row_zero is not to be corrected
  int64_t stride;
  int32_t offset;  // what was added to the codes of the weight
  const float* row_scale;
  const int32_t* row_zero;  // zero point of the codes of a
  const int32_t* row_sum;   // [rows][groups]: the sum of a - row_zero; null: zero, offset and float_zero are not there
  int64_t groups;

  // The same from row r on.
  __attribute__((always_inline)) inline GroupFold from_row(int64_t r) const {
    GroupFold f = *this;
    f.row_scale += r;
    f.row_zero += r;
    if (row_sum != nullptr) f.row_sum += r * groups;
    return f;
  }
};

// Rows of signed codes by 16 columns of four bits: b is [k / 8][16][4], and byte i of column n holds the codes, plus 8, of k = i in
// its low half and of k = 4 + i in its high one. y[r][n], floats, holds what the sums are added to and receives them.
struct NibbleTile {
  int64_t k, group;  // all k, padded to kNibbleStep; `group` is a multiple of it or at least k
  const int8_t* a;
  int64_t a_stride;
  const int8_t* b;
  GroupFold fold;
  float* y;
  int64_t y_stride;
};

// Sums of one group in memory, folded into y.
struct FoldRun {
  const int32_t* sums;
  int64_t stride;  // between rows of sums and of y
  int64_t rows, columns;
  int64_t group;  // its number
  GroupFold fold;
  float* y;
};

// A part of a packed weight for the products in float32: k [first, last) of one group, at most kWeightChunk and from a multiple of
// 8 on, of `columns` columns, a multiple of 16. What is multiplied is q - zero, which is exact, and `scale` is for the sum; with
// float_zero it is q * scale + float_zero.
struct WeightChunk {
  int bits;
  const int8_t* b;     // 4 bits: as in NibbleTile; 8 bits: [k / 4] quads
  int64_t block_step;  // bytes from 16 columns to the next 16
  int64_t quad_step;   // 8 bits: bytes between quads
  int64_t first, last;
  int64_t columns;
  const float* scale;       // of these columns and this group, as are the next two
  const int8_t* zero;       // null: 0
  const float* float_zero;  // null: none

  // Bytes from a lane's k to those after them: 8 of 4 bits, 4 of 8 bits.
  __attribute__((always_inline)) inline int64_t step() const { return bits == 4 ? kNibbleColumns * kQuad : quad_step; }

  __attribute__((always_inline)) inline const int8_t* octet(int64_t n, int64_t k) const {
    const int64_t quads = k / kQuad * (bits == 4 ? kNibbleColumns * kQuad / 2 : quad_step);
    return b + n / kNibbleColumns * block_step + quads + n % kNibbleColumns * kQuad;
  }
};

// y[r][n] = fma(sum over k of a[r * a_stride + k] w[k][n], column_scale[n], y[r][n]), 16 columns.
struct FloatTile {
  int64_t k;
  const float* a;
  int64_t a_stride;
  const float* w;
  const float* column_scale;
  float* y;
  int64_t y_stride;
};

// The same for a few rows, which read the packed weight themselves. a[r * a_stride + k], for k from 0 on, is x; up to a multiple of
// 8 k it is zero, and everywhere less than kFewLimit: the codes are converted to floats where they are 2^24 times too large.
struct FewRows {
  WeightChunk weight;
  const float* a;
  int64_t a_stride;
  float* y;
  int64_t y_stride;
};
constexpr int64_t kFewRows = 4;
constexpr float kFewLimit = 0x1p80f;

constexpr int64_t kFloatRows = 6;

// n elements as in PointwiseParams (ops.h); x may also be int32, a sum of codes less that of their zero points. y may be x or the
// residual themselves if their elements are as wide.
struct PointwiseRun {
  int64_t n;
  const void* x;
  DType x_dtype;
  float x_scale;
  int32_t x_zero_point;
  const void* residual = nullptr;
  DType residual_dtype = DType::kInt8;
  float residual_scale = 0.0f;
  int32_t residual_zero_point = 0;
  bool multiplies = false;  // x by the residual; both are codes
  Function function;
  void* y;
  DType y_dtype;
  float out_scale;
  int32_t out_zero_point;
};

// The largest code over windows of `rows` rows, `row` codes apart, of `taps` pixels, `tap` codes apart; n codes of each pixel, of
// as many windows as there are `pixels` of the result. A window has at least one tap.
struct MaxRun {
  const void* x;
  DType dtype;  // int8 or uint8
  int64_t rows, row, taps, tap;
  int64_t n;
  int64_t pixels, x_pixel;  // codes between the first taps of neighbouring windows
  void* y;
  int64_t y_pixel;
};

// The sums over one such window.
struct SumRun {
  const void* x;
  DType dtype;
  int64_t rows, row, taps, tap;
  int64_t n;
  int32_t* sums;
};

// Rows of floats to the dtype of a result.
struct StoreRun {
  const float* from;
  int64_t from_stride, rows, columns;
  void* y;
  DType dtype;
  int64_t y_stride;
};

// Rows of n contiguous elements. Scale and zero point of row i start at scale + i * scale_row and zero_point + i * zero_row and
// step by 0 (one for the row) or 1 along it.
struct RowsRun {
  int64_t n;
  int64_t rows = 1;
  int64_t from_row = 0, to_row = 0;  // elements from one row to the next, of what is read and of what is written
  const float* scale;
  const int32_t* zero_point;
  int scale_step, zero_step;
  int64_t scale_row = 0, zero_row = 0;
};

// Needs |qmin - zero_point| and |qmax - zero_point| <= 2^24. With reciprocals the kernel multiplies, and divides only where the
// product is so close to a tie that it might round to another integer than the quotient.
struct QuantizeRun : RowsRun {
  const void* x;
  void* y;
  const float* reciprocal = nullptr;  // reciprocal_of each scale, stepping like it; null: divide
  float tie = 0.0f;                   // tie_for the largest distance of qmin or qmax from a zero point
  int32_t qmin, qmax;
  DType x_dtype, y_dtype;
  bool simulate;
};

// 1 / scale, or NaN, which makes the kernel divide, where the error of x * (1 / scale) has no relative bound: if the scale or its
// reciprocal is subnormal.
static inline __attribute__((always_inline, unused)) float reciprocal_of(float scale) {
  return scale >= 0x1p-126f && scale <= 0x1p126f ? 1.0f / scale : __builtin_nanf("");
}

// The largest distance of x * (1 / scale) from its nearest integer at which it surely rounds like the IEEE quotient: 1/2, less the
// error of three roundings of half a unit each, relative to the largest value that does not saturate. For codes so wide that most
// vectors would be divided anyway it is negative, so that all are.
static inline __attribute__((always_inline, unused)) float tie_for(int64_t largest_step) {
  return largest_step <= 1024 ? 0.5f - static_cast<float>(largest_step + 2) * 0x1p-22f : -1.0f;
}

struct DequantizeRun : RowsRun {
  const void* q;
  void* y;
  DType q_dtype, y_dtype;  // q_dtype int8, uint8 or int16
};

// The straight-through gradient of n contiguous elements: dx = grad where qmin <= rne(x / scale) + zero_point <= qmax, else 0, and
// the sums of grad * factor (straight_through in arithmetic.h) in the order that ops.h fixes.
struct StraightThroughRun {
  const void* x;
  const void* grad;
  void* dx;  // null: not wanted
  int64_t n;
  const float* scale;
  const int32_t* zero_point;
  int scale_step, zero_step;  // 0 or 1
  int32_t qmin, qmax;
  DType dtype;                  // of x, grad and dx
  double* scale_sum = nullptr;  // one sum, of a chunk: n <= kReduceChunk; null: not wanted
  double* zero_sum = nullptr;   // likewise; wanted only with scale_sum
};

// The same for slices that lie side by side: column c of every row belongs to slice c, and has a scale and a zero point of its own
// (step 1) or shares one (step 0). The products of row i are added to lane (lane + i) % kReduceLanes of its slice.
constexpr int kReduceColumns = 64;  // most columns of a run: 32 lanes of them are 16 KiB, so that both sums stay in the first cache
struct StraightThroughColumnsRun {
  const void* x;
  const void* grad;
  void* dx;  // null: not wanted
  int64_t rows, columns;
  int64_t x_row, grad_row, dx_row;
  const float* scale;
  const int32_t* zero_point;
  int scale_step, zero_step;
  int32_t qmin, qmax;
  DType dtype;
  int64_t lane;
  double* scale_lanes;  // [kReduceLanes][kReduceColumns]
  double* zero_lanes;   // likewise; null: not wanted
};

// n contiguous elements to a floating format: y = round_to_format(x / scale) * scale; with grad, y = grad where |x / scale| is
// within the format's range, else 0.
struct FloatRun {
  const void* x;
  const void* grad = nullptr;
  void* y;
  int64_t n;
  DType dtype;
  const float* scale = nullptr;      // null: 1
  int scale_step = 0;                // 0 or 1
  const uint32_t* random = nullptr;  // [n], for stochastic rounding
  FloatFormat format;
};

// The same for blocks of elements, each with a scale from its largest magnitude. Contiguous blocks follow one another: rows of
// `length` elements are cut into blocks, the last of a row may be shorter; block `first` of a row is the first of `blocks`. Blocks
// side by side (quantize_block_columns) are the columns of a matrix of `length` rows, `row` elements apart.
struct BlockRun {
  const void* x;
  const void* grad = nullptr;
  void* y;
  int64_t length;
  int64_t block = 0, first = 0, blocks = 0;
  int64_t columns = 0, row = 0;
  DType dtype;
  BlockFormat format;
  float tensor_scale = 1.0f;
  const uint32_t* random = nullptr;  // laid out as the elements, without gaps
};

// Rows of n contiguous elements by the arithmetic of contract/affine.h. The factor and the offset of row i start at i * block_row
// and step by 0 or 1 along it. All operations have one dtype: float32, or with `narrow` that of the floating elements.
struct AffineRun {
  const void* from;
  void* to;
  DType from_dtype, to_dtype;
  int64_t n;
  int64_t rows = 1;
  int64_t from_row = 0, to_row = 0;
  const float* factor;  // one that is NaN is the usual NaN, likewise an offset
  const float* offset;
  int step;
  int64_t block_row = 0;
  ZeroPointDomain domain;
  bool narrow;   // quantizing; dequantizing always has the dtype of `to`
  float lo, hi;  // least and largest code; to_dtype holds them
  float mid;     // mid_point
};

// Minimum and maximum of a run, ignoring NaN, and the largest magnitude, which tells whether all of it is finite. A kernel extends
// the range that it is given.
struct Range {
  float min, max;
  uint32_t abs_bits;  // bits of the largest magnitude, as an integer; >= 0x7f800000 if any element is Inf or NaN
};

// The same for every column of a matrix, one array a field.
struct RangeColumnsRun {
  const void* x;
  DType dtype;
  int64_t rows, columns;
  int64_t x_row;
  float* min;
  float* max;
  uint32_t* abs_bits;
};

// The sums of columns in float32, in the order of the rows.
struct ColumnSumRun {
  const void* x;
  DType dtype;
  int64_t rows, columns;
  int64_t x_row;
  float* sums;
};

// Rows less one value a column, without gaps, and the largest magnitude of each row as in Range.
struct CenterRun {
  const void* x;
  DType dtype;
  int64_t rows, columns;
  int64_t x_row;
  const float* less;  // null: nothing is subtracted, and y not written
  float* y;
  uint32_t* abs_bits;
};

// The norm of one row (NormQuantizeRowsParams in ops.h) as floats. `y` has room for a multiple of kSumLanes elements.
struct NormalizeRun {
  const void* x;
  const void* residual;  // null: none
  DType dtype;
  int64_t n;
  const float* weight;  // null: 1
  const float* bias;    // null: none
  float eps;
  bool rms;
  float* y;
};

// The softmax of one row of scores as codes of eight bits (AttentionParams in ops.h): scores += mask, then
// codes = rne(255 e^(scores - their largest)). `scores` and `codes` have room for a multiple of kSumLanes elements; those
// beyond n become -Inf and 0.
struct SoftmaxRun {
  float* scores;
  const float* mask;  // null: none
  int64_t n;
  uint8_t* codes;
};

// ---- the tables -----------------------------------------------------------------------------------------------------

// Kernels that need an instruction set's vectors alone. Sets with the same vectors share them (generic/vectors.h).
struct VectorKernels {
  const char* vectors;  // the namespace of these functions
  void (*quantize)(const QuantizeRun&);
  void (*dequantize)(const DequantizeRun&);
  void (*straight_through)(const StraightThroughRun&);
  void (*straight_through_columns)(const StraightThroughColumnsRun&);
  // only_magnitude: min and max are not touched
  void (*range)(const void* x, DType dtype, int64_t n, bool only_magnitude, Range* range);
  void (*range_columns)(const RangeColumnsRun&);
  void (*column_sums)(const ColumnSumRun&);
  void (*center)(const CenterRun&);
  // Activations for the GEMM: clamp(rne(x / scale) + zero_point, 0, 255), as QuantizeRun gives it.
  void (*codes)(const void* x, DType dtype, int64_t n, float scale, int32_t zero_point, uint8_t* codes);
  void (*pack)(const PackRun&);
  void (*quantize_float)(const FloatRun&);
  void (*quantize_blocks)(const BlockRun&);                         // contiguous blocks
  void (*quantize_block_columns)(const BlockRun&);                  // blocks down the rows
  void (*widen)(const void* x, DType dtype, int64_t n, float* to);  // float16 or bfloat16
  // float32(x) * multiplier; x is float32, float16 or bfloat16
  void (*multiply)(const void* x, DType dtype, const float* multiplier, int64_t n, float* to);
  void (*fold)(const FoldRun&);
  // Unsigned codes to signed ones, if `flip`; returns the sum of the unsigned ones.
  int32_t (*sum_codes)(uint8_t* codes, int64_t n, bool flip);
  void (*expand)(const WeightChunk&, float* w);        // to w[k - first][16]
  void (*few_rows)(const FewRows&, int64_t rows);      // 1 <= rows <= kFewRows
  void (*float_tile)(const FloatTile&, int64_t rows);  // 1 <= rows <= kFloatRows
  void (*store)(const StoreRun&);
  // The random words of the elements first .. first + n - 1 (philox.h).
  void (*random_words)(uint64_t seed, uint64_t first, int64_t n, uint32_t* words);
  void (*quantize_affine)(const AffineRun&);
  void (*dequantize_affine)(const AffineRun&);
  void (*pointwise)(const PointwiseRun&);
  void (*max_pool)(const MaxRun&);
  void (*sum_pool)(const SumRun&);
  void (*normalize)(const NormalizeRun&);
  float (*softmax)(const SoftmaxRun&);  // returns the sum of the exponentials; 0 if the largest score is -Inf
};

// The sums that a gemm kernel keeps in registers at one time. Its name is gemm_u8s8_<rows>x<columns>_<isa>.
struct GemmShape {
  const char* isa;
  int64_t rows, columns;
};

// Of a kernel that sweeps its panel `columns` at a time, and `few` at a time where the panel is narrower.
constexpr GemmShape swept_shape(const char* isa, int64_t rows, int64_t width, int64_t columns, int64_t few) {
  return {isa, rows, columns <= width ? columns : few};
}

// Kernels that multiply.
struct ProductKernels {
  const char* isa;        // the namespace of these functions
  int64_t gemm_rows;      // of the full tile, at most kMaxGemmRows
  int64_t slim_rows;      // likewise, of a panel of at most kSlimColumns columns
  int64_t row_step = 1;   // rows that an instruction takes at once: a tile of fewer takes as long
  bool flips = false;     // gemm reads signed codes where they lie
  int64_t call_rows = 0;  // most rows of a call that has several tiles; 0: a call is one tile
  int64_t gathers = 0;    // groups of k of a tap from which on rows of several taps are copied beside each other; 0: never
  // width 16, 32, 48 or 64; 1 <= rows <= gemm_rows, or slim_rows for a slim panel, or rows <= call_rows
  void (*gemm)(const GemmTile& tile, int64_t rows, int64_t width);
  GemmShape (*gemm_shape)(int64_t rows, int64_t width);  // of the kernel that gemm runs for them
  void (*depthwise)(const DepthwiseRun&);
  int64_t nibble_rows;                                       // of the tallest tile of `nibbles`
  void (*nibbles)(const NibbleTile& tile, int64_t rows);     // 1 <= rows <= nibble_rows
  void (*dot)(const DotTile& tile, int64_t rows) = nullptr;  // 1 <= rows <= kDotRows; null: packing is as fast
  int64_t (*peak)(int64_t iterations);  // runs the multiply-accumulate instructions alone; returns how many MACs that were
};

struct KernelTable : ProductKernels, VectorKernels {};

extern const ProductKernels kScalarProducts;
extern const VectorKernels kScalarVectors;
#if defined(__x86_64__)
extern const ProductKernels kAvx2Products, kAvx512Products, kAvxVnniProducts, kAvx512VnniProducts, kAmxProducts;
extern const ProductKernels kAmxEmulatedProducts;  // in _kernels only
extern const VectorKernels kAvx2Vectors, kAvx512Vectors;
#elif defined(__aarch64__)
extern const ProductKernels kNeonDotProducts, kNeonI8mmProducts;
extern const VectorKernels kNeonVectors;
#endif

// ---- which table ----------------------------------------------------------------------------------------------------

// The table in use: the best this machine runs, or what QUANT_OPS_ISA or set_isa names.
// Throws std::runtime_error for a name that is unknown or that this machine cannot run.
const KernelTable& kernels();
void set_isa(const char* name);                      // "" = automatic again
int runnable_kernels(const KernelTable* tables[8]);  // all tables this machine runs, worst first

// ---- names ----------------------------------------------------------------------------------------------------------

// The kernel that gemm(tile, rows, width) runs, as gemm_u8s8_6x64_avx512vnni.
std::string gemm_name(const KernelTable& table, int64_t rows, int64_t width);

// Every entry of a table and the function that it calls: {"quantize", "avx512::quantize"}, in the order of the fields, without
// those that the table lacks; gemm with its full tile.
std::vector<std::pair<std::string, std::string>> kernel_names(const KernelTable& table);

}  // namespace quant_ops

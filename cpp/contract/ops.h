// THE contract between the torch bindings and the kernels: one plain struct of pointers, sizes and strides per operator, and one
// entry point per device. No torch, no CUDA headers. Strides are in elements, never in bytes. Entry points assume checked
// arguments (the bindings check) and write nothing outside the described tensors.
//
// Letters: M, N, K for GEMM, y[M,N] = a[M,K] b[N,K]^T; N, C, H, W -> O, OH, OW with an R x S kernel for convolution. A group is
// a group of a convolution, or, where the weight alone is quantized, consecutive k of a column that share a scale.
//
// Units of work and shapes, in every file of cpp/ and cuda/:
//   tile    rows x columns of a product that one micro-kernel call (CPU) or one thread block (CUDA) computes
//   panel   neighbouring columns of a packed weight (kPanel of them, CPU); slim if it has at most kSlimColumns
//   tap     a position (r, s) of a convolution kernel; a linear layer has one
//   quad    four consecutive k of one column: the four bytes of one lane of a dot-product instruction
//   run     consecutive elements that one micro-kernel call handles
//   slice   elements that share one scale
//   block   neighbouring elements along one dimension that share a scale; also a thread block, where CUDA is named
//   chunk   kReduceChunk elements of a slice, whose gradients are summed before the sums are
//   pass    the rows or samples whose codes are in scratch at one time
//   share   the part of a pass that one thread computes
//   split   a part of K that is multiplied on its own, its sums added to the other splits' (CUDA)
// Read next: arithmetic.h for the arithmetic, cpu/linear.cpp for the integer GEMM, kernels/table.h for the micro-kernels.
#pragma once

#include <cstdint>

#include "contract/arithmetic.h"
#include "contract/float_format.h"
#include "contract/functions.h"
#include "contract/philox.h"

namespace quant_ops {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt8, kUInt8, kInt16, kInt32 };

QO_HD constexpr int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt16: return 2;
    default: return 1;
  }
}

// ---- iteration spaces (iteration.h makes them) ------------------------------------------------------------------------

constexpr int kMaxDims = 32;     // a blocked dimension counts twice
constexpr int kMaxOperands = 5;  // tensors walked together

// Sizes, and for each operand the stride of every dimension; a broadcast dimension has stride 0. ndim 0 is one element.
struct Iteration {
  int ndim = 0;
  int operands = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxOperands][kMaxDims] = {};
};

// A reduction: for every point of `kept` (a slice), a walk over `reduced` in row-major order.
struct Reduction {
  Iteration kept, reduced;
};

// ---- elementwise quantization; on each device one file an operator: quantize, quantize_backward, qparams, quantize_rows,
// quantize_float, quantize_block, affine ---------------------------------------------------------------------------------

// quant_tensor_forward: q = clamp(rne(x / scale) + zero_point, qmin, qmax);  y = simulate ? (q - zero_point) * scale : q
struct QuantizeParams {
  Iteration it;  // operands: x, y, scale, zero_point
  const void* x;
  void* y;
  DType x_dtype, y_dtype;     // equal when simulating
  const void* scale;          // float32; float64 when x is float64
  const int32_t* zero_point;  // symmetric: a single 0 with stride 0; on CUDA null
  bool exact_in_float32;      // all |qmin - zero_point|, |qmax - zero_point| <= 2^24: the clamp is exact in float32
  int32_t qmin, qmax;
  bool simulate;
};

// quant_tensor_backward: dx = g where qmin <= rne(x / scale) + zero_point <= qmax, else 0; dscale and dzero_point are sums of
// g * factor (straight_through in arithmetic.h) over each element's slice, in float64, in this fixed order: the slice in row-major
// order is cut into chunks of kReduceChunk elements; element j of a chunk goes to lane j % 32; lanes are added as a butterfly
// (16, 8, 4, 2, 1). The chunks' sums are added in the same way, and theirs, until one is left. So the sums depend neither on
// threads nor on the device, and no chain of additions is long.
constexpr int64_t kReduceChunk = 1024;
constexpr int kReduceLanes = 32;
struct QuantizeBackwardParams {
  Iteration it;  // operands: x, grad, dx, scale, zero_point
  const void* x;
  const void* grad;
  void* dx;
  DType x_dtype;      // of x, grad and dx
  const void* scale;  // as in QuantizeParams, likewise the next three
  const int32_t* zero_point;
  bool exact_in_float32;
  int32_t qmin, qmax;
  // operands of both spaces: x, grad, scale, zero_point;  kept also: the gradient
  Reduction scale_sum, zero_sum;
  void* dscale;  // float32; float64 when x is float64
  void* dzero;   // likewise; null: not wanted
};

// dequant_tensor: y = (q - zero_point) * scale, computed in float32 (float64 when y is float64), rounded once to y's dtype
struct DequantizeParams {
  Iteration it;  // operands: q, y, scale, zero_point
  const void* q;
  void* y;
  DType q_dtype, y_dtype;
  const void* scale;  // float32; float64 when y is float64
  const int32_t* zero_point;
  bool exact_in_float32;  // all |zero_point| <= 2^24
};

// choose_qparams: the scale and zero point of every slice, from its minimum and maximum (choose_qparams_of in arithmetic.h)
struct ChooseQParams {
  Reduction range;  // operands of both: x;  kept also: the result
  const void* x;
  DType x_dtype;
  void* scale;  // float32; float64 when x is float64
  int32_t* zero_point;
  int32_t qmin, qmax;
  bool asymmetric;
};

// quantize_rows: choose_qparams over the last dimension and quantize to int8, each row read once from memory
struct QuantizeRowsParams {
  int64_t rows, columns;
  const void* x;  // last dimension contiguous
  int64_t x_stride;
  DType x_dtype;
  int8_t* q;  // [rows, columns], contiguous
  float* scale;
  int32_t* zero_point;
  bool asymmetric;
};

// The sums over a row in float32: element k goes to lane k % kSumLanes, which adds in the order of k; then lanes are added as a
// butterfly (8, 4, 2, 1). The same on every instruction set.
constexpr int kSumLanes = 16;

// norm_quantize_rows: quantize_rows of the LayerNorm or RMSNorm of every row, in float32, for t[k] = x[k] + residual[k]:
//   d[k] = t[k] - (sum t) / n, with rms t[k] itself;  r = 1 / sqrt((sum fma(d[k], d[k], ...)) / n + eps)
//   y[k] = fma(d[k] * r, weight[k], bias[k])
struct NormQuantizeRowsParams {
  QuantizeRowsParams rows;
  const void* residual;  // of x's dtype; null: none
  int64_t residual_stride;
  const float* weight;  // [columns]; null: 1
  const float* bias;    // null: none
  float eps;
  bool rms;
};

// Where the random words of stochastic rounding come from (philox.h): a value, or on a GPU one in its memory.
struct Seed {
  uint64_t value;
  const int64_t* memory;  // null: value
};

// quant_float_forward: y = round_to_format(x / scale) * scale.
// quant_float_backward: y = grad where |x / scale| <= format.largest, else 0.
struct QuantizeFloatParams {
  Iteration it;  // operands: x, y, scale, then forward the element's index (its stride in row-major order), backward grad
  const void* x;
  const void* grad;  // null: forward
  void* y;
  DType dtype;        // of x, y and grad
  const void* scale;  // float32; float64 when x is float64; null: 1
  FloatFormat format;
  Seed seed;
};

// quant_block_forward and quant_block_backward: the same, for blocks of elements with a scale from their largest magnitude
// (block_scale in float_format.h). Dense tensors are [outer][length][inner] in memory, and blocks lie along `length`: `block`
// elements each, the last of a length may be shorter.
struct QuantizeBlockParams {
  int64_t outer, length, inner, block;
  const void* x;
  const void* grad;  // null: forward
  void* y;
  DType dtype;  // float32, float16 or bfloat16
  BlockFormat format;
  const float* tensor_scale;  // one element; null: 1
  Seed seed;
  Iteration order;  // operand 0: the index of every element, in the order of memory; for stochastic rounding
};

// ---- torchao's affine primitives (affine.h has the arithmetic) --------------------------------------------------------

enum class Mapping : int32_t { kSymmetric, kSymmetricNoClipping, kAsymmetric };
enum class ZeroPointDomain : int32_t { kInt, kFloat, kNone };

// Where scales and zero points of blocks go, and how they are chosen.
struct AffineChoice {
  void* scale;  // a floating dtype
  DType scale_dtype;
  void* zero_point;
  DType zero_dtype;
  bool zero_is_floating, zero_is_int64;  // int64: zero_dtype is not read
  int32_t qmin, qmax;
  Mapping mapping;
  ZeroPointDomain domain;
  bool preserve_zero;
  float eps;  // a number of x_dtype
};

// choose_qparams_affine: the scale and the zero point of every block, from its smallest and largest element
struct ChooseAffineParams {
  Reduction range;  // operands of both: x;  kept also: the number of the block
  const void* x;
  DType x_dtype;  // float32, float16 or bfloat16
  AffineChoice choice;
};

// quantize_affine and dequantize_affine: from floating elements to codes and back
struct AffineParams {
  Iteration it;  // operands: from, to, the number of the block
  const void* from;
  void* to;
  DType from_dtype, to_dtype;
  int64_t blocks;
  const void* scale;  // [blocks], as zero_point
  DType scale_dtype;
  const void* zero_point;  // null: none
  DType zero_dtype;        // floating
  bool zero_is_integer;    // from an integer tensor, whose dtype gives way in torch's type promotion, or none
  int32_t qmin, qmax;
  ZeroPointDomain domain;
};

void quantize_affine_cpu(const AffineParams& p);
void dequantize_affine_cpu(const AffineParams& p);
void choose_qparams_affine_cpu(const ChooseAffineParams& p);

void quantize_float_cpu(const QuantizeFloatParams& p);
void quantize_block_cpu(const QuantizeBlockParams& p);
void quantize_cpu(const QuantizeParams& p);
void quantize_backward_cpu(const QuantizeBackwardParams& p);
void dequantize_cpu(const DequantizeParams& p);
void choose_qparams_cpu(const ChooseQParams& p);
void quantize_rows_cpu(const QuantizeRowsParams& p);
void norm_quantize_rows_cpu(const NormQuantizeRowsParams& p);

// ---- integer GEMM and convolution; on each device linear and conv2d --------------------------------------------------

// How the input becomes integer codes.
enum class InputMode : int32_t {
  kDynamic,            // scale from the data, symmetric: Linear per row, Conv2d per sample
  kDynamicAsymmetric,  // scale and zero point from the data
  kStatic,             // floating x, scale given: codes clamped to [-128, 127]
  kQuantized,          // x is int8 or uint8 already
};

// A tensor that is added to the result before its function: codes of r mean (r - zero_point) * scale.
struct ResidualParams {
  const void* r;              // lies exactly as y does; null: none
  DType dtype;                // int8, uint8, float32, float16 or bfloat16
  const float* scale;         // one element; null: floating
  const int32_t* zero_point;  // likewise; null: 0
};

// What an output element becomes, in float32: y = fma(acc, scale_a * scale_b, bias); with a residual y = fma(r - zero_point, scale,
// y), or y + r for a floating r; then the function; then
//   floating dtype: rounded once;  int8 / uint8: clamp(rne(y / out_scale) + out_zero_point);  int32: acc itself, no epilogue
struct OutputParams {
  void* y;
  DType dtype;
  const float* weight_scale;
  int64_t weight_scale_stride;  // 1: per output channel, 0: per tensor
  const float* bias;            // null: none
  ResidualParams residual;
  Function function;
  const float* out_scale;         // one element; null: floating or int32
  const int32_t* out_zero_point;  // likewise; null: 0
};

struct InputParams {
  const void* x;
  DType dtype;
  InputMode mode;
  const float* scale;  // static and quantized; stride 0 or 1 over rows (Linear) or samples (Conv2d)
  int64_t scale_stride;
  const int32_t* zero_point;
  int64_t zero_point_stride;
  // [K] of a linear layer with a floating x: what is quantized, or multiplied as it is, is float32(x[m,k]) * multiplier[k], in one
  // float32 multiplication. Null: x itself.
  const float* multiplier;
};
inline bool is_dynamic(const InputParams& in) { return in.mode == InputMode::kDynamic || in.mode == InputMode::kDynamicAsymmetric; }

struct Int8LinearParams {
  int64_t M, N, K;
  InputParams in;
  int64_t x_stride;      // between rows; the last dimension is contiguous
  const int8_t* weight;  // [N, K] contiguous; read only when packed is null
  const int8_t* packed;  // from pack_weight, or null
  OutputParams out;
  int64_t y_stride;
};

struct Int8Conv2dParams {
  int64_t N, C, H, W, O, R, S, OH, OW, groups;
  int64_t stride[2], pad[2], dilation[2];  // pad: top and left; OH, OW already tell bottom and right
  InputParams in;
  int64_t x_stride[4];   // N, C, H, W; the stride of C is 1, or else that of W is
  const int8_t* weight;  // [O, C/groups, R, S] contiguous
  const int8_t* packed;
  OutputParams out;
  bool y_channels_last;  // y is dense, [N, OH, OW, O] or [N, O, OH, OW] in memory
};

// weight_only_linear: y[m,n] = sum_k x[m,k] w[n,k] + bias[n], where the weight lies in groups of `group` consecutive k of a column,
// each with a scale and perhaps a zero point: w = (q - zero_point) * scale, or q * scale + float_zero.
//
// With codes of x (in.mode kDynamic or kDynamicAsymmetric; `codes`), over the groups g in ascending order, starting from the bias
// (-0 without one), in float32:
//   y = fma(float(sum_k (a - zero_a[m]) (q - zero_point[n,g])), scale_a[m] * scale[n,g], y)            sums are exact, in int32
//   and with float_zero, whose q is corrected by no zero point, y = fma(float(sum_k (a - zero_a[m])), scale_a[m] * float_zero[n,g],
//   y)
// Without codes the products are accumulated in float32, in no order that a caller may rely on: |error| <= 2 eps sum_k |x||w|.
struct WeightOnlyParams {
  int64_t M, N, K;
  int64_t group;
  int bits;  // of a code: 4 or 8
  InputParams in;
  bool codes;
  int64_t x_stride;      // between rows; the last dimension is contiguous
  const int8_t* packed;  // from pack_weight_only
  const float* scale;
  int64_t scale_stride[2];   // of a column, of a group
  const int8_t* zero_point;  // null: none
  const float* float_zero;   // null: none; at most one of the two is there
  int64_t zero_stride[2];    // of the one that is there
  const float* bias;         // null: none
  void* y;
  DType y_dtype;
  int64_t y_stride;
};

// weight_only_embedding: y[m,k] = w[index[m],k] of such a weight, in float32: float(q - zero_point) * scale, or
// float(q) * scale + float_zero in two roundings; then rounded once to y's dtype.
struct WeightOnlyEmbeddingParams {
  int64_t M, N, K;
  int64_t group;
  int bits;
  const void* index;  // contiguous; on the CPU each is in [0, N), on CUDA the kernel asserts it
  bool index_is_int64;
  const int8_t* packed;   // from pack_weight_only; null: `weight` is read
  const int8_t* weight;   // [N, K], its k contiguous
  int64_t weight_stride;  // between columns
  const float* scale;
  int64_t scale_stride[2];   // of a column, of a group
  const int8_t* zero_point;  // null: none
  const float* float_zero;   // null: none; at most one of the two is there
  int64_t zero_stride[2];    // of the one that is there
  void* y;                   // contiguous; float32, float16 or bfloat16
  DType y_dtype;
};

// ---- codes between products; on each device pointwise and pool ---------------------------------------------------------

// What becomes of a float32 value y that is a result: as OutputParams says.
struct ResultParams {
  void* y;
  DType dtype;
  const float* scale;         // one element; null: floating
  const int32_t* zero_point;  // likewise; null: 0
};

// int8_add, int8_mul, requantize and int8_cat: y = float(x - x_zero_point) * x_scale for codes x, float(x) for a floating x; then
// the residual, the function and the conversion. x and the residual are [rows][columns] without gaps.
//
// Of int8_mul the residual is a factor, and both are codes: y = (float(x - x_zero_point) * float(r - zero_point)) * (x_scale *
// scale). `shared_rows` rows of x in succession are multiplied by the same row of the factor, which with `factor_is_column` has one
// element for all columns.
struct PointwiseParams {
  int64_t rows, columns;
  const void* x;
  DType x_dtype;                // float32, float16, bfloat16, int8 or uint8
  const float* x_scale;         // of codes, one element
  const int32_t* x_zero_point;  // likewise; null: 0
  ResidualParams residual;
  Function function;
  ResultParams out;
  int64_t y_stride;  // between rows; columns are contiguous
  bool multiplies = false;
  int64_t shared_rows = 1;
  bool factor_is_column = false;

  bool shares_factor() const { return shared_rows > 1 || factor_is_column; }
};

// The windows of a pool along one dimension of the image.
struct PoolAxis {
  int64_t size, out;  // of the image and of the result
  int64_t kernel;     // 0: window o is [floor(o * size / out), ceil((o + 1) * size / out))
  int64_t stride, pad, dilation;
};
// The part of a window that lies in the image: `taps` positions from `first` on, `dilation` apart. `counted`: positions that an
// average over the padded image divides by.
struct PoolWindow {
  int64_t first, taps, counted;
};
QO_HD PoolWindow pool_window(const PoolAxis& a, int64_t o) {
  if (a.kernel == 0) {
    const int64_t begin = o * a.size / a.out, end = ((o + 1) * a.size + a.out - 1) / a.out;
    return {begin, end - begin, end - begin};
  }
  const int64_t begin = o * a.stride - a.pad;
  const int64_t before = begin < 0 ? (a.dilation - 1 - begin) / a.dilation : 0;  // taps before the image
  const int64_t up_to = begin >= a.size ? 0 : (a.size - 1 - begin) / a.dilation + 1, inside = up_to < a.kernel ? up_to : a.kernel;
  const int64_t end = begin + a.kernel < a.size + a.pad ? begin + a.kernel : a.size + a.pad;
  return {begin + before * a.dilation, inside > before ? inside - before : 0, end - begin};
}

struct PoolShape {
  int64_t N, C;
  PoolAxis h, w;
  bool y_channels_last;  // y is dense, [N, OH, OW, C] or [N, C, OH, OW] in memory
  int64_t x_stride[4];   // N, C, H, W; with y_channels_last that of C is 1, else that of W
};

// int8_max_pool2d: the largest code of every window; of an empty one the least code of the dtype.
struct MaxPoolParams {
  PoolShape shape;
  const void* x;
  void* y;
  DType dtype;  // int8 or uint8, of x and y
};

// int8_avg_pool2d and int8_adaptive_avg_pool2d: y = float(sum) * (x_scale / float(count)) from the exact int32 sum of
// x - x_zero_point over the window, then the conversion.
struct AvgPoolParams {
  PoolShape shape;  // dilation 1
  const void* x;
  DType dtype;  // int8 or uint8
  const float* x_scale;
  const int32_t* x_zero_point;  // null: 0
  bool counts_padding;          // the count is that of the positions in the padded image, or else of those in the image
  int64_t divisor;              // the count of every window; 0: as above
  ResultParams out;
};

// int8_upsample_nearest2d: y[n, c, h, w] = x[n, c, h / factor_h, w / factor_w], elements of one byte
struct UpsampleParams {
  int64_t N, C, H, W;  // of x
  int64_t factor[2];
  const void* x;
  void* y;
  bool y_channels_last;  // as in PoolShape
  int64_t x_stride[4];   // likewise
};

void pointwise_cpu(const PointwiseParams& p);
void max_pool2d_cpu(const MaxPoolParams& p);
void avg_pool2d_cpu(const AvgPoolParams& p);
void upsample_nearest2d_cpu(const UpsampleParams& p);

void int8_linear_cpu(const Int8LinearParams& p);
void weight_only_linear_cpu(const WeightOnlyParams& p);
void weight_only_embedding_cpu(const WeightOnlyEmbeddingParams& p);
void int8_conv2d_cpu(const Int8Conv2dParams& p);

// ---- attention: on the CPU, attention ---------------------------------------------------------------------------------

// int8_attention: y = softmax(scale q k^T + mask) v for every head, from eight-bit codes of q, k and v. For one head, in float32
// where nothing else is said, a sum over rows in their order:
//   k', v'    k and v less the means of their columns: fl(k - fl(sum k / S)). Neither changes the exact result: the first adds the
//             same to all scores of a row; the second is added again at the end.
//   codes     qc, kc: int8 of every row of q and k', vc: of every column of v', symmetric, each with a scale from its largest
//             magnitude (choose_qparams_of): a[l], b[s] and c[d]
//   scores    x[l,s] = float(sum_d qc[l,d] kc[s,d]) * ((a[l] * scale) * b[s]), the sum exact; then + mask[l,s], -Inf where a
//   Boolean
//             mask is false or, if causal, s > l
//   softmax   p[l,s] = exp_of(max(x[l,s] - max_s x[l,s], kLeastExponent));  Z[l] = sum_s p[l,s] in kSumLanes lanes. Z is at
//             least 1, so what is e^-87 in place of less does not show
//   result    y[l,d] = fma(float(sum_s rne(255 p[l,s]) vc[s,d]), (1 / (255 Z[l])) * c[d], mean_v[d]), rounded once to y's dtype. A
//             row whose largest score is -Inf, or without scores, is 0.
// The codes of p are of 1/255 of the row's largest; Z is the sum of p itself. So small p that have no code count as a token whose
// v is the mean, instead of being lost. docs/reference/operators.md has the bound of the error.
constexpr float kLeastExponent = -87.0f;  // e^-87 is a normal number
struct AttentionParams {
  int64_t batch, heads, kv_heads;  // head h reads k and v of head h / (heads / kv_heads)
  int64_t L, S, D, DV;             // rows of q, rows of k and v, columns of q and k, columns of v
  DType dtype;                     // of q, k, v and y: float32, float16 or bfloat16
  const void* q;
  const void* k;
  const void* v;
  void* y;
  int64_t q_stride[3], k_stride[3], v_stride[3], y_stride[3];  // batch, head, row; columns are contiguous
  const void* mask;                                            // null: none
  DType mask_dtype;                                            // kUInt8: Boolean
  int64_t mask_stride[4];                                      // batch, head, row, column
  bool causal;
  float scale;
};

void int8_attention_cpu(const AttentionParams& p);

}  // namespace quant_ops

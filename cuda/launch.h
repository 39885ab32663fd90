// Entry points of the CUDA kernels; the structs and formulas are those of ops.h. An operator that needs memory of its own has a
// plan: plan_x(params) decides everything that can be decided without a GPU, the caller allocates plan.bytes, and run_x launches.
// All work goes to the stream of `at`, and nothing waits for it. Errors of a launch are thrown as std::runtime_error. Read next:
// linear.cpp for plans, quantize.cu for kernels.
#pragma once

#include <optional>

#include "contract/cuda_weights.h"
#include "contract/ops.h"
#include "device/layout.cuh"
#include "device/workspace.h"
#include "engine/choose.h"
#include "weight_only.h"

namespace quant_ops {

// ---- quantize family ------------------------------------------------------------------------------------------------

// In the whole family a null zero_point is 0.
void quantize_cuda(const QuantizeParams& p, const Launch& at);
void dequantize_cuda(const DequantizeParams& p, const Launch& at);

struct QuantizeBackwardPlan {
  bool same_layout = true;   // of x and dx: the kernel that sums over slices meets every element once, and writes dx as well
  bool same_slices = false;  // of scale and zero point: one kernel sums for both
  bool early = false;        // the kernel that adds chunks starts while they are being summed
  Slot<double> scale_sum, zero_sum;  // of all levels of chunks, unless the first kernel finishes the slices
  int64_t bytes = 0;
};
QuantizeBackwardPlan plan_quantize_backward(const QuantizeBackwardParams& p, const GpuLimits& gpu);
void run_quantize_backward(const QuantizeBackwardPlan& plan, const QuantizeBackwardParams& p, const Launch& at);

// n contiguous zero points to int32: floating ones by round_zero_point, integers saturating. is_int64: DType has no name for it.
struct ZeroPointParams {
  const void* from;
  DType dtype;
  bool is_int64;
  int32_t* to;
  int64_t n, qmin, qmax;
};
void zero_points_cuda(const ZeroPointParams& p, const Launch& at);

// How the work of choose_qparams is cut.
struct QParamsPlan {
  Reduction range;  // coalesced and sorted
  int64_t slices = 0, length = 0;
  bool down = false;    // neighbouring slices are neighbours in memory, and are read side by side
  int64_t vector = 1;   // elements of a load
  int64_t run = 1;      // along: neighbouring elements of a slice
  int64_t units = 0;    // along: vectors of a slice; down: its rows
  int64_t workers = 0;  // tasks of one part of every slice
  int64_t parts = 0;    // of a slice, each with its own range; 0: slices are empty
  int64_t part_units = 0;
  int64_t bytes = 0;
};
QParamsPlan plan_choose_qparams(const ChooseQParams& p, int64_t multiprocessors);
void run_choose_qparams(const QParamsPlan& plan, const ChooseQParams& p, const Launch& at);

// The ranges alone, of every part of every slice: at.memory becomes [slices][parts] pairs of a minimum and a maximum, float64 if x
// is, else float32. Merged with each other and with zero they are the range that choose_qparams_of takes.
inline int64_t ranges_bytes(const QParamsPlan& plan) { return plan.slices * plan.parts * 2 * int64_t{sizeof(double)}; }
void run_ranges(const QParamsPlan& plan, const ChooseQParams& p, const Launch& at);

// Rows of q are q_stride >= columns apart; what is behind the codes becomes zeros. A null zero_point is not written.
void quantize_rows_cuda(const QuantizeRowsParams& p, int64_t q_stride, const Launch& at);

void quantize_affine_cuda(const AffineParams& p, const Launch& at);
void dequantize_affine_cuda(const AffineParams& p, const Launch& at);
void choose_qparams_affine_cuda(const ChooseAffineParams& p, const Launch& at);

void weight_only_embedding_cuda(const WeightOnlyEmbeddingParams& p, const Launch& at);

void quantize_float_cuda(const QuantizeFloatParams& p, const Launch& at);

// How long blocks are cut into parts.
struct QuantizeBlockPlan {
  int64_t part = 0;   // elements along the length
  int64_t parts = 1;  // of a block; more than one: their largest magnitudes come first
  Slot<float> amax{};
  int64_t bytes = 0;
};
QuantizeBlockPlan plan_quantize_block(const QuantizeBlockParams& p);
void run_quantize_block(const QuantizeBlockPlan& plan, const QuantizeBlockParams& p, const Launch& at);

// ---- operands of integer products -----------------------------------------------------------------------------------

// The sums and rows of cuda_weights.h; null if not wanted.
void pack_weight_cuda(const int8_t* weight, const CudaWeights& w, int32_t* sums, int8_t* rows, const Launch& at);

// How a weight gets into the form of cuda_weights.h: it has that form, or `packed` from pack_weight has it, or run_weight makes it.
struct WeightPlan {
  CudaWeights layout{};
  bool with_sums = false;
  Slot<int32_t> sums{};  // to be made
  Slot<int8_t> rows{};   // likewise
};
struct WeightOnDevice {
  const int8_t* rows;
  const int32_t* sums;  // null unless with_sums
};
WeightPlan plan_weight(const CudaWeights& layout, const int8_t* weight, const int8_t* packed, bool with_sums,
                       WorkspaceLayout* workspace);
WeightOnDevice run_weight(const WeightPlan& plan, const int8_t* weight, const int8_t* packed, const Launch& at);

// Who makes int8 codes of the activations.
enum class Encoder : int32_t {
  kNone,     // x is the codes
  kGiven,    // write_codes_cuda, by the given scale or by none
  kRange,    // a scale from the data: quantize_rows_cuda (linear), run_choose_qparams and write_codes_cuda (conv2d)
  kProduct,  // a scale from the data, by the kernel of the product (linear)
};
// Whether sums need a correction for zero points; those of unsigned codes are shifted by 128.
inline bool has_zero_points(const InputParams& in) {
  return in.mode == InputMode::kDynamicAsymmetric || in.zero_point != nullptr || in.dtype == DType::kUInt8;
}

// Scales of samples that write_codes_cuda itself chooses, from the ranges that run_ranges left.
struct SampleRanges {
  const void* parts = nullptr;  // [samples][count] pairs of a minimum and a maximum, float32
  int64_t count = 0;            // 0: scales are given
  bool asymmetric = false;
  float* scale = nullptr;         // results, one a sample
  int32_t* zero_point = nullptr;  // likewise; null: not wanted, unless asymmetric
};

// int8 codes of x [samples, channels of all groups, height, width] in NHWC. Codes of a group's channels fill `tap` bytes, of which
// those that are no channel's are 0. Of `in`, the scale is per sample, not read for int8 and uint8. Around each image of q is a
// border of border_h rows and border_w columns on each side, whose bytes are the code of zero.
struct CodesParams {
  InputParams in;
  int64_t stride[4];  // of x: N, C, H, W
  int64_t samples, height, width;
  int64_t channels, tap;  // of a group
  int8_t* q;
  int64_t pixel;  // bytes of a pixel of q: tap times the groups
  int64_t border_h = 0, border_w = 0;
  SampleRanges ranges{};  // in place of the scale and zero point of `in`, for float32, float16 and bfloat16
};
void write_codes_cuda(const CodesParams& p, const Launch& at);

// float32(x) * multiplier of rows of floats, as contiguous float32 rows.
struct MultiplyRowsParams {
  int64_t rows, columns;
  const void* x;
  int64_t x_stride;
  DType dtype;
  const float* multiplier;
  float* to;
};
void multiply_rows_cuda(const MultiplyRowsParams& p, const Launch& at);

// Scales and zero points as arrays with one element a sample, zero points less `offset`, and 16 codes of each zero point. Null
// results are not wanted; a null scale is 1, a null zero point 0.
struct SampleParams {
  int64_t samples;
  const float* scale;
  int64_t scale_stride;
  const int32_t* zero_point;
  int64_t zero_point_stride;
  int32_t offset;
  float* scale_out;
  int32_t* zero_point_out;
  int8_t* padding;  // [samples][16]
};
void write_sample_params_cuda(const SampleParams& p, const Launch& at);

// ---- codes between products -----------------------------------------------------------------------------------------

void pointwise_cuda(const PointwiseParams& p, const Launch& at);
void max_pool2d_cuda(const MaxPoolParams& p, const Launch& at);
void avg_pool2d_cuda(const AvgPoolParams& p, const Launch& at);
void upsample_nearest2d_cuda(const UpsampleParams& p, const Launch& at);

// ---- integer products -----------------------------------------------------------------------------------------------

struct LinearPlan {
  WeightPlan weight;
  Encoder encoder;
  IgemmProblem product;  // addresses of codes, weight and row parameters: run_linear
  Slot<int8_t> codes;
  Slot<float> row_scale;   // where they are not given, or not with one stride
  Slot<int32_t> row_zero;  // likewise
  KernelPlan kernel;
  bool early;          // the product starts while the rows are being quantized
  Slot<int32_t> sums;  // of the kernel's splits
  int64_t bytes;
};
LinearPlan plan_linear(const Int8LinearParams& p, const GpuLimits& gpu, const KernelChoice& wanted);
void run_linear(const LinearPlan& plan, const Int8LinearParams& p, const Launch& at);

// weight_only_linear (weight_only.cpp).
struct WeightOnlyPlan {
  WeightOnlyLayout layout{};
  WeightOnlyEngine engine{};
  WarpsOverK warps{};       // of the engines that have it
  WeightOnlyTiles tiles{};  // likewise
  int wgmma_tile = -1;      // likewise; its splits are those of `tiles`, in stages
  int64_t row_bytes = 0;    // of the codes of a row
  Slot<int8_t> codes{};     // where x becomes codes, as are the next three
  Slot<float> row_scale{};
  Slot<int32_t> row_zero{};  // asymmetric
  Slot<int32_t> row_sum{};   // where the weight has zero points
  int64_t padded_k = 0;      // of the copy of x
  Slot<char> rows{};         // a copy of floating rows that are not whole vectors
  Slot<float> parts{};       // results of splits of K
  bool early = false;        // the product starts while the rows are being quantized
  int64_t bytes = 0;
};
std::string kernel_text(const WeightOnlyPlan& plan);
WeightOnlyPlan plan_weight_only(const WeightOnlyParams& p, const GpuLimits& gpu, const KernelChoice& wanted);
void run_weight_only(const WeightOnlyPlan& plan, const WeightOnlyParams& p, const Launch& at);

// The output tile of a block of a depthwise convolution: rows, fours of pixels of a row, channels.
struct DepthwiseTile {
  int32_t rows = 0, quads = 0, channels = 0;
};

// The tile of a block of a convolution of few channels (conv2d_direct.cu).
struct DirectTile {
  int32_t tile_rows = 0, tile_columns = 0;            // output pixels
  int32_t columns = 0, pairs = 0;                     // output channels of a block; sixteens of them that a warp makes at a time
  int32_t shared_columns = 0;                         // output channels that share their input channels
  int32_t words = 0, group_channels = 0, joined = 0;  // their input channels: in fours, of a group of the weight, groups
  int32_t pitch = 0;                                  // words between neighbouring pixels in shared memory
};

// A convolution as a linear layer of its patches (conv2d_patches.cu).
struct PatchesPlan {
  LinearPlan linear;
  Slot<char> linear_memory;
  Slot<float> row_scale;   // where rows have their own
  Slot<int32_t> row_zero;  // likewise
};

struct Conv2dPlan {
  WeightPlan weight;
  Encoder encoder;
  Gather gather;            // addresses of codes and padding: run_conv2d
  int64_t border[2];        // rows and columns of zero-point codes on each side of the gathered image
  int64_t channels;         // of a group of the codes
  bool dense;               // a pointwise convolution that is a plain product of codes
  IgemmProblem product;     // if dense, as in LinearPlan
  DepthwiseTile depthwise;  // of a kernel that quantizes x itself, if it has rows
  DirectTile direct;        // likewise
  std::optional<PatchesPlan> patches;
  std::optional<QParamsPlan> range;  // of samples that have pixels, for scales from the data
  Slot<char> range_memory;
  Slot<int8_t> codes;
  Slot<float> scale;  // per sample, and likewise the next two
  Slot<int32_t> zero_point;
  Slot<int8_t> padding;  // 16 codes of the zero point
  KernelPlan kernel;
  Slot<int32_t> sums;
  int64_t bytes;
};
Conv2dPlan plan_conv2d(const Int8Conv2dParams& p, const GpuLimits& gpu, const KernelChoice& wanted);
void run_conv2d(const Conv2dPlan& plan, const Int8Conv2dParams& p, const Launch& at);

}  // namespace quant_ops

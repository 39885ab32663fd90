// Entry points of the CUDA kernels; the structs and formulas are those of ops.h. All work goes to `stream` (a cudaStream_t) of the
// current device, nothing waits for it. Errors of a launch are thrown as std::runtime_error. Read next: quantize.cu.
#pragma once

#include "contract/cuda_weights.h"
#include "contract/ops.h"
#include "engine/problem.h"

namespace quant_ops {

// ---- quantize family ------------------------------------------------------------------------------------------------

// In all of it a null zero_point is 0.
void quantize_cuda(const QuantizeParams& p, void* stream);
void dequantize_cuda(const DequantizeParams& p, void* stream);

// `workspace` holds quantize_backward_workspace(p) doubles.
int64_t quantize_backward_workspace(const QuantizeBackwardParams& p);
void quantize_backward_cuda(const QuantizeBackwardParams& p, double* workspace, void* stream);

// n contiguous zero points to int32: floating ones by round_zero_point, integers saturating. is_int64: DType has no name for it.
void zero_points_cuda(const void* from, DType dtype, bool is_int64, int32_t* to, int64_t n, int64_t qmin, int64_t qmax,
                      void* stream);

// `workspace` holds choose_qparams_workspace(p) doubles.
int64_t choose_qparams_workspace(const ChooseQParams& p);
void choose_qparams_cuda(const ChooseQParams& p, double* workspace, void* stream);

// Scale (and zero point) from each row's data, as int8_linear does on the CPU. Codes are signed: [-127, 127] symmetric, [-128, 127]
// asymmetric.
struct RowQuantParams {
  int64_t rows, columns;
  const void* x;
  DType x_dtype;
  int64_t x_stride;
  int8_t* q;
  int64_t q_stride;  // >= columns; the rest of each row is filled with zeros
  float* scale;
  int32_t* zero_point;  // null: symmetric
};
void quantize_rows_cuda(const RowQuantParams& p, void* stream);
void quantize_rows_cuda(const QuantizeRowsParams& p, void* stream);

// ---- integer products -----------------------------------------------------------------------------------------------

// The operators of ops.h; zero points and out_scale are on the device, too. Both give the bytes of workspace that they need, and
// with memory null do nothing else.
int64_t int8_linear_cuda(const char* op, const Int8LinearParams& p, void* memory, void* stream);
int64_t int8_conv2d_cuda(const Int8Conv2dParams& p, void* memory, void* stream);

// sums and rows of cuda_weights.h; null: not wanted.
void pack_weight_cuda(const int8_t* weight, const CudaWeights& w, int32_t* sums, int8_t* rows, void* stream);

// A weight as the kernels read it: in place, from its packed copy, or made in the workspace by prepare().
class WeightOnDevice {
 public:
  // packed: from pack_weight, or null. Sums are null unless asked for.
  WeightOnDevice(const CudaWeights& w, const int8_t* weight, const int8_t* packed, bool with_sums, Workspace* workspace);
  void prepare(void* stream) const;

  const int8_t* rows = nullptr;
  const int32_t* sums = nullptr;

 private:
  CudaWeights w_;
  const int8_t* weight_;
  int32_t* made_sums_ = nullptr;
  int8_t* made_rows_ = nullptr;
};

// int8 codes of x [samples, channels of all groups, height, width] in NHWC, `tap` bytes for the `channels` of a group.
struct CodesParams {
  const void* x;
  DType x_dtype;
  int64_t stride[4];  // of x: N, C, H, W
  int64_t samples, height, width;
  int64_t channels, tap;  // of a group
  int8_t* q;
  int64_t pixel;       // bytes of a pixel of q: tap times the groups
  const float* scale;  // per sample; not read for int8 and uint8
  int64_t scale_step;
  const int32_t* zero_point;  // null: 0
  int64_t zero_step;
};
void write_codes_cuda(const char* op, const CodesParams& p, void* stream);

// Per-sample scales and zero points as arrays of their own, less `offset`, and 16 codes of each zero point; null: not wanted.
struct SampleParams {
  int64_t samples;
  const float* scale;  // null: 1
  int64_t scale_step;
  const int32_t* zero_point;  // null: 0
  int64_t zero_step;
  int32_t offset;
  float* scale_out;
  int32_t* zero_out;
  int8_t* padding;  // [samples][16]
};
void sample_params_cuda(const char* op, const SampleParams& p, void* stream);

}  // namespace quant_ops

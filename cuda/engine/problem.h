// The integer GEMM that every CUDA engine computes, a contract between engines and their callers; no CUDA headers.
//
//   y[m,n] = max(floor, fma(float(acc - row_zero[m] * column_sum[n]), row_scale[m] * column_scale[n], bias[n])),  acc = a b^T
//
// rounded once to a floating y_dtype, requantized to int8 or uint8 (ops.h, OutputParams), or, for int32, the corrected acc itself.
// All pointers are on the device. Read next: choose.h for the choice of a kernel, portable.cuh for the portable engine.
#pragma once

#include "contract/ops.h"
#include "device/layout.cuh"
#include "device/workspace.h"

namespace quant_ops {

// a is [M,K], b is [N,K], y is [M,N]; strides in elements, the last dimension is contiguous. K and the strides of a and b are
// multiples of 16, and a and b are aligned to 16 bytes. In a plan, addresses that only the run knows are null.
struct IgemmProblem {
  int64_t M = 0, N = 0, K = 0;
  const int8_t* a = nullptr;
  int64_t a_stride = 0;
  const int8_t* b = nullptr;
  int64_t b_stride = 0;
  const float* row_scale = nullptr;   // not read for int32, likewise column_scale and bias
  int64_t row_step = 0;               // of row_scale and row_zero: 0 or 1
  const int32_t* row_zero = nullptr;  // null: none
  const float* column_scale = nullptr;
  int64_t column_step = 0;
  const int32_t* column_sum = nullptr;  // null when row_zero is
  const float* bias = nullptr;          // null: none
  float floor = 0.0f;                   // 0 for ReLU, else -inf
  void* y = nullptr;
  int64_t y_stride = 0;
  DType y_dtype = DType::kFloat32;
  const float* out_scale = nullptr;         // one element, for int8 and uint8
  const int32_t* out_zero_point = nullptr;  // null: 0
  // The kernel before this one in the stream, launched in order, writes a, row_scale and row_zero and nothing else that this one
  // reads, and lets it start: a kernel may be launched with Start::kEarly (common.cuh).
  bool early = false;
};

// ---- results --------------------------------------------------------------------------------------------------------

// A thread finishes this many neighbouring columns of a row at once.
constexpr int kFour = 4;

// Members are those of IgemmProblem. Row m belongs to sample m / rows: in a convolution rows are pixels, in a GEMM every row is a
// sample.
struct Epilogue {
  const float* row_scale = nullptr;
  const int32_t* row_zero = nullptr;
  int64_t row_step = 0;  // per sample
  const float* column_scale = nullptr;
  int64_t column_step = 0;
  const int32_t* column_sum = nullptr;
  const float* bias = nullptr;
  float floor = 0.0f;
  void* y = nullptr;
  DType dtype = DType::kFloat32;
  FastDiv rows = FastDiv(1);
  int64_t y_sample = 0, y_row = 0, y_column = 0;  // strides
  bool vectors = false;                           // results of four neighbouring columns are one aligned vector
  const float* out_scale = nullptr;
  const int32_t* out_zero_point = nullptr;
};

// Whether vectors of four columns are aligned. Groups start at multiples of `columns`.
inline bool whole_vectors(const Epilogue& e, int64_t columns) {
  return e.y_column == 1 && columns % kFour == 0 && e.y_row % kFour == 0 && e.y_sample % kFour == 0 &&
         is_aligned(e.y, kFour * dtype_bytes(e.dtype));
}

inline Epilogue epilogue_of(const IgemmProblem& p) {
  Epilogue e{.row_scale = p.row_scale,
             .row_zero = p.row_zero,
             .row_step = p.row_step,
             .column_scale = p.column_scale,
             .column_step = p.column_step,
             .column_sum = p.column_sum,
             .bias = p.bias,
             .floor = p.floor,
             .y = p.y,
             .dtype = p.y_dtype,
             .y_sample = p.y_stride,
             .y_column = 1,
             .out_scale = p.out_scale,
             .out_zero_point = p.out_zero_point};
  e.vectors = whole_vectors(e, p.N);
  return e;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// The engines, each with a table of kernels.
enum class Engine : int32_t {
  kNone,       // no kernel
  kPortable,   // tiles by mma.sync, sm_80 and newer (portable.cuh)
  kGemv,       // up to eight rows (gemv.cu)
  kFused,      // quantizes its floating rows itself; only of dynamic layers (fused.cu)
  kSm90,       // Hopper: wgmma and TMA (sm90/igemm.h)
  kDepthwise,  // depthwise convolutions (conv2d_depthwise.cu); never chosen for a dense product
  kDirect,     // convolutions of few channels (conv2d_direct.cu); likewise
};

// The kernel that computes a product, and how it splits K.
struct KernelPlan {
  Engine engine = Engine::kNone;
  int kernel = 0;       // of the engine's table
  int64_t splits = 1;   // of K
  int64_t split_k = 0;  // elements of each, a multiple of the tile's k
  double time = 0.0;    // in clocks, of the model in choose.h
  int64_t sums = 0;     // int32 values that the splits leave in the workspace
};

// Computes a dense product with the kernel that choose_kernel gave for it. `sums` is workspace for kernel.sums values.
void run_product(const IgemmProblem& p, const KernelPlan& kernel, int32_t* sums, const Launch& at);

// Adds the sums of all splits, each [M, columns], and finishes them (portable.cu).
void join_splits(const int32_t* sums, int64_t splits, int64_t M, int64_t columns, const Epilogue& out, const Launch& at);

}  // namespace quant_ops

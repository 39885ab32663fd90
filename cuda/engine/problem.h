// The integer GEMM that every CUDA engine computes, a contract between engines and their callers; no CUDA headers.
//
//   y[m,n] = max(floor, fma(float(acc - row_zero[m] * column_sum[n]), row_scale[m] * column_scale[n], bias[n])),  acc = a b^T
//
// rounded once to a floating y_dtype, requantized to int8 or uint8 (ops.h, OutputParams), or, for int32, the corrected acc itself.
// All pointers are on the device. Read next: portable.cuh for the portable engine, choose.h for the choice among tiles.
#pragma once

#include <string>

#include "contract/ops.h"

namespace quant_ops {

// a is [M,K], b is [N,K], y is [M,N]; strides in elements, the last dimension is contiguous. K and the strides of a and b are
// multiples of 16, and a and b are aligned to 16 bytes.
struct IgemmProblem {
  int64_t M, N, K;
  const int8_t* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t b_stride;
  const float* row_scale;   // not read for int32, likewise column_scale and bias
  int64_t row_step;         // of row_scale and row_zero: 0 or 1
  const int32_t* row_zero;  // null: none
  const float* column_scale;
  int64_t column_step;
  const int32_t* column_sum;  // null when row_zero is
  const float* bias;          // null: none
  float floor;                // 0: ReLU, -inf
  void* y;
  int64_t y_stride;
  DType y_dtype;
  const float* out_scale;         // one element, for int8 and uint8
  const int32_t* out_zero_point;  // null: 0
};

// Parts of a workspace, each aligned to 256 bytes. Without memory it only counts: the same code finds the size and uses it. The
// parts are then addresses that nobody reads, aligned and not null as the real ones are, so that the same kernels are chosen.
class Workspace {
 public:
  explicit Workspace(void* memory)
      : base_(memory == nullptr ? kAlignment : reinterpret_cast<uintptr_t>(memory)), counts_(!memory) {}
  template <class T>
  T* take(int64_t count) {
    const uintptr_t at = base_ + static_cast<uintptr_t>(used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(at);
  }
  bool counts() const { return counts_; }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 256;
  uintptr_t base_;
  bool counts_;
  int64_t used_ = 0;
};

// The name of the kernel that igemm_cuda takes, for people.
std::string igemm_kernel_text(const char* op, const IgemmProblem& p);

// Takes what it needs from the workspace and, unless that only counts, launches on `stream`. M, N >= 1.
void igemm_cuda(const char* op, const IgemmProblem& p, Workspace* workspace, void* stream);

}  // namespace quant_ops

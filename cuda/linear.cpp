// int8_linear and int8_gemm on CUDA: start reading here.
//
// Rows of x become int8 codes in a workspace, each row read once (quantize_rows.cu) or with the given scale (activations.cu); codes
// that can be read where they are, are. Then one integer product with its epilogue (problem.h). A few dynamic rows take one kernel
// (gemv.cu). Bits are those of cpp/cpu/linear.cpp.
#include <cmath>

#include "device/layout.cuh"
#include "engine/gemv.h"
#include "launch.h"

namespace quant_ops {

int64_t int8_linear_cuda(const char* op, const Int8LinearParams& p, void* memory, void* stream) {
  if (p.M == 0 || p.N == 0) return 0;
  Workspace workspace(memory);
  const CudaWeights weights = cuda_weights(p.N, p.K, 1, 1, 1);
  const bool dynamic = p.in.mode == Activation::kDynamic || p.in.mode == Activation::kDynamicAsymmetric;
  const bool is_unsigned = p.in.dtype == DType::kUInt8;
  const bool asymmetric = p.in.mode == Activation::kDynamicAsymmetric || p.in.zero_point != nullptr || is_unsigned;
  const WeightOnDevice weight(weights, p.weight, p.packed, asymmetric, &workspace);

  IgemmProblem product{};
  product.M = p.M;
  product.N = p.N;
  product.K = weights.k;
  product.a_stride = weights.k;
  product.b = weight.rows;
  product.b_stride = weights.row;
  product.row_scale = p.in.scale;
  product.row_zero = p.in.zero_point;
  product.row_step = p.in.scale_stride;
  product.column_scale = p.out.weight_scale;
  product.column_step = p.out.weight_scale_stride;
  product.column_sum = weight.sums;
  product.bias = p.out.bias;
  product.floor = p.out.relu ? 0.0f : -INFINITY;
  product.y = p.out.y;
  product.y_stride = p.y_stride;
  product.y_dtype = p.out.dtype;
  product.out_scale = p.out.out_scale;
  product.out_zero_point = p.out.out_zero_point;

  if (dynamic) {
    const FloatingRows rows{p.in.x, p.in.dtype, p.x_stride, p.K, asymmetric};
    if (gemv_quantizes(op, product, rows)) {
      if (workspace.counts()) return workspace.used();
      weight.prepare(stream);
      gemv_cuda(op, product, &rows, stream);
      return workspace.used();
    }
  }

  // codes of the rows
  const int64_t x_stride = p.M == 1 ? weights.k : p.x_stride;
  const bool in_place = p.in.dtype == DType::kInt8 && weights.k == p.K && x_stride % kChunk == 0 && is_aligned(p.in.x, kChunk);
  int8_t* codes = in_place ? nullptr : workspace.take<int8_t>(p.M * weights.k);
  product.a = in_place ? static_cast<const int8_t*>(p.in.x) : codes;
  if (in_place) product.a_stride = x_stride;
  // their scales and zero points, which must step alike; those of unsigned codes are shifted
  const bool made = !dynamic && asymmetric && (is_unsigned || p.in.scale_stride != p.in.zero_point_stride);
  float* row_scale = dynamic || made ? workspace.take<float>(p.M) : nullptr;
  int32_t* row_zero = asymmetric && (dynamic || made) ? workspace.take<int32_t>(p.M) : nullptr;
  if (dynamic || made) {
    product.row_scale = row_scale;
    product.row_zero = row_zero;
    product.row_step = 1;
  }

  if (!workspace.counts()) {
    weight.prepare(stream);
    if (dynamic)
      quantize_rows_cuda({p.M, p.K, p.in.x, p.in.dtype, p.x_stride, codes, weights.k, row_scale, row_zero}, stream);
    else if (!in_place)
      write_codes_cuda(op,
                       {p.in.x,
                        p.in.dtype,
                        {p.x_stride, 1, 0, 0},
                        p.M,
                        1,
                        1,
                        p.K,
                        weights.k,
                        codes,
                        weights.k,
                        p.in.scale,
                        p.in.scale_stride,
                        p.in.zero_point,
                        p.in.zero_point_stride},
                       stream);
    if (made)
      sample_params_cuda(op,
                         {p.M, p.in.scale, p.in.scale_stride, p.in.zero_point, p.in.zero_point_stride, is_unsigned ? 128 : 0,
                          row_scale, row_zero, nullptr},
                         stream);
  }
  igemm_cuda(op, product, &workspace, stream);
  return workspace.used();
}

}  // namespace quant_ops

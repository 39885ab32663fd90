// What follows a product, on its own (PointwiseParams in ops.h): int8_add, int8_mul, requantize and int8_cat, and what int8_conv2d
// and int8_linear do to float32 sums where their own epilogue cannot. A thread has four elements of a row, whose dtypes it looks
// at: the pass is bounded by memory. The bits are those of cpp/kernels/generic/pointwise.h.
#include "contract/functions.h"

#include "device/epilogue.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;

struct PointwiseArgs {
  static constexpr bool kBarriers = false;
  PointwiseParams p;
  FastDiv fours;        // of a row
  FastDiv shared_rows;  // of the factor
  int64_t work;
  bool whole;  // every four elements are there, and aligned
};

// Elements first .. first + 3, of which `count` are there, as values; codes are scaled by `scale` and `zero_point`.
struct FourValues {
  float value[kFour];
  bool codes;  // then value is code - zero_point
};

template <class X>
__device__ __forceinline__ void load_four(const void* from, int64_t first, int count, bool whole, int32_t zero, FourValues* four) {
  const X* const x = static_cast<const X*>(from) + first;
  X elements[kFour];
  if (whole) {
    const Vector<X, kFour> vector = load_vector<kFour>(x);
#pragma unroll
    for (int i = 0; i < kFour; ++i) elements[i] = vector.get(i);
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i) elements[i] = i < count ? x[i] : X{};
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if constexpr (sizeof(X) == 1)
      four->value[i] = static_cast<float>(static_cast<int32_t>(elements[i]) - zero);
    else
      four->value[i] = widen(elements[i]);
  }
  four->codes = sizeof(X) == 1;
}

__device__ __forceinline__ FourValues four_values(const void* from, DType dtype, int64_t first, int count, bool whole,
                                                  int32_t zero) {
  FourValues four;
  switch (dtype) {
    case DType::kFloat32: load_four<float>(from, first, count, whole, zero, &four); break;
    case DType::kFloat16: load_four<Half>(from, first, count, whole, zero, &four); break;
    case DType::kBFloat16: load_four<BFloat16>(from, first, count, whole, zero, &four); break;
    case DType::kInt8: load_four<int8_t>(from, first, count, whole, zero, &four); break;
    default: load_four<uint8_t>(from, first, count, whole, zero, &four);
  }
  return four;
}

template <class Y>
__global__ void __launch_bounds__(kThreads) pointwise_kernel(const QO_GRID_CONSTANT PointwiseArgs a) {
  const PointwiseParams& p = a.p;
  const float x_scale = p.x_scale != nullptr ? *p.x_scale : 1.0f;
  const int32_t x_zero = p.x_zero_point != nullptr ? *p.x_zero_point : 0;
  const float r_scale = p.residual.scale != nullptr ? *p.residual.scale : 1.0f;
  const int32_t r_zero = p.residual.zero_point != nullptr ? *p.residual.zero_point : 0;
  const float out_scale = p.out.scale != nullptr ? *p.out.scale : 1.0f;
  const int32_t out_zero = p.out.zero_point != nullptr ? *p.out.zero_point : 0;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.work; i += step) {
    const int64_t row = a.fours.quotient(i), column = (i - row * a.fours.divisor) * kFour, first = row * p.columns + column;
    const int count = static_cast<int>(p.columns - column < kFour ? p.columns - column : kFour);
    const FourValues x = four_values(p.x, p.x_dtype, first, count, a.whole, x_zero);
    FourValues r{};
    if (p.factor_is_column) {
      r = four_values(p.residual.r, p.residual.dtype, a.shared_rows.quotient(row), 1, false, r_zero);
#pragma unroll
      for (int j = 1; j < kFour; ++j) r.value[j] = r.value[0];
    } else if (p.residual.r != nullptr) {
      const int64_t from = p.shared_rows > 1 ? a.shared_rows.quotient(row) * p.columns + column : first;
      r = four_values(p.residual.r, p.residual.dtype, from, count, a.whole, r_zero);
    }
    Y results[kFour];
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      float y = x.codes && !p.multiplies ? x.value[j] * x_scale : x.value[j];
      if (p.multiplies)
        y = (y * r.value[j]) * (x_scale * r_scale);
      else if (p.residual.r != nullptr)
        y = r.codes ? fused(r.value[j], r_scale, y) : y + r.value[j];
      y = apply_function(p.function, y);
      if constexpr (sizeof(Y) == 1) {
        constexpr int32_t qmin = Y(-1) < Y(0) ? -128 : 0;
        results[j] = static_cast<Y>(requantized(y, out_scale, out_zero, qmin, qmin + 255));
      } else {
        results[j] = rounded_to<Y>(y);
      }
    }
    Y* const y = static_cast<Y*>(p.out.y) + row * p.y_stride + column;
    if (a.whole) {
      store_vector<kFour>(y, results);
    } else {
#pragma unroll
      for (int j = 0; j < kFour; ++j)
        if (j < count) y[j] = results[j];
    }
  }
}

}  // namespace

void pointwise_cuda(const PointwiseParams& params, const Launch& at) {
  PointwiseParams p = params;
  if (p.y_stride == p.columns && !p.shares_factor()) {  // one row
    p.columns *= p.rows;
    p.y_stride = p.columns;
    p.rows = 1;
  }
  const int64_t fours = (p.columns + kFour - 1) / kFour, work = p.rows * fours;
  if (work == 0) return;
  const auto is_aligned = [](const void* address, DType dtype) {
    return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(kFour * dtype_bytes(dtype)) == 0;
  };
  const PointwiseArgs a{.p = p,
                        .fours = FastDiv(fours),
                        .shared_rows = FastDiv(p.shared_rows),
                        .work = work,
                        .whole = p.columns % kFour == 0 && (p.rows == 1 || p.y_stride % kFour == 0) && is_aligned(p.x, p.x_dtype) &&
                                 is_aligned(p.residual.r, p.residual.dtype) && is_aligned(p.out.y, p.out.dtype)};
  const auto run = [&](auto* type) {
    launch(at, pointwise_kernel<std::remove_pointer_t<decltype(type)>>, blocks_for(work, kThreads, kMaxGrid), dim3(kThreads), a);
  };
  switch (p.out.dtype) {
    case DType::kFloat32: return run(static_cast<float*>(nullptr));
    case DType::kFloat16: return run(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return run(static_cast<BFloat16*>(nullptr));
    case DType::kInt8: return run(static_cast<int8_t*>(nullptr));
    default: return run(static_cast<uint8_t*>(nullptr));
  }
}

}  // namespace quant_ops

// The Hopper engine's kernels by number and output dtype. Plain C++: the kernels are in gemm_*.cu. Read next: sm90.h.
#include "engine/sm90/sm90.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "engine/sm90/kernels.h"

namespace quant_ops::sm90 {
namespace {

using Function = void (*)(const IgemmProblem&, const Launch&);

template <int... kKernel>
Function function_of(int kernel, DType out, std::integer_sequence<int, kKernel...>) {
  static constexpr Function float32[] = {&launch<kKernel, DType::kFloat32>...};
  static constexpr Function float16[] = {&launch<kKernel, DType::kFloat16>...};
  static constexpr Function bfloat16[] = {&launch<kKernel, DType::kBFloat16>...};
  return (out == DType::kFloat32 ? float32 : out == DType::kFloat16 ? float16 : bfloat16)[kernel];
}

}  // namespace

void run(const IgemmProblem& p, int kernel, const Launch& at) {
  if (!takes(p, kernel))
    throw std::runtime_error(std::string("quant_ops.") + at.op + ": expected a problem that Hopper kernel " +
                             std::to_string(kernel) + " takes, got M, N, K = " + std::to_string(p.M) + ", " + std::to_string(p.N) +
                             ", " + std::to_string(p.K) + ". The portable engine takes every problem.");
  function_of(kernel, p.y_dtype, std::make_integer_sequence<int, kKernels>())(p, at);
}

}  // namespace quant_ops::sm90

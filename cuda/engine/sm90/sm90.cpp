// The Hopper engine's kernels by number and output dtype. Plain C++: the kernels are in gemm_*.cu. Read next: sm90.h.
#include "engine/sm90/sm90.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "engine/sm90/kernels.h"

namespace quant_ops {
namespace {

struct Entry {
  int64_t (*workspace)(const IgemmProblem&);
  void (*launch)(const IgemmProblem&, void*, void*);
};

template <int kKernel, DType kOut>
constexpr Entry kEntry = {&sm90::workspace<kKernel, kOut>, &sm90::launch<kKernel, kOut>};

template <int... kKernel>
Entry entry_of(int kernel, DType out, std::integer_sequence<int, kKernel...>) {
  static constexpr Entry float32[] = {kEntry<kKernel, DType::kFloat32>...};
  static constexpr Entry float16[] = {kEntry<kKernel, DType::kFloat16>...};
  static constexpr Entry bfloat16[] = {kEntry<kKernel, DType::kBFloat16>...};
  return (out == DType::kFloat32 ? float32 : out == DType::kFloat16 ? float16 : bfloat16)[kernel];
}

Entry entry_for(const IgemmProblem& p, int kernel) {
  if (!igemm_sm90_can(p, kernel))
    throw std::runtime_error("quant_ops.int8_gemm: expected a problem that Hopper kernel " + std::to_string(kernel) +
                             " takes, got M, N, K = " + std::to_string(p.M) + ", " + std::to_string(p.N) + ", " +
                             std::to_string(p.K) + ". The portable engine takes every problem.");
  return entry_of(kernel, p.y_dtype, std::make_integer_sequence<int, kSm90Kernels>());
}

}  // namespace

int64_t igemm_sm90_workspace(const IgemmProblem& p, int kernel) { return entry_for(p, kernel).workspace(p); }

void igemm_sm90(const IgemmProblem& p, int kernel, void* workspace, void* stream) {
  entry_for(p, kernel).launch(p, workspace, stream);
}

}  // namespace quant_ops

// What sm90.cpp calls and the gemm_*.cu files define, per tile and output dtype.
#pragma once

#include "engine/sm90/sm90.h"

namespace quant_ops::sm90 {

template <int kKernel, DType kOut>
int64_t workspace(const IgemmProblem& p);

template <int kKernel, DType kOut>
void launch(const IgemmProblem& p, void* workspace, void* stream);

}  // namespace quant_ops::sm90

// What sm90.cpp calls and the gemm_*.cu files define, for each tile and output dtype.
#pragma once

#include "engine/sm90/sm90.h"

namespace quant_ops::sm90 {

template <int kKernel, DType kOut>
void launch(const IgemmProblem& p, const Launch& at);

}  // namespace quant_ops::sm90

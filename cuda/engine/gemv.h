// Integer products of up to eight rows (gemv.cu). Plain host code.
#pragma once

#include "engine/problem.h"

namespace quant_ops {

// p.M <= kGemvRows, and a block has gemv_shared_bytes(p.K) of shared memory.
void run_gemv(const IgemmProblem& p, const Launch& at);

// The same for floating rows, which the kernel quantizes by their data. They take the place of p's a, row_scale and row_zero; q,
// scale and zero_point of `rows` are not written.
void run_quantizing_gemv(const IgemmProblem& p, const QuantizeRowsParams& rows, const Launch& at);

}  // namespace quant_ops

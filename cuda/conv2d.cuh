// What the two kinds of convolution share on CUDA. Read next: conv2d.cu, conv2d_depthwise.cu.
#pragma once

#include "device/epilogue.cuh"
#include "launch.h"

namespace quant_ops {

// groups == C == O; `rows` is the packed weight.
void run_depthwise(const Int8Conv2dParams& p, const Gather& gather, const Epilogue& out, const CudaWeights& w, const int8_t* rows,
                   void* stream);

}  // namespace quant_ops

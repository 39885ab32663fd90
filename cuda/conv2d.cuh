// What the two kinds of convolution share on CUDA. Read next: conv2d.cu, conv2d_depthwise.cu.
#pragma once

#include "device/epilogue.cuh"
#include "launch.h"

namespace quant_ops {

// groups == C == O. `weight` is [R * S][gather.group], as pack_weight makes it.
void run_depthwise(const Int8Conv2dParams& p, const Gather& gather, const Epilogue& out, const int8_t* weight, const Launch& at);

}  // namespace quant_ops

// What the host side of the Hopper engine and its kernels share. Each igemm_*.cu instantiates one kernel of the table. Read next:
// igemm.cuh.
#pragma once

#include <cuda.h>

#include "device/common.cuh"
#include "engine/sm90/igemm.h"

namespace quant_ops::sm90 {

struct Args {
  CUtensorMap first, second;
  Schedule schedule;
  Epilogue out;
  int64_t split_stride;  // int32 sums of a split
};

// Launches a kernel of the table; `blocks` is a multiple of its cluster.
template <int kKernel>
cudaError_t launch(const Args& a, int blocks, cudaStream_t stream);

}  // namespace quant_ops::sm90

// What the host side of the Hopper engine and its kernels share. Each igemm_*.cu instantiates one kernel of the table. Read next:
// igemm.cuh.
#pragma once

#include <cuda.h>

#include "device/common.cuh"
#include "engine/sm90/igemm.h"

namespace quant_ops::sm90 {

// What TMA is told about a matrix whose loads bring `load` bytes of a row, 128 or 64; `what` it is, for an error. In igemm.cu.
CUtensorMap encode_matrix(const int8_t* codes, const MatrixMap& m, int load, const char* what, const Launch& at);

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

// What the kinds of convolution share on CUDA. Read next: conv2d.cu, conv2d_depthwise.cu, conv2d_direct.cu,
// conv2d_patches.cu.
#pragma once

#include "device/epilogue.cuh"
#include "engine/remembered.h"
#include "launch.h"

namespace quant_ops {

// make(), remembered by the sizes of the convolution and the GPU.
template <class Make>
auto remembered_tile(const Int8Conv2dParams& p, const GpuLimits& gpu, const Make& make) {
  return remembered(std::array<int64_t, 17>{p.N, p.C, p.H, p.W, p.O, p.R, p.S, p.OH, p.OW, p.groups, p.stride[0], p.stride[1],
                                            p.dilation[0], p.dilation[1], gpu.multiprocessors, gpu.shared_bytes, gpu.block_bytes},
                    make);
}

// Calls use(static_cast<X*>(nullptr)) for the type X of x as a kernel reads it: uint8 codes are read as int8.
template <class Use>
void with_input_type(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kFloat32: return use(static_cast<float*>(nullptr));
    case DType::kFloat16: return use(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return use(static_cast<BFloat16*>(nullptr));
    default: return use(static_cast<int8_t*>(nullptr));
  }
}

// What a kernel needs that quantizes x itself, beside the parameters of the convolution.
struct ConvOperands {
  InputParams in;  // scales and zero points of the samples
  Gather gather;   // the padding of 8-bit x; of the plain depthwise kernel also the codes
  Epilogue out;
  const int8_t* weight;  // as pack_weight makes it
};

// groups == C == O. A tile without rows: the kernel reads codes.
DepthwiseTile plan_depthwise(const Int8Conv2dParams& p, const GpuLimits& gpu);
void run_depthwise(const Int8Conv2dParams& p, const DepthwiseTile& tile, const ConvOperands& operands, const Launch& at);

// Few channels, in all or in a group. A tile without rows: the kernel does not take them.
DirectTile plan_direct(const Int8Conv2dParams& p, const CudaWeights& w, const GpuLimits& gpu);
void run_direct(const Int8Conv2dParams& p, const CudaWeights& w, const DirectTile& tile, const ConvOperands& operands,
                const Launch& at);

// Whether windows neither overlap nor leave the image, so that the convolution is a product of its patches.
bool is_patches(const Int8Conv2dParams& p);

// Codes of the patches, and scales and zero points of their rows: null if not wanted.
struct PatchRows {
  int8_t* q;
  int64_t row_bytes;
  float* scale;
  int32_t* zero_point;
};
void write_patches_cuda(const Int8Conv2dParams& p, const InputParams& in, const PatchRows& rows, const Launch& at);

}  // namespace quant_ops

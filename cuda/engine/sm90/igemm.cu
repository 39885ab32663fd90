// Launches of the Hopper engine: the operands' tensor maps, the arguments, and the table of kernels. Read next: igemm.h.
#include <cuda.h>

#include <algorithm>
#include <utility>

#include "engine/sm90/igemm.h"
#include "engine/sm90/kernels.cuh"

namespace quant_ops::sm90 {
namespace {

// A function of the driver, which is not linked: the library loads on machines without one.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || function == nullptr)
    throw std::runtime_error(std::string("quant_ops: expected the CUDA driver to have ") + name +
                             ", got none. Install a driver for CUDA 12.0 or newer.");
  return reinterpret_cast<Function>(function);
}

void expect_encoded(CUresult result, const char* what, const Launch& at) {
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("quant_ops.") + at.op + ": expected a tensor map of the " + what +
                             ", got the driver's error " + std::to_string(result) + ".");
}

CUtensorMapSwizzle swizzle_of(int load) { return load == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B; }

}  // namespace

CUtensorMap encode_matrix(const int8_t* codes, const MatrixMap& m, int load, const char* what, const Launch& at) {
  static const auto encode_tiled = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  cuuint64_t size[5], stride[4];
  std::copy(m.size, m.size + 5, size);
  std::copy(m.stride, m.stride + 4, stride);
  CUtensorMap map;
  expect_encoded(encode_tiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 5, const_cast<int8_t*>(codes), size, stride, m.box, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(load), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                 what, at);
  return map;
}

namespace {

CUtensorMap encode_image(const int8_t* codes, const ImageMap& m, int load, const Launch& at) {
  static const auto encode_im2col = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  cuuint64_t size[4], stride[3];
  std::copy(m.size, m.size + 4, size);
  std::copy(m.stride, m.stride + 3, stride);
  CUtensorMap map;
  expect_encoded(encode_im2col(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, const_cast<int8_t*>(codes), size, stride, m.lower, m.upper,
                               m.channels, m.pixels, m.step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(load),
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                 "image", at);
  return map;
}

using Function = cudaError_t (*)(const Args&, int, cudaStream_t);

template <int... kKernel>
Function function_of(int kernel, std::integer_sequence<int, kKernel...>) {
  static constexpr Function functions[] = {&launch<kKernel>...};
  return functions[kernel];
}

Args args_of(const Problem& p, const KernelPlan& plan, int32_t* sums, const Launch& at) {
  const Tile& t = kTiles[plan.kernel];
  const Gather& g = p.gather;
  const int load = p.gathers ? load_bytes(g.group) : kStepBytes;
  const Schedule schedule = schedule_of(p, plan);
  const MatrixMap weight =
      matrix_map(p.K, p.N * p.groups, p.b_stride, weight_order(p, t), load, t.swapped ? schedule.first_load : schedule.second_load);
  const CUtensorMap b = encode_matrix(p.b, weight, load, "weight", at);
  const CUtensorMap a =
      p.gathers
          ? encode_image(g.codes, image_map(g, p.groups * g.group, p.samples, load, schedule.first_load), load, at)
          : encode_matrix(
                p.a, matrix_map(p.K, p.M, p.a_stride, Order::kPlain, load, t.swapped ? schedule.second_load : schedule.first_load),
                load, "activations", at);
  const int64_t columns = p.N * p.groups;
  Args args{
      .first = t.swapped ? b : a, .second = t.swapped ? a : b, .schedule = schedule, .out = p.out, .split_stride = p.M * columns};
  args.out.vectors = stores_vectors(p);
  if (plan.sums > 0)  // every row is a sample
    args.out = {.y = sums, .dtype = DType::kInt32, .y_sample = columns, .y_column = 1, .vectors = is_ordered(p)};
  return args;
}

}  // namespace

void run(const Problem& p, const KernelPlan& plan, int32_t* sums, const Launch& at) {
  const Tile& t = kTiles[plan.kernel];
  const Args args = args_of(p, plan, sums, at);
  const int64_t units = clusters_of(args.schedule) * cluster_blocks(args.schedule);
  const int64_t resident = gpu_limits().multiprocessors * t.blocks_per_sm / t.cluster * t.cluster;  // of those that share loads
  const int blocks = static_cast<int>(std::min(units, resident));
  const cudaError_t error =
      function_of(plan.kernel, std::make_integer_sequence<int, kKernels>())(args, blocks, static_cast<cudaStream_t>(at.stream));
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("quant_ops.") + at.op + ": expected the launch of " + t.name + " to succeed, got " +
                             cudaGetErrorName(error) + ": " + cudaGetErrorString(error) +
                             ". Set CUDA_LAUNCH_BLOCKING=1 to find the launch that failed.");
  if (plan.sums > 0) join_splits(sums, plan.splits, p.M, p.N * p.groups, p.out, at);
}

}  // namespace quant_ops::sm90

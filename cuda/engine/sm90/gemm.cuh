// A kernel of the Hopper engine: CUTLASS's warp-specialised GEMM for a tile of kTiles, with the epilogue of arithmetic.h as one
// visitor. Only the gemm_*.cu files include it. Each of them instantiates one tile, because a kernel compiles for half a minute.
// Read next: sm90.h for the operands' layout, sm90.cpp for the table of these functions.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "engine/sm90/kernels.h"

namespace quant_ops::sm90 {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;
using cute::Int;

// ---- epilogue -------------------------------------------------------------------------------------------------------

template <class>
struct WithFloor {
  struct Arguments {
    float floor = 0;
  };
};

// The formula as the root of the visitor tree, on fragments of the accumulator and of the five broadcast vectors. A tree of
// CUTLASS's own nodes would have a fused multiply-add only where the compiler contracts one; this calls the function that the CPU
// uses. Either side may come first: the products commute.
template <class Out>
struct Formula : fusion::Sm90Compute<WithFloor, Out, float, cutlass::FloatRoundStyle::round_to_nearest> {
  using Base = fusion::Sm90Compute<WithFloor, Out, float, cutlass::FloatRoundStyle::round_to_nearest>;
  using Base::Base;

  struct ConsumerStoreCallbacks : fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(float f) : floor(f) {}
    float floor;

    template <int N>
    CUTLASS_DEVICE cutlass::Array<Out, N> visit(const cutlass::Array<int32_t, N>& acc, int, int, int,
                                                const cutlass::Array<float, N>& first_scale,
                                                const cutlass::Array<int32_t, N>& first_correction,
                                                const cutlass::Array<float, N>& second_scale,
                                                const cutlass::Array<int32_t, N>& second_correction,
                                                const cutlass::Array<float, N>& bias) {
      cutlass::Array<float, N> y;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        y[i] = epilogue(acc[i] - first_correction[i] * second_correction[i], first_scale[i], second_scale[i], bias[i], false);
        y[i] = y[i] < floor ? floor : y[i];
      }
      return cutlass::NumericArrayConverter<Out, float, N, cutlass::FloatRoundStyle::round_to_nearest>{}(y);
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>&) {
    return ConsumerStoreCallbacks(this->params.floor);
  }
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <DType>
struct OutOf;
template <>
struct OutOf<DType::kFloat32> {
  using type = float;
};
template <>
struct OutOf<DType::kFloat16> {
  using type = cutlass::half_t;
};
template <>
struct OutOf<DType::kBFloat16> {
  using type = cutlass::bfloat16_t;
};

template <int kKernel, DType kOut>
struct Gemm {
  static constexpr sm90::Tile kTile = kTiles[kKernel];
  using Out = typename OutOf<kOut>::type;
  using TileShape = cute::Shape<Int<kTile.m>, Int<kTile.n>, Int<kTile.k>>;
  using Cluster = cute::Shape<Int<kTile.cluster>, _1, _1>;
  using Rows = cutlass::layout::RowMajor;
  using Columns = cutlass::layout::ColumnMajor;
  using Sm90 = cutlass::arch::Sm90;
  using TensorOp = cutlass::arch::OpClassTensorOp;

  // Values per row of the first and of the second side. A flag and the pointer tell at run time whether they vary and exist.
  template <class T>
  using First = fusion::Sm90ColBroadcast<0, TileShape, T, T, cute::Stride<bool, _0, _0>>;
  template <class T>
  using Second = fusion::Sm90RowBroadcast<0, TileShape, T, T, cute::Stride<_0, bool, _0>>;
  using Bias = std::conditional_t<kTile.swapped, First<float>, Second<float>>;
  using Epilogue = fusion::Sm90EVT<Formula<Out>, First<float>, First<int32_t>, Second<float>, Second<int32_t>, Bias>;

  // Columns are contiguous in y. They are the second side, or the first one of a swapped tile.
  using OutLayout = std::conditional_t<kTile.swapped, Columns, Rows>;
  static constexpr int kOutAlignment = 16 / sizeof(Out);
  using EpilogueSchedule = std::conditional_t<kTile.cooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                                              cutlass::epilogue::TmaWarpSpecialized>;
  // Results pass through shared memory in pieces of 64 bytes a row, whatever their dtype, so that the stages fit for all dtypes.
  using Piece = cute::Shape<Int<kTile.cooperative ? 128 : 64>, Int<std::min(kTile.n, 64 / int{sizeof(Out)})>>;
  using CollectiveEpilogue =
      typename cutlass::epilogue::collective::CollectiveBuilder<Sm90, TensorOp, TileShape, Cluster, Piece, int32_t, float, void,
                                                                OutLayout, kOutAlignment, Out, OutLayout, kOutAlignment,
                                                                EpilogueSchedule, Epilogue>::CollectiveOp;

  using Schedule = std::conditional_t<kTile.cooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                      std::conditional_t<kTile.warpgroups == 2, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                                         cutlass::gemm::KernelTmaWarpSpecialized>>;
  using CollectiveMainloop =
      typename cutlass::gemm::collective::CollectiveBuilder<Sm90, TensorOp, int8_t, Rows, 16, int8_t, Columns, 16, int32_t,
                                                            TileShape, Cluster, cutlass::gemm::collective::StageCount<kTile.stages>,
                                                            Schedule>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Adapter = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // An SM has 228 KB for its blocks, each of which costs 1 KB.
  static_assert(kTile.blocks_per_sm * (Kernel::SharedStorageSize + 1024) <= 228 * 1024, "the blocks of a multiprocessor fit in it");

  static typename Kernel::Arguments arguments(const IgemmProblem& p) {
    const Side first = first_side(p, kTile), second = second_side(p, kTile);
    const auto size = [](int64_t n) { return static_cast<int>(n); };
    const float no_bias = -0.0f;  // changes no value and no sign

    typename Kernel::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {size(first.size), size(second.size), size(p.K), 1};
    args.mainloop.ptr_A = first.codes;
    args.mainloop.dA = {first.stride, _1{}, 0};
    args.mainloop.ptr_B = second.codes;
    args.mainloop.dB = {second.stride, _1{}, 0};

    typename Bias::Arguments bias{p.bias, no_bias, {}};
    if constexpr (kTile.swapped)
      cute::get<0>(bias.dCol) = true;
    else
      cute::get<1>(bias.dRow) = true;
    args.epilogue.thread = {{first.scale, 0.0f, {first.scale_varies, _0{}, _0{}}},
                            {first.correction, 0, {first.correction_varies, _0{}, _0{}}},
                            {second.scale, 0.0f, {_0{}, second.scale_varies, _0{}}},
                            {second.correction, 0, {_0{}, second.correction_varies, _0{}}},
                            bias,
                            {p.floor}};
    args.epilogue.ptr_D = static_cast<Out*>(p.y);
    const int64_t y_stride = stride_of(p.M, p.y_stride, p.N);
    if constexpr (kTile.swapped)
      args.epilogue.dD = {_1{}, y_stride, 0};
    else
      args.epilogue.dD = {y_stride, _1{}, 0};

    cudaGetDevice(&args.hw_info.device_id);
    cudaDeviceGetAttribute(&args.hw_info.sm_count, cudaDevAttrMultiProcessorCount, args.hw_info.device_id);
    args.scheduler.max_swizzle_size = swizzle(p, kTile);
    return args;
  }
};

// None of these kernels uses a workspace (tests/sm90_arguments.cu).
template <int kKernel, DType kOut>
void launch(const IgemmProblem& p, const Launch& at) {
  using G = Gemm<kKernel, kOut>;
  const auto args = G::arguments(p);
  typename G::Adapter gemm;
  cutlass::Status status = G::Adapter::can_implement(args);
  if (status == cutlass::Status::kSuccess) status = gemm.run(args, nullptr, static_cast<cudaStream_t>(at.stream));
  const cudaError_t error = cudaGetLastError();
  if (status != cutlass::Status::kSuccess || error != cudaSuccess)
    throw std::runtime_error(std::string("quant_ops.") + at.op + ": expected " + G::kTile.name +
                             " to take M, N, K = " + std::to_string(p.M) + ", " + std::to_string(p.N) + ", " + std::to_string(p.K) +
                             ", got " + cutlass::cutlassGetStatusString(status) + " (" + cudaGetErrorName(error) +
                             "). Set CUDA_LAUNCH_BLOCKING=1 to find the launch that failed.");
}

}  // namespace quant_ops::sm90

// Instantiates the tile of that name for every output dtype.
#define QO_SM90_INSTANCE(kernel, dtype) \
  template void quant_ops::sm90::launch<kernel, quant_ops::DType::dtype>(const quant_ops::IgemmProblem&, const quant_ops::Launch&)
#define QO_SM90_TILE(name)                                         \
  QO_SM90_INSTANCE(quant_ops::sm90::kernel_named(name), kFloat32); \
  QO_SM90_INSTANCE(quant_ops::sm90::kernel_named(name), kFloat16); \
  QO_SM90_INSTANCE(quant_ops::sm90::kernel_named(name), kBFloat16)

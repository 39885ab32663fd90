// A kernel of the Hopper engine: CUTLASS's warp-specialised GEMM for a tile of kSm90Tiles, with the epilogue of arithmetic.h as one
// visitor. Included by the gemm_*.cu files alone, each of which instantiates one tile: a kernel takes the compiler half a minute.
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

// The formula as the root of the visitor tree, on fragments of the accumulator and of the five broadcast vectors. CUTLASS's own
// nodes would compute it in several, with a fused multiply-add only where the compiler contracts one; this is the CPU's function.
// Either side may come first: the products commute.
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
  static constexpr Sm90Tile kTile = kSm90Tiles[kKernel];
  using Out = typename OutOf<kOut>::type;
  using Tile = cute::Shape<Int<kTile.m>, Int<kTile.n>, Int<kTile.k>>;
  using Cluster = cute::Shape<Int<kTile.cluster>, _1, _1>;
  using Rows = cutlass::layout::RowMajor;
  using Columns = cutlass::layout::ColumnMajor;
  using Sm90 = cutlass::arch::Sm90;
  using TensorOp = cutlass::arch::OpClassTensorOp;

  // Per row of the first and of the second side. Whether it varies and whether it is there is known at run time.
  template <class T>
  using First = fusion::Sm90ColBroadcast<0, Tile, T, T, cute::Stride<bool, _0, _0>>;
  template <class T>
  using Second = fusion::Sm90RowBroadcast<0, Tile, T, T, cute::Stride<_0, bool, _0>>;
  using Bias = std::conditional_t<kTile.swapped, First<float>, Second<float>>;
  using Epilogue = fusion::Sm90EVT<Formula<Out>, First<float>, First<int32_t>, Second<float>, Second<int32_t>, Bias>;

  // y has its columns contiguous: the second side, or the first where swapped.
  using OutLayout = std::conditional_t<kTile.swapped, Columns, Rows>;
  static constexpr int kOutAlignment = 16 / sizeof(Out);
  using EpilogueSchedule = std::conditional_t<kTile.cooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                                              cutlass::epilogue::TmaWarpSpecialized>;
  // Written through shared memory in pieces of 64 bytes a row: as large for float32 as for float16, so that stages are too.
  using Piece = cute::Shape<Int<kTile.cooperative ? 128 : 64>, Int<std::min(kTile.n, 64 / int{sizeof(Out)})>>;
  using CollectiveEpilogue =
      typename cutlass::epilogue::collective::CollectiveBuilder<Sm90, TensorOp, Tile, Cluster, Piece, int32_t, float, void,
                                                                OutLayout, kOutAlignment, Out, OutLayout, kOutAlignment,
                                                                EpilogueSchedule, Epilogue>::CollectiveOp;

  using Schedule = std::conditional_t<kTile.cooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                      std::conditional_t<kTile.warpgroups == 2, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                                         cutlass::gemm::KernelTmaWarpSpecialized>>;
  using CollectiveMainloop =
      typename cutlass::gemm::collective::CollectiveBuilder<Sm90, TensorOp, int8_t, Rows, 16, int8_t, Columns, 16, int32_t, Tile,
                                                            Cluster, cutlass::gemm::collective::StageCount<kTile.stages>,
                                                            Schedule>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Adapter = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // An SM has 228 KB for its blocks, each of which costs 1 KB.
  static_assert(kTile.blocks_per_sm * (Kernel::SharedStorageSize + 1024) <= 228 * 1024, "the blocks of a multiprocessor fit in it");

  static typename Kernel::Arguments arguments(const IgemmProblem& p) {
    const Sm90Side first = sm90_first(p, kTile), second = sm90_second(p, kTile);
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
    const int64_t y_stride = sm90_stride(p.M, p.y_stride, p.N);
    if constexpr (kTile.swapped)
      args.epilogue.dD = {_1{}, y_stride, 0};
    else
      args.epilogue.dD = {y_stride, _1{}, 0};

    cudaGetDevice(&args.hw_info.device_id);
    cudaDeviceGetAttribute(&args.hw_info.sm_count, cudaDevAttrMultiProcessorCount, args.hw_info.device_id);
    args.scheduler.max_swizzle_size = sm90_swizzle(p, kTile);
    return args;
  }
};

template <int kKernel, DType kOut>
int64_t workspace(const IgemmProblem& p) {
  using G = Gemm<kKernel, kOut>;
  return static_cast<int64_t>(G::Adapter::get_workspace_size(G::arguments(p)));
}

template <int kKernel, DType kOut>
void launch(const IgemmProblem& p, void* workspace, void* stream) {
  using G = Gemm<kKernel, kOut>;
  const auto args = G::arguments(p);
  typename G::Adapter gemm;
  cutlass::Status status = G::Adapter::can_implement(args);
  if (status == cutlass::Status::kSuccess) status = gemm.run(args, workspace, static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  if (status != cutlass::Status::kSuccess || error != cudaSuccess)
    throw std::runtime_error(std::string("quant_ops.int8_gemm: expected ") + G::kTile.name +
                             " to take M, N, K = " + std::to_string(p.M) + ", " + std::to_string(p.N) + ", " + std::to_string(p.K) +
                             ", got " + cutlass::cutlassGetStatusString(status) + " (" + cudaGetErrorName(error) +
                             "). Set CUDA_LAUNCH_BLOCKING=1 to find the launch that failed.");
}

}  // namespace quant_ops::sm90

// The tile of that name for every output dtype.
#define QO_SM90_INSTANCE(kernel, dtype)                                                                         \
  template int64_t quant_ops::sm90::workspace<kernel, quant_ops::DType::dtype>(const quant_ops::IgemmProblem&); \
  template void quant_ops::sm90::launch<kernel, quant_ops::DType::dtype>(const quant_ops::IgemmProblem&, void*, void*)
#define QO_SM90_TILE(name)                                  \
  QO_SM90_INSTANCE(quant_ops::sm90_kernel(name), kFloat32); \
  QO_SM90_INSTANCE(quant_ops::sm90_kernel(name), kFloat16); \
  QO_SM90_INSTANCE(quant_ops::sm90_kernel(name), kBFloat16)

// choose_qparams_affine, quantize_affine and dequantize_affine on CUDA, by the functions of contract/affine.h, so that bits are
// those of cpp/cpu/affine.cpp. A thread has an element at a time, whatever the strides; a warp, or for long blocks a thread block,
// finds the range of a block. Read next: contract/affine.h.
#include "contract/affine.h"

#include "device/range.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLongBlock = 2048;  // elements for which a thread block is worth while

// ---- elements -------------------------------------------------------------------------------------------------------

struct AffineElements {
  static constexpr bool kBarriers = false;
  AffineParams p;
  AffineDTypes dtypes;
  Dims<3> dims;  // from, to, block
  int64_t n;
};

template <bool kQuantize>
__global__ void __launch_bounds__(kThreads) affine_kernel(const QO_GRID_CONSTANT AffineElements a) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += step) {
    int64_t at[3];
    a.dims.seek(i, at);
    const double v = load_number(a.p.from, at[0], a.p.from_dtype);
    if constexpr (kQuantize)
      store_wrapped(a.p.to, at[1], a.p.to_dtype, false,
                    quantize_affine_element(v, quantize_affine_block(a.p, at[2]), a.p, a.dtypes));
    else
      store_rounded(a.p.to, at[1], a.p.to_dtype, dequantize_affine_element(v, dequantize_affine_block(a.p, at[2]), a.p, a.dtypes));
  }
}

template <bool kQuantize>
void launch_affine(const AffineParams& p, const Launch& at) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  const int64_t n = numel(it);
  const AffineElements a{.p = p,
                         .dtypes = kQuantize ? quantize_affine_dtypes(p) : dequantize_affine_dtypes(p),
                         .dims = make_dims<3>(it, 0, it.ndim),
                         .n = n};
  launch(at, affine_kernel<kQuantize>, blocks_for(n, kThreads, kMaxGrid), dim3(kThreads), a);
}

// ---- ranges ---------------------------------------------------------------------------------------------------------

struct AffineRanges {
  static constexpr bool kBarriers = true;
  const void* x;
  AffineChoice choice;
  Dims<2> kept;     // x, block
  Dims<1> reduced;  // x
  int64_t blocks, length;
};

// blockDim.x is kWarp or kThreads.
template <class X>
__global__ void __launch_bounds__(kThreads) affine_range_kernel(const QO_GRID_CONSTANT AffineRanges a) {
  __shared__ float mins[kThreads / kWarp], maxs[kThreads / kWarp];
  for (int64_t block = blockIdx.x; block < a.blocks; block += gridDim.x) {
    int64_t at[2];
    a.kept.seek(block, at);
    const X* const x = static_cast<const X*>(a.x) + at[0];
    Range<float> range = empty_range<float>();
    for (int64_t i = threadIdx.x; i < a.length; i += blockDim.x) {
      int64_t offset[1];
      a.reduced.seek(i, offset);
      range.add(widen(x[offset[0]]));
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2)
      range.merge({__shfl_xor_sync(0xffffffffu, range.min, mask), __shfl_xor_sync(0xffffffffu, range.max, mask)});
    if (blockDim.x > kWarp) {
      __syncthreads();  // the result before has been read
      if (threadIdx.x % kWarp == 0) {
        mins[threadIdx.x / kWarp] = range.min;
        maxs[threadIdx.x / kWarp] = range.max;
      }
      __syncthreads();
      for (int w = 0; w < kThreads / kWarp; ++w) range.merge({mins[w], maxs[w]});
    }
    if (threadIdx.x == 0) store_affine_qparams<X>(range.min, range.max, a.choice, at[1]);
  }
}

}  // namespace

void quantize_affine_cuda(const AffineParams& p, const Launch& at) { launch_affine<true>(p, at); }
void dequantize_affine_cuda(const AffineParams& p, const Launch& at) { launch_affine<false>(p, at); }

void choose_qparams_affine_cuda(const ChooseAffineParams& p, const Launch& at) {
  Reduction r = p.range;
  coalesce(&r.kept);
  sort_and_coalesce(&r.reduced, 0);
  const int64_t blocks = numel(r.kept), length = numel(r.reduced);
  const AffineRanges a{.x = p.x,
                       .choice = p.choice,
                       .kept = make_dims<2>(r.kept, 0, r.kept.ndim),
                       .reduced = make_dims<1>(r.reduced, 0, r.reduced.ndim),
                       .blocks = blocks,
                       .length = length};
  with_float_type(p.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<X, double>)
      launch(at, affine_range_kernel<X>, blocks_for(blocks, 1, kMaxGrid), dim3(length < kLongBlock ? kWarp : kThreads), a);
  });
}

}  // namespace quant_ops

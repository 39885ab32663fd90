// int8_max_pool2d, int8_avg_pool2d, int8_adaptive_avg_pool2d and int8_upsample_nearest2d on CUDA (ops.h has the windows and the
// formulas). A thread has one code of the result at a time, in the order of its memory.
#include "device/epilogue.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;

// The place of an element of the result, [N, H, W, C] or [N, C, H, W] in memory, by its index there.
struct ImageOrder {
  bool channels_last;
  FastDiv inner, middle, outer;  // the sizes of the last three dimensions, innermost first

  static ImageOrder of(int64_t C, int64_t H, int64_t W, bool channels_last) {
    return {.channels_last = channels_last,
            .inner = FastDiv(channels_last ? C : W),
            .middle = FastDiv(channels_last ? W : H),
            .outer = FastDiv(channels_last ? H : C)};
  }
};
struct Place {
  int64_t n, c, h, w;
};
__device__ __forceinline__ Place place_of(const ImageOrder& order, int64_t i) {
  const int64_t a = order.inner.quotient(i), b = order.middle.quotient(a), n = order.outer.quotient(b);
  const int64_t last = i - a * order.inner.divisor, middle = a - b * order.middle.divisor, outer = b - n * order.outer.divisor;
  return order.channels_last ? Place{n, last, outer, middle} : Place{n, outer, middle, last};
}

template <class T, class Use>
__device__ __forceinline__ void for_each_tap(const PoolShape& s, const T* x, const Place& at, const PoolWindow& h,
                                             const PoolWindow& w, const Use& use) {
  const T* const from = x + at.n * s.x_stride[0] + at.c * s.x_stride[1];
  for (int64_t r = 0; r < h.taps; ++r)
    for (int64_t t = 0; t < w.taps; ++t)
      use(from[(h.first + r * s.h.dilation) * s.x_stride[2] + (w.first + t * s.w.dilation) * s.x_stride[3]]);
}

int64_t results_of(const PoolShape& s) { return s.N * s.C * s.h.out * s.w.out; }

// ---- maxima ---------------------------------------------------------------------------------------------------------

struct MaxPoolArgs {
  static constexpr bool kBarriers = false;
  MaxPoolParams p;
  ImageOrder order;
  int64_t n;
};

template <class T>
__global__ void __launch_bounds__(kThreads) max_pool_kernel(const QO_GRID_CONSTANT MaxPoolArgs a) {
  const PoolShape& s = a.p.shape;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += step) {
    const Place at = place_of(a.order, i);
    T most = T(-1) < T(0) ? T(-128) : T(0);
    for_each_tap(s, static_cast<const T*>(a.p.x), at, pool_window(s.h, at.h), pool_window(s.w, at.w),
                 [&](T code) { most = code > most ? code : most; });
    static_cast<T*>(a.p.y)[i] = most;
  }
}

// ---- averages -------------------------------------------------------------------------------------------------------

struct AvgPoolArgs {
  static constexpr bool kBarriers = false;
  AvgPoolParams p;
  ImageOrder order;
  int64_t n;
};

template <class T>
__global__ void __launch_bounds__(kThreads) avg_pool_kernel(const QO_GRID_CONSTANT AvgPoolArgs a) {
  const PoolShape& s = a.p.shape;
  const int32_t zero = a.p.x_zero_point != nullptr ? *a.p.x_zero_point : 0;
  const float x_scale = *a.p.x_scale, out_scale = a.p.out.scale != nullptr ? *a.p.out.scale : 1.0f;
  const int32_t out_zero = a.p.out.zero_point != nullptr ? *a.p.out.zero_point : 0;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += step) {
    const Place at = place_of(a.order, i);
    const PoolWindow h = pool_window(s.h, at.h), w = pool_window(s.w, at.w);
    int32_t sum = 0;
    for_each_tap(s, static_cast<const T*>(a.p.x), at, h, w, [&](T code) { sum += code - zero; });
    const int64_t count = a.p.divisor != 0 ? a.p.divisor : a.p.counts_padding ? h.counted * w.counted : h.taps * w.taps;
    const float y = static_cast<float>(sum) * quotient(x_scale, static_cast<float>(count));
    with_output_type(a.p.out.dtype, [&](auto* type) {
      using Y = std::remove_pointer_t<decltype(type)>;
      Y* const to = static_cast<Y*>(a.p.out.y) + i;
      if constexpr (sizeof(Y) == 1) {
        constexpr int32_t qmin = Y(-1) < Y(0) ? -128 : 0;
        *to = static_cast<Y>(requantized(y, out_scale, out_zero, qmin, qmin + 255));
      } else if constexpr (!std::is_same_v<Y, int32_t>) {
        *to = rounded_to<Y>(y);
      }
    });
  }
}

// ---- upsampling -----------------------------------------------------------------------------------------------------

struct UpsampleArgs {
  static constexpr bool kBarriers = false;
  UpsampleParams p;
  ImageOrder order;
  FastDiv factor[2];
  int64_t n;
};

__global__ void __launch_bounds__(kThreads) upsample_kernel(const QO_GRID_CONSTANT UpsampleArgs a) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += step) {
    const Place at = place_of(a.order, i);
    const int64_t from = at.n * a.p.x_stride[0] + at.c * a.p.x_stride[1] + a.factor[0].quotient(at.h) * a.p.x_stride[2] +
                         a.factor[1].quotient(at.w) * a.p.x_stride[3];
    static_cast<uint8_t*>(a.p.y)[i] = static_cast<const uint8_t*>(a.p.x)[from];
  }
}

}  // namespace

void max_pool2d_cuda(const MaxPoolParams& p, const Launch& at) {
  const PoolShape& s = p.shape;
  const MaxPoolArgs a{.p = p, .order = ImageOrder::of(s.C, s.h.out, s.w.out, s.y_channels_last), .n = results_of(s)};
  if (a.n == 0) return;
  launch(at, p.dtype == DType::kInt8 ? max_pool_kernel<int8_t> : max_pool_kernel<uint8_t>, blocks_for(a.n, kThreads, kMaxGrid),
         dim3(kThreads), a);
}

void avg_pool2d_cuda(const AvgPoolParams& p, const Launch& at) {
  const PoolShape& s = p.shape;
  const AvgPoolArgs a{.p = p, .order = ImageOrder::of(s.C, s.h.out, s.w.out, s.y_channels_last), .n = results_of(s)};
  if (a.n == 0) return;
  launch(at, p.dtype == DType::kInt8 ? avg_pool_kernel<int8_t> : avg_pool_kernel<uint8_t>, blocks_for(a.n, kThreads, kMaxGrid),
         dim3(kThreads), a);
}

void upsample_nearest2d_cuda(const UpsampleParams& p, const Launch& at) {
  const int64_t height = p.H * p.factor[0], width = p.W * p.factor[1];
  const UpsampleArgs a{.p = p,
                       .order = ImageOrder::of(p.C, height, width, p.y_channels_last),
                       .factor = {FastDiv(p.factor[0]), FastDiv(p.factor[1])},
                       .n = p.N * p.C * height * width};
  if (a.n == 0) return;
  launch(at, upsample_kernel, blocks_for(a.n, kThreads, kMaxGrid), dim3(kThreads), a);
}

}  // namespace quant_ops

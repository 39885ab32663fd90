// Convolutions whose windows neither overlap nor leave the image (stride == kernel, no padding), as a model's patch embedding is: a
// product of the patches and the weight itself, in whose order (channel, r, s) this kernel writes the patches' codes.
//
//   q[m][(c R + r) S + s] = code of x[n, c, oh R + r, ow S + s],  m = (n OH + oh) OW + ow      zeros behind the last code of a row
//
// A row has the scale and the zero point of its sample. Read next: conv2d.cu.
#include "conv2d.cuh"
#include "device/encode.cuh"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;

struct PatchArgs {
  static constexpr bool kBarriers = false;
  InputParams in;
  int64_t x_stride[4];
  int8_t* q;
  int64_t row_bytes, total;
  int32_t k, s, r;
  FastDiv vectors, pixels, columns, kernel_columns, kernel_pixels;
  float* scale;         // of rows; null: not wanted
  int32_t* zero_point;  // likewise
};

// A thread makes sixteen codes.
template <class X>
__global__ void __launch_bounds__(kThreads) patches_kernel(const QO_GRID_CONSTANT PatchArgs a) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.total) return;
  const int64_t m = a.vectors.quotient(i), sample = a.pixels.quotient(m), pixel = m - sample * a.pixels.divisor;
  const int64_t oh = a.columns.quotient(pixel), ow = pixel - oh * a.columns.divisor;
  const int32_t first = static_cast<int32_t>(i - m * a.vectors.divisor) * kVectorBytes;
  const X* x = static_cast<const X*>(a.in.x) + sample * a.x_stride[0] + oh * a.r * a.x_stride[2] + ow * a.s * a.x_stride[3];
  const CodesOf<X> encode(a.in, sample, 0);
  int64_t c = a.kernel_pixels.quotient(first), r = a.kernel_columns.quotient(first - c * a.kernel_pixels.divisor);
  int64_t s = first - c * a.kernel_pixels.divisor - r * a.s;
  Vector<X, 4> elements[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    X four[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      four[b] = first + e * 4 + b < a.k ? x[c * a.x_stride[1] + r * a.x_stride[2] + s * a.x_stride[3]] : encode.zeros().get(b);
      if (++s == a.s) s = 0, ++r;
      if (r == a.r) r = 0, ++c;
    }
    memcpy(&elements[e].words, four, sizeof(four));
  }
  uint32_t codes[4][4];
  encode(elements, codes);
  int8_t bytes[kVectorBytes];
#pragma unroll
  for (int e = 0; e < kVectorBytes; ++e) bytes[e] = first + e < a.k ? static_cast<int8_t>(codes[e / 4][e % 4]) : int8_t{0};
  store_vector<kVectorBytes>(a.q + m * a.row_bytes + first, bytes);
  if (first > 0 || a.scale == nullptr) return;
  a.scale[m] = a.in.scale[sample * a.in.scale_stride];
  if (a.zero_point != nullptr)
    a.zero_point[m] = zero_at(a.in.zero_point, sample * a.in.zero_point_stride) - (a.in.dtype == DType::kUInt8 ? 128 : 0);
}

}  // namespace

bool is_patches(const Int8Conv2dParams& p) {
  return p.groups == 1 && p.R * p.S > 1 && p.stride[0] == p.R && p.stride[1] == p.S && p.dilation[0] == 1 && p.dilation[1] == 1 &&
         p.pad[0] == 0 && p.pad[1] == 0 && (p.OH - 1) * p.R + p.R <= p.H && (p.OW - 1) * p.S + p.S <= p.W && p.OH * p.OW > 0 &&
         p.C * p.R * p.S < int64_t{1} << 31;
}

void write_patches_cuda(const Int8Conv2dParams& p, const InputParams& in, const PatchRows& rows, const Launch& at) {
  if (p.N == 0) return;
  PatchArgs a{};
  a.in = in;
  for (int d = 0; d < 4; ++d) a.x_stride[d] = p.x_stride[d];
  a.q = rows.q;
  a.row_bytes = rows.row_bytes;
  a.vectors = FastDiv(rows.row_bytes / kVectorBytes);
  a.total = p.N * p.OH * p.OW * a.vectors.divisor;
  a.k = static_cast<int32_t>(p.C * p.R * p.S);
  a.r = static_cast<int32_t>(p.R);
  a.s = static_cast<int32_t>(p.S);
  a.pixels = FastDiv(p.OH * p.OW);
  a.columns = FastDiv(p.OW);
  a.kernel_columns = FastDiv(p.S);
  a.kernel_pixels = FastDiv(p.R * p.S);
  a.scale = rows.scale;
  a.zero_point = rows.zero_point;
  with_input_type(p.in.dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    launch(at, patches_kernel<X>, blocks_for(a.total, kThreads, kMaxGrid), dim3(kThreads), a);
  });
}

}  // namespace quant_ops

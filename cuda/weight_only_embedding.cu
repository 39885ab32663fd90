// weight_only_embedding (ops.h) on CUDA. A thread has eight k of an index: one word of a packed weight of four bits, two of one of
// eight, or eight codes of the plain weight. Read next: contract/weight_only_layout.h.
#include "contract/weight_only_layout.h"

#include "device/common.cuh"
#include "launch.h"

#undef NDEBUG  // an index that is out of range is asserted in release builds too, as torch's embedding does
#include <cassert>

namespace quant_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kOctet = 8;

struct EmbeddingArgs {
  static constexpr bool kBarriers = false;
  WeightOnlyEmbeddingParams p;
  const int8_t* codes;  // of the packed weight
  int64_t column_bytes, padded_n;
  FastDiv octets, group;  // octets of a row, k of a group
  int64_t work;
  bool whole_vectors;  // every octet has eight k, and y is aligned to them
};

// Codes k to k + 7 of column n as they are stored; those beyond K are not.
__device__ __forceinline__ void load_octet(const EmbeddingArgs& a, int64_t n, int64_t k, int32_t (&codes)[kOctet]) {
  const int64_t count = a.p.K - k;
  if (a.p.packed == nullptr) {
    const int8_t* const from = a.p.weight + n * a.p.weight_stride + k;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) codes[i] = i < count ? from[i] : 0;
    return;
  }
  const ColumnWords words = column_words(a.codes, a.p.bits, a.column_bytes, a.padded_n, n);
  const auto word = [&](int64_t i) { return *reinterpret_cast<const uint32_t*>(words.first + i * words.step); };
  if (a.p.bits == 4) {
    const uint32_t both = word(k / kOctet);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) codes[i] = static_cast<int32_t>(both >> (i % 4 * 8 + i / 4 * 4) & 15u);
    return;
  }
  const uint32_t quads[2] = {word(k / 4), count > 4 ? word(k / 4 + 1) : 0};
#pragma unroll
  for (int i = 0; i < kOctet; ++i) codes[i] = static_cast<int8_t>(quads[i / 4] >> (i % 4 * 8) & 0xffu);
}

template <class Y>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const QO_GRID_CONSTANT EmbeddingArgs a) {
  const WeightOnlyEmbeddingParams& p = a.p;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.work; i += step) {
    const int64_t m = a.octets.quotient(i), k = (i - m * a.octets.divisor) * kOctet;
    const int64_t n = p.index_is_int64 ? static_cast<const int64_t*>(p.index)[m] : static_cast<const int32_t*>(p.index)[m];
    assert(n >= 0 && n < p.N && "quant_ops.weight_only_embedding: indices >= 0 and below the rows of the weight");
    int32_t codes[kOctet];
    load_octet(a, n, k, codes);
    const int64_t g = a.group.quotient(k), zero_at = n * p.zero_stride[0] + g * p.zero_stride[1];
    const float scale = p.scale[n * p.scale_stride[0] + g * p.scale_stride[1]];
    const int32_t zero = (p.zero_point != nullptr ? p.zero_point[zero_at] : 0) + (p.packed != nullptr && p.bits == 4 ? 8 : 0);
    Y results[kOctet];
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const float value = static_cast<float>(codes[j] - zero) * scale;
      results[j] = rounded_to<Y>(p.float_zero != nullptr ? value + p.float_zero[zero_at] : value);
    }
    Y* const y = static_cast<Y*>(p.y) + m * p.K + k;
    constexpr int kVector = 16 / sizeof(Y);
    if (a.whole_vectors) {
#pragma unroll
      for (int j = 0; j < kOctet; j += kVector) store_vector(y + j, *reinterpret_cast<const Y(*)[kVector]>(results + j));
    } else {
#pragma unroll
      for (int j = 0; j < kOctet; ++j)
        if (k + j < p.K) y[j] = results[j];
    }
  }
}

}  // namespace

void weight_only_embedding_cuda(const WeightOnlyEmbeddingParams& p, const Launch& at) {
  const int64_t octets = (p.K + kOctet - 1) / kOctet, work = p.M * octets;
  if (work == 0) return;
  const WeightOnlyLayout layout = weight_only_layout(p.N, p.K, p.bits, p.group);
  const EmbeddingArgs a{.p = p,
                        .codes = p.packed != nullptr ? layout.codes(p.packed, 0) : nullptr,
                        .column_bytes = layout.column_bytes,
                        .padded_n = layout.padded_n,
                        .octets = FastDiv(octets),
                        .group = FastDiv(p.group),
                        .work = work,
                        .whole_vectors = p.K % kOctet == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0};
  with_float_type(p.y_dtype, [&](auto* type) {
    using Y = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<Y, double>)
      launch(at, embedding_kernel<Y>, blocks_for(work, kThreads, kMaxGrid), dim3(kThreads), a);
  });
}

}  // namespace quant_ops

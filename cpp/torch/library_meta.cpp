// torch.ops.quant_ops_meta: the operators for tensors of device meta, which have sizes and no data. Each runs all checks that need
// no values and gives the results' shapes and dtypes, through the same code as the devices; nothing is computed. The fake kernels
// of python/quant_ops/ops call them with concrete sizes. A namespace of its own, since a kernel registered for quant_ops on meta
// would be given symbolic sizes, and make them constants of the graph.
#include "contract/cuda_weights.h"
#include "cpu/pack.h"
#include "cpu/weight_only.h"
#include "torch/operators.h"

namespace quant_ops {
namespace {

struct Meta {
  static constexpr const char* kDevice = nullptr;

  static void quantize(const QuantizeParams&, const Tensor&) {}
  static void quantize_backward(const QuantizeBackwardParams&, const Tensor&) {}
  static void dequantize(const DequantizeParams&, const Tensor&) {}
  static void choose_qparams(const ChooseQParams&, const Tensor&) {}
  static void quantize_rows(const QuantizeRowsParams&, const Tensor&) {}
  static void norm_quantize_rows(const char*, const NormQuantizeRowsParams&, const Tensor&) {}
  static void quantize_float(const char*, const QuantizeFloatParams&, const Tensor&) {}
  static void quantize_block(const char*, const QuantizeBlockParams&, const Tensor&) {}
  static void choose_qparams_affine(const ChooseAffineParams&, const Tensor&) {}
  static void quantize_affine(const AffineParams&, const Tensor&) {}
  static void dequantize_affine(const AffineParams&, const Tensor&) {}
  static Seed seed(const Tensor&) { return {}; }
  static void linear(const char*, const Int8LinearParams&, const Tensor&) {}
  static void conv2d(const Int8Conv2dParams&, const Tensor&) {}
  static void pointwise(const char*, const PointwiseParams&, const Tensor&) {}
  static void max_pool(const MaxPoolParams&, const Tensor&) {}
  static void avg_pool(const char*, const AvgPoolParams&, const Tensor&) {}
  static void upsample(const UpsampleParams&, const Tensor&) {}
  static void attention(const char*, const AttentionParams&, const Tensor&) {}

  static const int32_t* no_zero_point() { return nullptr; }
  static ZeroPoints zero_points(const Tensor& t, int64_t, int64_t) {
    return {.tensor = empty(sizes_of(t), ScalarType::Int, t), .small = true};
  }
  static const int32_t* given_zero_points(const char*, const char*, const Tensor&, int64_t, int64_t, Holder*) { return nullptr; }
  static const float* one() { return nullptr; }

  static constexpr bool kReadsPlainBesidePacked = false;
  static int64_t packed_bytes(const WeightShape& w) { return packed_layout(w.o, w.c, w.r, w.s, w.groups).bytes; }
  static void pack(const Tensor&, const WeightShape&, Tensor&) {}
  static void unpack(const Tensor&, const WeightShape&, Tensor&) {}
  static void transpose(const Tensor&, const WeightShape&, const WeightShape&, Tensor&) {}
  // The length of one of the devices' layouts: which device the tensor stands for is not known here.
  static bool is_packed_for(const Tensor& packed, const WeightShape& w) {
    return packed.numel() == packed_bytes(w) || packed.numel() == cuda_weights(w.o, w.c, w.r, w.s, w.groups).bytes;
  }

  static void weight_only(const char*, const WeightOnlyParams&, const Tensor&) {}
  static int64_t weight_only_bytes(const WeightOnlyShape& w) { return weight_only_layout(w.n, w.k, w.bits, w.group).bytes; }
  static void pack(const Tensor&, const WeightOnlyShape&, Tensor&) {}
  static void unpack(const Tensor&, const WeightOnlyShape&, Tensor&) {}
  static bool is_packed_for(const Tensor& packed, const WeightOnlyShape& w) { return packed.numel() == weight_only_bytes(w); }
  static void expect_between(const char*, const char*, const Tensor&, int64_t, int64_t) {}
  static void weight_only_embedding(const WeightOnlyEmbeddingParams&, const Tensor&) {}
  static void expect_indices(const char*, const Tensor&, int64_t) {}
};

}  // namespace
}  // namespace quant_ops

STABLE_TORCH_LIBRARY(quant_ops_meta, m) { quant_ops::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(quant_ops_meta, Meta, m) {
  quant_ops::implement_operators<quant_ops::Meta>(m);
  QO_IMPLEMENT(m, unpack_weight, quant_ops::Meta);
  QO_IMPLEMENT(m, transpose_packed_weight, quant_ops::Meta);
}

// Launches of weight_only.cuh.
#include "engine/sm90/weight_only.cuh"

#include "engine/sm90/kernels.cuh"

namespace quant_ops::sm90 {

// One definition each, in weight_only_*.cu.
#define QO_DECLARE(X, BITS) \
  template <>               \
  WeightOnlyKernel weight_only_kernel_of<X, BITS>(int tile, int group);
QO_DECLARE(int8_t, 4)
QO_DECLARE(int8_t, 8)
QO_DECLARE(Half, 4)
QO_DECLARE(Half, 8)
QO_DECLARE(BFloat16, 4)
QO_DECLARE(BFloat16, 8)
#undef QO_DECLARE

namespace {

template <class X>
WeightOnlyKernel kernel_of(int bits, int tile, int group) {
  return bits == 4 ? weight_only_kernel_of<X, 4>(tile, group) : weight_only_kernel_of<X, 8>(tile, group);
}

}  // namespace

void run_weight_only(const WeightOnlyArgs& a, int bits, DType x_dtype, const WeightOnlyChoice& choice, float* parts, bool early,
                     const Launch& at) {
  const WeightOnlyTile& t = kWeightOnlyTiles[choice.tile];
  const int64_t x_bytes = dtype_bytes(x_dtype), row_bytes = a.K * x_bytes;
  const int64_t row_tiles = (a.M + t.rows - 1) / t.rows, column_tiles = (a.N + t.columns() - 1) / t.columns();
  WeightOnlyTileArgs args{};
  static_cast<WeightOnlyArgs&>(args) = a;
  if (choice.splits > 1) {
    args.y = parts;
    args.y_dtype = DType::kFloat32;
    args.y_stride = a.N;
    args.bias = nullptr;
  }
  args.row_load = static_cast<int32_t>(std::min<int64_t>(t.rows, a.M));
  args.last_row = static_cast<int32_t>(std::max<int64_t>(0, a.M - t.rows));
  args.row_tiles = static_cast<int32_t>(row_tiles);
  args.stages = (a.steps + kWeightStageK / kStepK - 1) / (kWeightStageK / kStepK);
  args.splits = choice.splits;
  args.split_stages = choice.split_stages;
  args.y_pairs = args.y_stride % 2 == 0 && is_aligned(args.y, 2 * dtype_bytes(args.y_dtype)) && (a.M * a.N) % 2 == 0;
  const int64_t stride = a.M > 1 ? a.x_stride * x_bytes : (row_bytes + 15) / 16 * 16;
  args.map = encode_matrix(static_cast<const int8_t*>(a.x),
                           matrix_map(row_bytes, a.M, stride, Order::kPlain, kStepBytes, args.row_load), kStepBytes, "rows", at);
  const int group = a.groups == 1 || a.group_shift > 2 ? 0 : kStepK << a.group_shift;
  const WeightOnlyKernel kernel = x_dtype == DType::kInt8      ? kernel_of<int8_t>(bits, choice.tile, group)
                                  : x_dtype == DType::kFloat16 ? kernel_of<Half>(bits, choice.tile, group)
                                                               : kernel_of<BFloat16>(bits, choice.tile, group);
  launch(at, kernel, row_tiles * column_tiles * choice.splits, dim3(static_cast<unsigned>(t.threads())), args,
         t.shared_bytes(bits, static_cast<int>(x_bytes)), early ? Start::kEarly : Start::kInOrder);
  if (choice.splits > 1) join_weight_only_parts(a, parts, choice.splits, at);
}

}  // namespace quant_ops::sm90

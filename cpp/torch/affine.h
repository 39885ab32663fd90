// torchao's affine primitives for any device: checks, allocation, the structs of ops.h. `Backend` supplies the entry points
// choose_qparams_affine, quantize_affine and dequantize_affine. Read next: contract/affine.h, cpu/affine.cpp.
#pragma once

#include <cmath>
#include <limits>
#include <tuple>

#include "contract/affine.h"
#include "torch/space.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace quant_ops {

// ---- block_size -----------------------------------------------------------------------------------------------------

// As torchao reads it: a dimension's entry is its size, or -1, for the whole dimension, or a divisor of its size.
struct AffineBlocks {
  Ints block;               // entries that are at least 1
  Ints grid;                // blocks along each dimension
  std::vector<bool> whole;  // a block of more than one element, or of none, is the whole dimension

  int64_t count() const {
    int64_t n = 1;
    for (int64_t g : grid) n *= g;
    return n;
  }
};

inline AffineBlocks expect_blocks(const char* op, const Tensor& input, const Ints& block_size) {
  const Ints shape = sizes_of(input);
  expect_elements(op, "input", shape);
  QO_EXPECT(block_size.size() == shape.size(), op, "one block_size entry per dimension of input, got block_size ",
            shape_text(block_size), " and input.shape ", shape_text(shape));
  AffineBlocks blocks;
  for (size_t d = 0; d < shape.size(); ++d) {
    const int64_t b = block_size[d], size = shape[d];
    QO_EXPECT(b == -1 || b == size || (b >= 1 && size % b == 0), op, "block_size to divide input.shape, got block_size ",
              shape_text(block_size), " and input.shape ", shape_text(shape), ". Pad the input, or use -1 for a whole dimension.");
    const bool whole = b == -1 || (b == size && b != 1);
    blocks.block.push_back(std::max<int64_t>(1, whole ? size : b));
    blocks.grid.push_back(whole ? 1 : size / b);
    blocks.whole.push_back(whole);
  }
  return blocks;
}

// ---- arguments that several share -----------------------------------------------------------------------------------

inline ZeroPointDomain expect_domain(const char* op, int64_t domain) {
  QO_EXPECT(domain >= 0 && domain <= 2, op, "zero_point_domain in 0 (INT), 1 (FLOAT), 2 (NONE), got ", domain);
  return static_cast<ZeroPointDomain>(domain);
}

inline void expect_affine_codes(const char* op, int64_t qmin, int64_t qmax) {
  QO_EXPECT(qmin < qmax, op, "quant_min < quant_max, got ", qmin, " and ", qmax);
  QO_EXPECT(qmin >= INT32_MIN && qmax <= INT32_MAX, op, "quant_min and quant_max to fit int32, got ", qmin, " and ", qmax);
}

inline void expect_affine_floating(const char* op, const char* name, ScalarType type) {
  QO_EXPECT_DTYPE(is_one_of(type, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), op, name,
                  " in (float32, float16, bfloat16), got ", dtype_name(type));
}

inline bool is_affine_integer(ScalarType type) {
  return is_one_of(type, {ScalarType::Char, ScalarType::Byte, ScalarType::Short, ScalarType::Int});
}

// torch clamps by bounds of the computation's dtype, and float16 ends at 65504.
inline void expect_bounds_in(const char* op, DType dtype, int64_t qmin, int64_t qmax) {
  QO_EXPECT(dtype != DType::kFloat16 || (qmin >= -65504 && qmax <= 65504), op,
            "quant_min and quant_max in [-65504, 65504], which float16 holds, got ", qmin, " and ", qmax,
            ". Use a float32 input or scale.");
}

// A scale or zero point: one number a block, in any shape.
inline void expect_per_block(const char* op, const char* name, const Tensor& t, const AffineBlocks& blocks, const Tensor& input) {
  QO_EXPECT(t.numel() == blocks.count(), op, name, " of one number per block, ", blocks.count(), " in all, got ", name, ".shape ",
            shape_text(t), " for input.shape ", shape_text(input), " and block_size ", shape_text(blocks.block));
  expect_device(op, name, t, input);
}

// ---- choose_qparams_affine ------------------------------------------------------------------------------------------

inline float expect_eps(const char* op, const std::optional<double>& eps, ScalarType type) {
  if (!eps) return type == ScalarType::Half ? 0x1p-14f : 0x1p-126f;
  const double most = type == ScalarType::Half ? 65504.0 : type == ScalarType::BFloat16 ? 0x1.fep127 : 0x1.fffffep127;
  QO_EXPECT(std::fabs(*eps) <= most, op, "eps to be a number that ", dtype_name(type), " holds, got ", *eps);
  return static_cast<float>(rounded(*eps, to_dtype(type)));
}

template <class Backend>
std::tuple<Tensor, Tensor> choose_qparams_affine(const Tensor& input, int64_t mapping, const Ints& block_size, int64_t qmin,
                                                 int64_t qmax, const std::optional<double>& eps,
                                                 const std::optional<ScalarType>& scale_dtype,
                                                 const std::optional<ScalarType>& zero_point_dtype, bool keepdim,
                                                 bool preserve_zero, int64_t zero_point_domain) {
  const char* op = "choose_qparams_affine";
  const ScalarType type = input.scalar_type();
  expect_affine_floating(op, "input.dtype", type);
  QO_EXPECT(mapping >= 0 && mapping <= 2, op, "mapping_type in 0 (SYMMETRIC), 1 (SYMMETRIC_NO_CLIPPING_ERR), 2 (ASYMMETRIC), got ",
            mapping);
  const ZeroPointDomain domain = expect_domain(op, zero_point_domain);
  const bool asymmetric = static_cast<Mapping>(mapping) == Mapping::kAsymmetric, is_float = domain == ZeroPointDomain::kFloat;
  QO_EXPECT(asymmetric || (preserve_zero && !is_float), op,
            "mapping_type ASYMMETRIC with preserve_zero=False or zero_point_domain FLOAT, got a symmetric one");
  QO_EXPECT(!is_float || !preserve_zero, op, "preserve_zero=False with zero_point_domain FLOAT, got True");
  QO_EXPECT(!asymmetric || domain != ZeroPointDomain::kNone, op,
            "a symmetric mapping_type with zero_point_domain NONE, got ASYMMETRIC");
  expect_affine_codes(op, qmin, qmax);
  if (!is_float) {
    const int64_t middle = (qmin + qmax + 1) / 2;
    asymmetric ? expect_bounds_in(op, to_dtype(type), qmin, qmax) : expect_bounds_in(op, to_dtype(type), middle, middle);
  }
  const ScalarType scale_type = scale_dtype.value_or(type);
  QO_EXPECT_DTYPE(is_floating(scale_type), op, "scale_dtype in (float32, float16, bfloat16, float64), got ",
                  dtype_name(scale_type));
  const ScalarType zero_type = zero_point_dtype.value_or(asymmetric && !is_float ? ScalarType::Int : type);
  QO_EXPECT_DTYPE(is_floating(zero_type) || (!is_float && (is_affine_integer(zero_type) || zero_type == ScalarType::Long)), op,
                  is_float ? "a floating zero_point_dtype with zero_point_domain FLOAT" : "zero_point_dtype integer or floating",
                  ", got ", dtype_name(zero_type));
  const float least_scale = expect_eps(op, eps, type);

  AffineBlocks blocks = expect_blocks(op, input, block_size);
  // torch's amin takes no dimensions for all of them, so that blocks of one element become one block here
  bool all = true;
  for (int64_t b : block_size) all = all && b == 1;
  QO_EXPECT(!all || !keepdim || input.numel() == 1, op, "a block of more than one element with keepdim=True, got block_size ",
            shape_text(block_size));
  if (all) {
    blocks.block = sizes_of(input);
    blocks.grid = Ints(blocks.block.size(), 1);
    blocks.whole = std::vector<bool>(blocks.block.size(), !keepdim);
  }
  Ints shape;
  for (size_t d = 0; d < blocks.grid.size(); ++d) {
    QO_EXPECT(!blocks.whole[d] || input.size(static_cast<int64_t>(d)) > 0, op, "a block of at least one element, got block_size ",
              shape_text(block_size), " and input.shape ", shape_text(input));
    if (keepdim || !blocks.whole[d]) shape.push_back(blocks.grid[d]);
  }
  Tensor scale = empty(shape, scale_type, input), zero_point = empty(shape, zero_type, input);
  if (scale.numel() == 0) return {scale, zero_point};

  Space space(op, input, blocks.block);
  space.add(input);
  Reduction range = space.reduction_of_blocks();
  for (int d = 0; d < range.reduced.ndim; ++d)  // the elements of an expanded dimension are one
    if (range.reduced.stride[0][d] == 0 && range.reduced.size[d] > 1) range.reduced.size[d] = 1;
  const ChooseAffineParams p{
      .range = range,
      .x = input.const_data_ptr(),
      .x_dtype = to_dtype(type),
      .choice =
          {
              .scale = scale.mutable_data_ptr(),
              .scale_dtype = to_dtype(scale_type),
              .zero_point = zero_point.mutable_data_ptr(),
              .zero_dtype = to_dtype(zero_type),
              .zero_is_floating = is_floating(zero_type),
              .zero_is_int64 = zero_type == ScalarType::Long,
              .qmin = static_cast<int32_t>(qmin),
              .qmax = static_cast<int32_t>(qmax),
              .mapping = static_cast<Mapping>(mapping),
              .domain = domain,
              .preserve_zero = preserve_zero,
              .eps = least_scale,
          },
  };
  Backend::choose_qparams_affine(p, input);
  return {scale, zero_point};
}

// ---- quantize_affine and dequantize_affine --------------------------------------------------------------------------

// What both take, checked, with the tensors that the struct points to.
struct AffineOperands {
  AffineBlocks blocks;
  Tensor scale;
  std::optional<Tensor> zero_point;
  AffineParams params;
};

inline AffineOperands expect_affine_operands(const char* op, const Tensor& input, const Ints& block_size, const Tensor& scale,
                                             const std::optional<Tensor>& zero_point, ScalarType to, int64_t qmin, int64_t qmax,
                                             int64_t zero_point_domain) {
  const ZeroPointDomain domain = expect_domain(op, zero_point_domain);
  expect_affine_codes(op, qmin, qmax);
  AffineBlocks blocks = expect_blocks(op, input, block_size);
  expect_floating(op, "scale", scale);
  expect_per_block(op, "scale", scale, blocks, input);
  // torchao also takes a tensor without elements for none
  const bool given = zero_point.has_value() && (zero_point->numel() > 0 || blocks.count() == 0);
  QO_EXPECT(!given || domain != ZeroPointDomain::kNone, op, "no zero_point with zero_point_domain NONE, got one");
  std::optional<Tensor> zero;
  bool integer = true;
  const bool wide = scale.scalar_type() == ScalarType::Double;
  if (given) {
    expect_zero_point_dtype(op, "zero_point", *zero_point);
    expect_per_block(op, "zero_point", *zero_point, blocks, input);
    integer = !is_floating(zero_point->scalar_type());
    zero = as_contiguous(integer ? to_type(*zero_point, wide ? ScalarType::Double : ScalarType::Float) : *zero_point);
  }
  const Tensor factors = as_contiguous(scale);
  const AffineParams p{
      .from_dtype = to_dtype(input.scalar_type()),
      .to_dtype = to_dtype(to),
      .blocks = blocks.count(),
      .scale = factors.const_data_ptr(),
      .scale_dtype = to_dtype(scale.scalar_type()),
      .zero_point = zero ? zero->const_data_ptr() : nullptr,
      .zero_dtype = zero ? to_dtype(zero->scalar_type()) : DType::kFloat32,
      .zero_is_integer = integer,
      .qmin = static_cast<int32_t>(qmin),
      .qmax = static_cast<int32_t>(qmax),
      .domain = domain,
  };
  return {.blocks = blocks, .scale = factors, .zero_point = zero, .params = p};
}

// A result this large is fresh memory of the system each time, which then is cleared at its first touch: by 4 KiB that takes
// several times as long as the operator. A hint only; large pages are used where the system's setting is madvise, as usual.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  constexpr int64_t kFresh = int64_t{32} << 20;  // glibc maps and unmaps what is larger
  if (bytes < kFresh) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The result, and the walk over it, into the struct.
inline Tensor affine_result(const char* op, const Tensor& input, ScalarType to, AffineOperands* operands) {
  Tensor y = empty_like(input, to);
  if (y.numel() == 0) return y;
  if (y.is_cpu()) prefer_huge_pages(y.mutable_data_ptr(), bytes_of(y.numel(), to));
  Space space(op, input, operands->blocks.block);
  space.add(input);
  space.add(y);
  space.add_block_number();
  operands->params.it = space.iteration();
  operands->params.from = input.const_data_ptr();
  operands->params.to = y.mutable_data_ptr();
  return y;
}

template <class Backend>
Tensor quantize_affine(const Tensor& input, const Ints& block_size, const Tensor& scale, const std::optional<Tensor>& zero_point,
                       ScalarType output_dtype, int64_t qmin, int64_t qmax, int64_t zero_point_domain) {
  const char* op = "quantize_affine";
  expect_affine_floating(op, "input.dtype", input.scalar_type());
  QO_EXPECT_DTYPE(is_affine_integer(output_dtype), op, "output_dtype in (uint8, int8, int16, int32), got ",
                  dtype_name(output_dtype));
  AffineOperands operands =
      expect_affine_operands(op, input, block_size, scale, zero_point, output_dtype, qmin, qmax, zero_point_domain);
  const AffineParams& p = operands.params;
  QO_EXPECT(p.domain != ZeroPointDomain::kFloat || operands.zero_point.has_value(), op,
            "a zero_point with zero_point_domain FLOAT, got None");
  const int64_t bits = 8 * dtype_bytes(p.to_dtype), least = p.to_dtype == DType::kUInt8 ? 0 : -(int64_t{1} << (bits - 1));
  const int64_t most = p.to_dtype == DType::kUInt8 ? 255 : -(least + 1);
  QO_EXPECT(qmin >= least && qmax <= most, op, "quant_min and quant_max in [", least, ", ", most, "] for ",
            dtype_name(output_dtype), ", got ", qmin, " and ", qmax);
  expect_bounds_in(op, quantize_affine_dtypes(p).sum, qmin, qmax);
  Tensor y = affine_result(op, input, output_dtype, &operands);
  if (y.numel() > 0) Backend::quantize_affine(operands.params, input);
  return y;
}

template <class Backend>
Tensor dequantize_affine(const Tensor& input, const Ints& block_size, const Tensor& scale, const std::optional<Tensor>& zero_point,
                         int64_t qmin, int64_t qmax, int64_t zero_point_domain, ScalarType output_dtype) {
  const char* op = "dequantize_affine";
  QO_EXPECT_DTYPE(is_affine_integer(input.scalar_type()), op, "input.dtype in (uint8, int8, int16, int32), got ",
                  dtype_name(input.scalar_type()));
  expect_affine_floating(op, "output_dtype", output_dtype);
  AffineOperands operands =
      expect_affine_operands(op, input, block_size, scale, zero_point, output_dtype, qmin, qmax, zero_point_domain);
  Tensor y = affine_result(op, input, output_dtype, &operands);
  if (y.numel() > 0) Backend::dequantize_affine(operands.params, input);
  return y;
}

}  // namespace quant_ops

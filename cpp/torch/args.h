// From torch tensors to the structs of ops.h: messages, dtype names, shapes, iteration spaces. Included by the bindings of both
// devices; together with them the only code that sees torch, and only its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "contract/iteration.h"
#include "contract/ops.h"

namespace quant_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// ---- messages: "quant_ops.<op>: expected <relation>, got <values>. <remedy>" ----------------------------------------

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "quant_ops." << op << ": expected ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define QO_EXPECT(condition, op, ...)                     \
  do {                                                    \
    if (!(condition)) ::quant_ops::fail(op, __VA_ARGS__); \
  } while (0)

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    default: return torch::headeronly::toString(t);
  }
}

inline std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}
inline std::string shape_text(const Tensor& t) { return shape_text(t.sizes()); }
inline std::string list_text(const Ints& list) {
  return shape_text(torch::headeronly::IntHeaderOnlyArrayRef(list.data(), list.size()));
}

// ---- dtypes ---------------------------------------------------------------------------------------------------------

inline bool is_one_of(ScalarType t, std::initializer_list<ScalarType> list) {
  for (ScalarType u : list)
    if (t == u) return true;
  return false;
}
inline bool is_floating(ScalarType t) {
  return is_one_of(t, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
}

inline DType to_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Char: return DType::kInt8;
    case ScalarType::Byte: return DType::kUInt8;
    case ScalarType::Short: return DType::kInt16;
    default: return DType::kInt32;
  }
}

// ---- tensors --------------------------------------------------------------------------------------------------------

inline Tensor to_type(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

inline void expect_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  QO_EXPECT(t.is_cpu() == x.is_cpu() && (x.is_cpu() || t.get_device_index() == x.get_device_index()), op, name,
            ".device to be that of the first argument, got two devices. Move the tensors or the module to one device.");
}

// An empty tensor of t's shape, memory layout and device.
inline Tensor empty_like(const Tensor& t, ScalarType type) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(t),
                                    from(std::optional<ScalarType>(type)),
                                    from(std::optional<torch::headeronly::Layout>()),
                                    from(std::optional<torch::stable::Device>()),
                                    from(std::optional<bool>()),
                                    from(std::optional<torch::headeronly::MemoryFormat>())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// An empty tensor on like's device, contiguous or (4-D) channels_last. Not torch::stable::empty: its boxed call costs a microsecond
// that a small layer would notice.
inline Tensor empty(const Ints& shape, ScalarType type, const Tensor& like, bool channels_last = false) {
  const int64_t dims = static_cast<int64_t>(shape.size());
  Ints strides(shape.size());
  int64_t step = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    const int64_t d = !channels_last ? i : i == 3 ? 1 : i == 0 ? 0 : i + 1;  // from the innermost on: C, W, H, N
    strides[static_cast<size_t>(d)] = step;
    step *= std::max<int64_t>(1, shape[static_cast<size_t>(d)]);
  }
  AtenTensorHandle handle;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, shape.data(), strides.data(), static_cast<int32_t>(type), device_type, device_index, &handle));
  return Tensor(handle);
}

inline Ints sizes_of(const Tensor& t) {
  const auto s = t.sizes();
  return Ints(s.begin(), s.end());
}

// ---- iteration spaces -----------------------------------------------------------------------------------------------

// The dimensions of a tensor, blocked ones split in two, and how other tensors broadcast over them.
class Space {
 public:
  Space(const char* op, const Tensor& tensor, const std::optional<Ints>& block_size) : op_(op), shape_(sizes_of(tensor)) {
    const size_t dims = shape_.size();
    block_ = Ints(dims, 1);
    if (block_size) {
      QO_EXPECT(block_size->size() == dims, op, "one block_size entry per dimension of tensor, got block_size ",
                list_text(*block_size), " and tensor.shape ", shape_text(tensor));
      for (size_t d = 0; d < dims; ++d) {
        const int64_t b = (*block_size)[d];
        QO_EXPECT(b >= 1 && shape_[d] % b == 0, op, "block_size to divide tensor.shape, got block_size ", list_text(*block_size),
                  " and tensor.shape ", shape_text(tensor));
        block_[d] = b;
      }
    }
    QO_EXPECT(dims * (block_size ? 2 : 1) <= kMaxDims, op, "at most ", kMaxDims / (block_size ? 2 : 1), " dimensions, got ", dims,
              ". Merge dimensions with reshape first.");
    blocked_ = block_size.has_value();
  }

  // A tensor of the full shape.
  void add(const Tensor& t) {
    const auto strides = t.strides();
    Ints s;
    for (size_t d = 0; d < shape_.size(); ++d) {
      if (blocked_) s.push_back(strides[d] * block_[d]);
      s.push_back(strides[d]);
    }
    strides_.push_back(s);
  }

  // A parameter that does not vary.
  void add_constant() { strides_.push_back(Ints(shape_.size() * (blocked_ ? 2 : 1), 0)); }

  // A scale or zero point: one element, or broadcastable by shape to the tensor (to its grid of blocks).
  void add_parameter(const char* name, const Tensor& t) {
    const auto sizes = t.sizes();
    const auto strides = t.strides();
    const size_t dims = shape_.size();
    Ints s;
    const bool scalar = t.numel() == 1;
    bool ok = scalar || sizes.size() <= dims;
    for (size_t d = 0; ok && d < dims; ++d) {
      int64_t stride = 0;
      if (!scalar && d + sizes.size() >= dims) {
        const size_t i = d + sizes.size() - dims;
        ok = sizes[i] == 1 || sizes[i] == shape_[d] / block_[d];
        stride = sizes[i] == 1 ? 0 : strides[i];
      }
      s.push_back(stride);
      if (blocked_) s.push_back(0);
    }
    QO_EXPECT(ok, op_, name, " to have one element or to broadcast to ", blocked_ ? "tensor.shape / block_size" : "tensor.shape",
              ", got ", name, ".shape ", shape_text(t), " and tensor.shape ", list_text(shape_), ". For one ", name,
              " per channel of dimension 1 use the shape (1, C, 1, 1).");
    strides_.push_back(s);
  }

  Iteration iteration() const {
    Iteration it;
    fill(&it, [](size_t) { return true; });
    return it;
  }

  // Split by a contiguous result with one element a slice: dimensions along which it varies are kept, the others reduced. Its
  // strides become the last operand of `kept`.
  Reduction reduction(const Tensor& result) const {
    Space with = *this;
    with.add_parameter("result", result);
    const Ints& varies = with.strides_.back();
    Reduction r;
    with.fill(&r.kept, [&](size_t d) { return varies[d] != 0; });
    fill(&r.reduced, [&](size_t d) { return varies[d] == 0; });
    return r;
  }

 private:
  template <class Keep>
  void fill(Iteration* it, const Keep& keep) const {
    it->operands = static_cast<int>(strides_.size());
    for (size_t d = 0, i = 0; d < shape_.size(); ++d)
      for (int half = 0; half < (blocked_ ? 2 : 1); ++half, ++i) {
        if (!keep(i)) continue;
        it->size[it->ndim] = !blocked_ ? shape_[d] : half == 0 ? shape_[d] / block_[d] : block_[d];
        for (size_t o = 0; o < strides_.size(); ++o) it->stride[o][it->ndim] = strides_[o][i];
        ++it->ndim;
      }
  }

  const char* op_;
  Ints shape_, block_;
  bool blocked_;
  std::vector<Ints> strides_;
};

}  // namespace quant_ops

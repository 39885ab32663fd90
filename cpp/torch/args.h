// What every operator does with its torch arguments: the checks that several share, and new tensors. Only torch's stable ABI is
// used. Read next: quantize.h for the quantize family; linear.h, conv2d.h and pack.h for the integer operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "contract/ops.h"
#include "torch/errors.h"

// A call of torch's C functions. torch's own macro of this kind has another name in 2.10 than in 2.13.
#define QO_TORCH(call)                                                                                                 \
  do {                                                                                                                 \
    if ((call) != TORCH_SUCCESS) throw std::runtime_error("quant_ops: " #call " failed: " + quant_ops::torch_error()); \
  } while (0)

// Since 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace quant_ops {

// What torch says of the C call that has just failed.
inline std::string torch_error() {
  return torch_exception_get_what_without_backtrace == nullptr ? "see torch's output"
                                                               : torch_exception_get_what_without_backtrace();
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

// ---- checks ---------------------------------------------------------------------------------------------------------

inline void expect_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  QO_EXPECT(t.is_cpu() == x.is_cpu() && (x.is_cpu() || t.get_device_index() == x.get_device_index()), op, name,
            ".device to be that of the first argument, got two devices. Move the tensors or the module to one device.");
}

inline void expect_floating(const char* op, const char* name, const Tensor& t) {
  QO_EXPECT_DTYPE(is_floating(t.scalar_type()), op, name, ".dtype in (float32, float16, bfloat16, float64), got ",
                  dtype_name(t.scalar_type()));
}

inline void expect_int8(const char* op, const char* name, const Tensor& t) {
  QO_EXPECT_DTYPE(t.scalar_type() == ScalarType::Char, op, name, ".dtype int8, got ", dtype_name(t.scalar_type()),
                  is_floating(t.scalar_type()) ? ". Quantize it first, e.g. with quant_tensor_forward(simulate=False)." : "");
}

inline void expect_zero_point_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  QO_EXPECT_DTYPE(is_floating(type) ||
                      is_one_of(type, {ScalarType::Char, ScalarType::Byte, ScalarType::Short, ScalarType::Int, ScalarType::Long}),
                  op, name, ".dtype integer or floating, got ", dtype_name(type));
}

// ---- sizes ----------------------------------------------------------------------------------------------------------

// Every size and step of a convolution is below kMostSize, since CUDA's coordinates are int32, and no tensor has more than
// kMostElements. So all that the kernels compute from them fits int64: the bytes of padded codes (at most 16 times the elements),
// offsets, and the multiplications of a call (2^17 an element of its result).
constexpr int64_t kMostSize = int64_t{1} << 30, kMostElements = int64_t{1} << 45;

// The product of numbers that are not negative, or the largest int64 where it does not fit.
inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

// An empty dimension counts as one element, so that the product of any of the sizes fits too.
template <class Sizes>
void expect_elements(const char* op, const char* name, const Sizes& sizes) {
  int64_t elements = 1;
  for (int64_t size : sizes) elements = times(elements, std::max<int64_t>(1, size));
  QO_EXPECT(elements <= kMostElements, op, name, " of at most 2^45 elements (an empty dimension counts as one), got shape ",
            shape_text(sizes), ". Split the call.");
}

// ---- tensors --------------------------------------------------------------------------------------------------------

inline int64_t bytes_of(int64_t elements, ScalarType type) {
  const int64_t size = type == ScalarType::Double || type == ScalarType::Long ? 8 : dtype_bytes(to_dtype(type));
  return times(elements, size);
}

// A new tensor of so many elements; torch's error, mostly of its allocator, becomes ours.
template <class Make>
Tensor allocated(int64_t elements, ScalarType type, const Make& make) {
  try {
    return make();
  } catch (const std::runtime_error& e) {
    throw OutOfMemory(bytes_of(elements, type), std::string("\n") + e.what());
  }
}

inline Tensor to_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : allocated(t.numel(), type, [&] { return torch::stable::to(t, type); });
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : allocated(t.numel(), t.scalar_type(), [&] { return torch::stable::contiguous(t); });
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
  return allocated(t.numel(), type, [&] {
    QO_TORCH(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  });
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
  QO_TORCH(aoti_torch_get_device_type(like.get(), &device_type));
  QO_TORCH(aoti_torch_get_device_index(like.get(), &device_index));
  return allocated(step, type, [&] {
    QO_TORCH(aoti_torch_empty_strided(dims, shape.data(), strides.data(), static_cast<int32_t>(type), device_type, device_index,
                                      &handle));
    return Tensor(handle);
  });
}

inline Ints sizes_of(const Tensor& t) {
  const auto s = t.sizes();
  return Ints(s.begin(), s.end());
}

// The last dimension contiguous and all others one regular step: rows for the kernels. Copies only what is not.
inline Tensor as_rows(const Tensor& x, int64_t* row_stride) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  bool ok = sizes[last] <= 1 || strides[last] == 1;
  int64_t step = -1;     // of the innermost leading dimension with more than one index
  int64_t expected = 0;  // stride that the next one out must have
  for (int64_t d = last - 1; ok && d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (step < 0)
      step = strides[d];
    else
      ok = strides[d] == expected;
    expected = strides[d] * sizes[d];
  }
  if (ok) {
    *row_stride = step < 0 ? sizes[last] : step;
    return x;
  }
  *row_stride = sizes[last];
  return as_contiguous(x);
}

}  // namespace quant_ops

// The sentences that refuse an argument: "quant_ops.<op>: expected <relation>, got <values>. <remedy>". Each is written once, where
// it is checked, for every device and for the fake kernels (library_meta.cpp). torch raises it as RuntimeError; for the wrappers of
// python/quant_ops/ops the check also decides whether it is a TypeError (QO_EXPECT_DTYPE), an IndexError (QO_EXPECT_INDEX) or a
// ValueError (QO_EXPECT). Memory that cannot be had is a RuntimeError there too (named_errors).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "contract/memory.h"

namespace quant_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

enum class Refusal : int32_t { kValue, kDtype, kMemory, kIndex };

// The last refusal on this thread that was not of a value: the first line of its text. A sentence always comes from the same check,
// so an old one is never mistaken for a refusal of another kind.
struct LastRefusal {
  Refusal kind = Refusal::kValue;
  std::string sentence;
};
inline LastRefusal& last_refusal() {
  thread_local LastRefusal last;
  return last;
}
inline Refusal refusal_of(const char* sentence) {
  return last_refusal().sentence == sentence ? last_refusal().kind : Refusal::kValue;
}

template <class... Parts>
[[noreturn]] void fail(Refusal kind, const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "quant_ops." << op << ": expected ";
  (text << ... << parts);
  if (kind != Refusal::kValue) last_refusal() = {kind, text.str().substr(0, text.str().find('\n'))};
  throw std::runtime_error(text.str());
}

// Runs an operator, and names it where memory cannot be had.
template <class F>
void named_errors(const char* op, const F& run) {
  try {
    run();
  } catch (const OutOfMemory& e) {
    fail(Refusal::kMemory, op, e.bytes(), " bytes of memory, got none. Free memory or split the call.", e.reason());
  } catch (const std::bad_alloc&) {
    fail(Refusal::kMemory, op, "enough memory, got none. Free memory or split the call.");
  }
}

#define QO_EXPECT_OF(kind, condition, op, ...)                  \
  do {                                                          \
    if (!(condition)) ::quant_ops::fail(kind, op, __VA_ARGS__); \
  } while (0)
#define QO_EXPECT(condition, op, ...) QO_EXPECT_OF(::quant_ops::Refusal::kValue, condition, op, __VA_ARGS__)
#define QO_EXPECT_DTYPE(condition, op, ...) QO_EXPECT_OF(::quant_ops::Refusal::kDtype, condition, op, __VA_ARGS__)
#define QO_EXPECT_INDEX(condition, op, ...) QO_EXPECT_OF(::quant_ops::Refusal::kIndex, condition, op, __VA_ARGS__)

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
inline std::string shape_text(const Ints& list) {
  return shape_text(torch::headeronly::IntHeaderOnlyArrayRef(list.data(), list.size()));
}

}  // namespace quant_ops

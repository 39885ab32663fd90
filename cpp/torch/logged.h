// The line that an operator's call writes with QUANT_OPS_LOG=1 (contract/log.h), up to the name of the kernel:
//
//   int8_linear(x=float32(2, 64), weight=int8(16, 64), weight_scale=float32(16, 1)) cpu
//
// Arguments have the names of the schema; those that have their default's value are left out. Read next: operators.h.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "contract/log.h"
#include "torch/errors.h"
#include "torch/repeat.h"

namespace quant_ops {

// ---- values as Python writes them -----------------------------------------------------------------------------------

inline std::string value_text(const Tensor& t) { return dtype_name(t.scalar_type()) + shape_text(t); }
inline std::string value_text(const Ints& list) { return shape_text(list); }
inline std::string value_text(const std::vector<Tensor>& list) { return std::to_string(list.size()).append(" tensors"); }
inline std::string value_text(bool value) { return value ? "True" : "False"; }
inline std::string value_text(int64_t value) { return std::to_string(value); }
inline std::string value_text(ScalarType type) { return dtype_name(type); }
inline std::string value_text(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}
template <class T>
std::string value_text(const std::optional<T>& value) {
  return value ? value_text(*value) : "None";
}

// ---- names from the schema ------------------------------------------------------------------------------------------

struct Argument {
  std::string name, fallback;  // empty: there is no default
};

// Of "op(Tensor x, int[2] stride=1, *, Tensor? y=None) -> Tensor".
inline std::vector<Argument> arguments_of(std::string_view schema) {
  std::vector<Argument> arguments;
  schema.remove_prefix(schema.find('(') + 1);
  schema = schema.substr(0, schema.find(") ->"));
  while (!schema.empty()) {
    const size_t comma = schema.find(", ");
    std::string_view one = schema.substr(0, comma);
    schema.remove_prefix(comma == schema.npos ? schema.size() : comma + 2);
    if (one == "*") continue;
    one.remove_prefix(one.find(' ') + 1);
    const size_t equals = one.find('=');
    const std::string_view fallback = equals == one.npos ? std::string_view() : one.substr(equals + 1);
    arguments.push_back({.name = std::string(one.substr(0, equals)), .fallback = std::string(fallback)});
  }
  return arguments;
}

// Takes the schemas from define_operators as a library does, and keeps the one of an operator.
struct SchemaReader {
  std::string op;  // with the parenthesis that follows it
  std::vector<Argument> arguments;
  void def(std::string_view schema) {
    if (schema.substr(0, op.size()) == op) arguments = arguments_of(schema);
  }
};
template <class Library>
void define_operators(Library& m);  // operators.h

template <class... Values>
std::string call_text(const char* op, const char* device, const Values&... values) {
  SchemaReader reader{.op = std::string(op) + "(", .arguments = {}};
  define_operators(reader);
  std::string text = reader.op;
  size_t at = 0;
  const auto add = [&](const std::string& value) {
    const Argument& argument = reader.arguments.at(at++);
    const std::string& one = argument.fallback;  // also of a list: the dispatcher repeats it to the list's length
    if (value == one || value == "(" + one + ",)" || value == "(" + one + ", " + one + ")") return;
    text += (text.back() == '(' ? "" : ", ") + argument.name + "=" + value;
  };
  (add(value_text(values)), ...);
  return text + ") " + device;
}

// ---- the call -------------------------------------------------------------------------------------------------------

// Kernels that run in its lifetime, such as those that pack a plain weight, are not the one that the call's line names.
class LogsLater {
 public:
  LogsLater() {
    if (logging()) call_.swap(logged_call());
  }
  ~LogsLater() {
    if (!call_.empty()) call_.swap(logged_call());
  }
  LogsLater(const LogsLater&) = delete;
  LogsLater& operator=(const LogsLater&) = delete;

 private:
  std::string call_;
};

// `kFunction` with a line of the log, and kept where a layer has asked for that (repeat.h). `Name::text()` is the operator's name;
// the backend of fake kernels, which run nothing, has no device and writes nothing.
template <class Name, class Backend, auto* kFunction>
struct Logged;
template <class Name, class Backend, class Result, class... Parameters, Result (*kFunction)(Parameters...)>
struct Logged<Name, Backend, kFunction> {
  static Result call(Parameters... values) {
    if constexpr (Backend::kDevice != nullptr) {
      if constexpr (kIsRepeatable<Backend, Result, Parameters...>)
        if (KeepsCall::of_thread().wanted) [[unlikely]]
          keep(values...);
      if (logging()) return logged(std::forward<Parameters>(values)...);
    }
    return kFunction(std::forward<Parameters>(values)...);
  }

 private:
  template <class... Rest>
  static void keep(const Tensor&, const Rest&... rest) {
    KeepsCall& state = KeepsCall::of_thread();
    state.wanted = false;
    state.kept = KeptCalls::all().add([kept = std::tuple<Rest...>(rest...)](const Tensor& x) {
      return std::apply([&](const Rest&... values) { return call(x, values...); }, kept);
    });
  }

  static Result logged(Parameters... values) {
    logged_call() = call_text(Name::text(), Backend::kDevice, values...);
    struct AtEnd {
      ~AtEnd() { logged_call().clear(); }  // a call that was refused writes no line
    } at_end;
    Result result = kFunction(std::forward<Parameters>(values)...);
    log_kernel([] { return std::string("none"); });  // where there was nothing to compute
    return result;
  }
};

}  // namespace quant_ops

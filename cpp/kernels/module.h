// What the files of quant_ops._kernels share: tables by name, and arguments that are numpy arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "kernels/table.h"

namespace quant_ops {

const KernelTable& table_of(const std::string& isa);
DType dtype_of(const std::string& name);

template <class T>
using Vector = pybind11::array_t<T, pybind11::array::c_style>;

template <class T>
const T* data_or_null(const std::optional<Vector<T>>& v) {
  return v ? v->data() : nullptr;
}
inline const void* data_or_null(const std::optional<pybind11::array>& v) { return v ? v->data() : nullptr; }

inline void expect_size(int64_t size, int64_t expected) {
  if (size != expected) throw pybind11::value_error("inconsistent shapes");
}

void add_weight_only(pybind11::module_& m);  // module_weight_only.cpp

}  // namespace quant_ops

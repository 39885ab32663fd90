// The kernels of weights in groups (table.h) in quant_ops._kernels. Arrays are read and written where they lie, so that a test can
// put what may not be touched behind them.
#include "kernels/module.h"

namespace py = pybind11;

namespace quant_ops {
namespace {

// A GroupFold and the arrays that it points to. Those over groups and columns are [groups, stride].
struct FoldArrays {
  Vector<float> scale;
  std::optional<Vector<int8_t>> zero;
  std::optional<Vector<float>> float_zero;
  std::optional<Vector<int32_t>> code_sum;
  int32_t offset;
  Vector<float> row_scale;
  Vector<int32_t> row_zero;
  std::optional<Vector<int32_t>> row_sum;

  GroupFold fold() const {
    const int64_t groups = scale.shape(0), rows = row_scale.size();
    for (int64_t size : {zero ? zero->size() : scale.size(), float_zero ? float_zero->size() : scale.size(),
                         code_sum ? code_sum->size() : scale.size()})
      expect_size(size, scale.size());
    expect_size(row_zero.size(), rows);
    if (row_sum) expect_size(row_sum->size(), rows * groups);
    return {.scale = scale.data(),
            .zero = data_or_null(zero),
            .float_zero = data_or_null(float_zero),
            .code_sum = data_or_null(code_sum),
            .stride = scale.shape(1),
            .offset = offset,
            .row_scale = row_scale.data(),
            .row_zero = row_zero.data(),
            .row_sum = data_or_null(row_sum),
            .groups = groups};
  }
};

// A WeightChunk of all columns of scale, and its arrays.
struct ChunkArrays {
  int bits;
  Vector<int8_t> b;
  int64_t block_step, quad_step, first, last;
  Vector<float> scale;
  std::optional<Vector<int8_t>> zero;
  std::optional<Vector<float>> float_zero;

  WeightChunk chunk() const {
    return {.bits = bits,
            .b = b.data(),
            .block_step = block_step,
            .quad_step = quad_step,
            .first = first,
            .last = last,
            .columns = scale.size(),
            .scale = scale.data(),
            .zero = data_or_null(zero),
            .float_zero = data_or_null(float_zero)};
  }
};

void nibbles(const std::string& isa, const Vector<int8_t>& a, int64_t k, int64_t group, const Vector<int8_t>& b,
             const FoldArrays& fold, Vector<float> y) {
  expect_size(y.size(), a.shape(0) * kNibbleColumns);
  expect_size(b.size(), k * kNibbleColumns / 2);
  table_of(isa).nibbles({.k = k,
                         .group = group,
                         .a = a.data(),
                         .a_stride = a.shape(1),
                         .b = b.data(),
                         .fold = fold.fold(),
                         .y = y.mutable_data(),
                         .y_stride = kNibbleColumns},
                        a.shape(0));
}

void fold(const std::string& isa, const Vector<int32_t>& sums, int64_t group, const FoldArrays& fold, Vector<float> y) {
  expect_size(y.size(), sums.size());
  table_of(isa).fold({.sums = sums.data(),
                      .stride = sums.shape(1),
                      .rows = sums.shape(0),
                      .columns = sums.shape(1),
                      .group = group,
                      .fold = fold.fold(),
                      .y = y.mutable_data()});
}

int32_t sum_codes(const std::string& isa, Vector<uint8_t> codes, bool flip) {
  return table_of(isa).sum_codes(codes.mutable_data(), codes.size(), flip);
}

void widen(const std::string& isa, const py::array& x, const std::string& dtype, Vector<float> to) {
  expect_size(to.size(), x.size());
  table_of(isa).widen(x.data(), dtype_of(dtype), x.size(), to.mutable_data());
}

void multiply(const std::string& isa, const py::array& x, const std::string& dtype, Vector<const float> multiplier,
              Vector<float> to) {
  expect_size(multiplier.size(), x.size());
  expect_size(to.size(), x.size());
  table_of(isa).multiply(x.data(), dtype_of(dtype), multiplier.data(), x.size(), to.mutable_data());
}

void expand(const std::string& isa, const ChunkArrays& chunk, Vector<float> w) {
  table_of(isa).expand(chunk.chunk(), w.mutable_data());
}

void few_rows(const std::string& isa, const ChunkArrays& chunk, const Vector<float>& a, Vector<float> y) {
  expect_size(y.size(), a.shape(0) * chunk.scale.size());
  table_of(isa).few_rows(
      {.weight = chunk.chunk(), .a = a.data(), .a_stride = a.shape(1), .y = y.mutable_data(), .y_stride = chunk.scale.size()},
      a.shape(0));
}

void float_tile(const std::string& isa, const Vector<float>& a, const Vector<float>& w, const Vector<float>& column_scale,
                Vector<float> y) {
  expect_size(w.size(), a.shape(1) * kNibbleColumns);
  expect_size(y.size(), a.shape(0) * kNibbleColumns);
  table_of(isa).float_tile({.k = a.shape(1),
                            .a = a.data(),
                            .a_stride = a.shape(1),
                            .w = w.data(),
                            .column_scale = column_scale.data(),
                            .y = y.mutable_data(),
                            .y_stride = kNibbleColumns},
                           a.shape(0));
}

void store(const std::string& isa, const Vector<float>& from, py::array y, const std::string& dtype) {
  table_of(isa).store({.from = from.data(),
                       .from_stride = from.shape(1),
                       .rows = y.shape(0),
                       .columns = y.shape(1),
                       .y = y.mutable_data(),
                       .dtype = dtype_of(dtype),
                       .y_stride = y.strides(0) / y.itemsize()});
}

}  // namespace

void add_weight_only(py::module_& m) {
  using namespace py::literals;
  py::class_<FoldArrays>(m, "GroupFold", "What becomes of the sum of a group.")
      .def(py::init<Vector<float>, std::optional<Vector<int8_t>>, std::optional<Vector<float>>, std::optional<Vector<int32_t>>,
                    int32_t, Vector<float>, Vector<int32_t>, std::optional<Vector<int32_t>>>(),
           "scale"_a, "zero"_a, "float_zero"_a, "code_sum"_a, "offset"_a, "row_scale"_a, "row_zero"_a, "row_sum"_a);
  py::class_<ChunkArrays>(m, "WeightChunk", "Some k of a group of a packed weight.")
      .def(py::init<int, Vector<int8_t>, int64_t, int64_t, int64_t, int64_t, Vector<float>, std::optional<Vector<int8_t>>,
                    std::optional<Vector<float>>>(),
           "bits"_a, "b"_a, "block_step"_a, "quad_step"_a, "first"_a, "last"_a, "scale"_a, "zero"_a, "float_zero"_a);
  m.def("nibble_rows", [](const std::string& isa) { return table_of(isa).nibble_rows; }, "isa"_a, "Rows of its tallest tile.");
  m.def("nibbles", &nibbles, "isa"_a, "a"_a.noconvert(), "k"_a, "group"_a, "b"_a.noconvert(), "fold"_a, "y"_a.noconvert());
  m.def("fold", &fold, "isa"_a, "sums"_a.noconvert(), "group"_a, "fold"_a, "y"_a.noconvert());
  m.def("sum_codes", &sum_codes, "isa"_a, "codes"_a.noconvert(), "flip"_a);
  m.def("multiply", &multiply, "isa"_a, "x"_a, "dtype"_a, "multiplier"_a, "to"_a.noconvert());
  m.def("widen", &widen, "isa"_a, "x"_a, "dtype"_a, "to"_a.noconvert());
  m.def("expand", &expand, "isa"_a, "chunk"_a, "w"_a.noconvert());
  m.def("few_rows", &few_rows, "isa"_a, "chunk"_a, "a"_a.noconvert(), "y"_a.noconvert());
  m.def("float_tile", &float_tile, "isa"_a, "a"_a.noconvert(), "w"_a.noconvert(), "column_scale"_a.noconvert(), "y"_a.noconvert());
  m.def("store", &store, "isa"_a, "from"_a.noconvert(), "y"_a, "dtype"_a);
  m.attr("few_rows_most") = kFewRows;
  m.attr("float_rows_most") = kFloatRows;
}

}  // namespace quant_ops

// From the shapes and strides of tensors to the iteration spaces of the quantize family: blocked dimensions are split in two,
// scales and zero points broadcast. Read next: contract/iteration.h.
#pragma once

#include <optional>
#include <vector>

#include "torch/args.h"

namespace quant_ops {

// The dimensions of a tensor, blocked ones split in two, and how other tensors broadcast over them.
class Space {
 public:
  Space(const char* op, const Tensor& tensor, const std::optional<Ints>& block_size) : op_(op), shape_(sizes_of(tensor)) {
    expect_elements(op, "tensor", shape_);
    const size_t dims = shape_.size();
    block_ = Ints(dims, 1);
    if (block_size) {
      QO_EXPECT(block_size->size() == dims, op, "one block_size entry per dimension of tensor, got block_size ",
                shape_text(*block_size), " and tensor.shape ", shape_text(tensor));
      for (size_t d = 0; d < dims; ++d) {
        const int64_t b = (*block_size)[d];
        QO_EXPECT(b >= 1 && shape_[d] % b == 0, op, "block_size to divide tensor.shape, got block_size ", shape_text(*block_size),
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
      const int64_t step = shape_[d] > 1 ? strides[d] : 0;  // of a single index it can be any number
      if (blocked_) s.push_back(step * block_[d]);
      s.push_back(step);
    }
    strides_.push_back(s);
  }

  // The index of every element, in row-major order of the shape.
  void add_index() {
    Ints s(shape_.size() * (blocked_ ? 2 : 1));
    int64_t step = 1;
    for (size_t d = shape_.size(); d-- > 0; step *= shape_[d]) {
      if (blocked_) {
        s[2 * d] = step * block_[d];
        s[2 * d + 1] = step;
      } else {
        s[d] = step;
      }
    }
    strides_.push_back(s);
  }

  // The number of every element's block, in row-major order of the grid of blocks.
  void add_block_number() {
    Ints s(shape_.size() * 2);
    int64_t step = 1;
    for (size_t d = shape_.size(); d-- > 0; step *= shape_[d] / block_[d]) s[2 * d] = step;
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
              ", got ", name, ".shape ", shape_text(t), " and tensor.shape ", shape_text(shape_), ". For one ", name,
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

  // Split into the blocks, whose number becomes the last operand of `kept`, and the elements of one.
  Reduction reduction_of_blocks() const {
    Space with = *this;
    with.add_block_number();
    Reduction r;
    with.fill(&r.kept, [](size_t i) { return i % 2 == 0; });
    fill(&r.reduced, [](size_t i) { return i % 2 == 1; });
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

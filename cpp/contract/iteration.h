// Makes and walks Iteration spaces: merges neighbouring dimensions, orders them for memory, and splits them into an outer walk and
// inner runs. Host code only, shared by the CPU drivers and the CUDA launchers.
#pragma once

#include <cstdlib>
#include <utility>

#include "contract/ops.h"

namespace quant_ops {

inline int64_t numel(const Iteration& it) {
  int64_t n = 1;
  for (int d = 0; d < it.ndim; ++d) n *= it.size[d];
  return n;
}

// Merges dimension d + 1 into d where every operand's stride of d is size times stride of d + 1, so that one stride serves both;
// drops dimensions of size 1. Row-major order is kept.
inline void coalesce(Iteration* it) {
  int out = 0;
  for (int d = 0; d < it->ndim; ++d) {
    if (it->size[d] == 1) continue;
    bool merge = out > 0;
    for (int o = 0; merge && o < it->operands; ++o) merge = it->stride[o][out - 1] == it->stride[o][d] * it->size[d];
    if (merge) {
      it->size[out - 1] *= it->size[d];
      for (int o = 0; o < it->operands; ++o) it->stride[o][out - 1] = it->stride[o][d];
    } else {
      it->size[out] = it->size[d];
      for (int o = 0; o < it->operands; ++o) it->stride[o][out] = it->stride[o][d];
      ++out;
    }
  }
  it->ndim = out;
}

// Orders dimensions by the stride of operand `key`, largest first, then merges. For elementwise work, whose order is free.
inline void sort_and_coalesce(Iteration* it, int key) {
  for (int i = 1; i < it->ndim; ++i)
    for (int d = i; d > 0 && std::llabs(it->stride[key][d]) > std::llabs(it->stride[key][d - 1]); --d) {
      std::swap(it->size[d], it->size[d - 1]);
      for (int o = 0; o < it->operands; ++o) std::swap(it->stride[o][d], it->stride[o][d - 1]);
    }
  coalesce(it);
}

// The offsets of every operand at a row-major position.
struct Walk {
  int64_t index[kMaxDims] = {};
  int64_t offset[kMaxOperands] = {};

  void seek(const Iteration& it, int ndim, int64_t position) {
    for (int o = 0; o < it.operands; ++o) offset[o] = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      index[d] = position % it.size[d];
      position /= it.size[d];
      for (int o = 0; o < it.operands; ++o) offset[o] += index[d] * it.stride[o][d];
    }
  }

  void next(const Iteration& it, int ndim) {
    for (int d = ndim - 1; d >= 0; --d) {
      for (int o = 0; o < it.operands; ++o) offset[o] += it.stride[o][d];
      if (++index[d] < it.size[d]) return;
      for (int o = 0; o < it.operands; ++o) offset[o] -= it.size[d] * it.stride[o][d];
      index[d] = 0;
    }
  }
};

// Calls run(offset, inner) for the runs that cover elements [begin, end) of `it`: `offset` is where each operand starts, the run
// has `inner` elements and steps by the strides of the last dimension.
template <class Run>
void for_each_run(const Iteration& it, int64_t begin, int64_t end, const Run& run) {
  const int outer = it.ndim > 0 ? it.ndim - 1 : 0;
  const int64_t length = it.ndim > 0 ? it.size[outer] : 1;
  if (begin >= end || length == 0) return;
  Walk walk;
  walk.seek(it, outer, begin / length);
  int64_t skip = begin % length;
  while (begin < end) {
    int64_t n = length - skip < end - begin ? length - skip : end - begin;
    int64_t offset[kMaxOperands] = {};
    for (int o = 0; o < it.operands; ++o) offset[o] = walk.offset[o] + (it.ndim > 0 ? skip * it.stride[o][outer] : 0);
    run(offset, n);
    begin += n;
    skip = 0;
    walk.next(it, outer);
  }
}

// The same in as few calls as possible: run(offset, rows, inner) gets `rows` runs, each a stride of the last dimension but one
// after the run before it.
template <class Run>
void for_each_block(const Iteration& it, int64_t begin, int64_t end, const Run& run) {
  if (it.ndim < 2) return for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) { run(offset, int64_t{1}, n); });
  const int outer = it.ndim - 2;
  const int64_t rows = it.size[outer], length = it.size[outer + 1], plane = rows * length;
  if (begin >= end || plane == 0) return;
  Walk walk;
  walk.seek(it, outer, begin / plane);
  int64_t row = begin % plane / length, skip = begin % length;
  while (begin < end) {
    const int64_t left = end - begin;
    int64_t n = length, count = rows - row;
    if (skip > 0 || left < length) {  // a part of one row
      n = length - skip < left ? length - skip : left;
      count = 1;
    } else if (count * length > left) {
      count = left / length;
    }
    int64_t offset[kMaxOperands] = {};
    for (int o = 0; o < it.operands; ++o) offset[o] = walk.offset[o] + row * it.stride[o][outer] + skip * it.stride[o][outer + 1];
    run(offset, count, n);
    begin += count * n;
    row += count;
    skip = 0;
    if (row == rows) {
      row = 0;
      walk.next(it, outer);
    }
  }
}

inline int64_t inner_stride(const Iteration& it, int operand) { return it.ndim > 0 ? it.stride[operand][it.ndim - 1] : 0; }
inline int64_t row_stride(const Iteration& it, int operand) { return it.ndim > 1 ? it.stride[operand][it.ndim - 2] : 0; }

}  // namespace quant_ops

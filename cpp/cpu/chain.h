// int8_chain on the CPU: the plan of a list of steps, and how it is run. A value is what an input gives or a step computes, a step
// one operator with the parameters of one sample. torch/chain.h makes both from a program.
//
// Batches are cut. The steps before `cut` run on a few samples at a time, whose values stay in a cache from step to step; with
// several threads each has samples of its own and waits for no other. The steps from `cut` on, whose weights are larger than their
// values, run on all samples together. Where samples cannot be told apart the whole batch counts as one sample.
//
// Codes that are int8 for the caller are kept as q + 128 between steps, with zero point + 128: the products read these where they
// lie, on every instruction set, and all results are the same. Read next: chain.cpp.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/linear.h"

namespace quant_ops {

struct ChainValue {
  std::vector<int64_t> sizes;
  DType dtype;
  bool channels_last;    // of four dimensions
  bool shifted = false;  // codes that are int8 for the caller: dtype is kUInt8, and they are q + 128
  // by plan_chain
  enum class Place { kInput, kResult, kOwn, kShared } place = Place::kShared;
  int64_t at = 0;     // the index of the input or result, or the offset in a worker's own or in the shared memory
  int64_t bytes = 0;  // of a sample
};

// quant_tensor_forward to codes, or dequant_tensor, of elements in any order.
struct ChainElements {
  int64_t n;
  bool quantizes;
  DType from, to;
  const float* scale;
  int32_t zero_point;
  int32_t qmin, qmax;
};

// [images][pixels][channels] to [images][channels][pixels].
struct ChainFlatten {
  int64_t images, pixels, channels, element_bytes;
};

// Of [rows][row_bytes] the bytes [first, first + bytes) of every row.
struct ChainSlice {
  int64_t rows, row_bytes, first, bytes;
};

// [outer][groups][per_group][inner] to [outer][per_group][groups][inner], of bytes.
struct ChainShuffle {
  int64_t outer, groups, per_group, inner;
};

struct ChainStep {
  std::vector<int64_t> inputs;  // values
  int64_t output;
  int64_t weight_bytes;  // that the step reads
};

// int8_cat: of each value the rows that it gives to those of the result; y_stride and `out` without y are those of the result.
struct ChainCat {
  std::vector<PointwiseParams> parts;
};

// Of one sample. Pointers to constants are those of a call; where a plan depends on whether one is there, it is not null.
using ChainParams = std::variant<ChainElements, Int8Conv2dParams, Int8LinearParams, ChainFlatten, PointwiseParams, MaxPoolParams,
                                 AvgPoolParams, ChainCat, UpsampleParams, ChainSlice, ChainShuffle>;

// What is chosen for a product with a number of samples and threads.
using ProductPlan = std::variant<std::monostate, Conv2dPlan, DepthwisePlan, LinearPlan>;

// Steps [first, last) on `samples` samples at a time by `threads` threads.
struct ChainPhase {
  int64_t first = 0, last = 0;
  int64_t samples = 0, threads = 0;
  std::vector<ProductPlan> products;  // of each step from `first` on
};

struct ChainPlan {
  std::vector<ChainValue> values;
  std::vector<ChainStep> steps;
  std::vector<ChainParams> params;  // of each step
  std::vector<int64_t> results;     // values
  int64_t samples;
  int64_t workers;         // that run `apart` at the same time
  int64_t share;           // samples of each of them, a multiple of apart.samples
  ChainPhase apart, left;  // the steps before the cut: samples [0, workers * share), and the others
  ChainPhase together;     // the steps from the cut on
  int64_t own_bytes;       // of the values of a worker
  int64_t shared_bytes;
};

// Completes a plan whose values, steps, params, results and samples are there.
void plan_chain(ChainPlan* plan, const KernelTable& table, int64_t threads);

// `params` are the plan's with the pointers of this call's constants. `seconds`, if it is not null, has an element for each step
// and gets the time that it took; a step that several threads run at once counts as often.
void run_chain(const ChainPlan& plan, const std::vector<ChainParams>& params, const std::vector<const void*>& inputs,
               const std::vector<void*>& results, double* seconds = nullptr);

}  // namespace quant_ops

// int8_chain: a program, the list of integers that python/quant_ops/ops/program.py makes and explains, read and checked. Read next:
// chain_plan.h.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "torch/args.h"

namespace quant_ops {

// The codes of STEPS in program.py.
enum class ChainOp : int64_t {
  kQuantize,
  kConv2d,
  kLinear,
  kAdd,
  kRequantize,
  kMaxPool2d,
  kAvgPool2d,
  kAdaptiveAvgPool2d,
  kCat,
  kUpsampleNearest2d,
  kFlatten,
  kDequantize,
  kMul,
  kSlice,
  kChannelShuffle,
};
constexpr const char* kChainOps[] = {"quantize",
                                     "conv2d",
                                     "linear",
                                     "add",
                                     "requantize",
                                     "max_pool2d",
                                     "avg_pool2d",
                                     "adaptive_avg_pool2d",
                                     "cat",
                                     "upsample_nearest2d",
                                     "flatten",
                                     "dequantize",
                                     "mul",
                                     "slice",
                                     "channel_shuffle"};
constexpr int64_t kChainOpCount = 15, kChainVersion = 1;
constexpr int64_t kChainElement = int64_t{1} << 24;  // constants below it are whole tensors (`element` in program.py)
constexpr const char* kChain = "int8_chain";

// A step as the program has it.
struct ChainSource {
  ChainOp op;
  Ints inputs, constants, numbers;
  std::string name;  // "int8_chain, step 3 (conv2d)", for errors
};

struct ChainProgram {
  int64_t inputs;
  Ints results;
  std::vector<ChainSource> steps;
};

// The numbers of an encoding, which are bytes in integers (_as_words in program.py).
class ChainReader {
 public:
  explicit ChainReader(const Ints& code) : code_(code), bytes_(code.empty() ? 0 : code[0]) {
    QO_EXPECT(bytes_ >= 0 && bytes_ <= 8 * (static_cast<int64_t>(code.size()) - 1), kChain,
              "a program as Program.encode gives it, got ", code.size(), " integers that are none");
  }

  int64_t number() {
    uint64_t coded = 0;
    for (int shift = 0;; shift += 7) {
      const uint64_t byte = next();
      coded |= (byte & 127) << (shift & 63);
      if (byte < 128) break;
    }
    return static_cast<int64_t>(coded % 2 == 0 ? coded >> 1 : ~(coded >> 1));
  }

  // `count` numbers, each of which has at least a byte.
  Ints list(int64_t count) {
    QO_EXPECT(count >= 0 && count <= bytes_ - at_, kChain, "a program as Program.encode gives it, got a list of ", count,
              " numbers");
    Ints numbers(static_cast<size_t>(count));
    for (int64_t& n : numbers) n = number();
    return numbers;
  }

 private:
  uint64_t next() {
    QO_EXPECT(at_ < bytes_, kChain, "a program as Program.encode gives it, got ", bytes_, " bytes that end early");
    const uint64_t word = static_cast<uint64_t>(code_[static_cast<size_t>(1 + at_ / 8)]);
    return word >> at_++ % 8 * 8 & 255;
  }

  const Ints& code_;
  const int64_t bytes_;
  int64_t at_ = 0;
};

// How many constants and numbers a step has.
struct ChainCounts {
  int64_t least_inputs, most_inputs, constants, numbers;
};
inline ChainCounts chain_counts(ChainOp op, int64_t inputs) {
  switch (op) {
    case ChainOp::kQuantize: return {1, 1, 2, 2};
    case ChainOp::kConv2d: return {1, 2, 10, 15};
    case ChainOp::kLinear: return {1, 2, 10, 4};
    case ChainOp::kAdd:
    case ChainOp::kMul: return {2, 2, 6, 2};
    case ChainOp::kRequantize: return {1, 1, 4, 2};
    case ChainOp::kMaxPool2d: return {1, 1, 0, 9};
    case ChainOp::kAvgPool2d: return {1, 1, 4, 10};
    case ChainOp::kAdaptiveAvgPool2d: return {1, 1, 4, 3};
    case ChainOp::kCat: return {1, inputs, 2 * inputs + 2, 2};
    case ChainOp::kUpsampleNearest2d: return {1, 1, 0, 2};
    case ChainOp::kFlatten:
    case ChainOp::kChannelShuffle: return {1, 1, 0, 1};
    case ChainOp::kSlice: return {1, 1, 0, 3};
    default: return {1, 1, 2, 1};
  }
}

inline ChainSource chain_source(ChainReader* reader, int64_t step, int64_t values, int64_t constants) {
  ChainSource source;
  const int64_t op = reader->number();
  QO_EXPECT(op >= 0 && op < kChainOpCount, kChain, "operations numbered 0 to ", kChainOpCount - 1, ", got ", op);
  source.op = static_cast<ChainOp>(op);
  std::ostringstream text;
  text << kChain << ", step " << step << " (" << kChainOps[op] << ")";
  source.name = text.str();
  const char* name = source.name.c_str();
  const int64_t inputs = reader->number(), of_constants = reader->number(), numbers = reader->number();
  const ChainCounts counts = chain_counts(source.op, inputs);
  QO_EXPECT(inputs >= counts.least_inputs && inputs <= counts.most_inputs && of_constants == counts.constants &&
                numbers == counts.numbers,
            name, counts.most_inputs, " inputs, ", counts.constants, " constants and ", counts.numbers, " numbers, got ", inputs,
            ", ", of_constants, " and ", numbers);
  source.inputs = reader->list(inputs);
  source.constants = reader->list(of_constants);
  source.numbers = reader->list(numbers);
  for (int64_t value : source.inputs) QO_EXPECT(value >= 0 && value < values, name, "values 0 to ", values - 1, ", got ", value);
  for (int64_t index : source.constants)
    QO_EXPECT(index >= -1 && index % kChainElement < constants, name, "constants -1 to ", constants - 1, ", got ", index);
  return source;
}

inline ChainProgram chain_program(const Ints& code, int64_t inputs, int64_t constants) {
  ChainReader reader(code);
  const int64_t version = reader.number();
  QO_EXPECT(version == kChainVersion, kChain, "a program of version ", kChainVersion, ", got one of version ", version);
  ChainProgram program{.inputs = reader.number(), .results = {}, .steps = {}};
  QO_EXPECT(program.inputs >= 1 && program.inputs == inputs, kChain, program.inputs, " inputs, got ", inputs);
  program.results = reader.list(reader.number());
  const int64_t steps = reader.number();
  for (int64_t i = 0; i < steps; ++i) program.steps.push_back(chain_source(&reader, i, inputs + i, constants));
  for (int64_t value : program.results) {
    QO_EXPECT(value >= inputs && value < inputs + steps, kChain, "results that are values of steps, got ", value);
    QO_EXPECT(std::count(program.results.begin(), program.results.end(), value) == 1, kChain, "results that differ, got ", value,
              " twice");
  }
  return program;
}

}  // namespace quant_ops

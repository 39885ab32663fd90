// int8_chain on the CPU: a program (chain_program.h) becomes a plan (chain_plan.h), once for each shape of the inputs, and each
// call gives the plan's steps their constants. On CUDA and for fake tensors the operator is Python: python/quant_ops/ops/chain.py.
// Read next: cpu/chain.h.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "torch/chain_plan.h"

namespace quant_ops {

// ---- the constants of a call -----------------------------------------------------------------------------------------

// Copies of a chain's steps with the pointers of this call's constants, which have to stay alive.
class ChainConstants {
 public:
  ChainConstants(const Chain& chain, const std::vector<Tensor>& constants)
      : chain_(chain), constants_(constants), params_(chain.plan.params), zero_points_(static_cast<size_t>(chain.zero_points)) {
    next_zero_point_ = zero_points_.data();
    for (size_t i = 0; i < params_.size(); ++i) {
      source_ = &chain.sources[i];
      step_ = &chain.plan.steps[i];
      layout_ = &chain.layouts[i];
      std::visit([&](auto& params) { take(&params); }, params_[i]);
    }
  }
  const std::vector<ChainParams>& params() const { return params_; }

 private:
  const char* op() const { return source_->name.c_str(); }
  const ChainValue& value(int64_t i) const { return chain_.plan.values[static_cast<size_t>(i)]; }

  // The constant in this place of the step; null for none.
  const Tensor* constant(size_t place) const {
    const int64_t index = source_->constants[place];
    return index < 0 ? nullptr : &constants_[static_cast<size_t>(index % kChainElement)];
  }

  // Of a constant that has one element, or of which the step names one: which it is.
  int64_t position(const char* name, size_t place, const Tensor& t) const {
    const int64_t index = source_->constants[place], position = index / kChainElement - 1;
    QO_EXPECT(position < 0 ? t.numel() == 1 : t.dim() == 1 && position < t.numel(), op(), name,
              " to have one element, or one dimension with the element ", position, ", got shape ", shape_text(t));
    return std::max<int64_t>(position, 0);
  }

  const float* floats(const char* name, const Tensor& t, int64_t count) {
    expect_floating(op(), name, t);
    QO_EXPECT(t.numel() == count, op(), name, " to have ", count, " elements, got shape ", shape_text(t));
    return holder_.floats(t);
  }
  const float* scale(const char* name, size_t place) {
    const Tensor* t = constant(place);
    if (t == nullptr) return nullptr;
    const int64_t at = position(name, place, *t);
    expect_floating(op(), name, *t);
    return holder_.floats(*t) + at;
  }

  // The zero point of codes of this value, as they are kept.
  int32_t zero_point(const char* name, size_t place, int64_t of_value) {
    const Tensor* t = constant(place);
    const ChainValue& v = value(of_value);
    const int32_t shift = v.shifted ? kSignedOffset : 0;
    if (t == nullptr) return shift;
    expect_zero_point_dtype(op(), name, *t);
    const bool is_unsigned = chain_.types[static_cast<size_t>(of_value)] == ScalarType::Byte;
    const int64_t least = is_unsigned ? 0 : -128, most = is_unsigned ? 255 : 127;
    return static_cast<int32_t>(zero_point_value(name, *t, position(name, place, *t), least, most)) + shift;
  }

  int64_t zero_point_value(const char* name, const Tensor& t, int64_t at, int64_t least, int64_t most) const {
    if (is_floating(t.scalar_type()))
      return round_zero_point(as_contiguous(to_type(t, ScalarType::Double)).const_data_ptr<double>()[at], least, most);
    const bool as_it_is = t.scalar_type() == ScalarType::Int && t.is_contiguous();
    const int64_t z = as_it_is ? static_cast<const int32_t*>(t.const_data_ptr())[at]
                               : as_contiguous(to_type(t, ScalarType::Long)).const_data_ptr<int64_t>()[at];
    QO_EXPECT(z >= least && z <= most, op(), name, " in [", least, ", ", most, "], got ", z);
    return z;
  }

  void take(ChainElements* p) {
    const int64_t codes = p->quantizes ? step_->output : step_->inputs[0];
    p->scale = needed_scale("scale", 0);
    p->zero_point = zero_point("zero_point", 1, codes);
  }

  void take(ChainFlatten*) {}
  void take(ChainSlice*) {}
  void take(ChainShuffle*) {}

  void take(Int8Conv2dParams* p) { take_product(p->O, p); }
  void take(Int8LinearParams* p) { take_product(p->N, p); }

  template <class Params>
  void take_product(int64_t channels, Params* p) {
    const PackedLayout& layout = *layout_;
    if (const Tensor* packed = constant(0)) {
      expect_int8(op(), "packed_weight", *packed);
      p->packed = static_cast<const int8_t*>(packed->const_data_ptr());
      QO_EXPECT(packed->is_contiguous() && is_packed_for(p->packed, packed->numel(), layout), op(),
                "packed_weight made by pack_weight from a weight of the sizes in the program, got another one");
    } else {
      const Tensor* weight = constant(9);
      expect_int8(op(), "weight", *weight);
      QO_EXPECT(weight->is_contiguous() && weight->numel() == layout.out_channels * layout.in_channels * layout.r * layout.s, op(),
                "a contiguous weight of the sizes in the program, got shape ", shape_text(*weight));
      p->weight = static_cast<const int8_t*>(weight->const_data_ptr());
    }
    OutputParams& out = p->out;
    out.weight_scale = weight_scales(*constant(1), channels);
    if (const Tensor* bias = constant(2)) out.bias = floats("bias", *bias, channels);
    p->in.scale = scale("x_scale", 3);
    p->in.zero_point = kept_zero_point("x_zero_point", p->in.scale, 4, step_->inputs[0]);
    out.out_scale = scale("out_scale", 5);
    out.out_zero_point = kept_zero_point("out_zero_point", out.out_scale, 6, step_->output);
    if (step_->inputs.size() < 2) return;
    out.residual.scale = scale("residual_scale", 7);
    out.residual.zero_point = kept_zero_point("residual_zero_point", out.residual.scale, 8, step_->inputs[1]);
  }

  void take(PointwiseParams* p) {
    const bool two = step_->inputs.size() == 2;
    const size_t zero = two ? 2 : 1, out = two ? 4 : 2;
    p->x_scale = needed_scale("x_scale", 0);
    p->x_zero_point = kept_zero_point("x_zero_point", p->x_scale, zero, step_->inputs[0]);
    if (two) {
      p->residual.scale = needed_scale("b_scale", 1);
      p->residual.zero_point = kept_zero_point("b_zero_point", p->residual.scale, zero + 1, step_->inputs[1]);
    }
    take_result(out, &p->out);
  }

  void take(MaxPoolParams*) {}
  void take(UpsampleParams*) {}

  void take(AvgPoolParams* p) {
    p->x_scale = needed_scale("x_scale", 0);
    p->x_zero_point = kept_zero_point("x_zero_point", p->x_scale, 1, step_->inputs[0]);
    take_result(2, &p->out);
  }

  void take(ChainCat* cat) {
    const size_t n = cat->parts.size();
    ResultParams out = cat->parts[0].out;
    take_result(2 * n, &out);
    for (size_t i = 0; i < n; ++i) {
      PointwiseParams& part = cat->parts[i];
      part.x_scale = needed_scale("a scale", i);
      part.x_zero_point = kept_zero_point("a zero point", part.x_scale, n + i, step_->inputs[i]);
      part.out = out;
    }
  }

  // out_scale and the zero point after it.
  void take_result(size_t place, ResultParams* out) {
    out->scale = scale("out_scale", place);
    out->zero_point = kept_zero_point("out_zero_point", out->scale, place + 1, step_->output);
  }

  const float* needed_scale(const char* name, size_t place) {
    QO_EXPECT(constant(place) != nullptr, op(), name, ", got none");
    return scale(name, place);
  }

  // The zero point of a value whose scale is this; null without a scale.
  const int32_t* kept_zero_point(const char* name, const float* scale, size_t place, int64_t of_value) {
    if (scale == nullptr) return nullptr;
    *next_zero_point_ = zero_point(name, place, of_value);
    return next_zero_point_++;
  }

  // One for each channel: plans count on it.
  const float* weight_scales(const Tensor& t, int64_t channels) {
    if (t.numel() != 1 || channels == 1) return floats("weight_scale", t, channels);
    copies_.push_back(std::make_unique<std::vector<float>>(static_cast<size_t>(channels), *floats("weight_scale", t, 1)));
    return copies_.back()->data();
  }

  const Chain& chain_;
  const std::vector<Tensor>& constants_;
  std::vector<ChainParams> params_;
  std::vector<int32_t> zero_points_;  // one for each value that a step reads or writes, at most
  std::vector<std::unique_ptr<std::vector<float>>> copies_;
  Holder holder_;
  const ChainSource* source_ = nullptr;
  const ChainStep* step_ = nullptr;
  const PackedLayout* layout_ = nullptr;
  int32_t* next_zero_point_ = nullptr;
};

// ---- plans that are kept --------------------------------------------------------------------------------------------

// The plans of the last calls, by program, inputs, instruction set and threads.
class ChainCache {
 public:
  struct Key {
    Ints program, inputs;  // of each input its number of dimensions, dtype, memory format and sizes
    const KernelTable* table;
    int64_t threads, constants;

    bool operator==(const Key& other) const = default;
  };

  template <class Build>
  static std::shared_ptr<const Chain> find(const Key& key, const Build& build) {
    static ChainCache cache;
    {
      const std::lock_guard<std::mutex> lock(cache.mutex_);
      for (Entry& entry : cache.entries_)
        if (entry.key == key) {
          entry.used = ++cache.clock_;
          return entry.chain;
        }
    }
    std::shared_ptr<const Chain> chain = build();
    const std::lock_guard<std::mutex> lock(cache.mutex_);
    if (cache.entries_.size() >= kEntries)
      cache.entries_.erase(std::min_element(cache.entries_.begin(), cache.entries_.end(),
                                            [](const Entry& a, const Entry& b) { return a.used < b.used; }));
    cache.entries_.push_back({.key = key, .chain = chain, .used = ++cache.clock_});
    return chain;
  }

 private:
  static constexpr size_t kEntries = 64;
  struct Entry {
    Key key;
    std::shared_ptr<const Chain> chain;
    uint64_t used;
  };
  std::mutex mutex_;
  std::vector<Entry> entries_;
  uint64_t clock_ = 0;
};

// ---- the operator ---------------------------------------------------------------------------------------------------

// Whether the elements of a 4-D tensor lie in channels_last order without gaps.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t step = 1;
  for (size_t d : {size_t{1}, size_t{3}, size_t{2}, size_t{0}}) {
    if (sizes[d] != 1 && strides[d] != step) return false;
    step *= sizes[d];
  }
  return true;
}

inline Tensor in_channels_last(const Tensor& t) {
  Tensor copy = empty(sizes_of(t), t.scalar_type(), t, true);
  torch::stable::copy_(copy, t);
  return copy;
}

// The program's plan for inputs like these.
inline std::shared_ptr<const Chain> chain_for(const std::vector<Tensor>& inputs, int64_t constants, const Ints& program) {
  QO_EXPECT(!inputs.empty(), kChain, "at least one input, got none");
  const KernelTable& table = kernels();
  ChainCache::Key key{.program = program, .inputs = {}, .table = &table, .threads = parallel_threads(), .constants = constants};
  for (const Tensor& x : inputs) {
    QO_EXPECT_DTYPE(is_floating(x.scalar_type()) ? x.scalar_type() != ScalarType::Double : is_codes(x.scalar_type()), kChain,
                    "inputs of dtype float32, float16, bfloat16, int8 or uint8, got ", dtype_name(x.scalar_type()));
    expect_elements(kChain, "an input", x.sizes());
    for (int64_t n : {x.dim(), static_cast<int64_t>(x.scalar_type()), int64_t{is_channels_last(x)}}) key.inputs.push_back(n);
    for (int64_t size : x.sizes()) key.inputs.push_back(size);
  }
  return ChainCache::find(key, [&] {
    const ChainProgram decoded = chain_program(program, static_cast<int64_t>(inputs.size()), constants);
    ChainBuilder builder(decoded, table, key.threads);
    for (const Tensor& x : inputs) builder.add_input(sizes_of(x), x.scalar_type(), is_channels_last(x));
    return builder.build();
  });
}

// `seconds` as for run_chain, of so many steps as the program has.
inline std::vector<Tensor> call_chain(const Chain& chain, const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants,
                                      double* seconds) {
  const ChainConstants bound(chain, constants);
  std::vector<Tensor> dense, results;
  std::vector<const void*> sources;
  std::vector<void*> destinations;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& x = inputs[i];
    const Arrival arrival = chain.arrivals[i];
    const bool stays = arrival == Arrival::kAsItIs && is_channels_last(x);
    dense.push_back(arrival == Arrival::kChannelsLast ? in_channels_last(x) : stays ? x : as_contiguous(x));
    sources.push_back(dense.back().const_data_ptr());
  }
  bool is_empty = false;
  for (int64_t result : chain.plan.results) {
    const ChainValue& value = chain.plan.values[static_cast<size_t>(result)];
    results.push_back(empty(value.sizes, chain.types[static_cast<size_t>(result)], inputs[0], value.channels_last));
    destinations.push_back(results.back().mutable_data_ptr());
    is_empty = is_empty || results.back().numel() == 0;
  }
  if (!is_empty) run_chain(chain.plan, bound.params(), sources, destinations, seconds);
  return results;
}

template <class Backend>
std::vector<Tensor> int8_chain(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants, const Ints& program) {
  return call_chain(*chain_for(inputs, static_cast<int64_t>(constants.size()), program), inputs, constants, nullptr);
}

// The seconds that each step of one call takes, float64; its results are dropped.
template <class Backend>
Tensor _int8_chain_times(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants, const Ints& program) {
  const std::shared_ptr<const Chain> chain = chain_for(inputs, static_cast<int64_t>(constants.size()), program);
  const size_t steps = chain->plan.steps.size();
  Tensor seconds = empty({static_cast<int64_t>(steps)}, ScalarType::Double, inputs[0]);
  double* times = seconds.mutable_data_ptr<double>();
  std::fill_n(times, steps, 0.0);
  call_chain(*chain, inputs, constants, times);
  return seconds;
}

}  // namespace quant_ops

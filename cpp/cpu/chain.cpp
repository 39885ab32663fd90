// int8_chain on the CPU: where the batch is cut, where values lie, and the run. Read first: chain.h.
#include "cpu/chain.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/staging.h"
#include "kernels/log.h"

namespace quant_ops {
namespace {

using Place = ChainValue::Place;

template <class... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <class... F>
Overloaded(F...) -> Overloaded<F...>;

constexpr int64_t kOwnBytes =
    int64_t{256} << 10;  // of the values of the samples that a worker has at one time: half of an L2 cache
constexpr int64_t kBytesPerThread = int64_t{1} << 16;  // of codes that are copied

// ---- parameters of several samples ----------------------------------------------------------------------------------

// A convolution without a window reads and writes pixel by pixel, so that its images can follow each other as the rows of one:
// tiles are then cut from all pixels together.
bool is_pixelwise(const Int8Conv2dParams& p) {
  const bool one = p.R == 1 && p.S == 1 && p.stride[0] == 1 && p.stride[1] == 1 && p.OH == p.H && p.OW == p.W && p.groups == 1;
  return one && p.in.mode == InputMode::kQuantized && p.x_stride[1] == 1 && p.y_channels_last;
}

Int8Conv2dParams of_samples(Int8Conv2dParams p, int64_t samples) {
  p.N *= samples;
  if (p.N > 1 && is_pixelwise(p)) {
    p.H *= p.N;
    p.OH *= p.N;
    p.x_stride[0] *= p.N;
    p.N = 1;
  }
  return p;
}

Int8LinearParams of_samples(Int8LinearParams p, int64_t samples) {
  p.M *= samples;
  return p;
}

ProductPlan plan_product(const ChainParams& params, int64_t samples, const KernelTable& table, int64_t threads) {
  if (const auto* one = std::get_if<Int8Conv2dParams>(&params)) {
    const Int8Conv2dParams p = of_samples(*one, samples);
    const PackedLayout layout = weight_layout(p);
    if (layout.form == WeightForm::kDepthwise) return plan_depthwise(p, layout, table, threads);
    return plan_conv2d(p, layout, table, threads);
  }
  if (const auto* one = std::get_if<Int8LinearParams>(&params)) return plan_linear(of_samples(*one, samples), table, threads);
  return std::monostate();
}

// ---- where the batch is cut -----------------------------------------------------------------------------------------

// The number of steps that run on a few samples at a time, so that the fewest bytes come from beyond the cache: a step reads its
// weight once for each of these, or the values of all samples.
int64_t choose_cut(const ChainPlan& plan) {
  int64_t bytes = 0;  // relative to a cut at 0
  int64_t best = 0, least = 0;
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const ChainStep& step = plan.steps[i];
    bytes += step.weight_bytes - plan.values[static_cast<size_t>(step.output)].bytes;
    for (int64_t value : step.inputs) bytes -= plan.values[static_cast<size_t>(value)].bytes;
    if (bytes <= least) {
      least = bytes;
      best = static_cast<int64_t>(i) + 1;
    }
  }
  return best;
}

// ---- where values lie -----------------------------------------------------------------------------------------------

// Memory that is given to values in the order of the steps. A value gets the lowest place that is free from the step that writes it
// to the last one that reads it, so that steps write where a cache holds what is no longer read.
class Arena {
 public:
  int64_t bytes = 0;

  int64_t place(int64_t size, int64_t first, int64_t last) {
    held_.erase(std::remove_if(held_.begin(), held_.end(), [&](const Part& part) { return part.last < first; }), held_.end());
    size = round_up(std::max<int64_t>(size, 1), 64);
    int64_t at = 0;
    auto next = held_.begin();
    for (; next != held_.end() && next->at - at < size; ++next) at = next->at + next->size;
    held_.insert(next, {at, size, last});  // they stay in the order of their places
    bytes = std::max(bytes, at + size);
    return at;
  }

 private:
  struct Part {
    int64_t at, size, last;
  };
  std::vector<Part> held_;
};

// Flattening that moves nothing: the value is its input under another shape.
bool is_alias(const ChainPlan& plan, size_t i) {
  const ChainStep& step = plan.steps[i];
  const auto* p = std::get_if<ChainFlatten>(&plan.params[i]);
  return p != nullptr && (p->pixels == 1 || p->channels == 1) &&
         plan.values[static_cast<size_t>(step.output)].place != Place::kResult;
}

// The last step that reads each value, or another name of it; the number of steps for none.
std::vector<int64_t> last_uses(const ChainPlan& plan) {
  std::vector<int64_t> last(plan.values.size(), -1);
  for (size_t i = plan.steps.size(); i-- > 0;) {
    const ChainStep& step = plan.steps[i];
    const int64_t reader = std::max(static_cast<int64_t>(i), is_alias(plan, i) ? last[static_cast<size_t>(step.output)] : -1);
    for (int64_t value : step.inputs) last[static_cast<size_t>(value)] = std::max(last[static_cast<size_t>(value)], reader);
  }
  return last;
}

void place_values(ChainPlan* plan, int64_t cut) {
  const std::vector<int64_t> last = last_uses(*plan);
  Arena own, shared;
  for (int64_t i = 0; i < static_cast<int64_t>(plan->steps.size()); ++i) {
    const ChainStep& step = plan->steps[static_cast<size_t>(i)];
    ChainValue& value = plan->values[static_cast<size_t>(step.output)];
    if (value.place == Place::kResult || is_alias(*plan, static_cast<size_t>(i))) continue;
    const int64_t until = std::max(i, last[static_cast<size_t>(step.output)]);
    // what is read after the cut is there before any step after it, for all samples
    value.place = until < cut ? Place::kOwn : Place::kShared;
    value.at = value.place == Place::kOwn ? own.place(value.bytes * plan->apart.samples, i, until)
                                          : shared.place(value.bytes * plan->samples, i < cut ? 0 : i, until);
  }
  for (size_t i = 0; i < plan->steps.size(); ++i) {
    if (!is_alias(*plan, i)) continue;
    const ChainStep& step = plan->steps[i];
    const ChainValue& from = plan->values[static_cast<size_t>(step.inputs[0])];
    ChainValue& to = plan->values[static_cast<size_t>(step.output)];
    to.place = from.place;
    to.at = from.at;
  }
  plan->own_bytes = own.bytes;
  plan->shared_bytes = shared.bytes;
}

// ---- the run --------------------------------------------------------------------------------------------------------

class ChainRun {
 public:
  ChainRun(const ChainPlan& plan, const std::vector<ChainParams>& params, const std::vector<const void*>& inputs,
           const std::vector<void*>& results, bool times)
      : plan_(plan),
        params_(params),
        inputs_(inputs),
        results_(results),
        memory_(plan.shared_bytes + std::max<int64_t>(plan.workers, 1) * plan.own_bytes, Scratch::Keeper::kChain),
        shared_(memory_.at<char>(0)),
        own_(memory_.at<char>(plan.shared_bytes)),
        seconds_(times ? static_cast<size_t>(std::max<int64_t>(plan.workers, 1)) * plan.steps.size() : 0) {}

  void run() {
    parallel_for(plan_.workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) run_share(worker);
    });
    if (int64_t bytes = missing_bytes_; bytes > 0) throw OutOfMemory(bytes);
    for (int64_t sample = plan_.workers * plan_.share; sample < plan_.samples && plan_.left.last > 0; ++sample)
      run_phase(plan_.left, sample, own_, 0);
    run_phase(plan_.together, 0, nullptr, 0);
  }

  void add_seconds(double* seconds) const {
    for (size_t i = 0; i < seconds_.size(); ++i) seconds[i % plan_.steps.size()] += seconds_[i];
  }

 private:
  // A thread of the pool must not throw: what it lacks is told to the caller's.
  void run_share(int64_t worker) {
    try {
      for (int64_t i = 0; i < plan_.share; i += plan_.apart.samples)
        run_phase(plan_.apart, worker * plan_.share + i, own_ + worker * plan_.own_bytes, worker);
    } catch (const OutOfMemory& e) {
      missing_bytes_ = e.bytes();
    }
  }

  void run_phase(const ChainPhase& phase, int64_t sample, char* own, int64_t worker) {
    if (seconds_.empty()) {
      for (int64_t i = phase.first; i < phase.last; ++i) run_step(phase, i, sample, own);
      return;
    }
    double* seconds = seconds_.data() + static_cast<size_t>(worker) * plan_.steps.size();
    auto before = std::chrono::steady_clock::now();
    for (int64_t i = phase.first; i < phase.last; ++i) {
      run_step(phase, i, sample, own);
      const auto now = std::chrono::steady_clock::now();
      seconds[i] += std::chrono::duration<double>(now - before).count();
      before = now;
    }
  }

  void run_step(const ChainPhase& phase, int64_t i, int64_t sample, char* own) const {
    const ChainStep& step = plan_.steps[static_cast<size_t>(i)];
    const Memory memory{.x = address(step.inputs[0], sample, own),
                        .second = step.inputs.size() > 1 ? address(step.inputs[1], sample, own) : nullptr,
                        .y = address(step.output, sample, own)};
    const ProductPlan& product = phase.products[static_cast<size_t>(i - phase.first)];
    const int64_t samples = phase.samples;
    std::visit(Overloaded{
                   [&](const Int8Conv2dParams& p) { run_conv2d(of_samples(p, samples), product, memory); },
                   [&](const Int8LinearParams& p) { run_linear(of_samples(p, samples), product, memory); },
                   [&](const ChainElements& p) { run_elements(p, samples, memory); },
                   [&](const ChainFlatten& p) { run_flatten(p, samples, memory); },
                   [&](const PointwiseParams& p) { run_pointwise(p, samples, memory); },
                   [&](const MaxPoolParams& p) { run_max_pool(p, samples, memory); },
                   [&](const AvgPoolParams& p) { run_avg_pool(p, samples, memory); },
                   [&](const UpsampleParams& p) { run_upsample(p, samples, memory); },
                   [&](const ChainSlice& p) { run_slice(p, samples, memory); },
                   [&](const ChainShuffle& p) { run_shuffle(p, samples, memory); },
                   [&](const ChainCat& p) {
                     char* y = static_cast<char*>(memory.y);
                     for (size_t part = 0; part < p.parts.size(); ++part)
                       y = run_part(p.parts[part], samples, address(step.inputs[part], sample, own), y);
                   },
               },
               params_[static_cast<size_t>(i)]);
  }

  // The values of a step, from the first sample on.
  struct Memory {
    const void* x;
    const void* second;  // residual or b; null without one
    void* y;
  };

  static void run_conv2d(Int8Conv2dParams p, const ProductPlan& product, const Memory& memory) {
    p.in.x = memory.x;
    p.out.residual.r = memory.second;
    p.out.y = memory.y;
    if (const auto* plan = std::get_if<DepthwisePlan>(&product)) return quant_ops::run_depthwise(*plan, p);
    quant_ops::run_conv2d(std::get<Conv2dPlan>(product), p);
  }

  static void run_linear(Int8LinearParams p, const ProductPlan& product, const Memory& memory) {
    p.in.x = memory.x;
    p.out.residual.r = memory.second;
    p.out.y = memory.y;
    quant_ops::run_linear(std::get<LinearPlan>(product), p);
  }

  static void run_pointwise(PointwiseParams p, int64_t samples, const Memory& memory) {
    (p.shares_factor() ? p.rows : p.columns) *= samples;
    p.y_stride = p.columns;
    p.x = memory.x;
    p.residual.r = memory.second;
    p.out.y = memory.y;
    pointwise_cpu(p);
  }

  // Returns where the next part begins.
  static char* run_part(PointwiseParams p, int64_t samples, const void* x, char* y) {
    p.rows *= samples;
    p.x = x;
    p.out.y = y;
    pointwise_cpu(p);
    return y + p.columns * dtype_bytes(p.out.dtype);
  }

  static void run_max_pool(MaxPoolParams p, int64_t samples, const Memory& memory) {
    p.shape.N *= samples;
    p.x = memory.x;
    p.y = memory.y;
    max_pool2d_cpu(p);
  }

  static void run_avg_pool(AvgPoolParams p, int64_t samples, const Memory& memory) {
    p.shape.N *= samples;
    p.x = memory.x;
    p.out.y = memory.y;
    avg_pool2d_cpu(p);
  }

  static void run_upsample(UpsampleParams p, int64_t samples, const Memory& memory) {
    p.N *= samples;
    p.x = memory.x;
    p.y = memory.y;
    upsample_nearest2d_cpu(p);
  }

  static void run_elements(const ChainElements& p, int64_t samples, const Memory& memory) {
    Iteration it;
    it.ndim = 1;
    it.operands = 4;
    it.size[0] = p.n * samples;
    it.stride[0][0] = it.stride[1][0] = 1;
    if (p.quantizes)
      quantize_cpu({.it = it,
                    .x = memory.x,
                    .y = memory.y,
                    .x_dtype = p.from,
                    .y_dtype = p.to,
                    .scale = p.scale,
                    .zero_point = &p.zero_point,
                    .exact_in_float32 = true,
                    .qmin = p.qmin,
                    .qmax = p.qmax,
                    .simulate = false});
    else
      dequantize_cpu({.it = it,
                      .q = memory.x,
                      .y = memory.y,
                      .q_dtype = p.from,
                      .y_dtype = p.to,
                      .scale = p.scale,
                      .zero_point = &p.zero_point,
                      .exact_in_float32 = true});
  }

  static void run_flatten(const ChainFlatten& p, int64_t samples, const Memory& memory) {
    if (memory.x == memory.y) return;
    const int64_t image = p.pixels * p.channels * p.element_bytes;
    for (int64_t n = 0; n < p.images * samples; ++n)
      transpose_bytes(p.element_bytes, static_cast<const char*>(memory.x) + n * image, p.channels, p.pixels, p.channels,
                      static_cast<char*>(memory.y) + n * image, p.pixels);
  }

  static void run_slice(const ChainSlice& p, int64_t samples, const Memory& memory) {
    const char* const x = static_cast<const char*>(memory.x) + p.first;
    char* const y = static_cast<char*>(memory.y);
    parallel_for(p.rows * samples, ceil_div(kBytesPerThread, std::max<int64_t>(p.bytes, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) copy_bytes(y + row * p.bytes, x + row * p.row_bytes, p.bytes);
    });
  }

  static void run_shuffle(const ChainShuffle& p, int64_t samples, const Memory& memory) {
    const int64_t bytes = p.groups * p.per_group * p.inner;
    parallel_for(p.outer * samples, ceil_div(kBytesPerThread, std::max<int64_t>(bytes, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * bytes; at < end * bytes; at += bytes)
        shuffle(p, static_cast<const char*>(memory.x) + at, static_cast<char*>(memory.y) + at);
    });
  }

  static void shuffle(const ChainShuffle& p, const char* x, char* y) {
    const int64_t half = p.per_group;
    if (p.inner == 1 && p.groups == 2) {  // which the compiler makes vectors of
      for (int64_t j = 0; j < half; ++j) {
        y[2 * j] = x[j];
        y[2 * j + 1] = x[half + j];
      }
      return;
    }
    for (int64_t j = 0; j < p.per_group; ++j)
      for (int64_t i = 0; i < p.groups; ++i, y += p.inner) copy_bytes(y, x + (i * p.per_group + j) * p.inner, p.inner);
  }

  // Of the samples from this one on; what a worker has of its own starts with it.
  char* address(int64_t value, int64_t sample, char* own) const {
    const ChainValue& v = plan_.values[static_cast<size_t>(value)];
    const int64_t offset = sample * v.bytes;
    switch (v.place) {
      case Place::kInput: return static_cast<char*>(const_cast<void*>(inputs_[static_cast<size_t>(v.at)])) + offset;
      case Place::kResult: return static_cast<char*>(results_[static_cast<size_t>(v.at)]) + offset;
      case Place::kOwn: return own + v.at;
      default: return shared_ + v.at + offset;
    }
  }

  const ChainPlan& plan_;
  const std::vector<ChainParams>& params_;
  const std::vector<const void*>& inputs_;
  const std::vector<void*>& results_;
  const Scratch memory_;
  char* const shared_;
  char* const own_;
  std::vector<double> seconds_;  // [workers][steps] or empty
  std::atomic<int64_t> missing_bytes_{0};
};

// The kernel of the first product, for the log.
std::string first_kernel(const ChainPlan& plan) {
  for (const ChainParams& params : plan.params) {
    if (const auto* p = std::get_if<Int8LinearParams>(&params)) {
      const LinearPlan linear = plan_linear(*p, kernels(), 1);
      return first_tile_name(kernels(), p->M * plan.samples, linear.layout.width(0));
    }
    if (const auto* p = std::get_if<Int8Conv2dParams>(&params)) {
      const PackedLayout layout = weight_layout(*p);
      if (layout.form == WeightForm::kDepthwise) return "depthwise";
      return first_tile_name(kernels(), p->N * p->OH * p->OW, layout.width(0));
    }
  }
  return one_by_one();
}

}  // namespace

void plan_chain(ChainPlan* plan, const KernelTable& table, int64_t threads) {
  for (ChainValue& value : plan->values) {
    int64_t elements = 1;
    for (int64_t size : value.sizes) elements *= size;
    value.bytes = elements / plan->samples * dtype_bytes(value.dtype);
  }
  for (size_t i = 0; i < plan->results.size(); ++i) {
    ChainValue& value = plan->values[static_cast<size_t>(plan->results[i])];
    value.place = Place::kResult;
    value.at = static_cast<int64_t>(i);
  }
  const int64_t steps = static_cast<int64_t>(plan->steps.size());
  int64_t cut = plan->samples > 1 ? choose_cut(*plan) : 0;
  plan->apart.samples = 1;
  place_values(plan, cut);
  int64_t group = std::max<int64_t>(1, kOwnBytes / std::max<int64_t>(1, plan->own_bytes));
  if (threads == 1 && group >= plan->samples) cut = 0;  // the values of all samples stay in the cache
  plan->share = cut > 0 ? plan->samples / threads : 0;
  plan->workers = plan->share > 0 ? threads : 0;
  group = std::clamp<int64_t>(group, 1, std::max<int64_t>(1, plan->share));
  while (plan->share % group != 0) --group;
  plan->apart.samples = group;
  place_values(plan, cut);

  const auto phase = [&](int64_t first, int64_t last, int64_t samples, int64_t of_threads) {
    ChainPhase p{.first = first, .last = last, .samples = samples, .threads = of_threads, .products = {}};
    for (int64_t i = first; i < last; ++i)
      p.products.push_back(plan_product(plan->params[static_cast<size_t>(i)], samples, table, of_threads));
    return p;
  };
  plan->apart = phase(0, plan->share > 0 ? cut : 0, group, 1);
  plan->left = phase(0, plan->share * threads < plan->samples ? cut : 0, 1, threads);
  plan->together = phase(cut, steps, plan->samples, threads);
}

void run_chain(const ChainPlan& plan, const std::vector<ChainParams>& params, const std::vector<const void*>& inputs,
               const std::vector<void*>& results, double* seconds) {
  log_kernel([&] { return first_kernel(plan); });
  ChainRun chain(plan, params, inputs, results, seconds != nullptr);
  chain.run();
  if (seconds != nullptr) chain.add_seconds(seconds);
}

}  // namespace quant_ops

// The choice among the engines' kernels by the models of choose.h and sm90/choose.h, or by name. Plain host code.
#include "engine/choose.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

#include "engine/remembered.h"
#if defined(QUANT_OPS_SM90)
#include "engine/sm90/choose.h"
#endif

namespace quant_ops {
namespace {

// ---- the wanted kernel ----------------------------------------------------------------------------------------------

std::atomic<const KernelChoice*> current{nullptr};

const char* from_environment() {
  const char* text = std::getenv("QUANT_OPS_CUDA_KERNEL");
  return text == nullptr ? "" : text;
}

std::string with_number(const std::string& name, int64_t number) {
  return number == 1 ? name : name + ":" + std::to_string(number);
}

// ---- portable tiles -------------------------------------------------------------------------------------------------

// Offers `splits` of K with tile i; keeps it if it is faster than the best plan so far.
void consider(const IgemmShape& shape, const GpuLimits& gpu, int i, int64_t splits, KernelPlan* best) {
  const IgemmTile& t = kIgemmTiles[i];
  const auto ceil_div = [](int64_t a, int64_t b) { return std::max<int64_t>(1, (a + b - 1) / b); };
  const int64_t steps = (shape.K + t.k - 1) / t.k, split_steps = ceil_div(steps, splits);
  splits = ceil_div(steps, split_steps);  // none is empty
  const double time = igemm_time(shape, t, gpu, splits, split_steps);
  if (best->engine != Engine::kNone && time >= best->time) return;
  *best = {.engine = Engine::kPortable,
           .kernel = i,
           .splits = splits,
           .split_k = split_steps * t.k,
           .time = time,
           .sums = splits > 1 ? splits * shape.M * shape.N * shape.groups : 0};
}

// choose_tile without a wanted kernel, remembered.
KernelPlan remembered_tile(const IgemmShape& shape, const GpuLimits& gpu) {
  const std::array<int64_t, 7> key{shape.M, shape.N, shape.K, shape.groups, shape.load_bytes, gpu.arch, gpu.multiprocessors};
  return remembered(key, [&] { return choose_tile(shape, gpu, KernelChoice()); });
}

}  // namespace

KernelChoice::KernelChoice(const std::string& text) : name(text) {
  const size_t colon = name.find(':');
  if (colon == std::string::npos) return;
  splits = std::max<int64_t>(1, std::atoll(name.c_str() + colon + 1));
  name.resize(colon);
}

const KernelChoice& kernel_choice() {
  const KernelChoice* choice = current.load(std::memory_order_acquire);
  if (choice == nullptr) {
    set_kernel_choice(nullptr);
    choice = current.load(std::memory_order_acquire);
  }
  return *choice;
}

// Every choice stays where it is, since another thread may still read the one before.
void set_kernel_choice(const char* text) {
  static std::mutex mutex;
  static std::map<std::string, KernelChoice>& choices = *new std::map<std::string, KernelChoice>;
  const std::string wanted = text == nullptr || *text == 0 ? from_environment() : text;
  const std::lock_guard<std::mutex> lock(mutex);
  current.store(&choices.try_emplace(wanted, wanted).first->second, std::memory_order_release);
}

bool names_tile(const KernelChoice& wanted) {
  return wanted.name.compare(0, 5, "igemm") == 0 && wanted.name.find("_wgmma") == std::string::npos;
}

KernelPlan choose_tile(const IgemmShape& shape, const GpuLimits& gpu, const KernelChoice& wanted) {
  constexpr int64_t kMostSumBytes = int64_t{64} << 20;  // of all splits
  const int64_t sum_bytes = 4 * shape.M * shape.N * shape.groups;
  KernelPlan best;
  for (int i = 0; i < kIgemmTileCount; ++i) {
    const IgemmTile& t = kIgemmTiles[i];
    if (!tile_fits(t, gpu) || (!wanted.name.empty() && wanted.name != t.name)) continue;
    if (wanted.splits > 0) {
      consider(shape, gpu, i, wanted.splits, &best);
      continue;
    }
    const int64_t steps = (shape.K + t.k - 1) / t.k;
    consider(shape, gpu, i, 1, &best);
    for (int64_t splits = 2; splits <= kMostSplits && steps / splits >= kLeastSteps && splits * sum_bytes <= kMostSumBytes;
         ++splits)
      consider(shape, gpu, i, splits, &best);
  }
  return best;
}

KernelPlan choose_kernel(const IgemmProblem& p, const GpuLimits& gpu, const KernelChoice& wanted) {
  const bool any = wanted.name.empty();
  KernelPlan best;
  const auto offer = [&](const KernelPlan& plan) {
    if (plan.engine != Engine::kNone && (best.engine == Engine::kNone || plan.time < best.time)) best = plan;
  };
#if defined(QUANT_OPS_SM90)
  if (gpu.arch == 90 && !names_tile(wanted)) {
    const sm90::Problem problem = sm90::problem_of(p);
    const bool free = any && wanted.splits == 0;
    offer(free ? sm90::choose(problem, gpu.multiprocessors) : sm90::choose(problem, gpu.multiprocessors, wanted));
  }
#endif
  // the Hopper engine is the faster one wherever it takes the problem
  if (best.engine == Engine::kNone)
    offer(any ? remembered_tile({p.M, p.N, p.K, 1}, gpu) : choose_tile({p.M, p.N, p.K, 1}, gpu, wanted));
  if (gemv_fits(p.M, p.K, gpu) && (any || wanted.name == kGemvName))
    offer({.engine = Engine::kGemv, .time = gemv_time(p.M, p.N, p.K, 0, gpu)});
  return best;
}

KernelPlan choose_quantizing_kernel(const IgemmProblem& p, int64_t x_bytes, const GpuLimits& gpu, const KernelChoice& wanted,
                                    const KernelPlan& other) {
  const bool any = wanted.name.empty();
  KernelPlan best;
  const auto offer = [&](const KernelPlan& plan, double extra) {  // `extra`: what the other kernel's quantize_rows takes
    if (any && plan.time >= other.time + extra) return;
    if (best.engine == Engine::kNone || plan.time < best.time) best = plan;
  };
  if (gemv_fits(p.M, p.K, gpu) && (any || wanted.name == kGemvName))
    offer({.engine = Engine::kGemv, .time = gemv_time(p.M, p.N, p.K, x_bytes, gpu)}, kLaunchClocks);
  for (int i = 0; i < kFusedTileCount; ++i) {
    const FusedTile& t = kFusedTiles[i];
    // the Hopper engine starts while the rows are being quantized, and was the faster one wherever both were timed
    if (any ? other.engine == Engine::kSm90 : wanted.name != t.name) continue;
    const int64_t tiles = (p.N + t.n - 1) / t.n, most = wanted.splits > 0 ? wanted.splits : kMostFusedColumns;
    for (int64_t columns = std::max<int64_t>(1, std::min(wanted.splits, tiles)); columns <= std::min(most, tiles); ++columns)
      if (fused_fits(t, p.K, columns, gpu))
        offer({.engine = Engine::kFused, .kernel = i, .splits = columns, .time = fused_time(p, t, columns, x_bytes, gpu)},
              rows_clocks(p.M, p.K, x_bytes, gpu));
  }
  return best;
}

KernelPlan choose_conv_tile(const IgemmShape& shape, const GpuLimits& gpu, const KernelChoice& wanted) {
  return names_tile(wanted) ? choose_tile(shape, gpu, wanted) : remembered_tile(shape, gpu);
}

std::string kernel_text(const KernelPlan& kernel) {
  switch (kernel.engine) {
    case Engine::kNone: return "none";
    case Engine::kGemv: return kGemvName;
    case Engine::kDepthwise: return "depthwise";
    case Engine::kDirect: return "direct";
    case Engine::kFused: return with_number(kFusedTiles[kernel.kernel].name, kernel.splits);
#if defined(QUANT_OPS_SM90)
    case Engine::kSm90: return with_number(sm90::kTiles[kernel.kernel].name, kernel.splits);
#endif
    default: return with_number(kIgemmTiles[kernel.kernel].name, kernel.splits);
  }
}

void expect_kernel(const char* op, const KernelPlan& kernel, const KernelChoice& wanted) {
  if (kernel.engine != Engine::kNone) return;
  std::string names = kGemvName;
  for (const FusedTile& t : kFusedTiles) names += std::string(", ") + t.name;
  for (const IgemmTile& t : kIgemmTiles) names += std::string(", ") + t.name;
  const std::string text = wanted.splits > 0 ? wanted.name + ":" + std::to_string(wanted.splits) : wanted.name;
  throw std::runtime_error(std::string("quant_ops.") + op +
                           ": expected QUANT_OPS_CUDA_KERNEL to name a kernel that takes these shapes on "
                           "this GPU, got " +
                           text + ". Unset it, or name one of " + names + ".");
}

}  // namespace quant_ops

// quant_float_forward and quant_float_backward on the CPU.
//
//   y = round_to_format(x / scale) * scale;  backward y = grad where |x / scale| <= largest, else 0
//
// Contiguous runs go to the vector kernels of the table, a stage at a time where an operand has to be gathered or random words are
// needed (staging.h). float64 goes to the scalar functions of float_format.h. Blocks with scales of their own: quantize_block.cpp.
#include <algorithm>

#include "contract/dtypes.h"
#include "contract/iteration.h"
#include "cpu/parallel.h"
#include "cpu/staging.h"
#include "kernels/log.h"
#include "kernels/table.h"

namespace quant_ops {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 15;

// The random words of n elements whose indices step by `step`.
void random_words(const KernelTable& table, uint64_t seed, int64_t first, int64_t step, int64_t n, uint32_t* words) {
  if (step == 1) return table.random_words(seed, static_cast<uint64_t>(first), n, words);
  for (int64_t i = 0; i < n; ++i) words[i] = random_word(static_cast<uint64_t>(first + i * step), seed);
}

template <class X>
void quantize_runs(const QuantizeFloatParams& p, const Iteration& it) {
  log_entries({"quantize_float"});
  const KernelTable& table = kernels();
  const bool random = p.grad == nullptr && p.format.rounding == Rounding::kStochastic;
  const int64_t x_step = inner_stride(it, 0), scale_step = inner_stride(it, 2), last_step = inner_stride(it, 3);
  const bool direct = (x_step == 1 || it.ndim == 0) && is_step(scale_step) && !random && (p.grad == nullptr || last_step == 1);
  parallel_for(numel(it), kElementsPerThread, [&](int64_t begin, int64_t end) {
    Stage<X> elements, grads;
    Stage<float> scales;
    uint32_t words[kStage];
    FloatRun run;
    run.dtype = p.dtype;
    run.format = p.format;
    run.scale_step = scale_step == 0 ? 0 : 1;
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t count) {
      for (int64_t i = 0, n; i < count; i += n) {
        n = run.n = direct ? count : std::min(kStage, count - i);
        run.x = elements.contiguous(static_cast<const X*>(p.x) + offset[0] + i * x_step, direct ? 1 : x_step, n);
        run.y = static_cast<X*>(p.y) + offset[1] + i;
        if (p.scale != nullptr)
          run.scale = scales.stepping(static_cast<const float*>(p.scale) + offset[2] + i * scale_step, scale_step, n);
        if (p.grad != nullptr)
          run.grad = grads.contiguous(static_cast<const X*>(p.grad) + offset[3] + i * last_step, direct ? 1 : last_step, n);
        if (random) {
          random_words(table, p.seed.value, offset[3] + i * last_step, last_step, n, words);
          run.random = words;
        }
        table.quantize_float(run);
      }
    });
  });
}

template <class X>
void quantize_elements(const QuantizeFloatParams& p, const Iteration& it) {
  log_kernel(one_by_one);
  using T = Compute<X>;
  const bool random = p.format.rounding == Rounding::kStochastic;
  parallel_for(numel(it), kElementsPerThread, [&](int64_t begin, int64_t end) {
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const auto at = [&](int operand) { return offset[operand] + i * inner_stride(it, operand); };
        const T scale = p.scale != nullptr ? static_cast<const T*>(p.scale)[at(2)] : T(1);
        const T v = to_compute(static_cast<const X*>(p.x)[at(0)]) / scale;
        X* y = static_cast<X*>(p.y) + at(1);
        if (p.grad != nullptr)
          from_compute(in_range(v, p.format) ? to_compute(static_cast<const X*>(p.grad)[at(3)]) : T(0), y);
        else
          from_compute(round_to_format(v, p.format, random ? random_word(static_cast<uint64_t>(at(3)), p.seed.value) : 0) * scale,
                       y);
      }
    });
  });
}

}  // namespace

void quantize_float_cpu(const QuantizeFloatParams& p) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  with_float_type(p.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<X, double>)
      if (it.ndim == 0 || inner_stride(it, 1) == 1) return quantize_runs<X>(p, it);
    quantize_elements<X>(p, it);
  });
}

}  // namespace quant_ops

// Plain C functions of libquant_ops.so, which python/quant_ops/_library.py calls through ctypes.
#include "contract/cuda_weights.h"
#include "cpu/columns.h"
#include "cpu/pack.h"
#include "cpu/weight_only.h"
#include "torch/errors.h"
#include "torch/repeat.h"

#define QO_EXPORT extern "C" __attribute__((visibility("default")))

// Each returns a text that stays valid until the thread's next call; one that starts with "quant_ops" is an error.
namespace {
const char* keep(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}
template <class F>
const char* guarded(const F& f) {
  try {
    return keep(f());
  } catch (const std::exception& e) {
    return keep(e.what());
  }
}
}  // namespace

// The instruction set in use.
QO_EXPORT const char* quant_ops_isa() {
  return guarded([] { return std::string(quant_ops::kernels().isa); });
}

// Chooses another one; "" = automatic.
QO_EXPORT const char* quant_ops_set_isa(const char* name) {
  return guarded([&] {
    quant_ops::set_isa(name);
    return std::string(quant_ops::kernels().isa);
  });
}

// Bytes of a weight packed by pack_weight, for its fake kernel.
QO_EXPORT int64_t quant_ops_packed_bytes(int64_t out_channels, int64_t in_channels, int64_t r, int64_t s, int64_t groups) {
  return quant_ops::packed_layout(out_channels, in_channels, r, s, groups).bytes;
}

// The same of a weight on CUDA, known without the CUDA library.
QO_EXPORT int64_t quant_ops_cuda_packed_bytes(int64_t out_channels, int64_t in_channels, int64_t r, int64_t s, int64_t groups) {
  return quant_ops::cuda_weights(out_channels, in_channels, r, s, groups).bytes;
}

// Bytes of a weight packed by pack_weight_only; group_size -1 is one group a column.
QO_EXPORT int64_t quant_ops_weight_only_bytes(int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  const int64_t whole = k > 0 ? k : 1;
  return quant_ops::weight_only_layout(n, k, static_cast<int>(bits), group_size < 0 ? whole : group_size).bytes;
}

// All that this machine runs, worst first, separated by commas.
QO_EXPORT const char* quant_ops_isas() {
  return guarded([] {
    const quant_ops::KernelTable* tables[8];
    std::string names;
    for (int i = 0, n = quant_ops::runnable_kernels(tables); i < n; ++i) names.append(i ? "," : "").append(tables[i]->isa);
    return names;
  });
}

// The micro-kernels of the table in use, as "entry=name", separated by commas; gemm with its full tile.
QO_EXPORT const char* quant_ops_kernels() {
  return guarded([] {
    std::string names;
    for (const auto& [entry, name] : quant_ops::kernel_names(quant_ops::kernels()))
      names.append(names.empty() ? "" : ",").append(entry).append("=").append(name);
    return names;
  });
}

// The micro-kernel that multiplies so many rows by a packed weight of so many columns: that of the first tile.
QO_EXPORT const char* quant_ops_gemm_kernel(int64_t rows, int64_t columns) {
  return guarded([&] {
    return quant_ops::first_tile_name(quant_ops::kernels(), rows, quant_ops::packed_layout(columns, 1, 1, 1, 1).width(0));
  });
}

// Runs the multiply-accumulate instruction of the set in use alone; returns how many multiply-accumulates that were. 0: it has none
// of its own, or no set can be used.
QO_EXPORT int64_t quant_ops_peak(int64_t iterations) {
  try {
    return quant_ops::kernels().peak(iterations);
  } catch (const std::exception&) {
    return 0;
  }
}

// The compiler that built this library.
QO_EXPORT const char* quant_ops_compiler() {
#ifdef __clang__
  return __VERSION__;  // begins with its name
#else
  return "GCC " __VERSION__;
#endif
}

// Keeps the arguments of this thread's next call of an operator (torch/repeat.h).
QO_EXPORT void quant_ops_keep_call() { quant_ops::KeepsCall::of_thread() = {.wanted = true, .kept = quant_ops::KeepsCall::kNone}; }

// The number of the call that was kept, -1 if there was none; the next call is not kept.
QO_EXPORT int64_t quant_ops_kept_call() { return std::exchange(quant_ops::KeepsCall::of_thread(), {}).kept; }

// Gives up a call that is kept.
QO_EXPORT void quant_ops_forget_call(int64_t number) { quant_ops::KeptCalls::all().remove(number); }

// What a sentence of this thread refused, as its check decided: 0 a value, 1 a dtype, 2 memory, 3 an index.
QO_EXPORT int quant_ops_refusal(const char* sentence) { return static_cast<int>(quant_ops::refusal_of(sentence)); }

// parallel_for: body(begin, end) over disjoint parts of [0, n), each of at least `grain` tasks. The op library runs on torch's
// threads (torch/library_cpu.cpp), the test module serially (kernels_module.cpp); whoever links the core defines the two functions.
// Bodies must not throw or allocate.
#pragma once

#include <cstdint>

namespace quant_ops {

void parallel_run(int64_t n, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
int64_t parallel_threads();

template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (n <= grain) {
    body(int64_t{0}, n);
    return;
  }
  parallel_run(
      n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace quant_ops

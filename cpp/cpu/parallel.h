// parallel_for: body(begin, end) over disjoint parts of [0, n), each of at least `grain` tasks. The op library runs on torch's
// threads (torch/library_cpu.cpp), the test module serially (kernels/module.cpp); whoever links the core defines the two functions.
// Bodies must not throw or allocate.
#pragma once

#include <algorithm>
#include <cstdint>

namespace quant_ops {

void parallel_run(int64_t n, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
int64_t parallel_threads();

// Multiply-accumulates that are worth a thread: with fewer, starting it costs more than it saves.
constexpr int64_t kMacsPerThread = int64_t{1} << 20;

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

// share(worker, begin, end) over at most `threads` parts of [0, tasks), each of which has at least `work_per_thread` of the work
// of all tasks. The part is cut by hand so that it knows its worker, and by it the worker's own piece of scratch.
template <class Share>
void for_each_share(int64_t tasks, int64_t threads, int64_t work, int64_t work_per_thread, const Share& share) {
  if (tasks <= 0) return;
  const int64_t workers = std::clamp<int64_t>(work / work_per_thread, 1, std::min(threads, tasks));
  parallel_for(workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) share(worker, worker * tasks / workers, (worker + 1) * tasks / workers);
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A pass is cut into row ranges times panel ranges, one of each for a worker.
struct Shares {
  int64_t rows, panels;
};

// Minimizes the tiles of the busiest of at most `workers` workers; on ties prefers to cut the panels, each of which is then read
// by fewer workers.
inline Shares cut_pass(int64_t tiles, int64_t panels, int64_t workers) {
  Shares best{1, 1};
  int64_t least = tiles * panels;
  for (int64_t panel_shares = 1; panel_shares <= std::min(workers, panels); ++panel_shares) {
    const int64_t row_shares = std::min(workers / panel_shares, tiles);
    const int64_t busiest = ceil_div(panels, panel_shares) * ceil_div(tiles, row_shares);
    if (busiest <= least) {
      best = {row_shares, panel_shares};
      least = busiest;
    }
  }
  return best;
}

}  // namespace quant_ops

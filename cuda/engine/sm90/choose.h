// The choice among the Hopper engine's tiles and numbers of splits: a model of their time. Plain host code. Read first: igemm.h.
#pragma once

#include "engine/sm90/igemm.h"

namespace quant_ops::sm90 {

// What the model of time takes for a GPU's properties, in clocks unless another unit is said. benchmarks/gpu/fit_choice.py fits
// them to measured times.
struct Costs {
  double start;                   // launch, descriptors, the first load and the last store
  double narrow;                  // what a tile of 16 columns takes beyond that; why is not known
  double product;                 // times 128 x rows x rows / 4096, what the matrix instruction needs at best for a step
  double ingest;                  // bytes a clock that a multiprocessor loads
  double row;                     // of a load of a matrix
  double image_row;               // likewise of an image, where it may be shorter
  double step;                    // of a block alone, however small its tile
  double latency;                 // of a load; the stages of the ring share it
  double write_start, write;      // of a tile's results, and of each that a thread has
  double hidden;                  // the part of the writing that the products of other blocks do not hide
  double memory;                  // bytes a clock and multiprocessor
  double cache;                   // likewise of the L2 cache, from which every tile loads its operands
  double join_start, join;        // of the kernel that adds splits, and its bytes a clock and multiprocessor
  double cluster_start, cluster;  // of a cluster that does, and of each sum of a thread that another block has
};

extern const Costs kH200;  // NVIDIA H200

// The clocks that a tile takes for a problem by the model: a round of resident blocks after the other. The blocks of a
// multiprocessor share its matrix instruction and its loads; a step of a block takes as long as the slowest of them. Steps of a
// tile hide behind those of others, the last tile's results do not.
double clocks(const Problem& p, int kernel, int64_t multiprocessors, int64_t splits, const Costs& costs);

// Whether that many splits are joined by a cluster: where all blocks are there at once.
bool joins_in_cluster(const Problem& p, int kernel, int64_t multiprocessors, int64_t splits);

// The fastest tile and number of splits by the model, or the wanted ones. Engine::kNone if none takes the problem.
KernelPlan choose(const Problem& p, int64_t multiprocessors, const KernelChoice& wanted, const Costs& costs = kH200);

// Likewise without a wish, and remembered: the model takes some microseconds, and a layer asks for the same shapes again and again.
KernelPlan choose(const Problem& p, int64_t multiprocessors);

}  // namespace quant_ops::sm90

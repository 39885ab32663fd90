// The packed weight of the weight-only operators on the CPU: how it is made, undone and recognized. Its layout is that of
// contract/weight_only_layout.h; the kernels that read it are in kernels/table.h. Read next: weight_only.cpp.
#pragma once

#include "contract/weight_only_layout.h"
#include "kernels/table.h"

namespace quant_ops {

static_assert(WeightOnlyLayout::kColumns == kPanel && WeightOnlyLayout::kColumnStep == kPanelStep &&
              WeightOnlyLayout::kColumnStep == kNibbleColumns && WeightOnlyLayout::kWord == kQuad &&
              WeightOnlyLayout::kNibblePad == kNibbleStep);

// weight: contiguous [n, k].
void pack_weight_only_cpu(const int8_t* weight, const WeightOnlyLayout& layout, int8_t* packed);
void unpack_weight_only_cpu(const int8_t* packed, const WeightOnlyLayout& layout, int8_t* weight);

// Whether pack_weight_only_cpu made this buffer of `bytes` bytes for this layout. It compares shapes; it cannot compare contents.
bool is_packed_for(const int8_t* packed, int64_t bytes, const WeightOnlyLayout& layout);

}  // namespace quant_ops

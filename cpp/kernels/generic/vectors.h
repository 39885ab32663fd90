// The table of the kernels that need vectors alone: what vectors_*.cpp compile. A new one is a field of VectorKernels, a line here
// and its name in dispatch.cpp.
#pragma once

#include "kernels/generic/affine.h"
#include "kernels/generic/center.h"
#include "kernels/generic/dequantize.h"
#include "kernels/generic/normalize.h"
#include "kernels/generic/pack.h"
#include "kernels/generic/pointwise.h"
#include "kernels/generic/pool.h"
#include "kernels/generic/quantize.h"
#include "kernels/generic/quantize_block.h"
#include "kernels/generic/quantize_float.h"
#include "kernels/generic/random.h"
#include "kernels/generic/range.h"
#include "kernels/generic/softmax.h"
#include "kernels/generic/straight_through.h"
#include "kernels/generic/weight_groups.h"

namespace quant_ops::QO_ISA {
namespace {

constexpr VectorKernels kVectorKernels = {
    .vectors = QO_TEXT(QO_ISA),
    .quantize = quantize,
    .dequantize = dequantize,
    .straight_through = straight_through,
    .straight_through_columns = straight_through_columns,
    .range = range,
    .range_columns = range_columns,
    .column_sums = column_sums,
    .center = center,
    .codes = codes,
    .pack = pack,
    .quantize_float = quantize_float,
    .quantize_blocks = quantize_blocks,
    .quantize_block_columns = quantize_block_columns,
    .widen = widen,
    .multiply = multiply,
    .fold = fold,
    .sum_codes = sum_codes,
    .expand = expand,
    .few_rows = few_rows,
    .float_tile = float_tile,
    .store = store,
    .random_words = random_words,
    .quantize_affine = quantize_affine,
    .dequantize_affine = dequantize_affine,
    .pointwise = pointwise,
    .max_pool = max_pool,
    .sum_pool = sum_pool,
    .normalize = normalize,
    .softmax = softmax,
};

}  // namespace
}  // namespace quant_ops::QO_ISA

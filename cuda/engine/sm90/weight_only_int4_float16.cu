#include "engine/sm90/weight_only.cuh"

QO_WEIGHT_ONLY_KERNELS(quant_ops::Half, 4)

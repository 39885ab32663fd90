#include "engine/sm90/weight_only.cuh"

QO_WEIGHT_ONLY_KERNELS(int8_t, 4)

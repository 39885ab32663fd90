#include "engine/sm90/gemm.cuh"

QO_SM90_TILE("gemm_s8s8_64x16x256_swapped_sm90a");

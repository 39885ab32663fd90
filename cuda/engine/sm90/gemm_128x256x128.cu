#include "engine/sm90/gemm.cuh"

QO_SM90_TILE("gemm_s8s8_128x256x128_sm90a");

#include "engine/sm90/igemm.cuh"

QO_SM90_KERNEL("igemm_s8s8_64x192x128_swapped_wgmma")

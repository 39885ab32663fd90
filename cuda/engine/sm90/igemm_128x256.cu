#include "engine/sm90/igemm.cuh"

QO_SM90_KERNEL("igemm_s8s8_128x256x128_wgmma")

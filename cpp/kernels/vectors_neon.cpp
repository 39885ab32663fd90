// The vector kernels (generic/vectors.h) by NEON: of neon_dot and neon_i8mm.
#if defined(__aarch64__)
#define QO_ISA neon
#define QO_SIMD "kernels/simd/neon.h"
#include "kernels/target.h"

#include "kernels/generic/vectors.h"

namespace quant_ops {

constinit const VectorKernels kNeonVectors = neon::kVectorKernels;

}  // namespace quant_ops
#endif

// The vector kernels (generic/vectors.h) by AVX2, FMA and F16C: of avx2 and avxvnni.
#if defined(__x86_64__)
#define QO_ISA avx2
#define QO_SIMD "kernels/simd/avx2.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("avx2,fma,f16c")
#include "kernels/generic/vectors.h"
QO_TARGET_END

namespace quant_ops {

constinit const VectorKernels kAvx2Vectors = avx2::kVectorKernels;

}  // namespace quant_ops
#endif

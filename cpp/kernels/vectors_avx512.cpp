// The vector kernels (generic/vectors.h) by AVX-512 F, BW, DQ and VL: of avx512, avx512vnni and amx.
#if defined(__x86_64__)
#define QO_ISA avx512
#define QO_SIMD "kernels/simd/avx512.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "kernels/generic/vectors.h"
QO_TARGET_END

namespace quant_ops {

constinit const VectorKernels kAvx512Vectors = avx512::kVectorKernels;

}  // namespace quant_ops
#endif

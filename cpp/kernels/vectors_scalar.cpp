// The vector kernels (generic/vectors.h) by plain C++: the reference that every other table must match bit for bit, and the
// fallback of machines without AVX2.
#define QO_ISA scalar
#define QO_SIMD "kernels/simd/scalar.h"
#include "kernels/target.h"

#include "kernels/generic/vectors.h"

namespace quant_ops {

constinit const VectorKernels kScalarVectors = scalar::kVectorKernels;

}  // namespace quant_ops

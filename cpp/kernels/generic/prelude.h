// What every generic kernel header stands on. Such a header is written once against `Simd` and compiled for several instruction
// sets. A source file says which by two macros, QO_ISA (its name, and the namespace of its kernels) and QO_SIMD (the header that
// defines `Simd`), begins a target region (target.h), and includes the generic headers that it wants, in any order.
//
// A header that is opened alone, as an editor does, has no QO_ISA: then the scalar `Simd` stands in.
#pragma once

#include "kernels/target.h"

#if !defined(QO_ISA)
#define QO_ISA scalar
#define QO_SIMD "kernels/simd/scalar.h"
#endif
#include QO_SIMD
#include "kernels/generic/unroll.h"

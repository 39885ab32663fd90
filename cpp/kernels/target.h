// QO_TARGET_BEGIN("avx2,fma,f16c") ... QO_TARGET_END compiles what stands between for an instruction set, without compiler flags
// for the whole file. Every header of the language and of the compiler is included here, before any region begins, so that its
// inline functions keep the baseline: the linker may share them with the rest of the library. For the same reason everything inside
// a region is in an unnamed namespace.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/table.h"

#define QO_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define QO_TARGET_BEGIN(features) QO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define QO_TARGET_END QO_PRAGMA(clang attribute pop)
#else
#define QO_TARGET_BEGIN(features) QO_PRAGMA(GCC push_options) QO_PRAGMA(GCC target(features))
#define QO_TARGET_END QO_PRAGMA(GCC pop_options)
#endif

#define QO_INLINE inline __attribute__((always_inline))
#define QO_LAMBDA __attribute__((always_inline))

#define QO_TEXT_OF(name) #name
#define QO_TEXT(name) QO_TEXT_OF(name)

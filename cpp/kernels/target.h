// QO_TARGET_BEGIN("avx2,fma") ... QO_TARGET_END compiles what stands between for an instruction set, without compiler flags for the
// whole file: inline functions of the standard headers, included before, keep the baseline and cannot leak wider instructions into
// the rest of the library. Everything inside belongs in an unnamed namespace.
#pragma once

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

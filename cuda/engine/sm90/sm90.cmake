# The Hopper engine, where 90a is among the architectures and the CUTLASS headers are found: in QUANT_OPS_CUTLASS_DIR (a CUTLASS
# checkout, or its include folder) or in the Python package nvidia-cutlass. Defines QUANT_OPS_SM90 for the rest of the library.
set(QUANT_OPS_CUTLASS_OLDEST 4.2.0) # the one this was written for
set(QUANT_OPS_CUTLASS_DIR "$ENV{QUANT_OPS_CUTLASS_DIR}" CACHE PATH "CUTLASS; empty: the Python package nvidia-cutlass, where installed")

set(QUANT_OPS_SM90_OFF_BECAUSE "")
if(NOT "90a" IN_LIST QUANT_OPS_CUDA_USED_ARCHS)
  set(QUANT_OPS_SM90_OFF_BECAUSE "90a is not among the architectures")
else()
  set(QUANT_OPS_CUTLASS_ROOT "${QUANT_OPS_CUTLASS_DIR}")
  if(NOT QUANT_OPS_CUTLASS_ROOT)
    # found, not imported: importing it needs its dependencies
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u; s = u.find_spec('cutlass_library'); \
print(s.submodule_search_locations[0] + '/source' if s else '', end='')"
      OUTPUT_VARIABLE QUANT_OPS_CUTLASS_ROOT)
  endif()
  unset(QUANT_OPS_CUTLASS_INCLUDE)
  if(QUANT_OPS_CUTLASS_ROOT)
    find_path(QUANT_OPS_CUTLASS_INCLUDE cutlass/version.h HINTS "${QUANT_OPS_CUTLASS_ROOT}" "${QUANT_OPS_CUTLASS_ROOT}/include"
              NO_DEFAULT_PATH NO_CACHE)
  endif()
  if(NOT QUANT_OPS_CUTLASS_INCLUDE)
    if(QUANT_OPS_CUTLASS_DIR)
      message(FATAL_ERROR "quant_ops: expected cutlass/version.h in QUANT_OPS_CUTLASS_DIR, got ${QUANT_OPS_CUTLASS_DIR}")
    endif()
    set(QUANT_OPS_SM90_OFF_BECAUSE
        "no CUTLASS headers (pip install --no-deps nvidia-cutlass==4.2.0.0, or set QUANT_OPS_CUTLASS_DIR)")
  else()
    file(STRINGS "${QUANT_OPS_CUTLASS_INCLUDE}/cutlass/version.h" QUANT_OPS_CUTLASS_LINES REGEX "define CUTLASS_(MAJOR|MINOR|PATCH)")
    string(REGEX REPLACE "[^0-9;]" "" QUANT_OPS_CUTLASS_VERSION "${QUANT_OPS_CUTLASS_LINES}")
    list(JOIN QUANT_OPS_CUTLASS_VERSION "." QUANT_OPS_CUTLASS_VERSION)
    if(QUANT_OPS_CUTLASS_VERSION VERSION_LESS QUANT_OPS_CUTLASS_OLDEST)
      set(QUANT_OPS_SM90_OFF_BECAUSE "CUTLASS ${QUANT_OPS_CUTLASS_VERSION} is older than ${QUANT_OPS_CUTLASS_OLDEST}")
    endif()
  endif()
endif()

if(QUANT_OPS_SM90_OFF_BECAUSE)
  message(STATUS "quant_ops: Hopper engine off: ${QUANT_OPS_SM90_OFF_BECAUSE}")
  return()
endif()
message(STATUS "quant_ops: Hopper engine on (CUTLASS ${QUANT_OPS_CUTLASS_VERSION} in ${QUANT_OPS_CUTLASS_INCLUDE})")

add_library(sm90 OBJECT cuda/engine/sm90/sm90.cpp
                        cuda/engine/sm90/gemm_64x16x256_swapped.cu cuda/engine/sm90/gemm_64x32x256_swapped.cu
                        cuda/engine/sm90/gemm_64x64x256_swapped.cu cuda/engine/sm90/gemm_64x128x128.cu
                        cuda/engine/sm90/gemm_128x128x128.cu cuda/engine/sm90/gemm_128x256x128.cu)
quant_ops_cuda_target(sm90 "SHELL:-gencode arch=compute_90a,code=sm_90a" --expt-relaxed-constexpr)
# Also in builds without it otherwise: with assertions, the compiler serialises the matrix instructions.
target_compile_definitions(sm90 PRIVATE NDEBUG)
target_include_directories(sm90 SYSTEM PRIVATE "${QUANT_OPS_CUTLASS_INCLUDE}")

target_link_libraries(quant_ops_cuda PRIVATE sm90)
target_compile_definitions(quant_ops_cuda PRIVATE QUANT_OPS_SM90)

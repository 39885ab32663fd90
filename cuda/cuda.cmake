# Decides in one line whether the CUDA operators are built, and why; builds libquant_ops_cuda.so. QUANT_OPS_CUDA=AUTO builds them
# where torch has CUDA and a usable CUDA compiler is found, and never fails for the lack of one. They compile and link without
# torch's CUDA libraries.
set(QUANT_OPS_CUDA_OFF_BECAUSE "")
set(QUANT_OPS_CUDA_OLDEST 12.0) # the first compiler for sm_90a

string(TOUPPER "${QUANT_OPS_CUDA}" QUANT_OPS_CUDA_WANTED)
if(NOT QUANT_OPS_CUDA_WANTED MATCHES "^(AUTO|ON|TRUE|YES|1|OFF|FALSE|NO|0)$")
  message(FATAL_ERROR "quant_ops: expected QUANT_OPS_CUDA to be AUTO, ON or OFF, got ${QUANT_OPS_CUDA}")
endif()

if(QUANT_OPS_CUDA_WANTED MATCHES "^(OFF|FALSE|NO|0)$")
  set(QUANT_OPS_CUDA_OFF_BECAUSE "QUANT_OPS_CUDA=OFF")
elseif(QUANT_OPS_CUDA_WANTED STREQUAL "AUTO" AND TORCH_CUDA STREQUAL "None")
  set(QUANT_OPS_CUDA_OFF_BECAUSE "this torch is built without CUDA (QUANT_OPS_CUDA=ON builds them all the same)")
else()
  # Architectures are chosen per source below. Compiles and links a test program in a process of its own.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(QUANT_OPS_CUDA_OFF_BECAUSE "no CUDA compiler was found (set CUDACXX or QUANT_OPS_CUDA=OFF)")
  else()
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE QUANT_OPS_NVCC_TEXT ERROR_QUIET)
    if(QUANT_OPS_NVCC_TEXT MATCHES "release ([0-9]+\\.[0-9]+)")
      set(QUANT_OPS_NVCC_VERSION "${CMAKE_MATCH_1}")
    else()
      set(QUANT_OPS_NVCC_VERSION 0)
    endif()
    if(QUANT_OPS_NVCC_VERSION VERSION_LESS QUANT_OPS_CUDA_OLDEST)
      set(QUANT_OPS_CUDA_OFF_BECAUSE
          "${CMAKE_CUDA_COMPILER} is not nvcc ${QUANT_OPS_CUDA_OLDEST} or newer (set CUDACXX or QUANT_OPS_CUDA=OFF)")
    endif()
  endif()
endif()

# Architectures that this compiler knows, without their suffixes.
set(QUANT_OPS_CUDA_USED_ARCHS "")
if(NOT QUANT_OPS_CUDA_OFF_BECAUSE)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE QUANT_OPS_KNOWN_ARCHS ERROR_QUIET)
  foreach(arch IN LISTS QUANT_OPS_CUDA_ARCHS)
    string(REGEX REPLACE "[af]$" "" number "${arch}")
    if(NOT number MATCHES "^[0-9]+$")
      message(FATAL_ERROR "quant_ops: expected QUANT_OPS_CUDA_ARCHS like 80;90a, got ${QUANT_OPS_CUDA_ARCHS}")
    elseif(QUANT_OPS_KNOWN_ARCHS MATCHES "sm_${number}[\n\r ]")
      list(APPEND QUANT_OPS_CUDA_USED_ARCHS "${arch}")
    elseif(QUANT_OPS_CUDA_WANTED STREQUAL "AUTO")
      message(STATUS "quant_ops: nvcc ${QUANT_OPS_NVCC_VERSION} does not know architecture ${arch}: left out")
    else()
      message(FATAL_ERROR "quant_ops: nvcc ${QUANT_OPS_NVCC_VERSION} does not know architecture ${arch}. "
                          "Set QUANT_OPS_CUDA_ARCHS to architectures that it lists with --list-gpu-code.")
    endif()
  endforeach()
  if(NOT QUANT_OPS_CUDA_USED_ARCHS)
    set(QUANT_OPS_CUDA_OFF_BECAUSE "nvcc ${QUANT_OPS_NVCC_VERSION} knows none of the architectures ${QUANT_OPS_CUDA_ARCHS}")
  endif()
endif()

if(QUANT_OPS_CUDA_OFF_BECAUSE)
  set(QUANT_OPS_BUILD_CUDA OFF)
  if(QUANT_OPS_CUDA_WANTED MATCHES "^(ON|TRUE|YES|1)$")
    message(FATAL_ERROR "quant_ops: QUANT_OPS_CUDA=ON, but ${QUANT_OPS_CUDA_OFF_BECAUSE}. "
                        "Install the CUDA toolkit ${QUANT_OPS_CUDA_OLDEST} or newer and set CUDACXX to its nvcc.")
  endif()
  message(STATUS "quant_ops: CUDA operators off: ${QUANT_OPS_CUDA_OFF_BECAUSE}")
  return()
endif()

set(QUANT_OPS_BUILD_CUDA ON)
enable_language(CUDA)
message(STATUS "quant_ops: CUDA operators on, architectures ${QUANT_OPS_CUDA_USED_ARCHS} (nvcc ${QUANT_OPS_NVCC_VERSION})")

# Machine code for each architecture; PTX, which later GPUs translate at load, for the newest one that has no suffix (code for 90a
# and the like runs nowhere else).
set(QUANT_OPS_GENCODE "")
set(QUANT_OPS_PTX 0)
foreach(arch IN LISTS QUANT_OPS_CUDA_USED_ARCHS)
  list(APPEND QUANT_OPS_GENCODE "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
  if(arch MATCHES "^[0-9]+$" AND arch GREATER QUANT_OPS_PTX)
    set(QUANT_OPS_PTX ${arch})
  endif()
endforeach()
if(QUANT_OPS_PTX)
  list(APPEND QUANT_OPS_GENCODE "SHELL:-gencode arch=compute_${QUANT_OPS_PTX},code=compute_${QUANT_OPS_PTX}")
endif()

# IEEE arithmetic as written, as on the CPU. ptxas reports registers and spills; the launcher keeps them in ptxas-*.log.
function(quant_ops_cuda_target target)
  target_include_directories(${target} PRIVATE cpp cuda)
  target_compile_options(
    ${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${QUANT_OPS_FLAGS};${QUANT_OPS_FILE_NAMES}>
                      "$<$<COMPILE_LANGUAGE:CUDA>:${ARGN};-fmad=false;SHELL:-Xptxas -v;SHELL:-Xcompiler -Wall,-Wextra>")
  set_target_properties(
    ${target}
    PROPERTIES CUDA_STANDARD 20
               CUDA_STANDARD_REQUIRED ON
               CUDA_EXTENSIONS OFF
               CUDA_ARCHITECTURES OFF
               CUDA_VISIBILITY_PRESET hidden
               CUDA_RUNTIME_LIBRARY Static
               CUDA_COMPILER_LAUNCHER "sh;${CMAKE_CURRENT_SOURCE_DIR}/cuda/ptxas_log.sh;${CMAKE_CURRENT_BINARY_DIR}")
endfunction()

add_library(quant_ops_cuda SHARED cpp/torch/library_cuda.cpp cuda/quantize.cu cuda/quantize_backward.cu cuda/qparams.cu
                                  cuda/quantize_rows.cu cuda/quantize_float.cu cuda/quantize_block.cu cuda/affine.cu cuda/weight_only_embedding.cu
                                  cuda/pointwise.cu cuda/pool.cu
                                  cuda/linear.cpp cuda/conv2d.cu cuda/conv2d_depthwise.cu
                                  cuda/conv2d_direct.cu cuda/conv2d_patches.cu cuda/activations.cu cuda/pack.cu
                                  cuda/engine/choose.cpp cuda/engine/portable.cu cuda/engine/gemv.cu
                                  cuda/engine/fused.cu
                                  cuda/weight_only.cpp cuda/weight_only_pack.cu cuda/weight_only_gemv.cu cuda/weight_only_floats.cu
                                  cuda/weight_only_tiles.cu)
quant_ops_cuda_target(quant_ops_cuda ${QUANT_OPS_GENCODE})
target_compile_definitions(quant_ops_cuda PRIVATE USE_CUDA)
target_link_libraries(quant_ops_cuda PRIVATE torch_stable)
set_target_properties(quant_ops_cuda PROPERTIES SKIP_BUILD_RPATH ON)
include(cuda/engine/sm90/sm90.cmake)
install(TARGETS quant_ops_cuda LIBRARY DESTINATION quant_ops)

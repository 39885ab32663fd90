# find_package(quant_ops), after find_package(Torch): a program that links quant_ops::quant_ops has torch.ops.quant_ops in its
# libtorch, without Python. The program calls nothing of the library itself, which is why the linker is told that it is needed.
# Installed with the Python package, whose libraries lie two folders up; docs/cpp.md shows how to use it.
include(CMakeFindDependencyMacro)
find_dependency(Torch)

get_filename_component(_quant_ops_folder "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET quant_ops::quant_ops)
  add_library(quant_ops::quant_ops SHARED IMPORTED)
  set_target_properties(quant_ops::quant_ops PROPERTIES IMPORTED_LOCATION "${_quant_ops_folder}/libquant_ops.so"
                                                        INTERFACE_LINK_LIBRARIES "${TORCH_LIBRARIES}"
                                                        INTERFACE_LINK_OPTIONS "LINKER:--undefined=quant_ops_isa")
endif()

# The operators on CUDA, where they are there.
if(NOT TARGET quant_ops::cuda)
  foreach(_quant_ops_cuda_folder IN ITEMS "${_quant_ops_folder}" "${_quant_ops_folder}/../quant_ops_cuda")
    if(EXISTS "${_quant_ops_cuda_folder}/libquant_ops_cuda.so" AND NOT TARGET quant_ops::cuda)
      add_library(quant_ops::cuda SHARED IMPORTED)
      set_target_properties(quant_ops::cuda PROPERTIES IMPORTED_LOCATION "${_quant_ops_cuda_folder}/libquant_ops_cuda.so"
                                                       INTERFACE_LINK_LIBRARIES quant_ops::quant_ops
                                                       INTERFACE_LINK_OPTIONS "LINKER:--undefined=quant_ops_cuda_gemm_kernel")
    endif()
  endforeach()
endif()

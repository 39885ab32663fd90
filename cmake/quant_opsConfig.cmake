# find_package(quant_ops), after find_package(Torch): a program that links quant_ops::quant_ops has torch.ops.quant_ops in its
# libtorch, without Python; quant_ops::cuda adds the kernels on CUDA, where they are installed. Needs CMake 3.24. Installed with the
# Python package, whose library lies three folders up; docs/cpp.md shows how to use it.
include(CMakeFindDependencyMacro)
if(NOT TARGET torch)
  find_dependency(Torch)
endif()

# A program calls nothing of these libraries, and linkers leave out what nothing calls.
set(CMAKE_LINK_LIBRARY_USING_quant_ops_needed_SUPPORTED TRUE)
set(CMAKE_LINK_LIBRARY_USING_quant_ops_needed "LINKER:--push-state,--no-as-needed" "<LINK_ITEM>" "LINKER:--pop-state")

function(_quant_ops_target name library)
  if(EXISTS "${library}" AND NOT TARGET quant_ops::${name})
    add_library(quant_ops::${name}_library SHARED IMPORTED)
    set_target_properties(quant_ops::${name}_library PROPERTIES IMPORTED_LOCATION "${library}"
                                                                INTERFACE_LINK_LIBRARIES "${TORCH_LIBRARIES}")
    add_library(quant_ops::${name} INTERFACE IMPORTED)
    set_target_properties(quant_ops::${name} PROPERTIES INTERFACE_LINK_LIBRARIES
                                                        "$<LINK_LIBRARY:quant_ops_needed,quant_ops::${name}_library>;${ARGN}")
  endif()
endfunction()

get_filename_component(_quant_ops_folder "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
_quant_ops_target(quant_ops "${_quant_ops_folder}/libquant_ops.so")
_quant_ops_target(cuda "${_quant_ops_folder}/libquant_ops_cuda.so" quant_ops::quant_ops)
_quant_ops_target(cuda "${_quant_ops_folder}/../quant_ops_cuda/libquant_ops_cuda.so" quant_ops::quant_ops)
unset(_quant_ops_folder)

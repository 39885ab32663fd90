# The Hopper engine, where 90a is among the architectures: its instructions exist in code for that architecture alone. Defines
# QUANT_OPS_SM90 for the rest of the library.
if(NOT "90a" IN_LIST QUANT_OPS_CUDA_USED_ARCHS)
  message(STATUS "quant_ops: Hopper engine off: 90a is not among the architectures")
  return()
endif()
message(STATUS "quant_ops: Hopper engine on")

file(GLOB QUANT_OPS_SM90_SOURCES CONFIGURE_DEPENDS cuda/engine/sm90/*.cu cuda/engine/sm90/*.cpp)
add_library(sm90 OBJECT ${QUANT_OPS_SM90_SOURCES})
quant_ops_cuda_target(sm90 "SHELL:-gencode arch=compute_90a,code=sm_90a" --expt-relaxed-constexpr)

target_link_libraries(quant_ops_cuda PRIVATE sm90)
target_compile_definitions(quant_ops_cuda PRIVATE QUANT_OPS_SM90)

# What CUDA and NCCL (found by find_cuda.cmake) add to the rooms: the CUDA backend, communicators
# between GPUs, ranges for NVIDIA's profilers.
set(comm_parts absent/no_gpu absent/no_nccl)
if(DROVER_HAVE_CUDA)
  # Header-only: base/trace's spans as ranges in Nsight Systems. CUPTI's headers lie beside, or apart;
  # the library is looked for when a trace is asked for (cupti_trace.cc).
  find_path(DROVER_NVTX_INCLUDE nvtx3/nvToolsExt.h HINTS ${CUDAToolkit_INCLUDE_DIRS} NO_CACHE)
  if(DROVER_NVTX_INCLUDE)
    target_compile_definitions(drover_base PRIVATE DROVER_NVTX)
    target_include_directories(drover_base SYSTEM PRIVATE ${DROVER_NVTX_INCLUDE})
    target_link_libraries(drover_base PUBLIC ${CMAKE_DL_LIBS})
  endif()
  find_path(DROVER_CUPTI_INCLUDE cupti.h HINTS ${CUDAToolkit_INCLUDE_DIRS} NO_CACHE
    PATHS ${CUDAToolkit_LIBRARY_ROOT}/extras/CUPTI/include)

  # Kernels see plain types only, so they need neither drover_flags nor its libraries. What uses
  # Hopper's own instructions is compiled for Hopper alone; it is called on nothing else.
  file(GLOB cuda_kernels CONFIGURE_DEPENDS src/backend/cuda/*.cu)
  set(hopper_kernels ${cuda_kernels})
  list(FILTER hopper_kernels INCLUDE REGEX "/hopper_[^/]*$")
  list(FILTER cuda_kernels EXCLUDE REGEX "/hopper_[^/]*$")
  add_library(drover_cuda_kernels STATIC ${cuda_kernels})
  target_include_directories(drover_cuda_kernels PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/src)
  target_link_libraries(drover_cuda_kernels PUBLIC CUDA::cudart_static)
  if(hopper_kernels)
    add_library(drover_hopper_kernels OBJECT ${hopper_kernels})
    set_target_properties(drover_hopper_kernels PROPERTIES CUDA_ARCHITECTURES 90a)
    target_include_directories(drover_hopper_kernels PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/src)
    target_sources(drover_cuda_kernels PRIVATE $<TARGET_OBJECTS:drover_hopper_kernels>)
  endif()
  drover_room(backend/cuda drover_backend drover_cuda_kernels CUDA::cublasLt)
  target_link_libraries(drover_backend_cuda PRIVATE ${CMAKE_DL_LIBS})
  if(DROVER_CUPTI_INCLUDE)
    target_include_directories(drover_backend_cuda SYSTEM PRIVATE ${DROVER_CUPTI_INCLUDE})
  endif()

  set(comm_parts gpu/* absent/no_nccl)
  target_link_libraries(drover_comm PUBLIC CUDA::cudart_static)
  if(DROVER_HAVE_NCCL)
    set(comm_parts gpu/* nccl/*)
    target_include_directories(drover_comm SYSTEM PRIVATE ${NCCL_INCLUDE_DIR})
    target_link_libraries(drover_comm PUBLIC ${NCCL_LIBRARY})
  endif()
endif()

# What stands in src/comm for the libraries that this build lacks makes the program say so.
list(TRANSFORM comm_parts PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/src/comm/)
list(TRANSFORM comm_parts APPEND .cc)
file(GLOB comm_sources CONFIGURE_DEPENDS ${comm_parts})
target_sources(drover_comm PRIVATE ${comm_sources})

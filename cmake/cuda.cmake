# The CUDA backend, off unless asked for with -DDROVER_CUDA=ON; for which GPUs:
# -DCMAKE_CUDA_ARCHITECTURES.
option(DROVER_CUDA "Build the CUDA backend (sm_80 and later; needs CUDA 12 or later)" OFF)
if(DROVER_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "80;86;89;90a")
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know it of CUDA 13
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  find_package(CUDAToolkit REQUIRED)
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
  # Kernels see plain types only, so they need neither drover_flags nor its libraries.
  file(GLOB cuda_kernels CONFIGURE_DEPENDS src/backend/cuda/*.cu)
  add_library(drover_cuda_kernels STATIC ${cuda_kernels})
  target_include_directories(drover_cuda_kernels PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/src)
  target_link_libraries(drover_cuda_kernels PUBLIC CUDA::cudart)
  drover_room(backend/cuda drover_base drover_cuda_kernels CUDA::cublasLt)
  target_link_libraries(drover_backend_cuda PRIVATE ${CMAKE_DL_LIBS})
  if(DROVER_CUPTI_INCLUDE)
    target_include_directories(drover_backend_cuda SYSTEM PRIVATE ${DROVER_CUPTI_INCLUDE})
  endif()
endif()

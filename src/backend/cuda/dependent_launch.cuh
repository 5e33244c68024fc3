// Programmatic dependent launch (sm_90 and later): a kernel's blocks start once all blocks of the
// kernel before have said dependency_launch() or ended, and wait for its end, and with it for
// everything before it, in dependency_wait(). So a launch costs no time between two kernels, and
// what no kernel of a step writes (weights, pages of earlier steps) is fetched while the kernel
// before still runs.
//
// A kernel that is launched this way must come to dependency_wait(), or the kernels after it would
// wait for less than they think.
#pragma once

#include <cuda_runtime.h>

namespace drover::cuda {

// Nothing that an earlier kernel of the stream writes may be read, nor what one reads be written,
// before.
__device__ __forceinline__ void dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void dependency_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Of the current device.
inline bool has_dependent_launch() {
  static const bool has = [] {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major >= 9;
  }();
  return has;
}

// kernel<<<grid, block, shared_bytes, s>>>(arguments), in clusters of `cluster` blocks along x.
template <typename... Parameters, typename... Arguments>
void launch_dependent(void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared_bytes,
                      cudaStream_t s, unsigned cluster, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(block), config.dynamicSmemBytes = shared_bytes;
  config.stream = s, config.attrs = attributes;
  if (has_dependent_launch()) {
    auto& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    auto& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {cluster, 1, 1};
  }
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace drover::cuda

// CUDA errors as drover::Error.
#pragma once

#include <cuda_runtime_api.h>

#include "base/error.h"

#define DROVER_CUDA(call)                                                                 \
  do {                                                                                    \
    const cudaError_t drover_e_ = (call);                                                 \
    if (drover_e_ != cudaSuccess)                                                         \
      DROVER_FAIL(::drover::ExitCode::kEnvironment, "CUDA: {} failed: {} ({}:{})", #call, \
                  cudaGetErrorString(drover_e_), __FILE__, __LINE__);                     \
  } while (false)

// After a launch.
#define DROVER_CUDA_LAUNCHED(what)                                                         \
  do {                                                                                     \
    const cudaError_t drover_e_ = cudaGetLastError();                                      \
    if (drover_e_ != cudaSuccess)                                                          \
      DROVER_FAIL(::drover::ExitCode::kEnvironment, "CUDA: launch of {} failed: {}", what, \
                  cudaGetErrorString(drover_e_));                                          \
  } while (false)

// The CUDA backend: activations bf16, sums f32, weights as stored (INT4 and INT8 codes exact in the
// tensor cores, float weights as bf16). One GPU a backend, sm_80 or later.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace drover {

struct CudaOptions {
  int device = 0;
  // Inputs of INT4 layers: kBf16 (W4A16, exact), or kFp8E4m3 (W4A8).
  Dtype inputs = Dtype::kBf16;
  // Linears and prefill as on a GPU before Hopper, whatever the GPU is: for tests of that path.
  bool portable = false;
  // How linears run; its GPU must be this one (check_gpu). Empty: by the built-in rule.
  Tuning tuning{};
  size_t workspace_bytes = size_t{64} << 20;  // partial sums of split linears and attention
};

// Throws kEnvironment when there is no such GPU, or it is too old.
//
// Operations run on stream() in order and only there (the workspace is shared); none allocates or
// waits. Ends of copies: copy_in has taken the host's bytes when it returns; copy_out's bytes are
// there once wait() has returned for an event recorded after it. Large copies go in pieces of the
// staging memory and wait for it. Every recorded event is waited for once.
// A row's results do not depend on its batch, but for float weights (cuBLASLt). On Hopper, with
// an FP8 cache and heads of 128 features, a row of attention that goes as decode differs by
// rounding from the same row in a chunk.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);

int cuda_device_count() noexcept;  // 0 without a driver
// Why no GPU can be used here: no driver, one older than the toolkit, no GPU, or none recent
// enough. Empty when the first one can.
std::string cuda_problem();
std::string cuda_device_uuid(int device);  // "GPU-8-4-4-4-12 digits", as NVML has it
std::string cuda_device_name(int device);  // "NVIDIA H100 80GB HBM3"
int cuda_capability(int device);           // 90 for 9.0

}  // namespace drover

// Found before tests/ops/harness.h when the operation tests are built for the GPU: the same suite
// over the CUDA backend. Skipped where there is no GPU.
#pragma once

#define backends cpu_backends
#include "../../ops/harness.h"
#undef backends

#include "backend/cuda/cuda_backend.h"

namespace drover::ops {

inline std::vector<BackendCase> backends() {
  return {{"cuda", [] { return make_cuda_backend({}); }, false},
          {"cuda_w4a8",
           [] {
             CudaOptions o;
             o.inputs = Dtype::kFp8E4m3;
             return make_cuda_backend(o);
           },
           false},
          {"cuda_portable",
           [] {
             CudaOptions o;
             o.portable = true;
             return make_cuda_backend(o);
           },
           false},
          // Next to no workspace: chunks of columns and partitions of contexts one after the other.
          {"cuda_no_split",
           [] {
             CudaOptions o;
             o.workspace_bytes = 4096;
             return make_cuda_backend(o);
           },
           false}};
}

// Skips a test before OpsTest makes its backend.
class GpuOpsTest : public OpsTest {
 protected:
  void SetUp() override {
    if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU here";
    OpsTest::SetUp();
  }
};
#define OpsTest GpuOpsTest

}  // namespace drover::ops

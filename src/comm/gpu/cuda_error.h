// CUDA errors as drover::Error, and events with a deadline. Only for src/comm.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "base/interrupt.h"

#define DROVER_CUDA(call)                                                                 \
  do {                                                                                    \
    const cudaError_t drover_e_ = (call);                                                 \
    if (drover_e_ != cudaSuccess)                                                         \
      DROVER_FAIL(::drover::ExitCode::kEnvironment, "CUDA: {} failed: {} ({}:{})", #call, \
                  cudaGetErrorString(drover_e_), __FILE__, __LINE__);                     \
  } while (false)

namespace drover {

class CudaEvent {
 public:
  explicit CudaEvent(unsigned flags = cudaEventDisableTiming) {
    DROVER_CUDA(cudaEventCreateWithFlags(&event_, flags));
  }
  ~CudaEvent() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  CudaEvent(CudaEvent&& o) noexcept : event_(std::exchange(o.event_, nullptr)) {}
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;
  CudaEvent& operator=(CudaEvent&&) = delete;

  cudaEvent_t get() const { return event_; }
  void record(cudaStream_t s) const { DROVER_CUDA(cudaEventRecord(event_, s)); }
  // Throws kLostPeer at the deadline, naming `what`, and when the interrupt is raised. `meanwhile`,
  // where it is given, is called while it waits.
  void wait(Deadline deadline, const Interrupt& interrupt, const char* what,
            const std::function<void()>& meanwhile = nullptr) const {
    wait_until(
        [&] {
          const cudaError_t e = cudaEventQuery(event_);
          if (e != cudaErrorNotReady) {
            DROVER_CUDA(e);
            return true;
          }
          if (meanwhile) meanwhile();
          return false;
        },
        deadline, interrupt, what);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace drover

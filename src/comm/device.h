// Memory, stream and clock of what a communicator's buffers live on: for benches and tests of
// communicators (the engine has its Backend).
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "base/interrupt.h"

namespace drover {

class CommDevice {
 public:
  virtual ~CommDevice() = default;
  virtual std::string name() const = 0;  // "NVIDIA H100 80GB HBM3", "cpu"
  virtual void* stream() = 0;
  virtual void* alloc(size_t bytes) = 0;  // zeros
  virtual void free(void* p) noexcept = 0;
  // In stream order; the bytes are there on return.
  virtual void copy_in(void* device, const void* host, size_t bytes) = 0;
  virtual void copy_out(void* host, const void* device, size_t bytes) = 0;
  // Microseconds that what `calls` queue takes.
  virtual double time(const std::function<void()>& calls) = 0;
  // Records what `calls` queue; the result runs it. Null where there are no graphs.
  virtual std::function<void()> record(const std::function<void()>& calls) = 0;
};

std::unique_ptr<CommDevice> make_host_device();

int comm_gpu_count() noexcept;  // 0 without a driver, or in a build without CUDA
// Makes this GPU current on the calling thread. Waits end with kLostPeer after `seconds`, and when
// the interrupt is raised. Throws kEnvironment when there is no such GPU.
std::unique_ptr<CommDevice> make_gpu_device(int device, const Interrupt& interrupt, double seconds);

}  // namespace drover

// Copies between pageable host memory and the device through pinned memory, without waiting for the
// device unless the pinned memory is full.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <deque>
#include <vector>

#include "base/interrupt.h"

namespace drover::cuda {

class Staging {
 public:
  explicit Staging(size_t half_bytes);  // of each direction, two halves a direction
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  void copy_in(void* device, const void* host, size_t bytes, cudaStream_t s);
  void copy_out(void* host, const void* device, size_t bytes, cudaStream_t s);

  // An event after everything so far; wait, or the done that is true, delivers what was copied out
  // before it.
  void* record(cudaStream_t s);
  bool done(void* event);
  void wait(void* event, Deadline deadline, const Interrupt& interrupt);

 private:
  struct Half {
    std::byte* memory = nullptr;
    size_t used = 0;
    cudaEvent_t done = nullptr;  // the copies of a full half
  };
  struct Mark {
    cudaEvent_t event = nullptr;
    size_t outs = 0;  // copies out before it, since the beginning
  };
  struct Out {
    void* host;
    const std::byte* staged;
    size_t bytes;
  };
  std::byte* take_in(size_t bytes, cudaStream_t s);
  std::byte* take_out(size_t bytes);
  void deliver(size_t until);

  size_t half_bytes_;
  Half in_[2];
  int current_ = 0;
  std::byte* out_ = nullptr;  // [half_bytes], a ring: steps overlap, so it is seldom empty
  size_t out_next_ = 0;
  std::deque<Out> outs_;
  size_t delivered_ = 0, ordered_ = 0;
  std::vector<Mark*> marks_, free_;
};

}  // namespace drover::cuda

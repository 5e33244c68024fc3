// Messages one way from one rank to another, on an NCCL communicator of just those two. Only for
// src/comm.
//
// NCCL runs the kernels of a communicator in the order of their launch, whatever their streams. So
// a send that waits for its receiver would hold up everything behind it, also what that receiver
// waits for. With a communicator and a stream of its own for each way, a send waits for the
// receives of this way only, and a receive for nothing that is not in its own stream already.
#pragma once

#include <vector>

#include "comm/nccl/nccl_handle.h"

namespace drover {

class NcclLink {
 public:
  // `handle` has two ranks: 0 sends, 1 receives. Connects them (collective).
  explicit NcclLink(std::unique_ptr<NcclHandle> handle);
  ~NcclLink();
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;

  // Room for `messages` of `bytes` under way. The sender's; not collective.
  void make_room(size_t bytes, int messages);
  void send(const void* buffer, size_t bytes, cudaStream_t stream);
  void recv(void* buffer, size_t bytes, cudaStream_t stream);

 private:
  struct Slot {
    void* memory = nullptr;
    CudaEvent filled, sent;
  };
  bool sends() const { return handle_->rank() == 0; }
  void free_slots() noexcept;

  std::unique_ptr<NcclHandle> handle_;
  cudaStream_t side_ = nullptr;  // the sender's
  std::vector<Slot> slots_;
  size_t room_ = 0, next_ = 0;
};

}  // namespace drover

// Makers of the communicators between GPUs, for World. Defined in gpu/ and nccl/, or, in builds
// that lack CUDA or NCCL, in absent/, where they throw kEnvironment: CMake takes the one or the
// other. Only for src/comm.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "base/interrupt.h"
#include "comm/comm.h"

namespace drover {

// A communicator of one rank, on buffers of a GPU.
std::unique_ptr<Comm> make_solo_comm();

// Ranks that share a GPU; `host` is the same ranks' communicator on host memory. `progress` moves
// messages that are under way on: it is called while the GPU is waited for.
std::unique_ptr<Comm> make_staged_comm(std::unique_ptr<Comm> host, Interrupt& interrupt,
                                       double seconds, const std::function<void()>& progress);

struct NcclPlace {
  int rank = 0, size = 1;  // in the world
  std::string host;
  double seconds = 0;  // longest wait
  void* stream = nullptr;
};
// from_rank_0(bytes, count): rank 0's bytes become everybody's; throws at its deadline.
std::unique_ptr<Comm> make_nccl_comm(const NcclPlace& place, Interrupt& interrupt,
                                     Progress* progress,
                                     const std::function<void(void*, size_t)>& from_rank_0);

// Before any thread is started and NCCL is first called.
void prepare_nccl_environment();

}  // namespace drover

// Memory of all ranks of an NCCL communicator on one host, through CUDA's IPC handles. Only for
// src/comm.
#pragma once

#include <memory>

#include "comm/comm.h"
#include "comm/nccl/nccl_handle.h"

namespace drover {

// Collective on `handle`, which must outlive it, whose gathers of a few hundred bytes are connected
// and which is not recorded meanwhile. Null on every rank where one of them cannot.
std::unique_ptr<PeerMemory> share_memory(NcclHandle& handle, size_t bytes);

// Kernels that wait at peer memory end their waits, in this process and for good.
void stop_peer_waits() noexcept;

}  // namespace drover

// Communication between the ranks of a replica: collectives and point to point on device buffers.
// Implementations: mpi_comm (CPU), nccl/nccl_comm (one GPU a rank), gpu/staged_comm (ranks that
// share a GPU). No arithmetic of the model lives here.
//
// Every call is ordered on the stream it is given; a buffer may be reused by later work on the
// same stream. send() never waits for its receiver (it copies; NCCL has a stream of its own for
// each link), so two stages may send to each other at once. Every rank of a communicator makes the
// same collective calls in the same order. Every wait has a deadline and ends when the interrupt is
// raised; a GPU that waits inside a kernel is ended by abort_all_nccl() (world.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/dtype.h"

namespace drover {

// A piece of memory of each rank of a communicator that the GPUs of all of them read and write.
// Only kernels do (Backend::Norm::peers): nothing is ordered here. Its destructor is collective,
// and comes before the communicator's.
class PeerMemory {
 public:
  virtual ~PeerMemory() = default;
  virtual void* of(int rank) const = 0;  // as this rank's GPU reaches it; all bits set at first
  virtual size_t bytes() const = 0;      // of each
  // In memory that GPUs read: 0 until waits are to end (abort_all_nccl), which a kernel that waits
  // for a peer asks now and then.
  virtual const uint32_t* stop() const = 0;
};

class Comm {
 public:
  virtual ~Comm() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // Collective. Ranks with the same color form a communicator, ordered by key. color < 0: none
  // (null).
  virtual std::unique_ptr<Comm> split(int color, int key, const std::string& name) = 0;
  // In place, element type f32 or bf16. All ranks get the same bits.
  virtual void all_reduce_sum(void* buffer, size_t count, Dtype type, void* stream) = 0;
  // out [size(), bytes]: rank i's bytes at place i.
  virtual void all_gather(const void* in, void* out, size_t bytes, void* stream) = 0;
  virtual void broadcast(void* buffer, size_t bytes, int root, void* stream) = 0;
  virtual void send(const void* buffer, size_t bytes, int peer, void* stream) = 0;
  virtual void recv(void* buffer, size_t bytes, int peer, void* stream) = 0;

  // Before the steps, so that nothing is made in one. Both are collective and may wait for all
  // ranks. reserve: what all_reduce_sum, all_gather and broadcast of up to `bytes` need. Without it
  // the first of them makes it, and must then not be recorded in a graph.
  virtual void reserve(size_t bytes) { (void)bytes; }
  // connect: the way of messages from rank `from` to rank `to`, of up to `bytes` each, `messages`
  // of them at once: one more waits, on the sender's stream, until the oldest has been received. On
  // a GPU no message goes without (kInternal). Again with more of either makes more room.
  virtual void connect(int from, int to, size_t bytes, int messages) {
    (void)from, (void)to, (void)bytes, (void)messages;
  }
  // Collective. Null, on every rank, where they have no such memory: ranks on several hosts, on one
  // GPU or on none, GPUs without access to each other.
  virtual std::unique_ptr<PeerMemory> share(size_t bytes) {
    (void)bytes;
    return nullptr;
  }
  // Whether the collectives (not send and recv) may be recorded in a CUDA graph. Graphs are to be
  // destroyed before the communicators in them, whose destructors wait for that.
  virtual bool capturable() const { return true; }
};

}  // namespace drover

// Communication between the ranks of a replica: collectives and point to point on device buffers.
// Implementations: mpi_comm (CPU), later nccl_comm. No arithmetic of the model lives here.
//
// Every call is ordered on the stream it is given; a buffer may be reused by later work on the
// same stream. send() never waits for its receiver (the CPU copies; NCCL has a stream of its own),
// so two stages may send to each other at once. Every rank of a communicator makes the same calls
// in the same order. Every wait has a deadline and ends when the interrupt is raised.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "base/dtype.h"

namespace drover {

class Comm {
 public:
  virtual ~Comm() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // Ranks with the same color form a communicator, ordered by key. color < 0: none (null).
  virtual std::unique_ptr<Comm> split(int color, int key, const std::string& name) = 0;
  // In place, element type f32 or bf16. All ranks get the same bits.
  virtual void all_reduce_sum(void* buffer, size_t count, Dtype type, void* stream) = 0;
  // out [size(), bytes]: rank i's bytes at place i.
  virtual void all_gather(const void* in, void* out, size_t bytes, void* stream) = 0;
  virtual void broadcast(void* buffer, size_t bytes, int root, void* stream) = 0;
  virtual void send(const void* buffer, size_t bytes, int peer, void* stream) = 0;
  virtual void recv(void* buffer, size_t bytes, int peer, void* stream) = 0;
};

}  // namespace drover

// MPI's life, and what the ranks have in common. The only room that includes mpi.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/interrupt.h"
#include "comm/comm.h"

namespace drover {

class Mailbox;
class Watchdog;

struct Peer {
  std::string host;
  int64_t pid = 0;
  uint64_t pid_namespace = 0;  // pids mean something only within one
};

class World {
 public:
  // MPI_Init_thread with MPI_THREAD_MULTIPLE (kEnvironment when MPI cannot give it), errors return.
  World();
  // Finalizes MPI unless leave() was not agreed: then MPI is left as it is (a peer is gone, and
  // MPI_Finalize would wait for it).
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int rank() const;
  int size() const;
  int local_rank() const;  // among the ranks of this host
  int local_size() const;
  const std::vector<Peer>& peers() const;  // of every rank

  // Communicator over all ranks for the backend's data, used by one thread. Every wait of it ends
  // after `seconds` with kLostPeer. `progress` may be null. Collective.
  std::unique_ptr<Comm> make_comm(Interrupt& interrupt, Progress* progress, double seconds);
  // Likewise for buffers of the GPU that is current on this thread (cudaSetDevice), one rank a GPU,
  // over NCCL. `stream` (cudaStream_t) is what start-up work runs on. Throws kEnvironment in a
  // build without NCCL; a world of one rank needs none. Its waits on the host end as make_comm's
  // do; what the GPU waits for in a kernel is for whoever waits for the stream. Its calls may come
  // from any thread, one at a time.
  std::unique_ptr<Comm> make_nccl_comm(Interrupt& interrupt, Progress* progress, double seconds,
                                       void* stream);
  // Likewise for ranks that share a GPU, which NCCL refuses: through pinned host memory and MPI.
  // Every call waits for its stream. kEnvironment in a build without CUDA. (It needs no stream of
  // its own; the arguments are make_nccl_comm's, so that the caller chooses by name.)
  std::unique_ptr<Comm> make_staged_comm(Interrupt& interrupt, Progress* progress, double seconds,
                                         void* stream);
  std::unique_ptr<Mailbox> make_mailbox();                         // collective
  std::unique_ptr<Watchdog> make_watchdog(Interrupt&, Progress&);  // collective
  // The smallest of everybody's values. Collective; ends like make_comm's waits.
  int64_t agree_min(int64_t value, const Interrupt& interrupt, double seconds);
  // Nobody leaves before everybody has come. Collective.
  void barrier(const Interrupt& interrupt, double seconds, const char* what);
  void set_finalize(bool yes);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Posted bytes between threads of ranks: plans down, results up. Any thread may post or poll; one
// thread polls a given channel on a given rank.
class Mailbox {
 public:
  enum class Channel : int { kPlan = 1, kResult = 2, kTimes = 3 };
  virtual ~Mailbox() = default;
  virtual int rank() const = 0;
  // Never waits; the bytes are kept until they have left.
  virtual void post(int peer, Channel channel, std::vector<std::byte> bytes) = 0;
  // False when nothing is there. `from` may be null.
  virtual bool poll(Channel channel, std::vector<std::byte>& bytes, int* from) = 0;
};

// Keep-alive and the first cause, on a thread of each rank.
//   - every rank beats to rank 0 and rank 0 beats back, twice a second;
//   - rank 0 raises the interrupt when a rank is silent, dead (same host), or computes without
//     progress for longer than its phase allows; a worker raises it when rank 0 is silent;
//   - an interrupt raised anywhere reaches rank 0 and from there everybody, with its first cause;
//   - SIGUSR1 on any rank reaches rank 0, which asks the interrupt's owner to stop; a second one,
//     two seconds later or more, raises it (kInvalidResult, as does the first while nobody heeds
//     it);
//   - a process whose threads do not come to leave() soon after an interrupt is ended from here.
class Watchdog {
 public:
  struct FirstCause {
    ExitCode code = ExitCode::kOk;
    std::string text;
    bool agreed = false;  // it is rank 0's word
  };
  virtual ~Watchdog() = default;  // stops the thread
  // After an interrupt: the first cause as rank 0 knows it, the same on every rank. This rank's own
  // when rank 0 is lost or does not answer within `seconds`.
  virtual FirstCause first_cause(double seconds) = 0;
  // Waits until every rank has come here too, or `seconds` are over. True: MPI_Finalize is safe.
  virtual bool leave(double seconds) = 0;
};

std::string mpi_version();   // needs no World
bool has_nccl();             // built with NCCL
std::string nccl_version();  // "2.28.3" of the library; "none" in a build without

// Ends what every NCCL communicator of this process waits for, kernels on the GPU too, and kernels
// that wait at peer memory (Comm::share); none may be used any more. For the way out of a failed
// run, once the interrupt is raised. Takes `seconds` at most: what NCCL has not freed by then is
// left to the end of the process.
void abort_all_nccl(double seconds = 1) noexcept;
// The first error that NCCL met on its own (a peer that is gone, on another host), or empty.
std::string nccl_async_error() noexcept;

// SIGTERM and SIGINT make the watchdog raise kLostPeer (or kEnvironment for SIGINT); SIGUSR1:
// see Watchdog. They wait until there is one: this blocks them on the calling thread and on all
// that it starts, so call it first, and only a watchdog's thread takes them.
void install_signal_handlers();

}  // namespace drover

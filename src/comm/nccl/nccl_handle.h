// One ncclComm_t: how it is made, called, and ended. Only for src/comm.
//
// Launching on a non-blocking NCCL communicator starts a thread for each call, so what is called in
// steps is blocking, and is made by splitting a non-blocking one: NCCL then makes it in the
// background, while we look at the deadline and the interrupt. A blocking call waits for its peers
// only when it first connects them: `guarded` does that on a thread of its own.
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "comm/gpu/cuda_error.h"

namespace drover {

// What all communicators of a rank have in common.
struct NcclContext {
  Interrupt& interrupt;
  Progress* progress;  // may be null
  double seconds;      // longest wait
  int world_rank;
  std::string host;
  int device;
  cudaStream_t stream;  // of start-up work
};

class NcclHandle {
 public:
  // Over the whole world, not blocking. Throws kLostPeer at the deadline, saying who waits.
  static std::unique_ptr<NcclHandle> init(const NcclContext& context, const std::string& name,
                                          int size, int rank, const ncclUniqueId& id);
  // Destroys it, or aborts it once the interrupt is raised; bounded, and never throws.
  ~NcclHandle();
  NcclHandle(const NcclHandle&) = delete;
  NcclHandle& operator=(const NcclHandle&) = delete;

  struct Kind {
    bool blocking = false;
    int most_ctas = 0;  // blocks of a kernel at most; 0: NCCL's choice
  };
  // Collective, on a handle that is not blocking. Null for color < 0.
  std::unique_ptr<NcclHandle> split(int color, int key, const std::string& name, Kind kind);

  int rank() const { return rank_; }
  int size() const { return size_; }
  const NcclContext& context() const { return context_; }

  // An NCCL call that does not wait for peers.
  template <class Call>
  void launch(const char* what, Call&& call) {
    context_.interrupt.check();
    ncclResult_t result;
    {
      const std::lock_guard lock(state_->mutex);
      if (state_->comm == nullptr) fail_aborted(what);
      result = call(state_->comm);
    }
    if (result != ncclSuccess) fail(what, result);
  }
  // Calls that may wait for peers on the host, and then for what they queued on `stream`. The copy
  // of `call` must own all it uses: at the deadline it is left where it is.
  void guarded(const char* what, cudaStream_t stream,
               const std::function<ncclResult_t(ncclComm_t)>& call);

  struct State {
    std::timed_mutex mutex;         // held in every NCCL call
    ncclComm_t comm = nullptr;      // null: not there yet, or ended
    std::string text;               // "'tensor' (rank 0 of 2: rank 3 on node7, GPU 3)"
    std::atomic<bool> left{false};  // a call hangs in it: not to be touched again
  };

 private:
  NcclHandle(const NcclContext& context, const std::string& name);
  void adopt();  // once it is made: its rank and size, and into the list of all
  void await(const char* what);
  // A call on a thread of its own, until the deadline; then it is left where it is, with what it
  // owns.
  ncclResult_t beside(const char* what, Deadline deadline,
                      const std::function<ncclResult_t(ncclComm_t)>& call);
  [[noreturn]] void fail(const char* what, ncclResult_t result) const;
  [[noreturn]] void fail_aborted(const char* what) const;
  std::string waiting_text(const char* what) const;

  NcclContext context_;
  std::string name_;
  int rank_ = 0, size_ = 1;
  std::shared_ptr<State> state_;
};

}  // namespace drover

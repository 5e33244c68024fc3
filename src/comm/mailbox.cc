#include <list>
#include <mutex>

#include "comm/mpi_check.h"
#include "comm/watchdog.h"

namespace drover {

namespace {

class MpiMailbox final : public Mailbox {
 public:
  MpiMailbox(MPI_Comm plans, MPI_Comm results) : comms_{plans, results} {
    DROVER_MPI(MPI_Comm_rank(plans, &rank_));
  }
  int rank() const override { return rank_; }

  void post(int peer, Channel channel, std::vector<std::byte> bytes) override {
    DROVER_CHECK(bytes.size() <= static_cast<size_t>(INT32_MAX), ExitCode::kInternal,
                 "a message of {} bytes is more than MPI can count", bytes.size());
    const std::lock_guard lock(mutex_);
    reap();
    pending_.push_back({std::move(bytes), MPI_REQUEST_NULL});
    auto& p = pending_.back();
    DROVER_MPI(MPI_Isend(p.bytes.data(), static_cast<int>(p.bytes.size()), MPI_BYTE, peer,
                         static_cast<int>(channel), comm(channel), &p.request));
  }

  bool poll(Channel channel, std::vector<std::byte>& bytes, int* from) override {
    int there = 0;
    MPI_Message message = MPI_MESSAGE_NULL;
    MPI_Status status;
    DROVER_MPI(MPI_Improbe(MPI_ANY_SOURCE, static_cast<int>(channel), comm(channel), &there,
                           &message, &status));
    if (there == 0) return false;
    int count = 0;
    DROVER_MPI(MPI_Get_count(&status, MPI_BYTE, &count));
    bytes.resize(static_cast<size_t>(count));
    DROVER_MPI(MPI_Mrecv(bytes.data(), count, MPI_BYTE, &message, &status));
    if (from != nullptr) *from = status.MPI_SOURCE;
    return true;
  }

 private:
  struct Pending {
    std::vector<std::byte> bytes;
    MPI_Request request;
  };
  MPI_Comm comm(Channel channel) const { return comms_[channel == Channel::kPlan ? 0 : 1]; }

  void reap() {
    for (auto p = pending_.begin(); p != pending_.end();) {
      int done = 0;
      DROVER_MPI(MPI_Test(&p->request, &done, MPI_STATUS_IGNORE));
      p = done != 0 ? pending_.erase(p) : std::next(p);
    }
  }

  // Plans and results have a communicator each, so that the leader and the worker of rank 0 do not
  // wait for each other inside MPI. Never freed: a mailbox lives as long as MPI.
  MPI_Comm comms_[2];
  int rank_ = 0;
  std::mutex mutex_;
  std::list<Pending> pending_;
};

}  // namespace

std::unique_ptr<Mailbox> make_mpi_mailbox(MPI_Comm plans, MPI_Comm results) {
  return std::make_unique<MpiMailbox>(plans, results);
}

}  // namespace drover

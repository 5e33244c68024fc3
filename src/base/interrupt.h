// How waits end: on time, at a deadline, or because some rank failed.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <string>

#include "base/error.h"

namespace drover {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

inline Deadline deadline_in(double seconds) {
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// The first cause of a failure, known on this rank. Any thread may raise it; the first one wins.
// Every wait in the program polls it, so that raising it ends all threads of the process.
class Interrupt {
 public:
  bool raised() const noexcept { return raised_.load(std::memory_order_acquire); }
  // Returns true if this call was the first.
  bool raise(ExitCode code, const std::string& cause);
  // Throws Error(code, cause) once raised.
  void check() const;
  ExitCode code() const;
  std::string cause() const;

  // The softer end: whoever runs something that can end at a safe point says so (`heed_stops`) and
  // looks at `asked_to_stop`. `ask_to_stop` returns false when nobody does: then there is nothing
  // to save, and the caller raises instead.
  bool ask_to_stop(const std::string& why);
  bool asked_to_stop() const noexcept { return asked_.load(std::memory_order_acquire); }
  std::string why_stop() const;
  void heed_stops();

 private:
  std::atomic<bool> raised_{false};
  std::atomic<bool> asked_{false};
  bool heeded_ = false;  // guarded by mutex_, as what follows
  std::string why_stop_;
  mutable std::mutex mutex_;
  ExitCode code_ = ExitCode::kOk;
  std::string cause_;
};

// What the watchdog tells of this rank: it advances whenever the worker gets something done. And
// what its communicators on the host took of the worker's time, in nanoseconds since the start.
struct Progress {
  std::atomic<uint64_t> ticks{0};
  std::atomic<bool> waiting{false};            // in a wait for a peer (the peer is to blame)
  std::atomic<const char*> phase{"start-up"};  // string literals only
  std::atomic<int> patience_seconds{120};      // longest time without a tick in this phase
  std::atomic<int64_t> communication_ns{0};    // collectives and sends, waits in them included
  std::atomic<int64_t> receive_ns{0};          // receives: waits for another stage
  // Start-up and loading are given time; steps are not.
  void enter(const char* name, int patience) noexcept {
    phase.store(name);
    patience_seconds.store(patience);
    tick();
  }
  void tick() noexcept { ticks.fetch_add(1, std::memory_order_relaxed); }
};

// Polls `ready` until it returns true: first hot, then yielding, then sleeping in steps of 20 to
// 200 us (ranks may share cores). Throws kLostPeer at the deadline, naming `what`; throws the
// interrupt's cause when it is raised.
void wait_until(const std::function<bool()>& ready, Deadline deadline, const Interrupt& interrupt,
                const char* what);

}  // namespace drover

// The leader: one thread on rank 0 that turns requests into plans and results into events.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/interrupt.h"
#include "comm/grid.h"
#include "sched/scheduler.h"

namespace drover {

class Mailbox;

// Called on the leader's thread, in the order things happened. Must return soon and not throw.
struct LeaderEvents {
  std::function<void(const FirstToken&)> first_token;
  std::function<void(const StreamedToken&)> streamed;
  std::function<void(Finished&&)> finished;
  std::function<void(LogitsBlock&&)> logits;
};

class Leader {
 public:
  // `mailbox` must outlive the leader. `step_seconds`: longest wait for one step's result.
  Leader(Mailbox& mailbox, const Grid& grid, const ReplicaLimits& limits, Interrupt& interrupt,
         double step_seconds);
  ~Leader();

  // Replaces the events; only while idle (before submit, or after drain).
  void listen(LeaderEvents events);
  // From any thread. Never waits. Throws kUsage when the request can never run (Scheduler::refuse).
  void submit(std::vector<Request> requests);
  // Waits until everything submitted has finished. Throws the interrupt's cause.
  void drain();
  // Tells all workers to stop and joins. Idempotent.
  void stop();

  // Sums over the replicas, since start or the last call of reset_counters; call while idle.
  SchedulerCounters counters() const;
  void reset_counters();
  // Seconds in which at least one step was in flight, and the workers' sum of step seconds.
  double busy_seconds() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace drover

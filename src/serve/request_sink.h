// What a session needs of the leader: requests go in, events come out. Leader is the one
// implementation of the program; tests of this room put their own behind it.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "sched/scheduler.h"
#include "serve/timeline.h"

namespace drover {

// Called on the sink's own thread, in the order things happened. Must return soon and not throw.
struct LeaderEvents {
  std::function<void(const FirstToken&)> first_token;
  std::function<void(const StreamedToken&)> streamed;
  std::function<void(Finished&&)> finished;
  std::function<void(LogitsBlock&&)> logits;
  std::function<void(const StepResult&)> step;  // every step's result, before its other events
};

class RequestSink {
 public:
  virtual ~RequestSink() = default;
  // Replaces the events; only while idle (before submit, or after drain).
  virtual void listen(LeaderEvents events) = 0;
  // Why a request can never run, or nothing (Scheduler::refuse). From any thread.
  virtual std::optional<std::string> refuse(const Request& request) const = 0;
  // From any thread. Never waits. Throws kUsage when a request can never run.
  virtual void submit(std::vector<Request> requests) = 0;
  // Waits until everything submitted has finished. Throws the interrupt's cause.
  virtual void drain() = 0;
  // The way to an early end. Nothing more is admitted; what is queued or comes later is dropped,
  // and nothing is told of it. What runs goes on to its end, or with `drop_running` is dropped too,
  // at the end of the steps that are on their way. From any thread; there is no way back.
  virtual void wind_down(bool drop_running) = 0;
  // Nothing that was submitted is unfinished, but for what was dropped. From any thread.
  virtual bool idle() const = 0;
  // Sums over the replicas, since start or the last call of reset_counters; call while idle.
  virtual SchedulerCounters counters() const = 0;
  // Likewise; after a reset it begins with the first plan.
  virtual Timeline timeline() const = 0;
  virtual void reset_counters() = 0;  // the timeline, too
  // Where each rank's time went since the last call, by rank; call while idle. Empty, with a
  // warning in the log, when not all ranks answer in time. Throws the interrupt's cause.
  virtual std::vector<RankTimes> rank_times() = 0;
};

}  // namespace drover

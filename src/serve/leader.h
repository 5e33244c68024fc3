// The leader: one thread on rank 0 that turns requests into plans and results into events.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/interrupt.h"
#include "comm/grid.h"
#include "sched/scheduler.h"
#include "serve/request_sink.h"

namespace drover {

class Mailbox;

class Leader : public RequestSink {
 public:
  // `mailbox` must outlive the leader. `step_seconds`: longest wait for one step's result.
  Leader(Mailbox& mailbox, const Grid& grid, const ReplicaLimits& limits, Interrupt& interrupt,
         double step_seconds);
  ~Leader() override;

  void listen(LeaderEvents events) override;
  std::optional<std::string> refuse(const Request& request) const override;
  void submit(std::vector<Request> requests) override;
  void drain() override;
  void wind_down(bool drop_running) override;
  bool idle() const override;
  // Tells all workers to stop and joins. Idempotent.
  void stop();

  SchedulerCounters counters() const override;
  Timeline timeline() const override;
  void reset_counters() override;
  std::vector<RankTimes> rank_times() override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace drover

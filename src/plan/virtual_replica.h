// The ranks of one replica as the scheduler sees them (src/CONTRACT.md), without tokens or
// arithmetic: slots, who decodes, who ends when, and what the rows of a step are. And their clocks:
// stages work one after the other on a step, each on the steps of all groups in order.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "plan/cost_model.h"
#include "sched/scheduler.h"

namespace drover {

// How long a replica's parts take, in seconds.
struct ReplicaCosts {
  int stages = 1;
  std::function<double(int stage, const StepWork&)> stage;
  std::function<double(double rows)> send;  // of the activations to the next stage
  double feedback = 0;                      // of sampled ids from the last stage to the first
};

class VirtualReplica {
 public:
  // `slowdown` [stages]: of each stage, by its slowest rank; 1: none.
  VirtualReplica(const ReplicaLimits& limits, const ReplicaCosts& costs,
                 std::vector<double> slowdown);

  struct Step {
    StepResult result;
    StepWork work;
    double begin = 0, end = 0;  // on the first stage; on the last
    double busy = 0;            // seconds of all stages together
  };
  // Applies the plan, which reaches the first rank at `arrival`. Throws kInternal when the plan
  // breaks the contract.
  Step run(const StepPlan& plan, double arrival);

  int64_t rows() const { return rows_; }
  int64_t live() const { return live_; }
  double busy(int stage) const { return busy_[static_cast<size_t>(stage)]; }  // seconds

 private:
  enum class State : uint8_t { kFree, kWaiting, kDecoding };
  struct Slot {
    State state = State::kFree;
    bool ended = false;
    int32_t group = 0, prompt = 0, max_new = 0, forced = 0;
    int32_t next = 0;     // position of its next row
    int32_t sampled = 0;  // new tokens
    SequenceId id = 0;
  };

  Slot& at(int32_t slot);
  void release(int32_t slot, State state);
  void sample(Slot& s, int32_t position, StepResult& result);
  void apply(const StepPlan& plan, Step& step);
  void clock(int32_t group, double arrival, Step& step);

  const ReplicaCosts& costs_;
  std::vector<double> slowdown_, busy_, free_at_;  // [stages]
  std::vector<double> fed_back_;                   // [groups]
  std::vector<Slot> slots_;
  std::vector<std::vector<int32_t>> decoding_;  // [groups] slots
  int64_t rows_ = 0, live_ = 0;
};

}  // namespace drover

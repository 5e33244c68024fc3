// A replica in its steady state, on paper: as many sequences as fit, each group's step with the
// rows of those who decode and its share of the prompts that replace those who end.
#pragma once

#include <vector>

#include "plan/replica_costs.h"
#include "plan/simulator.h"
#include "sched/scheduler.h"

namespace drover {

struct Workload {
  double prompt_tokens = 0, output_tokens = 0;  // means
  double prompt_pairs = 0;                      // mean of prompt * (prompt + 1) / 2
  double most_sequences = 0;                    // at once over all replicas; 0: as many as fit
};

struct Estimate {
  double sequences = 0;    // at once, of a replica
  StepWork step;           // of one group
  double decode_rows = 0;  // of these
  std::vector<StepCost> stages;
  double send_seconds = 0;   // of a step's activations to the next stage
  double round_seconds = 0;  // all groups once through all stages
  double step_seconds = 0;   // round / groups: what a new step begins every
  double tokens_per_s = 0;   // of all replicas
  double sums_share = 0;     // of the slowest stage's time
  double bubble = 0;         // share of the stages' time in which they wait
  int slowest = 0;           // stage
};

// `groups` at least the stages.
Estimate estimate(const GridShape& shape, const ReplicaLimits& limits, const Workload& workload,
                  const Rates& rates);

struct Steady {
  double tokens_per_s = 0;  // of all replicas
  double step_seconds = 0;  // a replica begins a step every so often
  double busy = 0;          // share of the stages' time
};
// One replica between ramp and drain, fed with `samples` in an order by a fixed seed.
Steady simulate_steady(const GridShape& shape, const ReplicaLimits& limits,
                       std::vector<Arrival> samples, double most_sequences, const Rates& rates);

// Sequences that fit by the KV cache alone, at their mean length while they run.
double sequences_that_fit(const ReplicaLimits& limits, const Workload& workload);

}  // namespace drover

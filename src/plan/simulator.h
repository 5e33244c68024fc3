// The scheduler of src/sched, as the leader uses it, over replicas in virtual time. What rank 0
// computes is computed (plans, results and their encoding, timed by the thread's own clock); what
// ranks compute is taken from a cost model. For the same input all but those timings are the same.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "comm/grid.h"
#include "plan/virtual_replica.h"
#include "sched/scheduler.h"

namespace drover {

struct Arrival {
  double at = 0;  // virtual seconds; ascending
  int32_t prompt = 0;
  int32_t max_new_tokens = 0;
  int32_t forced_length = 0;  // 0: none
};

struct SimulationInput {
  Grid grid;
  ReplicaLimits limits;
  ReplicaCosts costs;
  std::vector<Arrival> arrivals;
  double deadline = 0;  // QueueOrder::kDeadline: after arrival
  // Rank 0 handles one message after the other and takes so long for each, in virtual time.
  double plan_seconds = 10e-6, result_seconds = 5e-6;
  double message_seconds = 5e-6;  // of a plan or a result on its way
  // [replicas][stages] of each stage; empty: none slower.
  std::vector<std::vector<double>> slowdown;
  // Rank 0 measures its own time (a few hundred ns a message more real time).
  bool time_rank0 = false;
  // Every step as its result is taken; may be null.
  std::function<void(int replica, const VirtualReplica::Step&, double at)> on_step;
};

struct SequenceTimes {
  double arrival = 0, first = -1, end = -1;  // virtual seconds, as rank 0 sees them
  int32_t tokens = 0;
  int32_t replica = 0;
};

struct SimulationResult {
  std::vector<SequenceTimes> sequences;  // by arrival
  double seconds = 0;                    // first arrival to last end
  int64_t output_tokens = 0;
  // Three phases: until the first sequence ends, until the last one has begun, until all have
  // ended.
  struct Mark {
    double at = -1;     // virtual seconds
    double tokens = 0;  // sampled by then
    double steps = 0;   // with rows
    double busy = 0;    // seconds of all stages together
  };
  Mark ramp_end, drain_begin;
  double plans = 0, results = 0, plan_bytes = 0, result_bytes = 0;
  double busy = 0;  // share of the stages' time, over all
  std::vector<double> replica_end;
  SchedulerCounters counters;  // sums over replicas
  // Real seconds of rank 0's thread: submitting, planning and encoding, decoding and completing.
  double submit_cpu = 0, plan_cpu = 0, complete_cpu = 0;
  double busiest_second = 0;       // of them in one virtual second
  double virtual_leader_busy = 0;  // share of virtual time, by plan_seconds and result_seconds
};

// Throws kUsage when a sequence can never run.
SimulationResult simulate(const SimulationInput& input);

// LoadGen's arrivals: Offline issues all at once; Server waits between two queries by an
// exponential distribution of rate target_qps from its own generator (mt19937_64), seeded.
std::vector<double> server_arrivals(size_t count, double target_qps, uint64_t seed);

}  // namespace drover

// The global batch scheduler: continuous batching with chunked prefill, pages, preemption by
// recomputation, placement over replicas. Pure: no I/O, no clock, no threads, no MPI.
//
// The leader calls plan() for a replica whenever fewer than `steps_in_flight` plans of it are
// unanswered, sends the plan, and feeds what comes back into complete(). plan() runs ahead of the
// results: it counts on one new token per decoding sequence and step, learns of an end of sequence
// late, and then retires the slot (the surplus rows' tokens were dropped by the workers).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "sched/step.h"

namespace drover {

enum class Batching : uint8_t { kContinuous, kStatic };
enum class QueueOrder : uint8_t {
  kArrival,   // first come, first served
  kLongest,   // Offline: longest prompts first, within what is queued
  kDeadline,  // Server: earliest deadline first
};

struct ReplicaLimits {
  int32_t slots = 64;  // sequences at once
  int32_t pages = 0;   // of the KV pool
  int32_t page_tokens = 16;
  int32_t max_positions = 0;   // of the model (and of the workers' token buffers)
  int32_t groups = 1;          // sequences are spread over so many groups (>= pp)
  int32_t step_tokens = 512;   // rows of one step at most
  int32_t chunk_tokens = 512;  // rows of one sequence's chunk at most
  Batching batching = Batching::kContinuous;
  QueueOrder order = QueueOrder::kArrival;
};

struct Request {
  SequenceId id = 0;            // unique; chosen by the caller
  std::vector<int32_t> prompt;  // at least one token
  int32_t max_new_tokens = 0;   // at least 1
  int32_t forced_length = 0;    // hidden from every decision: only passed on
  bool ignore_eos = false;
  bool stream_tokens = false;
  bool want_logits = false;
  double deadline = 0;  // any monotonic unit; QueueOrder::kDeadline only
};

struct SchedulerCounters {
  // plan_rows = prefill_rows + decode_rows; recomputed_rows are those of prefill_rows that had been
  // planned before.
  uint64_t steps = 0, plan_rows = 0, prefill_rows = 0, decode_rows = 0, recomputed_rows = 0;
  uint64_t preemptions = 0, admitted = 0, finished = 0;
  int32_t peak_running = 0, peak_pages = 0;
};

class Scheduler {
 public:
  Scheduler(int replicas, const ReplicaLimits& limits);
  ~Scheduler();

  // Why a request can never run ("prompt of 900 tokens + 64 new ones needs 61 pages, the pool has
  // 40: raise --kv-memory"), or nothing. Check before submit.
  std::optional<std::string> refuse(const Request& r) const;
  // Queues the request with a replica: the one with the fewest outstanding tokens (prompt + bound
  // of new ones), free pages deciding between equals. Throws kUsage when refuse() has a reason.
  void submit(Request r);
  // Moves what is queued but not admitted, so that a long query is balanced after it arrived:
  // a replica that runs dry takes queued requests from the fullest. Called by plan().

  // The next plan of the replica. False: nothing to run in it (nothing queued, nothing running,
  // nothing to tell): the leader then sends none. `out` is cleared and reused.
  // A group with no rows is skipped in favour of the next one that has some.
  bool plan(int replica, StepPlan& out);
  // A result of the replica, in step order. Throws kInternal when it contradicts the plans.
  void complete(int replica, const StepResult& result);

  // Forgets what is queued and not admitted; returns how many. What is admitted goes on.
  size_t drop_queued();

  // True when every request has finished (its result has come) and all retirements were told.
  bool idle() const;
  bool idle(int replica) const;
  int64_t outstanding_tokens(int replica) const;
  int32_t free_pages(int replica) const;
  int32_t running(int replica) const;  // sequences that have a slot
  const SchedulerCounters& counters(int replica) const;
  SchedulerCounters counters() const;  // of all replicas: sums, and the largest peaks
  void reset_counters();               // of all replicas, to zero

 private:
  struct Replica;
  struct Load {
    int64_t outstanding = 0;
    int64_t queued = 0;
    bool busy = false;
  };
  void note(size_t replica);
  void steal(size_t thief);

  std::vector<std::unique_ptr<Replica>> replicas_;
  std::vector<Load> load_;  // of each replica
  ReplicaLimits limits_;
  uint64_t arrivals_ = 0;
  int64_t queued_ = 0;  // over all replicas
  int busy_ = 0;        // replicas that are not idle
};

}  // namespace drover

// Drives a Scheduler and simulated replicas to the end of a set of requests, every message going
// through the codec, results coming back late. For tests; reports through GoogleTest.
#pragma once

#include <gtest/gtest.h>

#include <deque>
#include <functional>
#include <map>
#include <random>

#include "sched/scheduler.h"
#include "sim_worker.h"

namespace drover::sim {

struct Case {
  ReplicaLimits limits;
  Model model;
  int replicas = 1;
  uint64_t seed = 1;
  bool lockstep = false;     // results come at once instead of up to groups + 1 steps late
  double arrive_rate = 1.0;  // chance of a request to arrive before each turn; 1: all at once
};

class Driver {
 public:
  explicit Driver(const Case& c)
      : case_(c),
        random_(c.seed),
        scheduler_(c.replicas, c.limits),
        flights_(static_cast<size_t>(c.replicas)) {
    for (int r = 0; r < c.replicas; ++r) workers_.emplace_back(c.limits, c.model);
  }

  // Runs all of `requests` and checks what comes out. Throws what the scheduler or a worker throws.
  void go(std::vector<Request> requests) {
    for (Request& r : requests) waiting_.push_back(std::move(r));
    std::uniform_real_distribution<double> chance(0, 1);
    const size_t all = waiting_.size();
    for (int64_t turn = 0; finished_.size() < all || !scheduler_.idle(); ++turn) {
      ASSERT_LT(turn, 20'000'000) << "no end in sight: " << finished_.size() << " of " << all;
      if (case_.arrive_rate >= 1) {
        while (!waiting_.empty()) arrive();
      } else if (!waiting_.empty() && chance(random_) < case_.arrive_rate) {
        arrive();
      }
      const int replica = static_cast<int>(random_() % static_cast<uint64_t>(case_.replicas));
      step(replica);
    }
    check_end(all);
  }

  Scheduler& scheduler() { return scheduler_; }
  const std::vector<Worker>& workers() const { return workers_; }
  const std::vector<SequenceId>& finish_order() const { return order_; }

  // Called with every plan, before it runs.
  std::function<void(int replica, const StepPlan&)> on_plan;

 private:
  void arrive() {
    Request r = std::move(waiting_.front());
    waiting_.pop_front();
    expected_[r.id] = expected_tokens(case_.model, r);
    scheduler_.submit(std::move(r));
  }

  void step(int replica) {
    auto& flight = flights_[static_cast<size_t>(replica)];
    const size_t ahead = case_.lockstep ? 1 : static_cast<size_t>(case_.limits.groups) + 1;
    bool planned = false;
    if (flight.size() < ahead) planned = plan(replica);
    // Late by chance, but in the end all results must come.
    const bool full = flight.size() >= ahead || !planned;
    while (!flight.empty() && (full || case_.lockstep || random_() % 3 == 0)) {
      answer(replica, flight.front());
      flight.pop_front();
      if (random_() % 2 == 0 && !case_.lockstep) break;
    }
  }

  bool plan(int replica) {
    StepPlan plan;
    if (!scheduler_.plan(replica, plan)) return false;
    std::vector<std::byte> bytes;
    encode(plan, bytes);
    plan = decode_plan(bytes);
    if (on_plan) on_plan(replica, plan);
    Worker& worker = workers_[static_cast<size_t>(replica)];
    StepResult result = worker.apply(plan);
    EXPECT_EQ(worker.pages_in_use() + scheduler_.free_pages(replica) >= case_.limits.pages, true);
    encode(result, bytes);
    flights_[static_cast<size_t>(replica)].push_back(decode_result(bytes));
    return true;
  }

  void answer(int replica, const StepResult& result) {
    scheduler_.complete(replica, result);
    for (const FirstToken& f : result.first) {
      EXPECT_TRUE(first_.emplace(f.id, f.token).second) << "two first tokens of " << f.id;
      EXPECT_EQ(f.token, expected_.at(f.id).front());
    }
    for (const StreamedToken& t : result.streamed) streamed_[t.id].push_back(t.token);
    for (const Finished& f : result.finished) {
      EXPECT_EQ(f.tokens, expected_.at(f.id)) << "sequence " << f.id;
      EXPECT_TRUE(first_.contains(f.id));
      if (streamed_.contains(f.id)) {
        EXPECT_EQ(streamed_[f.id], f.tokens);
      }
      EXPECT_TRUE(finished_.emplace(f.id, true).second) << "sequence " << f.id << " ended twice";
      order_.push_back(f.id);
    }
  }

  void check_end(size_t all) {
    uint64_t admitted = 0, finished = 0;
    for (int r = 0; r < case_.replicas; ++r) {
      const SchedulerCounters& c = scheduler_.counters(r);
      admitted += c.admitted;
      finished += c.finished;
      EXPECT_TRUE(scheduler_.idle(r));
      EXPECT_EQ(scheduler_.free_pages(r), case_.limits.pages);
      EXPECT_EQ(scheduler_.outstanding_tokens(r), 0);
      EXPECT_EQ(c.plan_rows, c.prefill_rows + c.decode_rows);
      EXPECT_EQ(workers_[static_cast<size_t>(r)].live(), 0);
      EXPECT_EQ(workers_[static_cast<size_t>(r)].pages_in_use(), 0);
      EXPECT_LE(c.peak_pages, case_.limits.pages);
      EXPECT_LE(c.peak_running, case_.limits.slots);
    }
    EXPECT_EQ(admitted, all);
    EXPECT_EQ(finished, all);
  }

  Case case_;
  std::mt19937_64 random_;
  Scheduler scheduler_;
  std::vector<Worker> workers_;
  std::vector<std::deque<StepResult>> flights_;
  std::deque<Request> waiting_;
  std::map<SequenceId, std::vector<int32_t>> expected_, streamed_;
  std::map<SequenceId, int32_t> first_;
  std::map<SequenceId, bool> finished_;
  std::vector<SequenceId> order_;
};

// A request with a prompt made of its id.
inline Request make_request(SequenceId id, int32_t prompt, int32_t max_new) {
  Request r;
  r.id = id;
  for (int32_t i = 0; i < prompt; ++i) {
    r.prompt.push_back(static_cast<int32_t>(mix(id, static_cast<uint64_t>(i)) % 999) + 1);
  }
  r.max_new_tokens = max_new;
  return r;
}

}  // namespace drover::sim

#include "plan/simulator.h"

#include <time.h>

#include <algorithm>
#include <queue>
#include <random>

#include "base/error.h"

namespace drover {

namespace {

double thread_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Adds up this thread's time, less what looking at the clock costs.
class Stopwatch {
 public:
  explicit Stopwatch(bool on) : on_(on) {
    if (!on_) return;
    constexpr int kLooks = 2000;
    const double begin = thread_seconds();
    for (int i = 0; i < kLooks; ++i) (void)thread_seconds();
    look_ = (thread_seconds() - begin) / kLooks;
  }
  void start() {
    if (on_) begin_ = thread_seconds();
  }
  void stop(double& sum) {
    if (on_) sum += std::max(0.0, thread_seconds() - begin_ - look_);
  }

 private:
  bool on_;
  double look_ = 0, begin_ = 0;
};

class Simulation {
 public:
  explicit Simulation(const SimulationInput& in)
      : in_(in),
        scheduler_(in.grid.dp, in.limits),
        in_flight_(static_cast<size_t>(in.grid.dp)),
        watch_(in.time_rank0) {
    DROVER_CHECK(!in.arrivals.empty(), ExitCode::kUsage, "nothing to simulate: no sequences");
    for (int r = 0; r < in.grid.dp; ++r) {
      auto slowdown = in.slowdown.empty()
                          ? std::vector<double>(static_cast<size_t>(in.costs.stages), 1.0)
                          : in.slowdown[static_cast<size_t>(r)];
      replicas_.emplace_back(in.limits, in.costs, std::move(slowdown));
    }
    out_.sequences.resize(in.arrivals.size());
    out_.replica_end.resize(static_cast<size_t>(in.grid.dp));
  }

  SimulationResult run() {
    for (;;) {
      const double arrival = next_ < in_.arrivals.size() ? in_.arrivals[next_].at : kNever;
      const double result = results_.empty() ? kNever : results_.top().at;
      if (arrival == kNever && result == kNever) break;
      now_ = std::max(now_, std::min(arrival, result));
      // As the leader's loop: all that has arrived, then plans, then results.
      take_arrivals();
      send_plans();
      if (!results_.empty() && results_.top().at <= now_) take_result();
      send_plans();
      if (in_.time_rank0) note_load();
    }
    DROVER_CHECK(scheduler_.idle(), ExitCode::kInternal,
                 "the simulation ended with work left in the scheduler");
    return finish();
  }

 private:
  static constexpr double kNever = 1e300;
  struct Due {
    double at = 0;
    uint64_t order = 0;
    int replica = 0;
    bool operator>(const Due& o) const { return at != o.at ? at > o.at : order > o.order; }
  };

  void take_arrivals() {
    while (next_ < in_.arrivals.size() && in_.arrivals[next_].at <= now_) {
      const Arrival& a = in_.arrivals[next_];
      Request r;
      r.id = next_;
      r.prompt.resize(static_cast<size_t>(a.prompt));
      r.max_new_tokens = a.max_new_tokens;
      r.forced_length = a.forced_length;
      r.ignore_eos = a.forced_length > 0;
      r.deadline = a.at + in_.deadline;
      out_.sequences[next_].arrival = a.at;
      watch_.start();
      scheduler_.submit(std::move(r));
      watch_.stop(out_.submit_cpu);
      ++next_;
      asked_ = false;
    }
  }

  // Plans of a replica that may be unanswered: as the leader has it.
  bool may_send(size_t r) const {
    return static_cast<int32_t>(in_flight_[r].size()) < in_.limits.groups + 1;
  }

  // The leader asks every replica that may have another plan, in each turn of its loop.
  void send_plans() {
    if (asked_) return;
    asked_ = true;
    watch_.start();
    for (int r = 0; r < in_.grid.dp; ++r) {
      const auto i = static_cast<size_t>(r);
      while (may_send(i) && scheduler_.plan(r, plan_)) {
        encode(plan_, bytes_);
        watch_.stop(out_.plan_cpu);
        send(r);
        watch_.start();
      }
    }
    watch_.stop(out_.plan_cpu);
  }

  void send(int r) {
    const auto i = static_cast<size_t>(r);
    busy(in_.plan_seconds);
    out_.plan_bytes += static_cast<double>(bytes_.size());
    ++out_.plans;
    in_flight_[i].push(replicas_[i].run(plan_, now_ + in_.message_seconds));
    if (in_flight_[i].size() == 1) expect(r);
  }

  // The first unanswered step of the replica is what rank 0 hears of next.
  void expect(int r) {
    const auto& step = in_flight_[static_cast<size_t>(r)].front();
    results_.push({std::max(step.end + in_.message_seconds, 0.0), orders_++, r});
  }

  void take_result() {
    const int r = results_.top().replica;
    results_.pop();
    const auto i = static_cast<size_t>(r);
    const VirtualReplica::Step step = std::move(in_flight_[i].front());
    in_flight_[i].pop();
    encode(step.result, bytes_);  // by the last stage, not by rank 0
    busy(in_.result_seconds);
    watch_.start();
    const StepResult result = decode_result(bytes_);
    scheduler_.complete(r, result);
    watch_.stop(out_.complete_cpu);
    ++out_.results;
    out_.result_bytes += static_cast<double>(bytes_.size());
    mark_.at = now_;
    mark_.tokens += step.work.sampled;
    mark_.steps += step.work.rows > 0 ? 1 : 0;
    mark_.busy += step.busy;
    deliver(r, result);
    if (in_.on_step) in_.on_step(r, step, now_);
    if (!in_flight_[i].empty()) expect(r);
    asked_ = false;
  }

  void deliver(int r, const StepResult& result) {
    for (const FirstToken& t : result.first) {
      SequenceTimes& s = out_.sequences[t.id];
      DROVER_CHECK(s.first < 0, ExitCode::kInternal, "sequence {} began twice", t.id);
      s.first = now_;
      s.replica = r;
      out_.drain_begin = mark_;
    }
    for (const Finished& f : result.finished) {
      SequenceTimes& s = out_.sequences[f.id];
      DROVER_CHECK(s.first >= 0 && s.end < 0, ExitCode::kInternal, "sequence {} ended out of turn",
                   f.id);
      s.end = now_;
      if (out_.ramp_end.at < 0) out_.ramp_end = mark_;
      s.tokens = static_cast<int32_t>(f.tokens.size());
      out_.output_tokens += s.tokens;
      out_.replica_end[static_cast<size_t>(r)] = now_;
    }
  }

  // What rank 0 has computed by now, for the busiest second.
  void note_load() {
    const auto second = static_cast<size_t>(now_);
    const double sum = out_.submit_cpu + out_.plan_cpu + out_.complete_cpu;
    if (second >= load_.size()) load_.resize(second + 1);
    load_[second] += sum - noted_;
    noted_ = sum;
  }

  void busy(double seconds) {
    now_ += seconds;
    out_.virtual_leader_busy += seconds;
  }

  SimulationResult finish() {
    double last = 0, stages = 0;
    for (const SequenceTimes& s : out_.sequences) {
      DROVER_CHECK(s.end >= 0, ExitCode::kInternal, "a sequence never ended");
      last = std::max(last, s.end);
    }
    out_.seconds = last - in_.arrivals.front().at;
    for (auto& replica : replicas_) {
      for (int stage = 0; stage < in_.costs.stages; ++stage) stages += replica.busy(stage);
    }
    out_.busy = stages / (out_.seconds * in_.costs.stages * in_.grid.dp);
    out_.virtual_leader_busy /= out_.seconds;
    for (const double seconds : load_) out_.busiest_second = std::max(out_.busiest_second, seconds);
    out_.counters = scheduler_.counters();
    return std::move(out_);
  }

  const SimulationInput& in_;
  Scheduler scheduler_;
  std::vector<VirtualReplica> replicas_;
  std::vector<std::queue<VirtualReplica::Step>> in_flight_;
  std::priority_queue<Due, std::vector<Due>, std::greater<>> results_;
  uint64_t orders_ = 0;
  size_t next_ = 0;  // arrival
  double now_ = 0;
  SimulationResult::Mark mark_;  // now
  std::vector<double> load_;     // rank 0's seconds in each virtual second
  double noted_ = 0;
  bool asked_ = false;  // every replica, since something changed
  StepPlan plan_;
  std::vector<std::byte> bytes_;
  Stopwatch watch_;
  SimulationResult out_;
};

}  // namespace

SimulationResult simulate(const SimulationInput& input) { return Simulation(input).run(); }

std::vector<double> server_arrivals(size_t count, double target_qps, uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::exponential_distribution<double> wait(target_qps);
  std::vector<double> at(count);
  double now = 0;
  for (auto& t : at) t = now += wait(generator);
  return at;
}

}  // namespace drover

// What the scheduler costs the leader. Limits (one core of an ordinary server): decode-only plan
// 5 us, full plan 50 us, both with 1,024 running sequences. `bytes` are of the encoded plan.
#include <benchmark/benchmark.h>

#include <chrono>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "../unit/sim_worker.h"
#include "sched/scheduler.h"

namespace drover::sim {
namespace {

constexpr int32_t kRunning = 1024;

ReplicaLimits big() {
  ReplicaLimits l;
  l.slots = kRunning;
  l.pages = 200'000;
  l.page_tokens = 16;
  l.max_positions = 4096;
  l.step_tokens = 2048;
  l.chunk_tokens = 512;
  return l;
}

Request request(SequenceId id, int32_t prompt, int32_t max_new) {
  Request r;
  r.id = id;
  r.prompt.assign(static_cast<size_t>(prompt), 1);
  r.max_new_tokens = max_new;
  r.ignore_eos = true;
  return r;
}

// Adds up what is to be timed; pausing the benchmark's own clock costs more than a plan.
class Stopwatch {
 public:
  void start() { begin_ = std::chrono::steady_clock::now(); }
  void stop() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }
  double take() { return std::exchange(seconds_, 0.0); }

 private:
  std::chrono::steady_clock::time_point begin_;
  double seconds_ = 0;
};

struct Sums {
  double plans = 0, bytes = 0, admitted = 0, retired = 0, grants = 0, chunks = 0;
  void add(const StepPlan& plan, size_t encoded) {
    ++plans;
    bytes += static_cast<double>(encoded);
    admitted += static_cast<double>(plan.admitted.size());
    retired += static_cast<double>(plan.retired.size());
    grants += static_cast<double>(plan.grants.size());
    chunks += static_cast<double>(plan.chunks.size());
  }
  void report(benchmark::State& state) const {
    state.counters["bytes"] = bytes / plans;
    state.counters["admitted"] = admitted / plans;
    state.counters["retired"] = retired / plans;
    state.counters["grants"] = grants / plans;
    state.counters["chunks"] = chunks / plans;
  }
};

// Everybody decodes; the time is that of plan() and encode(). aligned: all cross a page at once, in
// every 16th plan, which is left out; else the crossings are spread and their grants counted in.
void BM_DecodeOnly(benchmark::State& state) {
  const auto running = static_cast<int32_t>(state.range(0));
  const bool aligned = state.range(1) != 0;
  std::optional<Scheduler> s;
  std::mt19937 random(1);
  StepPlan plan;
  std::vector<std::byte> bytes;
  Stopwatch watch;
  Sums sums;
  SequenceId id = 0;
  int left = 0;
  const auto step = [&] {
    watch.start();
    s->plan(0, plan);
    encode(plan, bytes);
    watch.stop();
    StepResult result;  // nobody has ended
    result.step = plan.step;
    s->complete(0, result);
  };
  for (auto _ : state) {
    if (left <= 0) {
      s.emplace(1, big());
      for (int32_t i = 0; i < running; ++i) {
        s->submit(request(++id, aligned ? 1 : 1 + static_cast<int32_t>(random() % 16), 3000));
      }
      do step();
      while (!plan.chunks.empty());
      left = 2900;
    }
    do {
      watch.take();
      step();
      --left;
    } while (aligned && !plan.grants.empty());
    state.SetIterationTime(watch.take());
    sums.add(plan, bytes.size());
  }
  sums.report(state);
}

// Every plan admits, chunks, grants and retires: short sequences take each other's places among
// 1,024. The time is that of complete(), plan() and encode().
void BM_FullPlan(benchmark::State& state) {
  Scheduler s(1, big());
  Worker worker(big(), Model{1, 1000, 0.0});
  std::mt19937 random(1);
  StepPlan plan;
  StepResult result;
  std::vector<std::byte> bytes;
  Stopwatch watch;
  Sums sums;
  SequenceId id = 0;
  uint64_t queued = 0;
  double running = 0;
  const auto step = [&] {
    for (; queued < s.counters(0).admitted + 200; ++queued) {
      s.submit(request(++id, 1 + static_cast<int32_t>(random() % 49),
                       1 + static_cast<int32_t>(random() % 95)));
    }
    watch.start();
    if (id > 200) s.complete(0, result);
    s.plan(0, plan);
    encode(plan, bytes);
    watch.stop();
    result = worker.apply(plan);
  };
  for (int i = 0; i < 300; ++i) step();
  for (auto _ : state) {
    watch.take();
    step();
    state.SetIterationTime(watch.take());
    sums.add(plan, bytes.size());
    running += worker.live();
  }
  sums.report(state);
  state.counters["running"] = running / sums.plans;
}

// Replicas driven from one thread, each with up to 64 sequences and a queue, from the submission of
// all requests to the end. us_per_plan is what the leader pays: plan(), encode(), and for the
// result decode_result() and complete(). submit_us: of one request.
void BM_ManyReplicas(benchmark::State& state) {
  const auto replicas = static_cast<int>(state.range(0));
  ReplicaLimits l = big();
  l.slots = 64;
  l.step_tokens = 512;
  l.pages = 2048;
  std::mt19937 random(1);
  Sums sums;
  for (auto _ : state) {
    Scheduler s(replicas, l);
    std::vector<Worker> workers;
    for (int r = 0; r < replicas; ++r) workers.emplace_back(l, Model{1, 1000, 0.0});
    std::vector<std::vector<std::byte>> results(static_cast<size_t>(replicas));
    std::vector<std::byte> bytes;
    StepPlan plan;
    Stopwatch watch;
    const int requests = 100 * replicas;
    for (int i = 0; i < requests; ++i) {
      Request r = request(static_cast<SequenceId>(i), 20 + static_cast<int32_t>(random() % 400),
                          10 + static_cast<int32_t>(random() % 400));
      watch.start();
      s.submit(std::move(r));
      watch.stop();
    }
    state.counters["submit_us"] = watch.take() * 1e6 / requests;
    for (bool any = true; any;) {
      any = false;
      for (int r = 0; r < replicas; ++r) {
        auto& late = results[static_cast<size_t>(r)];
        watch.start();
        if (!late.empty()) s.complete(r, decode_result(late));
        const bool planned = s.plan(r, plan);
        if (planned) encode(plan, bytes);
        watch.stop();
        late.clear();
        if (!planned) continue;
        any = true;
        sums.add(plan, bytes.size());
        encode(workers[static_cast<size_t>(r)].apply(plan), late);
      }
    }
    if (!s.idle()) state.SkipWithError("not all requests have finished");
    const double seconds = watch.take();
    state.SetIterationTime(seconds);
    state.counters["us_per_plan"] = seconds * 1e6 / sums.plans;
  }
  sums.report(state);
  state.counters["plans"] = sums.plans;
}

BENCHMARK(BM_DecodeOnly)
    ->ArgsProduct({{8, 64, kRunning}, {0, 1}})
    ->ArgNames({"running", "aligned"})
    ->Iterations(20'000)
    ->UseManualTime();
BENCHMARK(BM_FullPlan)->Iterations(5'000)->UseManualTime();
BENCHMARK(BM_ManyReplicas)
    ->Arg(1)
    ->Arg(1000)
    ->ArgName("replicas")
    ->Iterations(1)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace drover::sim

BENCHMARK_MAIN();

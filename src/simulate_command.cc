// drover simulate: a run in virtual time. Plans and results are the real scheduler's and codec's,
// the ranks' times the cost model's; rank 0's own time is measured while it makes the plans.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <numeric>
#include <random>

#include "base/error.h"
#include "base/host.h"
#include "command_line.h"
#include "commands.h"
#include "planning.h"
#include "serve/results.h"

namespace drover {

namespace {

// Rank 0 should leave half of a core to LoadGen's callbacks and MPI.
constexpr double kMostLoad = 0.5;

std::vector<OptionRow> simulate_options() {
  auto table = planning_options();
  const std::vector<OptionRow> own{
      {"scenario", "offline",
       "offline (one query of all samples), server or interactive (Poisson), as LoadGen issues"},
      {"samples", "0", "use the first so many samples (0: all)"},
      {"queries", "0", "sequences in all; samples are repeated (0: each sample once)"},
      {"target-qps", "0", "server, interactive: queries a second"},
      {"seed", "1", "of arrivals, order and stragglers"},
      {"sort", "yes", "Offline: longest prompts first within what is queued"},
      {"ttft-ms", "0", "limit on the time to first token (0: 2000; interactive 450)"},
      {"tpot-ms", "0", "limit on the time per output token (0: 200; interactive 40)"},
      {"stragglers", "", "N:FACTOR: so many ranks, chosen by the seed, take FACTOR times as long"},
      {"step-ms", "0", "every stage takes this for a step instead of the cost model's time"},
      {"leader-us", "15", "virtual time of rank 0 for a plan and its result"},
  };
  table.insert(table.begin(), own.begin(), own.end());
  return table;
}

struct Straggling {
  int ranks = 0;
  double factor = 1;
};

Straggling stragglers_of(const Options& o, int ranks) {
  Straggling s;
  const std::string text = o.text("stragglers");
  if (text.empty()) return s;
  int used = 0;
  DROVER_CHECK(std::sscanf(text.c_str(), "%d:%lf%n", &s.ranks, &s.factor, &used) == 2 &&
                   static_cast<size_t>(used) == text.size() && s.ranks >= 0 && s.ranks <= ranks &&
                   s.factor >= 1 && s.factor <= 1e3,
               ExitCode::kUsage,
               "--stragglers {}: expected N:FACTOR with at most {} ranks and a factor from 1 to "
               "1000, such as 8:1.5",
               text, ranks);
  return s;
}

// A stage is as slow as its slowest rank.
std::vector<std::vector<double>> slowdown_of(const Grid& grid, const Straggling& s, uint64_t seed) {
  std::vector<std::vector<double>> all(static_cast<size_t>(grid.dp),
                                       std::vector<double>(static_cast<size_t>(grid.pp), 1.0));
  std::vector<int> ranks(static_cast<size_t>(grid.ranks()));
  std::iota(ranks.begin(), ranks.end(), 0);
  std::mt19937_64 random(seed);
  std::shuffle(ranks.begin(), ranks.end(), random);
  for (int i = 0; i < s.ranks; ++i) {
    const int rank = ranks[static_cast<size_t>(i)];
    all[static_cast<size_t>(grid.replica_of(rank))][static_cast<size_t>(grid.stage_of(rank))] =
        s.factor;
  }
  return all;
}

// What the simulation holds at once, before it is allocated: page pools, slots, queued prompts.
void check_memory(const SizedGrid& g, const std::vector<Arrival>& arrivals) {
  double bytes = g.grid.dp * (200.0 * g.limits.slots + 4.0 * g.limits.pages);
  for (const Arrival& a : arrivals) bytes += 200 + 4.0 * a.prompt;
  DROVER_CHECK(bytes < 0.7 * static_cast<double>(memory_total_bytes()), ExitCode::kEnvironment,
               "this simulation takes about {:.0f} GB, more than this machine should give: lower "
               "--queries, --max-sequences or --kv-memory",
               bytes / 1e9);
}

struct Traffic {
  bool server = false;
  double qps = 0, ttft_limit = 0, tpot_limit = 0;  // seconds
  std::vector<Arrival> arrivals;
};

Traffic traffic_of(const Options& o, const std::vector<Arrival>& samples) {
  Traffic t;
  const std::string scenario = o.text("scenario");
  DROVER_CHECK(scenario == "offline" || scenario == "server" || scenario == "interactive",
               ExitCode::kUsage, "--scenario {}: expected offline, server or interactive",
               scenario);
  t.server = scenario != "offline";
  const auto limit = [&](const char* name, double usual, double interactive) {
    const double given = o.number(name, 0, 1e9);
    return (given > 0 ? given : scenario == "interactive" ? interactive : usual) / 1e3;
  };
  t.ttft_limit = limit("ttft-ms", 2000, 450);
  t.tpot_limit = limit("tpot-ms", 200, 40);
  const auto used = static_cast<size_t>(o.integer("samples", 0, 1 << 24));
  DROVER_CHECK(used <= samples.size(), ExitCode::kUsage, "--samples {}: there are {}", used,
               samples.size());
  std::vector<Arrival> set(samples.begin(),
                           used == 0 ? samples.end() : samples.begin() + static_cast<long>(used));
  const auto queries = static_cast<size_t>(o.integer("queries", 0, 1 << 26));
  const size_t count = queries == 0 ? set.size() : queries;
  const auto seed = static_cast<uint64_t>(o.integer("seed", 0, INT64_MAX));
  t.qps = o.number("target-qps", 0, 1e9);
  DROVER_CHECK(!t.server || t.qps > 0, ExitCode::kUsage,
               "--scenario {} needs --target-qps: queries a second", scenario);
  std::vector<double> at(count, 0.0);
  if (t.server) at = server_arrivals(count, t.qps, seed);
  std::mt19937_64 order(seed + 1);
  while (t.arrivals.size() < count) {
    // Whole sets, each in an order of its own (LoadGen's sample_concatenate_permutation).
    if (t.server) std::shuffle(set.begin(), set.end(), order);
    for (size_t i = 0; i < set.size() && t.arrivals.size() < count; ++i) {
      Arrival a = set[i];
      a.at = at[t.arrivals.size()];
      t.arrivals.push_back(a);
    }
  }
  return t;
}

struct Tails {
  double p50 = 0, p90 = 0, p99 = 0;
  explicit Tails(const std::vector<double>& values)
      : p50(percentile(values, 0.5)), p90(percentile(values, 0.9)), p99(percentile(values, 0.99)) {}
  Json json() const { return {{"p50", p50}, {"p90", p90}, {"p99", p99}}; }
};

struct Report {
  Tails ttft, tpot;
  double tokens_per_s = 0, steady = 0;  // whole; between ramp and drain
  double plans_per_s = 0, steps_per_s_replica = 0;
  double load = 0;  // of rank 0, share of one core
};

std::vector<double> ttft_ms(const SimulationResult& r) {
  std::vector<double> all;
  for (const auto& s : r.sequences) all.push_back(1e3 * (s.first - s.arrival));
  return all;
}
std::vector<double> tpot_ms(const SimulationResult& r) {
  std::vector<double> all;
  for (const auto& s : r.sequences) {
    if (s.tokens > 1) all.push_back(1e3 * (s.end - s.first) / (s.tokens - 1));
  }
  if (all.empty()) all.push_back(0);
  return all;
}

Report report_of(const SimulationResult& r, const Grid& grid) {
  Report p{.ttft = Tails(ttft_ms(r)), .tpot = Tails(tpot_ms(r))};
  p.tokens_per_s = static_cast<double>(r.output_tokens) / r.seconds;
  if (r.drain_begin.at > r.ramp_end.at) {
    p.steady = (r.drain_begin.tokens - r.ramp_end.tokens) / (r.drain_begin.at - r.ramp_end.at);
  }
  p.plans_per_s = r.plans / r.seconds;
  p.steps_per_s_replica = p.plans_per_s / grid.dp;
  p.load = (r.submit_cpu + r.plan_cpu + r.complete_cpu) / r.seconds;
  return p;
}

// What is the same for the same input and seed.
Json figures_json(const SimulationResult& r, const Report& p) {
  return {{"sequences", r.sequences.size()},
          {"output_tokens", r.output_tokens},
          {"seconds", r.seconds},
          {"output_tokens_per_second", p.tokens_per_s},
          {"steady_tokens_per_second", p.steady},
          {"ramp_s", r.ramp_end.at},
          {"drain_s", r.seconds - r.drain_begin.at},
          {"ttft_ms", p.ttft.json()},
          {"tpot_ms", p.tpot.json()},
          {"stages_busy", r.busy},
          {"preemptions", r.counters.preemptions},
          {"prefill_rows", r.counters.prefill_rows},
          {"decode_rows", r.counters.decode_rows},
          {"peak_running", r.counters.peak_running},
          {"peak_pages", r.counters.peak_pages},
          {"plans", r.plans},
          {"plans_per_s", p.plans_per_s},
          {"messages_per_s", (r.plans + r.results) / r.seconds},
          {"plan_bytes_per_s", r.plan_bytes / r.seconds},
          {"result_bytes_per_s", r.result_bytes / r.seconds}};
}

Json rank0_json(const SimulationResult& r, const Report& p) {
  return {{"load", p.load},
          {"load_of_busiest_second", r.busiest_second},
          {"us_per_plan", 1e6 * r.plan_cpu / r.plans},
          {"us_per_result", 1e6 * r.complete_cpu / r.results},
          {"us_per_submit", 1e6 * r.submit_cpu / static_cast<double>(r.sequences.size())},
          {"plan_cpu_s", r.plan_cpu},
          {"complete_cpu_s", r.complete_cpu},
          {"submit_cpu_s", r.submit_cpu}};
}

void print(const SimulationResult& r, const Report& p, const Traffic& t, const Grid& grid) {
  std::cout << fmt::format(
      "{} sequences, {} tokens in {:.2f} s of virtual time\n"
      "  output tokens/s        {:.1f} in all, {:.1f} between ramp ({:.2f} s) and drain ({:.2f} "
      "s)\n"
      "  time to first token    p50 {:.1f} ms, p90 {:.1f}, p99 {:.1f}\n"
      "  time per output token  p50 {:.2f} ms, p90 {:.2f}, p99 {:.2f}\n"
      "  stages                 {:.1f} % busy; {:.1f} steps/s a replica; {} preemptions\n",
      r.sequences.size(), r.output_tokens, r.seconds, p.tokens_per_s, p.steady, r.ramp_end.at,
      r.seconds - r.drain_begin.at, p.ttft.p50, p.ttft.p90, p.ttft.p99, p.tpot.p50, p.tpot.p90,
      p.tpot.p99, 100 * r.busy, p.steps_per_s_replica, r.counters.preemptions);
  if (t.server) {
    const bool good = p.ttft.p99 <= 1e3 * t.ttft_limit && p.tpot.p99 <= 1e3 * t.tpot_limit;
    std::cout << fmt::format(
        "  limits                 p99 {:.0f} ms to the first token, {:.0f} a "
        "token: {} at {} queries/s\n",
        1e3 * t.ttft_limit, 1e3 * t.tpot_limit, good ? "met" : "NOT met", t.qps);
  }
  auto ends = r.replica_end;
  std::sort(ends.begin(), ends.end());
  std::cout << fmt::format("  replicas end           first {:.2f} s, median {:.2f}, last {:.2f}\n",
                           ends.front(), ends[ends.size() / 2], ends.back());
  std::cout << fmt::format(
      "rank 0, one core of this machine: {:.1f} % busy, {:.1f} % in its busiest second (a plan "
      "{:.2f} "
      "us, a result {:.2f}, submitting a sequence {:.2f}; without MPI's and LoadGen's own time)\n"
      "  {:.0f} plans/s and as many results; {:.2f} MB/s of plans, {:.2f} of results; {} ranks, {} "
      "replicas\n",
      100 * p.load, 100 * r.busiest_second, 1e6 * r.plan_cpu / r.plans,
      1e6 * r.complete_cpu / r.results,
      1e6 * r.submit_cpu / static_cast<double>(r.sequences.size()), p.plans_per_s,
      r.plan_bytes / r.seconds / 1e6, r.result_bytes / r.seconds / 1e6, grid.ranks(), grid.dp);
  const double load = std::max(p.load, r.busiest_second);
  if (load > kMostLoad) {
    const int leaders = static_cast<int>(std::ceil(load / (0.8 * kMostLoad)));
    std::cout << fmt::format(
        "  too much for one rank: a tree of {} leaders with {} replicas each would have {:.0f} % "
        "of "
        "a core each; the root hands out requests only\n",
        leaders, (grid.dp + leaders - 1) / leaders, 100 * load / leaders);
  }
}

}  // namespace

int simulate_command(const std::vector<std::string>& arguments) {
  const auto table = simulate_options();
  const Options o = Options::parse(table, arguments);
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  const Planning planning(o);
  const SizedGrid sized = planning.size(planning.one_grid());
  DROVER_CHECK(sized.problem.empty(), ExitCode::kEnvironment, "{}", sized.problem);
  const Traffic traffic = traffic_of(o, planning.samples());
  const auto seed = static_cast<uint64_t>(o.integer("seed", 0, INT64_MAX));
  const Straggling slow = stragglers_of(o, sized.grid.ranks());

  check_memory(sized, traffic.arrivals);
  SimulationInput in;
  in.grid = sized.grid;
  in.limits = sized.limits;
  in.limits.order = traffic.server   ? QueueOrder::kDeadline
                    : o.flag("sort") ? QueueOrder::kLongest
                                     : QueueOrder::kArrival;
  in.costs = replica_costs(planning.shape(sized.grid), planning.rates(sized));
  const double step_ms = o.number("step-ms", 0, 1e6);
  if (step_ms > 0) in.costs.stage = [step_ms](int, const StepWork&) { return step_ms / 1e3; };
  in.arrivals = traffic.arrivals;
  in.deadline = traffic.ttft_limit;
  const double leader = o.number("leader-us", 0, 1e6) / 1e6;
  in.plan_seconds = leader * 2 / 3;
  in.result_seconds = leader / 3;
  in.slowdown = slowdown_of(sized.grid, slow, seed);
  in.time_rank0 = true;
  const SimulationResult result = simulate(in);
  const Report report = report_of(result, sized.grid);

  std::cout << fmt::format("{}; {}, {}\n", planning.model().arch.summary(), sized.grid.text(),
                           o.text("scenario"));
  if (!planning.calibrated() && step_ms == 0) {
    std::cout << "times: the topology file's rates, not calibrated (--calibrate)\n";
  }
  print(result, report, traffic, sized.grid);
  if (!o.text("json").empty()) {
    write_json(o.text("json"), {{"simulate", "drover"},
                                {"model", planning.model().arch.summary()},
                                {"topology", planning.topology().file},
                                {"calibrated_with", planning.calibrated_with()},
                                {"grid", sized.grid.text()},
                                {"scenario", o.text("scenario")},
                                {"target_qps", traffic.qps},
                                {"seed", seed},
                                {"stragglers", {{"ranks", slow.ranks}, {"factor", slow.factor}}},
                                {"step_ms", step_ms},
                                {"settings", o.values()},
                                {"figures", figures_json(result, report)},
                                {"rank0", rank0_json(result, report)}});
  }
  return 0;
}

}  // namespace drover

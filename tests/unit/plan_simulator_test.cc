#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "base/error.h"
#include "plan/estimate.h"
#include "plan/simulator.h"

namespace drover {
namespace {

ReplicaCosts costs(int stages, double per_step = 1e-3, double per_row = 1e-5) {
  ReplicaCosts c;
  c.stages = stages;
  c.stage = [=](int, const StepWork& w) { return (per_step + per_row * w.rows) / stages; };
  c.send = [](double) { return 1e-5; };
  c.feedback = 1e-5;
  return c;
}

SimulationInput input(const Grid& grid, int sequences, uint64_t seed, int32_t pages = 4000) {
  SimulationInput in;
  in.grid = grid;
  in.limits = {.slots = 32,
               .pages = pages,
               .max_positions = 2048,
               .groups = grid.pp,
               .step_tokens = 128,
               .chunk_tokens = 64};
  in.costs = costs(grid.pp);
  std::mt19937 random(static_cast<uint32_t>(seed));
  for (int i = 0; i < sequences; ++i) {
    in.arrivals.push_back({0, 1 + static_cast<int32_t>(random() % 200), 128,
                           1 + static_cast<int32_t>(random() % 100)});
  }
  return in;
}

int64_t forced_tokens(const SimulationInput& in) {
  return std::accumulate(in.arrivals.begin(), in.arrivals.end(), int64_t{0},
                         [](int64_t sum, const Arrival& a) { return sum + a.forced_length; });
}

// Grids, and pools so small that sequences are suspended and recomputed.
TEST(Simulation, ConservesEverySequenceAndToken) {
  for (const Grid grid : {Grid{1, 1, 1}, Grid{1, 3, 1}, Grid{2, 2, 3}, Grid{1, 1, 7}}) {
    for (const int32_t pages : {4000, 40}) {
      const SimulationInput in = input(grid, 200, 7, pages);
      int64_t rows = 0, first = 0;
      SimulationInput watched = in;
      watched.on_step = [&](int, const VirtualReplica::Step& s, double) {
        rows += s.result.rows;
        first += static_cast<int64_t>(s.result.first.size());
      };
      const SimulationResult r = simulate(watched);
      EXPECT_EQ(r.output_tokens, forced_tokens(in));
      EXPECT_EQ(first, 200);
      EXPECT_EQ(r.counters.admitted, 200u);
      EXPECT_EQ(r.counters.finished, 200u);
      EXPECT_EQ(static_cast<uint64_t>(rows), r.counters.plan_rows);
      EXPECT_EQ(r.plans, r.results);
      for (size_t i = 0; i < in.arrivals.size(); ++i) {
        EXPECT_EQ(r.sequences[i].tokens, in.arrivals[i].forced_length);
        EXPECT_GE(r.sequences[i].first, r.sequences[i].arrival);
        EXPECT_GE(r.sequences[i].end, r.sequences[i].first);
      }
      EXPECT_EQ(r.counters.preemptions > 0, pages == 40);
    }
  }
}

TEST(Simulation, IsTheSameForTheSameSeed) {
  const auto run = [](uint64_t seed) {
    SimulationInput in = input({1, 2, 4}, 300, 3);
    const auto at = server_arrivals(in.arrivals.size(), 500, seed);
    for (size_t i = 0; i < at.size(); ++i) in.arrivals[i].at = at[i];
    in.limits.order = QueueOrder::kDeadline;
    in.deadline = 2;
    in.time_rank0 = seed % 2 == 0;  // changes nothing
    return simulate(in);
  };
  const SimulationResult a = run(4), b = run(4), c = run(5);
  EXPECT_EQ(a.seconds, b.seconds);
  EXPECT_EQ(a.plan_bytes, b.plan_bytes);
  EXPECT_NE(a.seconds, c.seconds);
  for (size_t i = 0; i < a.sequences.size(); ++i) {
    EXPECT_EQ(a.sequences[i].first, b.sequences[i].first);
    EXPECT_EQ(a.sequences[i].end, b.sequences[i].end);
    EXPECT_EQ(a.sequences[i].replica, b.sequences[i].replica);
  }
}

TEST(Simulation, IsNoFasterThanItsStages) {
  const SimulationInput in = input({1, 2, 2}, 400, 1);
  const SimulationResult r = simulate(in);
  EXPECT_LE(r.busy, 1);
  EXPECT_GT(r.busy, 0.5);
  const double rows = static_cast<double>(r.counters.plan_rows);
  EXPECT_GT(r.seconds, rows * 1e-5 / 4);
}

TEST(Simulation, OneGroupLeavesAPipelineIdle) {
  SimulationInput in = input({1, 4, 1}, 100, 1);
  const double four = simulate(in).busy;
  in.limits.groups = 1;
  const double one = simulate(in).busy;
  EXPECT_LT(one, 0.27);
  EXPECT_GT(four, 2.5 * one);
}

TEST(Simulation, WaitsForStragglersOfAReplicaOnly) {
  SimulationInput in = input({1, 2, 4}, 800, 1);
  const SimulationResult even = simulate(in);
  in.slowdown.assign(4, {1, 1});
  in.slowdown[2] = {1, 3};
  const SimulationResult r = simulate(in);
  EXPECT_GT(r.seconds, even.seconds);
  // The others take its work over: three times slower would be 3 x as long without that.
  EXPECT_LT(r.seconds, 2 * even.seconds);
  std::vector<int> of(4);
  for (const auto& s : r.sequences) ++of[static_cast<size_t>(s.replica)];
  EXPECT_LT(of[2], of[0]);
}

// On paper every step is the mean one. A stage alone or a tensor-parallel one loses nothing by
// that.
TEST(SteadyState, IsWhatTheEstimateSaysButForPipelines) {
  const Architecture a = named_architecture("llama2-70b");
  const NumberSizes sizes{.layer_weight = 0.516, .output_weight = 2, .kv_head = 264};
  const Rates r =
      guessed_rates(read_topology(DROVER_SOURCE_DIR "/topology/h100x8.ini"), "fp8", 8, 1);
  std::mt19937 random(1);
  std::vector<Arrival> samples;
  Workload w;
  constexpr int kSamples = 1000;
  for (int i = 0; i < kSamples; ++i) {
    const auto prompt = static_cast<int32_t>(100 + random() % 400);
    const auto output = static_cast<int32_t>(100 + random() % 200);
    samples.push_back({0, prompt, 1024, output});
    w.prompt_tokens += static_cast<double>(prompt) / kSamples;
    w.output_tokens += static_cast<double>(output) / kSamples;
    w.prompt_pairs += prompt * (prompt + 1.0) / 2 / kSamples;
  }
  const auto ratio = [&](const Grid& grid, int32_t step_tokens) {
    const GridShape shape = grid_shape(a, 128, grid, sizes, 0);
    const ReplicaLimits limits{.slots = 256,
                               .pages = 15000,
                               .max_positions = 4096,
                               .groups = grid.pp,
                               .step_tokens = step_tokens,
                               .chunk_tokens = step_tokens};
    const Steady s = simulate_steady(shape, limits, samples, 0, r);
    EXPECT_LE(s.busy, 1);
    return s.tokens_per_s / estimate(shape, limits, w, r).tokens_per_s;
  };
  EXPECT_NEAR(ratio({1, 1, 1}, 2048), 1, 0.06);
  EXPECT_NEAR(ratio({2, 1, 3}, 2048), 1, 0.06);
  const double uneven = ratio({1, 4, 1}, 2048), even = ratio({1, 4, 1}, 192);
  EXPECT_LT(uneven, 0.9);
  EXPECT_GT(even, 1.2 * uneven);
  EXPECT_LT(even, 1.05);
}

TEST(ServerArrivals, ArePoisson) {
  const auto at = server_arrivals(20000, 50, 1);
  EXPECT_NEAR(at.back() / 20000, 0.02, 0.0006);
  double squares = 0;
  for (size_t i = 1; i < at.size(); ++i) {
    EXPECT_GE(at[i], at[i - 1]);
    squares += (at[i] - at[i - 1]) * (at[i] - at[i - 1]) / 20000;
  }
  EXPECT_NEAR(squares, 2 * 0.02 * 0.02, 0.06 * 0.02 * 0.02);  // an exponential's second moment
}

TEST(Simulation, RefusesWhatCanNeverRun) {
  SimulationInput in = input({1, 1, 1}, 1, 1);
  in.arrivals[0].prompt = 5000;
  EXPECT_THROW(simulate(in), Error);
  in.arrivals.clear();
  EXPECT_THROW(simulate(in), Error);
}

}  // namespace
}  // namespace drover

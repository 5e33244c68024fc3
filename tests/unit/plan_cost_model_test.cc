#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "base/error.h"
#include "plan/calibrate.h"
#include "plan/estimate.h"

namespace drover {
namespace {

Topology machine() { return read_topology(DROVER_SOURCE_DIR "/topology/h200_2x8.ini"); }
Rates rates() { return guessed_rates(machine(), "fp8", 8, 1); }
Architecture model() { return named_architecture("llama2-70b"); }
const NumberSizes kSizes{
    .layer_weight = 0.516, .output_weight = 2, .kv_head = 264, .activation = 2};

GridShape shape(int tp, int pp, int dp, int ranks_per_node = 0) {
  return grid_shape(model(), 128, {tp, pp, dp}, kSizes, ranks_per_node);
}
StepWork decode(double rows) {
  return {.rows = rows, .sampled = rows, .decode_context = 400 * rows, .prompt_pairs = 0};
}

TEST(Knee, LiesBetweenTheLargerAndTheSum) {
  for (const double p : {1.0, 1.5, 2.5, 8.0}) {
    for (const double a : {1e-9, 1e-3, 1.0, 1e6}) {
      const double k = knee(a, 2e-3, p);
      EXPECT_GE(k, std::max(a, 2e-3) * (1 - 1e-12));
      EXPECT_LE(k, (a + 2e-3) * (1 + 1e-12));
    }
  }
  EXPECT_NEAR(knee(3, 4, 2), 5, 1e-12);
  EXPECT_EQ(knee(0, 4, 2), 4);
}

TEST(StepCost, IsTheSumOfItsTerms) {
  const GridShape s = shape(4, 2, 1);
  const StepCost c = step_cost(s.stages[1], decode(64), s.place, rates());
  EXPECT_DOUBLE_EQ(c.total(), c.linears + c.output + c.attention + c.rows + c.overhead + c.sums);
  for (const double part : {c.linears, c.output, c.attention, c.rows, c.overhead, c.sums}) {
    EXPECT_GT(part, 0);
  }
  // The first stage has no output layer, one rank sums with nobody.
  EXPECT_EQ(step_cost(s.stages[0], decode(64), s.place, rates()).output, 0);
  EXPECT_EQ(step_cost(shape(1, 1, 1).stages[0], decode(64), shape(1, 1, 1).place, rates()).sums, 0);
}

TEST(StepCost, GrowsWithEverythingThatIsAskedOfIt) {
  const GridShape s = shape(2, 1, 1);
  const auto seconds = [&](StepWork w) {
    return step_cost(s.stages[0], w, s.place, rates()).total();
  };
  double before = 0;
  for (const double rows : {1, 2, 16, 64, 256, 1024, 4096}) {
    const double now = seconds(decode(rows));
    EXPECT_GT(now, before);
    before = now;
  }
  StepWork w = decode(64);
  const double base = seconds(w);
  w.decode_context *= 2;
  EXPECT_GT(seconds(w), base);
  w = decode(64);
  w.prompt_pairs = 1e6;
  EXPECT_GT(seconds(w), base);
}

TEST(StepCost, NeverBeatsTheMachine) {
  const GridShape s = shape(1, 1, 1);
  const Rates r = rates();
  const ShardShape& all = s.stages[0];
  for (const double rows : {1.0, 128.0, 2048.0}) {
    const double t = step_cost(all, decode(rows), s.place, r).total();
    EXPECT_GT(t, (all.layers * all.layer_bytes + all.output_bytes) / r[kRead]);
    EXPECT_GT(t, 2 * rows * (all.layers * all.layer_weights + all.output_weights) / r[kFlops]);
  }
}

TEST(StepCost, FallsWithMoreRanksButNotInProportion) {
  const auto seconds = [&](int tp, const Rates& r) {
    const GridShape s = shape(tp, 1, 1);
    return step_cost(s.stages[0], decode(256), s.place, r).total();
  };
  double before = 1e9;
  for (const int tp : {1, 2, 4, 8}) {
    const double now = seconds(tp, rates());
    EXPECT_LT(now, before);
    EXPECT_GE(now, seconds(1, rates()) / tp * (1 - 1e-9));
    before = now;
  }
  // Slower in all rates is slower.
  for (int i = kRead; i < kNetSumLatency; ++i) {
    Rates slow = rates();
    const bool time = i == kPerLayer || i == kPerStep || i == kSumLatency || i == kSendLatency;
    slow.value[static_cast<size_t>(i)] *= time ? 2 : 0.5;
    EXPECT_GE(seconds(4, slow), seconds(4, rates())) << rate_name(static_cast<RateId>(i));
  }
}

TEST(Sums, CostMoreOverMoreRanksAndFarMoreOverNodes) {
  const Rates r = rates();
  EXPECT_EQ(sum_seconds(1e6, {.tp = 1}, r), 0);
  double before = 0;
  for (const int tp : {2, 4, 8}) {
    const double now = sum_seconds(1e6, {.tp = tp}, r);
    EXPECT_GT(now, before);
    before = now;
  }
  EXPECT_GT(sum_seconds(1e6, {.tp = 8, .nodes_of_stage = 2}, r), 1.3 * before);
  EXPECT_NEAR(ring_seconds(0, {.tp = 2}, r), machine().link.latency_us * 1e-6, 1e-12);
}

TEST(Estimate, OfAPipelineCountsEveryRow) {
  const ReplicaLimits limits{.slots = 512,
                             .pages = 40000,
                             .max_positions = 4096,
                             .groups = 2,
                             .step_tokens = 2048,
                             .chunk_tokens = 2048};
  const Workload w{.prompt_tokens = 300, .output_tokens = 200, .prompt_pairs = 45150};
  const Estimate one = estimate(shape(1, 2, 1), limits, w, rates());
  EXPECT_GE(one.bubble, 0);
  EXPECT_LT(one.bubble, 0.2);
  EXPECT_NEAR(one.tokens_per_s * one.step_seconds, one.step.sampled, 1e-6);
  // Twice the replicas, twice the tokens.
  EXPECT_NEAR(estimate(shape(1, 2, 2), limits, w, rates()).tokens_per_s / one.tokens_per_s, 2,
              1e-9);
  // One sequence at a time fills one stage of two.
  Workload alone = w;
  alone.most_sequences = 1;
  EXPECT_GT(estimate(shape(1, 2, 1), limits, alone, rates()).bubble, 0.49);
  // Fewer pages, fewer sequences.
  ReplicaLimits small = limits;
  small.pages = 500;
  EXPECT_LT(estimate(shape(1, 2, 1), small, w, rates()).sequences, one.sequences);
  EXPECT_NEAR(sequences_that_fit(small, w), 500 / (408 / 16.0 + 0.25), 1);
}

TEST(Sums, OfFewRowsGoOverPeerMemoryWhereGpusHaveIt) {
  const Rates r = rates();
  const double row = 2 * 8192;
  EXPECT_EQ(sum_seconds(row, {.tp = 2}, r), peer_seconds(row, {.tp = 2}, r));
  EXPECT_LT(sum_seconds(row, {.tp = 2}, r), ring_seconds(row, {.tp = 2}, r));
  EXPECT_EQ(sum_seconds(64 * row, {.tp = 2}, r), peer_seconds(64 * row, {.tp = 2}, r));
  // What each may send bounds the rows, and nodes have no memory in common.
  EXPECT_EQ(sum_seconds(65 * row, {.tp = 2}, r), ring_seconds(65 * row, {.tp = 2}, r));
  EXPECT_EQ(sum_seconds(64 * row, {.tp = 4}, r), ring_seconds(64 * row, {.tp = 4}, r));
  EXPECT_EQ(sum_seconds(row, {.tp = 16, .nodes_of_stage = 2}, r),
            ring_seconds(row, {.tp = 16, .nodes_of_stage = 2}, r));
  const Rates cpu =
      guessed_rates(read_topology(DROVER_SOURCE_DIR "/topology/cpu.ini"), "bf16", 2, 1);
  EXPECT_EQ(sum_seconds(row, {.tp = 2}, cpu), ring_seconds(row, {.tp = 2}, cpu));
}

TEST(Intervals, GrowWithWhatIsNotKnown) {
  Rates r = rates();
  const GridShape s = shape(8, 1, 1);
  const auto f = [&](const Rates& x) {
    return step_cost(s.stages[0], decode(64), s.place, x).total();
  };
  const double before = relative_sigma(r, f);
  EXPECT_GT(before, r.misfit);
  EXPECT_EQ(origin_of(r, f), Origin::kGuessed);
  r.covariance[kSumLatency][kSumLatency] *= 4;
  EXPECT_GT(relative_sigma(r, f), before);
  r.covariance = {};
  EXPECT_NEAR(relative_sigma(r, f), r.misfit, 1e-9);
}

// Steps of a machine whose rates are known: the fit must find what matters of them.
TEST(Calibration, FindsTheRatesThatMadeTheFigures) {
  const Rates prior = rates();
  Rates truth = prior;
  truth.value[kRead] *= 0.8;
  truth.value[kFlops] *= 1.2;
  truth.value[kPerLayer] *= 1.3;
  std::vector<Observation> seen;
  const GridShape s = shape(1, 1, 1);
  for (const double rows : {1.0, 4.0, 16.0, 64.0, 256.0, 1024.0}) {
    const auto f = [s, rows](const Rates& r) {
      return step_cost(s.stages[0], decode(rows), s.place, r).total();
    };
    seen.push_back({"", f(truth), 0.02, Origin::kFitted, f});
  }
  const Calibration c = calibrate(prior, seen);
  EXPECT_LT(c.worst, 0.02);
  // As near as it says it is: reading and what a layer takes besides are alike in these steps.
  for (const RateId id : {kFlops, kRead, kPerLayer})
    EXPECT_LT(std::abs(std::log(c.rates[id] / truth[id])), 2 * c.rates.sigma(id)) << rate_name(id);
  EXPECT_NEAR(std::log(c.rates[kFlops] / truth[kFlops]), 0, 0.12);
  EXPECT_NEAR(std::log(c.rates[kRead] / truth[kRead]), 0, 0.15);
  EXPECT_LT(c.rates.sigma(kFlops), prior.sigma(kFlops));
  EXPECT_EQ(c.rates.origin[kFlops], Origin::kFitted);
  // Nothing was learnt of links: they stay what they were.
  EXPECT_NEAR(c.rates[kSumLatency], prior[kSumLatency], 1e-12);
  EXPECT_NEAR(c.rates.sigma(kSumLatency), prior.sigma(kSumLatency), 1e-6);
  EXPECT_EQ(c.rates.origin[kSumLatency], prior.origin[kSumLatency]);
}

TEST(CpuSpeed, IsSharedBeyondTheCores) {
  EXPECT_EQ(cpu_speed(4, 1, 1), 1);
  EXPECT_EQ(cpu_speed(4, 4, 1), 1);
  EXPECT_EQ(cpu_speed(4, 8, 1), 0.5);
  EXPECT_NEAR(cpu_speed(4, 1, 2), 1.27, 0.01);
  EXPECT_LT(cpu_speed(4, 1, 4), 4);
  EXPECT_GT(cpu_speed(4, 1, 4), cpu_speed(4, 1, 2));
}

TEST(Guesses, NameWhatTheFileLacks) {
  Topology t = machine();
  t.copy_gb_per_s = 0;
  try {
    guessed_rates(t, "fp8", 8, 1);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    EXPECT_NE(std::string(e.what()).find("gpu.copy_gb_per_s"), std::string::npos);
  }
}

}  // namespace
}  // namespace drover

// Ramp, steady state and drain out of what the leader notes.
#include <gtest/gtest.h>

#include "serve/results.h"
#include "serve/timeline.h"

namespace drover {
namespace {

// 2 s rising to 10 sequences, 5 s of them at 100 tokens/s, 3 s falling, on a clock that began long
// ago.
Timeline trapezoid(double begin, int steps_per_second) {
  Timeline t;
  t.running(begin, 1);
  for (int i = 1; i <= 10 * steps_per_second; ++i) {
    const double s = static_cast<double>(i) / steps_per_second;
    const double share = s < 2 ? s / 2 : s <= 7 ? 1 : (10 - s) / 3;
    const double rate = s <= 2 ? 20 : s <= 7 ? 100 : 50;
    t.tokens(begin + s, static_cast<int32_t>(rate / steps_per_second));
    t.running(begin + s, static_cast<int32_t>(10 * share));
  }
  return t;
}

TEST(Timeline, TellsRampSteadyStateAndDrainApart) {
  const Json p = trapezoid(5e6, 10).phases_json();
  EXPECT_EQ(p.at("peak_running"), 10);
  EXPECT_NEAR(p.at("ramp").at("seconds").get<double>(), 1.9, 0.15);
  EXPECT_NEAR(p.at("steady").at("seconds").get<double>(), 5.4, 0.3);
  EXPECT_NEAR(p.at("drain").at("seconds").get<double>(), 2.7, 0.3);
  EXPECT_NEAR(p.at("steady").at("tokens_per_second").get<double>(), 97, 4);
  EXPECT_NEAR(p.at("drain").at("tokens_per_second").get<double>(), 50, 4);
  double seconds = 0;
  int64_t tokens = 0;
  for (const char* phase : {"ramp", "steady", "drain"}) {
    seconds += p.at(phase).at("seconds").get<double>();
    tokens += p.at(phase).at("tokens").get<int64_t>();
  }
  EXPECT_NEAR(seconds, 10, 1e-6);
  EXPECT_EQ(tokens, 20 * 2 + 100 * 5 + 50 * 3);
}

TEST(Timeline, AnyLengthFitsIntoItsBinsAndLosesNothing) {
  for (const double length : {1e-4, 0.02, 3.0, 700.0, 1e5}) {
    Timeline t;
    t.running(100, 8);
    for (int i = 1; i <= 1000; ++i) t.tokens(100 + length * i / 1000, 3);
    t.running(100 + length, 0);
    const Json bins = t.bins_json();
    const double width = bins.at("bin_s").get<double>();
    EXPECT_LE(bins.at("tokens").size(), Timeline::kBins);
    EXPECT_LE(width, std::max(0.001, 2.001 * length / static_cast<double>(Timeline::kBins)));
    int64_t sum = 0;
    for (const auto& n : bins.at("tokens")) sum += n.get<int64_t>();
    EXPECT_EQ(sum, 3000) << length;
    const Json p = t.phases_json();
    EXPECT_TRUE(p.at("ramp").is_null()) << p.dump();
    EXPECT_NEAR(p.at("steady").at("seconds").get<double>(), length, 1e-9 * length + 1e-9);
  }
}

TEST(Timeline, APeakShorterThanABinIsNoSteadyState) {
  Timeline t;
  t.running(0, 1);
  t.running(50, 40);
  t.running(50.0001, 1);
  t.running(100, 0);
  EXPECT_EQ(t.phases_json().at("peak_running"), 40);
  EXPECT_TRUE(t.phases_json().at("steady").is_null());
  EXPECT_NEAR(t.phases_json().at("ramp").at("seconds").get<double>(), 100, 1e-6);
}

TEST(Timeline, NothingIsNull) {
  EXPECT_TRUE(Timeline().phases_json().is_null());
  EXPECT_TRUE(Timeline().bins_json().is_null());
  Timeline t = trapezoid(0, 10);
  t.clear();
  EXPECT_TRUE(t.phases_json().is_null());
}

TEST(StepTime, AveragesRanksAndKeepsWhatADeviceHidesAbsent) {
  RankTimes a{.rank = 0, .split = true, .steps = 10, .seconds = 1};
  a.compute = 0.5;
  a.communication = 0.25;
  a.stage_wait = 0.125;
  a.plan_wait = 0.125;
  RankTimes b = a;
  b.rank = 1;
  b.compute = 0.7;
  b.stage_wait = 0;
  b.host = 0.05;
  const Json j = step_time_json({a, b});
  EXPECT_EQ(j.at("ranks"), 2);
  EXPECT_DOUBLE_EQ(j.at("mean_ms").at("step").get<double>(), 100);
  EXPECT_DOUBLE_EQ(j.at("mean_ms").at("compute").get<double>(), 60);
  EXPECT_DOUBLE_EQ(j.at("mean_ms").at("bubble").get<double>(), 6.25 + 12.5);
  EXPECT_DOUBLE_EQ(j.at("per_rank").at(1).at("host_s").get<double>(), 0.05);
  EXPECT_FALSE(j.contains("absent"));

  RankTimes gpu{.rank = 0, .split = false, .steps = 4, .seconds = 2};
  gpu.device = 1.5;
  gpu.plan_wait = 0.5;
  const Json g = step_time_json({gpu});
  EXPECT_FALSE(g.at("mean_ms").contains("compute"));
  EXPECT_FALSE(g.at("mean_ms").contains("bubble"));
  EXPECT_DOUBLE_EQ(g.at("mean_ms").at("device").get<double>(), 375);
  EXPECT_TRUE(g.contains("absent"));
  EXPECT_TRUE(step_time_json({RankTimes{}}).is_null());
  EXPECT_EQ(step_time_json(std::vector<RankTimes>(1000, a)).contains("per_rank"), false);
}

TEST(Energy, CountsEachDeviceOnceAndSaysNothingOfSome) {
  using Meter = RankTimes::Meter;
  RankTimes a{.rank = 0, .meter = Meter::kCounted, .joules = 600, .joules_seconds = 1};
  RankTimes b{.rank = 1, .meter = Meter::kCounted, .joules = 1000, .joules_seconds = 2};
  const RankTimes same{.rank = 2, .meter = Meter::kAnothers};
  const Json j = energy_json({a, b, same}, 400);
  EXPECT_EQ(j.at("devices"), 2);
  EXPECT_DOUBLE_EQ(j.at("joules").get<double>(), 1600);
  EXPECT_DOUBLE_EQ(j.at("mean_watts").get<double>(), 1100);
  EXPECT_DOUBLE_EQ(j.at("joules_per_output_token").get<double>(), 4);
  EXPECT_EQ(energy_text(j), "1600 J, 1100 W, 4 J an output token");
  EXPECT_FALSE(energy_json({a}, 0).contains("joules_per_output_token"));
  EXPECT_TRUE(energy_json({a, RankTimes{.rank = 1}}, 400).is_null());
  EXPECT_TRUE(energy_json({same}, 400).is_null());
  EXPECT_TRUE(energy_json({}, 400).is_null());
  b.joules = 0;  // its counter stood still
  EXPECT_TRUE(energy_json({a, b}, 400).is_null());
}

}  // namespace
}  // namespace drover

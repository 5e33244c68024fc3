// What serve refuses before anything starts, and what it makes of options and of LoadGen's logs.
#include <fstream>

#include "serve/loadgen_logs.h"
#include "serve/loadgen_settings.h"
#include "serve/results.h"
#include "unit/serve_fixture.h"

namespace drover {
namespace {

ExitCode code_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return e.code();
  }
  return ExitCode::kOk;
}

ServeOptions good_options(const TempDir& dir) {
  ServeOptions o;
  o.out_dir = dir.path + "/a/b";
  return o;
}

TEST(OutDir, IsMadeAndResultsAreNeverOverwrittenUnasked) {
  TempDir dir;
  ServeOptions o = good_options(dir);
  prepare_out_dir(o);
  prepare_out_dir(o);  // empty: nothing to lose
  std::ofstream(o.out_dir + "/result.json") << "{}";
  std::ofstream(o.out_dir + "/notes.txt") << "mine";
  EXPECT_EQ(code_of([&] { prepare_out_dir(o); }), ExitCode::kUsage);
  EXPECT_TRUE(std::filesystem::exists(o.out_dir + "/result.json"));
  o.force = true;
  prepare_out_dir(o);
  EXPECT_FALSE(std::filesystem::exists(o.out_dir + "/result.json"));
  EXPECT_TRUE(std::filesystem::exists(o.out_dir + "/notes.txt"));
}

TEST(OutDir, ThatCannotBeWrittenIsTheEnvironments) {
  TempDir dir;
  ServeOptions o = good_options(dir);
  std::ofstream(dir.path + "/a") << "a file in the way";
  EXPECT_EQ(code_of([&] { prepare_out_dir(o); }), ExitCode::kEnvironment);
}

TEST(Options, ThatCannotWorkAreRefused) {
  TempDir dir;
  ServeOptions o = good_options(dir);
  o.user_conf = dir.path + "/absent.conf";
  EXPECT_EQ(code_of([&] { prepare_out_dir(o); }), ExitCode::kBadInput);
  o = good_options(dir);
  o.audit_conf = dir.path + "/audit.config";
  EXPECT_EQ(code_of([&] { prepare_out_dir(o); }), ExitCode::kBadInput);
  std::ofstream(o.audit_conf) << "*.*.mode = 2\n";
  EXPECT_EQ(code_of([&] { prepare_out_dir(o); }), ExitCode::kUsage);  // accuracy asked for, too
  o.modes = {Mode::kPerformance};
  EXPECT_EQ(code_of([&] { prepare_out_dir(o); }), ExitCode::kOk);
  o = good_options(dir);
  o.model_name = "a.b";
  EXPECT_EQ(code_of([&] { prepare_out_dir(o); }), ExitCode::kUsage);
  EXPECT_EQ(code_of([] { parse_scenario("onlyfast"); }), ExitCode::kUsage);
  EXPECT_EQ(code_of([] { parse_modes("performance,performance"); }), ExitCode::kUsage);
  EXPECT_EQ(code_of([] { parse_modes(""); }), ExitCode::kUsage);
  EXPECT_EQ(parse_modes("performance,accuracy").size(), 2u);
}

// make_loadgen_plan reads LoadGen's config, which counts its calls: a child for each.
int plan_in_child(const ServeOptions& o, const TempDir& dir,
                  const std::function<bool(const LoadgenPlan&)>& good) {
  return in_child([&] {
    const std::string file = dir.path + "/user.conf";
    std::ofstream(file) << compose_user_conf(o, 64);
    return good(make_loadgen_plan(o, file, 64)) ? ExitCode::kOk : ExitCode::kInternal;
  });
}

TEST(Settings, TheBenchmarksOwnAreLeftAlone) {
  TempDir dir;
  ServeOptions o = good_options(dir);
  o.model_name = "llama2-70b";
  EXPECT_EQ(compose_user_conf(o, 64), "");
  EXPECT_EQ(plan_in_child(o, dir,
                          [](const LoadgenPlan& p) {
                            return p.known_benchmark && p.settings.min_query_count == 24576 &&
                                   p.settings.min_duration_ms == 600000 &&
                                   p.settings.use_token_latencies &&
                                   p.settings.sample_concatenate_permutation &&
                                   p.ttft_limit_ms == 0 &&
                                   !p.whole_set;  // 64 samples instead of 24,576
                          }),
            0);
  o.model_name = "llama2-70b-interactive";
  o.scenario = Scenario::kInteractive;
  o.target_qps = 3.5;
  EXPECT_EQ(plan_in_child(o, dir,
                          [](const LoadgenPlan& p) {
                            return p.ttft_limit_ms == 450 && p.tpot_limit_ms == 40 &&
                                   p.departures.empty() && p.settings.server_target_qps == 3.5 &&
                                   p.known_benchmark;
                          }),
            0);
}

TEST(Settings, InteractiveNeedsTheNameThatHasItsLimits) {
  TempDir dir;
  ServeOptions o = good_options(dir);
  const auto code = [&] { return plan_in_child(o, dir, [](const LoadgenPlan&) { return true; }); };
  o.model_name = "llama2-70b";
  o.scenario = Scenario::kInteractive;
  o.target_qps = 1;
  EXPECT_EQ(code(), static_cast<int>(ExitCode::kUsage));
  o.model_name = "llama2-70b-interactive";
  EXPECT_EQ(code(), 0);
  o.ttft_limit_ms = 1000;  // a benchmark's limits are not an option's to change
  EXPECT_EQ(code(), static_cast<int>(ExitCode::kUsage));
}

TEST(Settings, LooserLimitsThanMlperfsAreNamed) {
  TempDir dir;
  ServeOptions o = good_options(dir);
  o.model_name = "llama2-70b-interactive";
  o.scenario = Scenario::kInteractive;
  o.user_conf = dir.path + "/mine.conf";
  std::ofstream(o.user_conf) << "llama2-70b-interactive.Server.ttft_latency = 2000";
  EXPECT_EQ(
      plan_in_child(o, dir,
                    [](const LoadgenPlan& p) {
                      return p.departures ==
                             "time to first token limit of 2000 ms where mlperf.conf has 450 ms";
                    }),
      0);
  std::ofstream(o.user_conf) << "llama2-70b-interactive.Server.ttft_latency = soon";
  EXPECT_EQ(plan_in_child(o, dir, [](const LoadgenPlan&) { return true; }),
            static_cast<int>(ExitCode::kBadInput));
}

TEST(Settings, ANameOfOnesOwnGetsTokenLatencies) {
  TempDir dir;
  ServeOptions o = good_options(dir);
  o.scenario = Scenario::kServer;
  o.demo = true;
  EXPECT_EQ(plan_in_child(o, dir,
                          [](const LoadgenPlan& p) {
                            return !p.known_benchmark && p.whole_set &&
                                   p.settings.use_token_latencies &&
                                   p.settings.min_query_count == 459 &&
                                   p.settings.min_duration_ms == 0 && p.ttft_limit_ms == 2000 &&
                                   p.tpot_limit_ms == 200 && p.expected_queries == 512;
                          }),
            0);
}

TEST(Logs, AnErrorOrACutOffLogIsNeverValid) {
  TempDir dir;
  std::ofstream(dir.path + "/mlperf_log_detail.txt")
      << R"(:::MLLOG {"key": "result_validity", "value": "VALID", "metadata": {"is_error": false}})"
      << "\n"
      << R"(:::MLLOG {"key": "error_runtime", "value": "boom", "metadata": {"is_error": true}})"
      << "\n"
      << R"(:::MLLOG {"key": "rate", "value": nan, "metadata": {"is_error": false}})"
      << "\n";
  std::ofstream(dir.path + "/mlperf_log_summary.txt") << "Result is : VALID\n";
  const LoadgenLogs logs = read_loadgen_logs(dir.path);
  EXPECT_FALSE(logs.complete);
  EXPECT_EQ(logs.error_count, 1u);
  const auto reasons = invalid_reasons(logs);
  ASSERT_EQ(reasons.size(), 2u);
  EXPECT_EQ(reasons[1], "LoadGen logged an error: boom");
}

TEST(Logs, AnAccuracyLogWithoutItsBracketIsRefused) {
  TempDir dir;
  const std::string file = dir.path + "/log.json";
  std::ofstream(file) << "[\n{ \"seq_id\" : 0, \"qsl_idx\" : 5, \"data\" : \"0A000000FFFFFFFF\", "
                         "\"token_count\" : 2 },\n";
  EXPECT_EQ(code_of([&] { read_accuracy_log(file); }), ExitCode::kInternal);
  std::ofstream(file, std::ios::app) << "\n]\n";
  const auto entries = read_accuracy_log(file);
  ASSERT_EQ(entries.size(), 1u);
  EXPECT_EQ(entries[0].index, 5u);
  const int32_t ids[] = {10, -1};
  EXPECT_EQ(entries[0].hash, hash_tokens(ids, 2));
}

TEST(Results, PercentileIsLoadgens) {
  std::vector<double> v(100);
  std::iota(v.rbegin(), v.rend(), 0);
  EXPECT_EQ(percentile(v, 0.5), 50);
  EXPECT_EQ(percentile(v, 0.99), 99);
  EXPECT_EQ(percentile({7}, 0.99), 7);
}

TEST(Environment, KeepsSecretsOut) {
  ::setenv("SLURM_JOB_ID", "12", 1);
  ::setenv("SLURM_JWT", "secret", 1);
  ::setenv("HOME_OF_OTHERS", "x", 1);
  const Json v = environment_json(fixture_facts()).at("variables");
  EXPECT_EQ(v.at("SLURM_JOB_ID"), "12");
  EXPECT_FALSE(v.contains("SLURM_JWT"));
  EXPECT_FALSE(v.contains("HOME_OF_OTHERS"));
}

}  // namespace
}  // namespace drover

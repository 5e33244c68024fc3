// Sessions under the real LoadGen against a sink whose answers are known.
#include <cmath>

#include "base/log.h"
#include "unit/serve_fixture.h"

namespace drover {
namespace {

ServeOptions options_in(const TempDir& dir, Scenario scenario) {
  ServeOptions o;
  o.scenario = scenario;
  o.out_dir = dir.path + "/out";
  o.demo = true;
  o.max_new_tokens = 64;
  o.ttft_limit_ms = 5000;
  o.tpot_limit_ms = 2000;
  if (scenario == Scenario::kServer) o.target_qps = 800;
  o.progress = false;
  return o;
}

int run(const ServeOptions& options, size_t dataset_size, size_t slots, double step_ms) {
  return in_child([&] {
    Interrupt interrupt;
    CountedDataset dataset(dataset_size);
    prepare_out_dir(options);
    PacedSink sink(interrupt, slots, step_ms);
    const ExitCode code = run_session(sink, dataset, options, fixture_facts(), interrupt);
    const bool server = options.scenario == Scenario::kServer;
    EXPECT_EQ(sink.with_deadline > 0, server);
    return testing::Test::HasFailure() ? ExitCode::kInternal : code;
  });
}

// Each sample once: tokens of the answers to samples 0..n-1.
uint64_t tokens_of(size_t n, int32_t max_new_tokens) {
  CountedDataset d(n);
  uint64_t sum = 0;
  for (size_t i = 0; i < n; ++i) sum += answer(d.sample(i).input, max_new_tokens).size();
  return sum;
}

void expect_journal(const std::string& file, const char* pass, size_t lines) {
  const auto journal = lines_of(file);
  EXPECT_EQ(journal.size(), lines);
  CountedDataset d(100000);
  for (const auto& line : journal) {
    const Json j = Json::parse(line);
    EXPECT_EQ(j.at("pass"), pass);
    const auto want = answer(d.sample(j.at("sample").get<size_t>()).input, 64);
    EXPECT_EQ(j.at("tokens").get<std::vector<int32_t>>(), want);
    EXPECT_EQ(j.at("n_tokens"), want.size());
    EXPECT_EQ(j.at("by_eos"), true);
    EXPECT_GE(j.at("latency_ms").get<double>(), j.at("ttft_ms").get<double>());
  }
}

void expect_accuracy_log(const std::string& file, size_t samples) {
  const Json log = read_json(file);
  ASSERT_EQ(log.size(), samples);
  CountedDataset d(samples);
  std::vector<int> seen(samples, 0);
  for (const auto& e : log) {
    const auto index = e.at("qsl_idx").get<size_t>();
    ++seen.at(index);
    std::string hex;
    for (const int32_t t : answer(d.sample(index).input, 64))
      for (int b = 0; b < 4; ++b)
        hex += fmt::format("{:02X}", (static_cast<uint32_t>(t) >> (8 * b)) & 255u);
    EXPECT_EQ(e.at("data").get<std::string>(), hex);
    EXPECT_EQ(e.at("token_count").get<size_t>() * 8, hex.size());
  }
  for (const int n : seen) EXPECT_EQ(n, 1);
}

Json expect_valid(const ServeOptions& o) {
  const Json r = read_json(o.out_dir + "/result.json");
  EXPECT_EQ(r.at("valid"), true) << r.dump(1);
  EXPECT_EQ(r.at("reasons").size(), 0u);
  EXPECT_EQ(r.at("verdict"), "VALID under demo settings; not an MLPerf result");
  EXPECT_EQ(r.at("mode"), "performance,accuracy");
  EXPECT_EQ(r.at("preemptions"), 3);
  EXPECT_EQ(r.at("phases").at("peak_running"), 4);
  EXPECT_EQ(r.at("phases").at("drain").at("tokens"), 5);
  EXPECT_EQ(r.at("step_time").at("mean_ms").at("bubble"), 37.5);
  EXPECT_EQ(r.at("model").at("fingerprint"), "beef");
  EXPECT_EQ(r.at("dataset").at("fingerprint"), "f00d");
  EXPECT_EQ(r.at("passes").at("accuracy").at("valid"), true);
  return r;
}

TEST(ServeSession, OfflinePerformanceThenAccuracy) {
  TempDir dir;
  const ServeOptions o = options_in(dir, Scenario::kOffline);
  ASSERT_EQ(run(o, 64, 8, 6), 0);
  const Json r = expect_valid(o);
  EXPECT_EQ(r.at("scenario"), "offline");
  EXPECT_EQ(r.at("samples"), 64);
  EXPECT_EQ(r.at("output_tokens"), tokens_of(64, 64));
  // LoadGen's rate is over the longest latency, drover's duration over the same interval.
  const double rate = r.at("output_tokens_per_second").get<double>();
  EXPECT_NEAR(rate * r.at("duration_s").get<double>(), static_cast<double>(tokens_of(64, 64)),
              0.05 * static_cast<double>(tokens_of(64, 64)));
  // One token a step of at least 6 ms.
  EXPECT_GE(r.at("tpot_ms").at("p50").get<double>(), 5.9);
  EXPECT_GE(r.at("ttft_ms").at("p99").get<double>(), r.at("ttft_ms").at("p50").get<double>());
  expect_journal(o.out_dir + "/performance/journal.jsonl", "performance", 64);
  expect_journal(o.out_dir + "/accuracy/journal.jsonl", "accuracy", 64);
  expect_accuracy_log(o.out_dir + "/accuracy/mlperf_log_accuracy.json", 64);
  EXPECT_TRUE(std::filesystem::exists(o.out_dir + "/performance/run_1/mlperf_log_summary.txt"));
  const Json env = read_json(o.out_dir + "/environment.json");
  EXPECT_EQ(env.at("command_line"), "drover run");
  EXPECT_TRUE(env.at("versions").contains("loadgen"));
}

TEST(ServeSession, ServerMeetsEarlyStopping) {
  TempDir dir;
  const ServeOptions o = options_in(dir, Scenario::kServer);
  ASSERT_EQ(run(o, 64, 64, 2), 0);
  const Json r = expect_valid(o);
  EXPECT_EQ(r.at("samples"), 512);  // 459 queries, padded to whole sets
  EXPECT_EQ(r.at("output_tokens"), 8 * tokens_of(64, 64));
  EXPECT_EQ(r.at("latency_limits").at("ttft_p99_ms"), 5000);
  EXPECT_TRUE(r.at("loadgen_latency").at("ttft_ms").contains("p99"));
  EXPECT_GT(r.at("output_tokens_per_second").get<double>(), 0);
  expect_journal(o.out_dir + "/performance/journal.jsonl", "performance", 512);
}

TEST(ServeSession, SingleStream) {
  TempDir dir;
  ServeOptions o = options_in(dir, Scenario::kSingleStream);
  ASSERT_EQ(run(o, 80, 4, 1), 0);
  const Json r = expect_valid(o);
  EXPECT_EQ(r.at("samples"), 80);
  EXPECT_EQ(r.at("output_tokens"), tokens_of(80, 64));
}

TEST(ServeSession, TheFirstSamplesOnly) {
  TempDir dir;
  ServeOptions o = options_in(dir, Scenario::kOffline);
  o.samples = 40;
  ASSERT_EQ(run(o, 1000, 4, 6), 0);
  const Json r = expect_valid(o);
  EXPECT_EQ(r.at("samples"), 40);
  EXPECT_EQ(r.at("output_tokens"), tokens_of(40, 64));
  expect_accuracy_log(o.out_dir + "/accuracy/mlperf_log_accuracy.json", 40);
}

TEST(ServeSession, MissedLimitsAreInvalid) {
  TempDir dir;
  ServeOptions o = options_in(dir, Scenario::kServer);
  o.modes = {Mode::kPerformance};
  o.ttft_limit_ms = 1;
  EXPECT_EQ(run(o, 64, 2, 2), static_cast<int>(ExitCode::kInvalidResult));
  const Json r = read_json(o.out_dir + "/result.json");
  EXPECT_EQ(r.at("valid"), false);
  EXPECT_EQ(r.at("verdict"), "INVALID under demo settings; not an MLPerf result");
  EXPECT_NE(r.at("reasons").dump().find("latency limits are not met"), std::string::npos);
}

TEST(ServeSession, TokensBelowTwoAreAUsageError) {
  TempDir dir;
  ServeOptions o = options_in(dir, Scenario::kOffline);
  o.max_new_tokens = 1;
  EXPECT_EQ(run(o, 16, 4, 1), static_cast<int>(ExitCode::kUsage));
}

TEST(ServeSession, APromptThatCannotFitIsToldBeforeTheClock) {
  TempDir dir;
  ServeOptions o = options_in(dir, Scenario::kOffline);
  o.max_new_tokens = 5000;
  EXPECT_EQ(run(o, 16, 4, 1), static_cast<int>(ExitCode::kUsage));
  EXPECT_FALSE(std::filesystem::exists(o.out_dir + "/result.json"));
}

// The interrupt goes up in the middle: LoadGen must end soon, the process must not crash, and
// what was finished must be told, as invalid.
void expect_interrupted(Scenario scenario, std::vector<Mode> modes, double qps) {
  TempDir dir;
  ServeOptions o = options_in(dir, scenario);
  o.modes = std::move(modes);
  if (qps > 0) o.target_qps = qps;
  const auto start = Clock::now();
  const int code = in_child([&] {
    Interrupt interrupt;
    CountedDataset dataset(64);
    prepare_out_dir(o);
    PacedSink sink(interrupt, 2, 10);
    std::thread breaker([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(700));
      interrupt.raise(ExitCode::kLostPeer, "host h, rank 3: gone");
    });
    ExitCode result = ExitCode::kOk;
    try {
      result = run_session(sink, dataset, o, fixture_facts(), interrupt);
    } catch (const Error& e) {
      result = e.code();
    }
    breaker.join();
    return result;
  });
  EXPECT_EQ(code, static_cast<int>(ExitCode::kLostPeer));
  EXPECT_LT(std::chrono::duration<double>(Clock::now() - start).count(), 4.0);
  const Json r = read_json(o.out_dir + "/result.json");
  EXPECT_EQ(r.at("valid"), false);
  EXPECT_EQ(r.at("verdict"), "ended early; not a result");
  EXPECT_EQ(r.at("error"), "host h, rank 3: gone");
  const char* pass = o.modes[0] == Mode::kPerformance ? "performance" : "accuracy";
  const auto journal = lines_of(fmt::format("{}/{}/journal.jsonl", o.out_dir, pass));
  EXPECT_GT(journal.size(), 0u);
  EXPECT_LT(journal.size(), 512u);
  EXPECT_EQ(r.at("samples"), journal.size());
  std::string detail;
  for (const auto& line :
       lines_of(o.out_dir + "/" + pass + (o.modes[0] == Mode::kPerformance ? "/run_1" : "") +
                "/mlperf_log_detail.txt"))
    detail += line;
  EXPECT_NE(detail.find("drover ended the run early: host h, rank 3: gone"), std::string::npos);
}

TEST(ServeInterrupt, Offline) { expect_interrupted(Scenario::kOffline, {Mode::kPerformance}, 0); }
TEST(ServeInterrupt, OfflineAccuracy) {
  expect_interrupted(Scenario::kOffline, {Mode::kAccuracy}, 0);
}
TEST(ServeInterrupt, ServerWhileIssuing) {
  expect_interrupted(Scenario::kServer, {Mode::kPerformance}, 20);
}
TEST(ServeInterrupt, ServerWhenAllIsIssued) {
  expect_interrupted(Scenario::kServer, {Mode::kPerformance}, 5000);
}
TEST(ServeInterrupt, SingleStream) {
  expect_interrupted(Scenario::kSingleStream, {Mode::kPerformance}, 0);
}

// At one query in five minutes LoadGen is asleep when the interrupt goes up.
TEST(ServeInterrupt, ServerAsleepUntilTheNextArrival) {
  TempDir dir;
  ServeOptions o = options_in(dir, Scenario::kServer);
  o.target_qps = 0.003;
  o.stuck_seconds = 0.5;
  o.on_stuck = [] { ::_exit(static_cast<int>(ExitCode::kLostPeer)); };
  const auto start = Clock::now();
  const int code = in_child([&] {
    Interrupt interrupt;
    CountedDataset dataset(64);
    prepare_out_dir(o);
    PacedSink sink(interrupt, 2, 10);
    std::thread breaker([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(700));
      interrupt.raise(ExitCode::kLostPeer, "host h, rank 3: gone");
    });
    breaker.detach();
    return run_session(sink, dataset, o, fixture_facts(), interrupt);
  });
  EXPECT_EQ(code, static_cast<int>(ExitCode::kLostPeer));
  EXPECT_LT(std::chrono::duration<double>(Clock::now() - start).count(), 4.0);
  const Json r = read_json(o.out_dir + "/result.json");
  EXPECT_EQ(r.at("valid"), false);
  EXPECT_EQ(r.at("error"), "host h, rank 3: gone");
  EXPECT_EQ(lines_of(o.out_dir + "/performance/journal.jsonl").size(), 1u);  // the first, at once
}

TEST(ServeJournal, IsGoodUpToTheLastLineAfterAKill) {
  TempDir dir;
  const ServeOptions o = options_in(dir, Scenario::kOffline);
  const int code = in_child([&] {
    Interrupt interrupt;
    CountedDataset dataset(64);
    prepare_out_dir(o);
    PacedSink sink(interrupt, 2, 5);
    std::thread killer([] {
      std::this_thread::sleep_for(std::chrono::milliseconds(500));
      ::kill(::getpid(), SIGKILL);
    });
    killer.detach();
    return run_session(sink, dataset, o, fixture_facts(), interrupt);
  });
  EXPECT_EQ(code, 128 + SIGKILL);
  const auto journal = lines_of(o.out_dir + "/performance/journal.jsonl");
  ASSERT_GT(journal.size(), 0u);
  ASSERT_LT(journal.size(), 64u);
  expect_journal(o.out_dir + "/performance/journal.jsonl", "performance", journal.size());
}

}  // namespace
}  // namespace drover

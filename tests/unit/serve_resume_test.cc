// Ends at a safe point, and runs that go on from an earlier one's journal, under the real LoadGen.
#include "serve/resume.h"

#include <sys/resource.h>

#include <csignal>

#include "serve/journal.h"
#include "unit/serve_fixture.h"

namespace drover {
namespace {

constexpr size_t kSamples = 64;

ServeOptions options_in(const TempDir& dir, const std::string& out, Mode mode) {
  ServeOptions o;
  o.modes = {mode};
  o.out_dir = dir.path + "/" + out;
  o.demo = true;
  o.max_new_tokens = 64;
  o.ttft_limit_ms = 5000;
  o.tpot_limit_ms = 2000;
  o.progress = false;
  return o;
}

struct Outcome {
  int code = 0;
  double seconds = 0;
  Json result;
  std::vector<std::string> journal;
};

// A session that is asked to stop after `stop_after` seconds (0: never), in a process of its own.
// Its exit code is the session's unless it submitted another number of requests than `submitted`.
Outcome run(const ServeOptions& o, double stop_after, int64_t submitted = -1, double step_ms = 10) {
  const auto start = Clock::now();
  Outcome out;
  out.code = in_child([&] {
    Interrupt interrupt;
    CountedDataset dataset(kSamples);
    prepare_out_dir(o);
    PacedSink sink(interrupt, 2, step_ms);
    std::thread stopper([&] {
      if (stop_after <= 0) return;
      std::this_thread::sleep_for(std::chrono::duration<double>(stop_after));
      if (!interrupt.ask_to_stop("asked by the test")) ::_exit(98);
    });
    ExitCode code = ExitCode::kOk;
    try {
      code = run_session(sink, dataset, o, fixture_facts(), interrupt);
    } catch (const Error& e) {
      std::fprintf(stderr, "%s\n", e.what());
      code = e.code();
    }
    stopper.join();
    const auto asked = static_cast<int64_t>(sink.submitted) - o.warmup_requests;
    if (submitted >= 0 && asked != submitted) ::_exit(97);
    return code;
  });
  out.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  if (std::filesystem::exists(o.out_dir + "/result.json"))
    out.result = read_json(o.out_dir + "/result.json");
  out.journal = lines_of(fmt::format("{}/{}/journal.jsonl", o.out_dir, to_string(o.modes[0])));
  return out;
}

std::vector<int32_t> wanted(size_t sample) {
  CountedDataset d(kSamples);
  return answer(d.sample(sample).input, 64);
}

void expect_whole_accuracy_log(const ServeOptions& o) {
  const Json log = read_json(o.out_dir + "/accuracy/mlperf_log_accuracy.json");
  ASSERT_EQ(log.size(), kSamples);
  std::vector<int> seen(kSamples, 0);
  for (const auto& e : log) {
    const auto index = e.at("qsl_idx").get<size_t>();
    ++seen.at(index);
    std::string hex;
    for (const int32_t t : wanted(index))
      for (int b = 0; b < 4; ++b)
        hex += fmt::format("{:02X}", (static_cast<uint32_t>(t) >> (8 * b)) & 255u);
    EXPECT_EQ(e.at("data").get<std::string>(), hex);
  }
  for (const int n : seen) EXPECT_EQ(n, 1);
}

void expect_stopped(const Outcome& run, Mode mode) {
  EXPECT_EQ(run.code, static_cast<int>(ExitCode::kInvalidResult));
  EXPECT_LT(run.seconds, 3.0);
  EXPECT_EQ(run.result.at("valid"), false);
  EXPECT_EQ(run.result.at("verdict"), "ended early; not a result");
  EXPECT_EQ(run.result.at("error"), "asked by the test");
  EXPECT_GT(run.journal.size(), 0u);
  EXPECT_LT(run.journal.size(), kSamples);
  EXPECT_EQ(run.result.at("samples"), run.journal.size());
  const std::string advice = run.result.at("go_on");
  EXPECT_NE(advice.find(mode == Mode::kAccuracy ? "--resume" : "never resumed"), std::string::npos);
}

// What an accuracy run of all scenarios leaves when it is stopped, and that another goes on with
// it.
void expect_stop_and_resume(Scenario scenario, double qps) {
  TempDir dir;
  ServeOptions o = options_in(dir, "first", Mode::kAccuracy);
  o.scenario = scenario;
  o.target_qps = qps;
  const Outcome first = run(o, 0.7);
  expect_stopped(first, Mode::kAccuracy);
  ServeOptions again = o;
  again.out_dir = dir.path + "/second";
  again.resume_from = o.out_dir;
  const auto left = static_cast<int64_t>(kSamples - first.journal.size());
  const Outcome second = run(again, 0, left, 2);
  EXPECT_EQ(second.code, 0);
  expect_whole_accuracy_log(again);
  EXPECT_EQ(second.journal.size(), kSamples);
  const Json& resumed = second.result.at("resumed");
  EXPECT_EQ(resumed.at("from"), o.out_dir);
  EXPECT_EQ(resumed.at("samples_taken_over"), first.journal.size());
  EXPECT_EQ(resumed.at("samples_run"), left);
  EXPECT_EQ(second.result.at("samples"), kSamples);
  size_t marked = 0;
  for (const auto& line : second.journal) marked += Json::parse(line).value("resumed", false);
  EXPECT_EQ(marked, first.journal.size());
  // The newest folder alone is enough to go on from.
  ServeOptions third = again;
  third.out_dir = dir.path + "/third";
  third.resume_from = again.out_dir;
  const Outcome nothing_left = run(third, 0, 0, 2);
  EXPECT_EQ(nothing_left.code, 0);
  expect_whole_accuracy_log(third);
}

TEST(ServeStop, OfflineGoesOn) { expect_stop_and_resume(Scenario::kOffline, 0); }
TEST(ServeStop, ServerGoesOn) { expect_stop_and_resume(Scenario::kServer, 60); }
TEST(ServeStop, SingleStreamGoesOn) { expect_stop_and_resume(Scenario::kSingleStream, 0); }

TEST(ServeStop, PerformanceEndsAtTheNextStep) {
  for (const Scenario scenario : {Scenario::kOffline, Scenario::kServer}) {
    TempDir dir;
    ServeOptions o = options_in(dir, "out", Mode::kPerformance);
    o.scenario = scenario;
    if (scenario == Scenario::kServer) o.target_qps = 60;
    expect_stopped(run(o, 0.7), Mode::kPerformance);
  }
}

TEST(ServeStop, WhatRunsIsDroppedAfterItsTime) {
  TempDir dir;
  ServeOptions o = options_in(dir, "out", Mode::kAccuracy);
  o.stop_seconds = 0.1;
  o.warmup_requests = 0;
  // A step of 400 ms: two sequences of 2 to 8 tokens run when the stop comes.
  const Outcome run_ = run(o, 2.5, -1, 400);
  EXPECT_EQ(run_.code, static_cast<int>(ExitCode::kInvalidResult));
  EXPECT_LT(run_.seconds, 4.0);
  EXPECT_EQ(run_.result.at("samples"), run_.journal.size());
}

TEST(ServeStop, TheNextPassIsNotBegun) {
  TempDir dir;
  ServeOptions o = options_in(dir, "out", Mode::kPerformance);
  o.modes = {Mode::kPerformance, Mode::kAccuracy};
  const Outcome both = run(o, 0.7);
  expect_stopped(both, Mode::kPerformance);
  EXPECT_FALSE(std::filesystem::exists(o.out_dir + "/accuracy"));
  EXPECT_NE(both.result.at("reasons").dump().find("accuracy: not begun"), std::string::npos);
}

TEST(ServeStop, NobodyHeedsItBeforeTheSession) {
  Interrupt interrupt;
  EXPECT_FALSE(interrupt.ask_to_stop("too early"));
  EXPECT_FALSE(interrupt.asked_to_stop());
  interrupt.heed_stops();
  EXPECT_TRUE(interrupt.ask_to_stop("first"));
  EXPECT_TRUE(interrupt.ask_to_stop("second"));
  EXPECT_EQ(interrupt.why_stop(), "first");
  EXPECT_FALSE(interrupt.raised());
}

// An earlier run's folder, made by a real one, for the cases below.
class Resume : public testing::Test {
 protected:
  void SetUp() override {
    o_ = options_in(dir_, "first", Mode::kAccuracy);
    ASSERT_EQ(run(o_, 0, kSamples, 1).code, 0);
    lines_ = lines_of(journal());
    again_ = o_;
    again_.out_dir = dir_.path + "/second";
    again_.resume_from = o_.out_dir;
  }
  std::string journal() const { return o_.out_dir + "/accuracy/journal.jsonl"; }
  void put(const std::string& text) const { std::ofstream(journal()) << text; }
  std::string first_lines(size_t n) const {
    std::string text;
    for (size_t i = 0; i < n; ++i) text += lines_[i] + "\n";
    return text;
  }
  void expect_goes_on(size_t known, size_t damaged) {
    const Outcome second = run(again_, 0, static_cast<int64_t>(kSamples - known), 1);
    ASSERT_EQ(second.code, 0);
    EXPECT_EQ(second.result.at("resumed").at("samples_taken_over"), known);
    EXPECT_EQ(second.result.at("resumed").at("damaged_lines"), damaged);
    expect_whole_accuracy_log(again_);
    EXPECT_EQ(lines_of(again_.out_dir + "/accuracy/journal.jsonl").size(), kSamples);
  }
  void expect_refused(ExitCode code) {
    EXPECT_EQ(run(again_, 0, -1, 1).code, static_cast<int>(code));
    EXPECT_FALSE(std::filesystem::exists(again_.out_dir + "/result.json"));
    EXPECT_EQ(lines_of(journal()).size(), lines_.size());
  }

  TempDir dir_;
  ServeOptions o_, again_;
  std::vector<std::string> lines_;
};

TEST_F(Resume, TornLastLine) {
  for (const size_t keep : {size_t{1}, lines_[10].size() / 2, lines_[10].size()}) {
    put(first_lines(10) + lines_[10].substr(0, keep));
    again_.out_dir = fmt::format("{}/torn{}", dir_.path, keep);
    expect_goes_on(10, 1);
  }
}

TEST_F(Resume, EmptyJournal) {
  put("");
  expect_goes_on(0, 0);
}

TEST_F(Resume, DamagedAndContradictingLines) {
  std::string text = first_lines(20);
  auto replace = [&](const std::string& line, const char* key, const Json& value) {
    Json j = Json::parse(line);
    j[key] = value;
    text.replace(text.find(line), line.size(), j.dump());
  };
  replace(lines_[3], "tokens", Json::array({5, 6}));
  replace(lines_[4], "sample", kSamples);
  Json tokens = Json::parse(lines_[5]).at("tokens");
  tokens[0] = tokens[0].get<int32_t>() ^ 1;
  replace(lines_[5], "tokens", tokens);
  text.replace(text.find(lines_[6]), 4, "\x01\x02{}");
  put(text + lines_[0] + "\n");  // one twice
  expect_goes_on(16, 4);
}

TEST_F(Resume, JournalOfAnotherRun) {
  std::string text = first_lines(lines_.size());
  const std::string run = Json::parse(lines_[7]).at("run");
  text.replace(text.find(lines_[7]) + lines_[7].find(run), run.size(), "0123456789abcdef");
  put(text);
  expect_refused(ExitCode::kBadInput);
}

TEST_F(Resume, NoJournalAtAll) {
  put(std::string(64, '\n'));
  expect_refused(ExitCode::kBadInput);
}

TEST_F(Resume, OtherOptionsAreRefused) {
  again_.max_new_tokens = 63;
  expect_refused(ExitCode::kUsage);
  again_.max_new_tokens = o_.max_new_tokens;
  again_.samples = 10;
  expect_refused(ExitCode::kUsage);
}

TEST_F(Resume, OtherModeOrFolderIsRefused) {
  again_.modes = {Mode::kPerformance, Mode::kAccuracy};
  expect_refused(ExitCode::kUsage);
  again_.modes = {Mode::kAccuracy};
  again_.out_dir = dir_.path + "/./first";
  again_.force = true;
  EXPECT_EQ(run(again_, 0, -1, 1).code, static_cast<int>(ExitCode::kUsage));
  EXPECT_EQ(lines_of(journal()).size(), lines_.size());
}

TEST_F(Resume, ChangedIdentityIsRefused) {
  const std::string file = o_.out_dir + "/accuracy/identity.json";
  Json j = read_json(file);
  j["identity"]["max-new-tokens"] = 65;
  write_json(file, j);
  expect_refused(ExitCode::kBadInput);
  std::filesystem::remove(file);
  expect_refused(ExitCode::kBadInput);
}

TEST_F(Resume, DifferencesAreNamed) {
  RunFacts facts = fixture_facts();
  facts.model["fingerprint"] = "other";
  try {
    read_earlier_run(o_.out_dir, run_identity(o_, facts, kSamples), kSamples, 60000);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    EXPECT_NE(std::string(e.what()).find("model is other here and beef there"), std::string::npos);
  }
  facts = fixture_facts();
  facts.kv = "fp8";
  facts.shape = {{"tp", 2}};
  try {
    read_earlier_run(o_.out_dir, run_identity(o_, facts, kSamples), kSamples, 60000);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_NE(
        std::string(e.what()).find("kv is fp8 here and f32 there; tp is 2 here and not known"),
        std::string::npos);
  }
}

TEST(ServeJournal, AFullDiskLeavesWholeLines) {
  TempDir dir;
  const std::string file = dir.path + "/journal.jsonl";
  const int code = in_child([&] {
    // The largest file that this process may write stands for the disk's end.
    const rlimit limit{1000, 1000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    ::signal(SIGXFSZ, SIG_IGN);
    Journal journal(file);
    int refused = 0;
    for (int i = 0; i < 5; ++i) {
      try {
        journal.append(std::string(299, 'a' + static_cast<char>(i)));
      } catch (const Error& e) {
        refused += e.code() == ExitCode::kEnvironment;
      }
    }
    journal.append("small");  // what fits is kept
    return refused == 2 ? ExitCode::kOk : ExitCode::kInternal;
  });
  EXPECT_EQ(code, 0);
  const auto lines = lines_of(file);
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_EQ(lines[2], std::string(299, 'c'));
  EXPECT_EQ(lines[3], "small");
}

}  // namespace
}  // namespace drover

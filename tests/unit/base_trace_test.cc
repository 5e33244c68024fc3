#include "base/trace.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <set>
#include <thread>

#include "base/error.h"
#include "base/json.h"

namespace drover::trace {
namespace {

Json taken(int rank = 0, int64_t offset = 0) {
  return Json::parse(fmt::format("[{}]", take_json_events(rank, offset)));
}

// Events of a phase ("X": spans, "M": names, "C": counters, "i": marks).
std::vector<Json> of(const Json& events, const std::string& phase, const std::string& name = "") {
  std::vector<Json> out;
  for (const auto& e : events) {
    if (e["ph"] == phase && (name.empty() || e["name"] == name)) out.push_back(e);
  }
  return out;
}

std::string name_of_row(const Json& events, const Json& span) {
  for (const auto& m : of(events, "M", "thread_name")) {
    if (m["tid"] == span["tid"]) return m["args"]["name"];
  }
  return {};
}

class Trace : public ::testing::Test {
 protected:
  void TearDown() override {
    stop();
    take_json_events(0, 0);
  }
};

TEST_F(Trace, OffRecordsNothing) {
  EXPECT_FALSE(on());
  {
    const Scope s("unseen");
    counter("unseen", 1);
    span(track("steps", "step"), "unseen", 0, 1);
  }
  EXPECT_EQ(take_json_events(0, 0), "");
  // A scope that began before start() is no event.
  {
    const Scope s("too early");
    start();
  }
  EXPECT_EQ(take_json_events(0, 0), "");
  stop();
  EXPECT_FALSE(on());
}

TEST_F(Trace, SpansOfThreadsNest) {
  start();
  name_thread("main");
  {
    const Scope outer("plan", {"step", 7}, {"rows", -3});
    const Scope inner("encode");
  }
  std::thread([] {
    name_thread("worker");
    const Scope s("step");
    counter("queue", 42);
  }).join();
  const int64_t started = started_ns();
  const Json events = taken(3, -started);
  ASSERT_EQ(of(events, "X").size(), 3u);
  const Json plan = of(events, "X", "plan").at(0), encode = of(events, "X", "encode").at(0);
  const Json step = of(events, "X", "step").at(0);
  EXPECT_EQ(plan["pid"], 3);
  EXPECT_EQ(plan["cat"], "host");
  EXPECT_EQ(plan["args"], (Json{{"step", 7}, {"rows", -3}}));
  EXPECT_FALSE(encode.contains("args"));
  EXPECT_EQ(plan["tid"], encode["tid"]);
  EXPECT_NE(plan["tid"], step["tid"]);
  EXPECT_LE(plan["ts"].get<double>(), encode["ts"].get<double>());
  EXPECT_GE(plan["dur"].get<double>(), encode["dur"].get<double>());
  // The offset brings the beginning to 0.
  EXPECT_GE(plan["ts"].get<double>(), 0.0);
  EXPECT_LT(plan["ts"].get<double>(), 60e6);
  EXPECT_EQ(name_of_row(events, plan), "main");
  EXPECT_EQ(name_of_row(events, step), "worker");
  const Json count = of(events, "C", "queue").at(0);
  EXPECT_EQ(count["args"]["value"], 42);
  const auto process = of(events, "M", "process_name");
  ASSERT_EQ(process.size(), 1u);
  EXPECT_TRUE(process[0]["args"]["name"].get<std::string>().starts_with("rank 3 ("));
  EXPECT_EQ(take_json_events(0, 0), "") << "taken twice";
}

TEST_F(Trace, TracksKeepNanosecondsAndOverlapsApart) {
  start();
  const int kernels = track("GPU stream 7", "kernel"), steps = track("steps", "step");
  EXPECT_EQ(track("GPU stream 7", "kernel"), kernels);
  EXPECT_NE(kernels, steps);
  const char* name = keep(std::string("k<\"q\"\\\n\xff>"));
  EXPECT_EQ(keep("k<\"q\"\\\n\xff>"), name);
  span(kernels, name, 2000, 3001);
  span(kernels, "first", 1000, 2000);
  span(kernels, "overlaps", 2500, 4000);
  span(kernels, "after", 3001, 3500);
  span(steps, "decode step", 999, 5000, {"step", 1});
  const Json events = taken(0, 5);
  const Json first = of(events, "X", "first").at(0), over = of(events, "X", "overlaps").at(0);
  EXPECT_EQ(first["cat"], "kernel");
  EXPECT_EQ(first["tid"], of(events, "X", "after").at(0)["tid"]);
  EXPECT_NE(first["tid"], over["tid"]);
  EXPECT_EQ(name_of_row(events, first), "GPU stream 7");
  EXPECT_EQ(name_of_row(events, over), "GPU stream 7 (2)");
  const Json step = of(events, "X", "decode step").at(0);
  EXPECT_DOUBLE_EQ(step["ts"].get<double>(), 1.004);
  EXPECT_DOUBLE_EQ(step["dur"].get<double>(), 4.001);
  EXPECT_EQ(of(events, "X").size(), 5u);
}

TEST_F(Trace, ManyThreadsWithinTheBound) {
  constexpr size_t kMost = 1000;
  start(kMost);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 500; ++i) const Scope s("work");
    });
  }
  // Taking goes on beside recording.
  size_t spans = 0, dropped = 0;
  const auto take = [&] {
    const Json events = taken();
    spans += of(events, "X").size();
    for (const auto& d : of(events, "i", "dropped")) dropped += d["args"]["events"].get<size_t>();
  };
  take();
  for (auto& t : threads) t.join();
  take();
  EXPECT_EQ(spans, kMost);
  EXPECT_EQ(spans + dropped, 4000u);
}

TEST_F(Trace, OneFileOfAllRanks) {
  start();
  { const Scope s("one"); }
  const std::string first = take_json_events(0, 0);
  { const Scope s("two"); }
  const std::string second = take_json_events(1, 0);
  const auto file = std::filesystem::temp_directory_path() /
                    ("drover_trace_" + std::to_string(started_ns()) + ".json");
  write(file.string(), {first, "", second});
  const Json whole = read_json(file.string());
  std::filesystem::remove(file);
  std::set<int> ranks;
  for (const auto& e : of(whole["traceEvents"], "X")) ranks.insert(e["pid"].get<int>());
  EXPECT_EQ(ranks, (std::set<int>{0, 1}));
  write(file.string(), {});
  EXPECT_TRUE(read_json(file.string())["traceEvents"].empty());
  std::filesystem::remove(file);
  EXPECT_THROW(write((file / "none" / "t.json").string(), {}), Error);
}

TEST_F(Trace, AMarkerEndsASpanWhereTheNextBegins) {
  Marker mark(track("operations", "operation"));
  mark("before the start");
  mark(nullptr);
  start();
  Marker nothing;
  nothing("unseen");
  nothing(nullptr);
  mark("qkv");
  mark("rope");
  mark(nullptr);
  mark(nullptr);
  mark("o");
  mark(nullptr);
  const auto all = spans();
  ASSERT_EQ(all.size(), 3u);
  EXPECT_STREQ(all[0].category, "operation");
  EXPECT_STREQ(all[0].name, "qkv");
  EXPECT_EQ(all[0].end_ns, all[1].begin_ns);
  EXPECT_STREQ(all[2].name, "o");
  EXPECT_LE(all[1].end_ns, all[2].begin_ns);
  EXPECT_EQ(spans().size(), 3u);  // they stay
  EXPECT_EQ(of(taken(), "X").size(), 3u);
  EXPECT_EQ(dropped(), 0u);
}

TEST(ClockProbe, TheShortestRoundTripDecides) {
  ClockProbe p;
  p.sample(1000, 51'300, 1600);
  p.sample(2000, 52'050, 2100);
  p.sample(3000, 53'900, 4000);
  EXPECT_EQ(p.round_trip_ns, 100);
  EXPECT_EQ(p.offset_ns, 50'000);
}

}  // namespace
}  // namespace drover::trace

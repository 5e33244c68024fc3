#include <gtest/gtest.h>

#include <random>

#include "base/error.h"
#include "sched/step.h"

namespace drover {
namespace {

StepPlan sample_plan() {
  StepPlan p;
  p.step = 0x1122334455667788ull;
  p.group = 3;
  p.retired = {1, 2, 9};
  p.suspended = {4};
  p.admitted.push_back({77, 5, 3, 64, 12, true, false, true, {9, -1, 8, 7}});
  p.admitted.push_back({~0ull, 6, 3, 1, 0, false, true, false, {1}});
  p.grants.push_back({5, 0, {10, 11}});
  p.grants.push_back({6, 3, {12}});
  p.chunks.push_back({5, 0, 4, true});
  p.chunks.push_back({6, 16, 1, false});
  return p;
}

StepResult sample_result() {
  StepResult r;
  r.step = 42;
  r.rows = 17;
  r.seconds = 0.125;
  r.tokens = 5;
  r.first = {{1, 100}, {2, 200}};
  r.streamed = {{1, 100}};
  r.finished.push_back({1, true, {100, 2}});
  r.finished.push_back({2, false, {}});
  r.logits.push_back({1, 3, 2, {0.5f, -1.5f, 2.0f, 3.0f}});
  return r;
}

RankTimes sample_times() {
  RankTimes t{.asking = 7, .rank = 3, .split = true, .steps = 9, .seconds = 1.5};
  t.compute = 1;
  t.communication = 0.25;
  t.stage_wait = 0.125;
  t.plan_wait = 0.0625;
  t.device = 0.5;
  t.host = 0.03125;
  t.meter = RankTimes::Meter::kCounted;
  t.joules = 1234.5;
  t.joules_seconds = 1.75;
  return t;
}

std::vector<std::byte> bytes_of(const auto& message) {
  std::vector<std::byte> bytes(5);  // encode must clear it
  encode(message, bytes);
  return bytes;
}

TEST(StepCodec, PlanComesBack) {
  const StepPlan p = sample_plan();
  const StepPlan q = decode_plan(bytes_of(p));
  EXPECT_EQ(q.step, p.step);
  EXPECT_EQ(q.group, p.group);
  EXPECT_FALSE(q.stop);
  EXPECT_EQ(q.retired, p.retired);
  EXPECT_EQ(q.suspended, p.suspended);
  ASSERT_EQ(q.admitted.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(q.admitted[i].id, p.admitted[i].id);
    EXPECT_EQ(q.admitted[i].slot, p.admitted[i].slot);
    EXPECT_EQ(q.admitted[i].group, p.admitted[i].group);
    EXPECT_EQ(q.admitted[i].max_new_tokens, p.admitted[i].max_new_tokens);
    EXPECT_EQ(q.admitted[i].forced_length, p.admitted[i].forced_length);
    EXPECT_EQ(q.admitted[i].ignore_eos, p.admitted[i].ignore_eos);
    EXPECT_EQ(q.admitted[i].stream_tokens, p.admitted[i].stream_tokens);
    EXPECT_EQ(q.admitted[i].want_logits, p.admitted[i].want_logits);
    EXPECT_EQ(q.admitted[i].prompt, p.admitted[i].prompt);
  }
  ASSERT_EQ(q.grants.size(), 2u);
  EXPECT_EQ(q.grants[1].slot, 6);
  EXPECT_EQ(q.grants[1].first_index, 3);
  EXPECT_EQ(q.grants[0].pages, p.grants[0].pages);
  ASSERT_EQ(q.chunks.size(), 2u);
  EXPECT_EQ(q.chunks[1].slot, 6);
  EXPECT_EQ(q.chunks[1].start, 16);
  EXPECT_EQ(q.chunks[1].count, 1);
  EXPECT_TRUE(q.chunks[0].last);
  EXPECT_FALSE(q.chunks[1].last);
  EXPECT_EQ(bytes_of(q), bytes_of(p));
}

TEST(StepCodec, StopComesBack) {
  StepPlan p;
  p.stop = true;
  EXPECT_TRUE(decode_plan(bytes_of(p)).stop);
  EXPECT_FALSE(decode_plan(bytes_of(p)).tell_times);
}

TEST(StepCodec, TimesComeBack) {
  StepPlan asking;
  asking.tell_times = true;
  asking.step = 7;
  EXPECT_TRUE(decode_plan(bytes_of(asking)).tell_times);
  EXPECT_FALSE(decode_plan(bytes_of(asking)).stop);
  const RankTimes p = sample_times();
  const RankTimes q = decode_times(bytes_of(p));
  EXPECT_EQ(q.asking, 7u);
  EXPECT_EQ(q.rank, 3);
  EXPECT_TRUE(q.split);
  EXPECT_EQ(q.steps, 9u);
  EXPECT_EQ(q.seconds, 1.5);
  EXPECT_EQ(q.stage_wait, 0.125);
  EXPECT_EQ(q.host, 0.03125);
  EXPECT_EQ(q.meter, RankTimes::Meter::kCounted);
  EXPECT_EQ(q.joules, 1234.5);
  EXPECT_EQ(q.joules_seconds, 1.75);
  EXPECT_EQ(bytes_of(q), bytes_of(p));
}

TEST(StepCodec, ResultComesBack) {
  const StepResult p = sample_result();
  const StepResult q = decode_result(bytes_of(p));
  EXPECT_EQ(q.step, 42u);
  EXPECT_EQ(q.rows, 17);
  EXPECT_EQ(q.seconds, 0.125);
  EXPECT_EQ(q.tokens, 5);
  ASSERT_EQ(q.first.size(), 2u);
  EXPECT_EQ(q.first[1].id, 2u);
  EXPECT_EQ(q.first[1].token, 200);
  ASSERT_EQ(q.streamed.size(), 1u);
  ASSERT_EQ(q.finished.size(), 2u);
  EXPECT_TRUE(q.finished[0].by_eos);
  EXPECT_EQ(q.finished[0].tokens, (std::vector<int32_t>{100, 2}));
  ASSERT_EQ(q.logits.size(), 1u);
  EXPECT_EQ(q.logits[0].start, 3);
  EXPECT_EQ(q.logits[0].logits, p.logits[0].logits);
  EXPECT_EQ(bytes_of(q), bytes_of(p));
}

TEST(StepCodec, EveryTruncationThrows) {
  const auto plan = bytes_of(sample_plan());
  for (size_t n = 0; n < plan.size(); ++n) {
    EXPECT_THROW(decode_plan(std::span(plan).first(n)), Error) << n << " bytes";
  }
  const auto result = bytes_of(sample_result());
  for (size_t n = 0; n < result.size(); ++n) {
    EXPECT_THROW(decode_result(std::span(result).first(n)), Error) << n << " bytes";
  }
  const auto times = bytes_of(sample_times());
  for (size_t n = 0; n < times.size(); ++n) {
    EXPECT_THROW(decode_times(std::span(times).first(n)), Error) << n << " bytes";
  }
}

TEST(StepCodec, EveryFlippedBitThrows) {
  auto plan = bytes_of(sample_plan());
  for (size_t bit = 0; bit < plan.size() * 8; ++bit) {
    plan[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_THROW(decode_plan(plan), Error) << "bit " << bit;
    plan[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  auto result = bytes_of(sample_result());
  for (size_t bit = 0; bit < result.size() * 8; ++bit) {
    result[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_THROW(decode_result(result), Error) << "bit " << bit;
    result[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  auto times = bytes_of(sample_times());
  for (size_t bit = 0; bit < times.size() * 8; ++bit) {
    times[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_THROW(decode_times(times), Error) << "bit " << bit;
    times[bit / 8] ^= std::byte{1} << (bit % 8);
  }
}

TEST(StepCodec, TheOtherKindThrows) {
  EXPECT_THROW(decode_result(bytes_of(sample_plan())), Error);
  EXPECT_THROW(decode_plan(bytes_of(sample_result())), Error);
  EXPECT_THROW(decode_result(bytes_of(sample_times())), Error);
  EXPECT_THROW(decode_times(bytes_of(sample_result())), Error);
}

TEST(StepCodec, NegativeNumbersThrow) {
  StepPlan p = sample_plan();
  p.chunks[0].start = -1;
  EXPECT_THROW(decode_plan(bytes_of(p)), Error);
  p = sample_plan();
  p.admitted[0].slot = -5;
  EXPECT_THROW(decode_plan(bytes_of(p)), Error);
}

TEST(StepCodec, AnUnknownMeterThrows) {
  RankTimes t = sample_times();
  t.meter = static_cast<RankTimes::Meter>(3);
  EXPECT_THROW(decode_times(bytes_of(t)), Error);
}

TEST(StepCodec, GarbageThrowsAsAnInternalError) {
  std::mt19937_64 random(5);
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::byte> bytes(random() % 200);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    try {
      decode_plan(bytes);
      FAIL() << "garbage was taken for a plan";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kInternal);
    }
  }
}

}  // namespace
}  // namespace drover

#include <gtest/gtest.h>

#include <set>

#include "sim_run.h"

namespace drover::sim {
namespace {

ReplicaLimits roomy() {
  ReplicaLimits l;
  l.slots = 16;
  l.pages = 1000;
  l.page_tokens = 16;
  l.max_positions = 512;
  l.step_tokens = 128;
  l.chunk_tokens = 64;
  return l;
}

std::vector<Request> requests(int count, int32_t prompt, int32_t max_new) {
  std::vector<Request> all;
  for (int i = 0; i < count; ++i) {
    all.push_back(make_request(static_cast<SequenceId>(i), prompt, max_new));
  }
  return all;
}

// Answers each plan at once with what the worker says.
StepPlan turn(Scheduler& scheduler, Worker& worker, int replica = 0) {
  StepPlan plan;
  EXPECT_TRUE(scheduler.plan(replica, plan));
  scheduler.complete(replica, worker.apply(plan));
  return plan;
}

TEST(Scheduler, RefusesWhatCanNeverRun) {
  ReplicaLimits l = roomy();
  l.max_positions = 2000;
  l.pages = 40;
  const Scheduler s(1, l);
  EXPECT_EQ(s.refuse(make_request(1, 400, 200)), std::nullopt);
  EXPECT_EQ(s.refuse(make_request(1, 577, 64)), std::nullopt);  // 640 rows: exactly 40 pages
  EXPECT_EQ(*s.refuse(make_request(1, 900, 64)),
            "prompt of 900 tokens + 64 new ones needs 61 pages, the pool has 40: raise "
            "--kv-memory");
  EXPECT_NE(s.refuse(make_request(1, 578, 64)), std::nullopt);
  EXPECT_EQ(*s.refuse(make_request(1, 1990, 64)),
            "prompt of 1990 tokens + 64 new ones is 2054 positions, the model has 2000: shorten "
            "the prompt or ask for at most 10 new tokens");
  EXPECT_NE(s.refuse(make_request(1, 0, 5)), std::nullopt);
  EXPECT_NE(s.refuse(make_request(1, 5, 0)), std::nullopt);
  Scheduler t(1, l);
  EXPECT_THROW(t.submit(make_request(1, 900, 64)), Error);
}

TEST(Scheduler, RefusesAbsurdLimits) {
  ReplicaLimits l = roomy();
  l.step_tokens = 0;
  EXPECT_THROW(Scheduler(1, l), Error);
  EXPECT_THROW(Scheduler(0, roomy()), Error);
}

TEST(Scheduler, NothingToDoGivesNoPlan) {
  Scheduler s(2, roomy());
  StepPlan plan;
  EXPECT_FALSE(s.plan(0, plan));
  EXPECT_TRUE(s.idle());
}

TEST(Scheduler, OneRequestStepByStep) {
  ReplicaLimits l = roomy();
  Scheduler s(1, l);
  Worker w(l, Model{});
  s.submit(make_request(7, 100, 3));
  EXPECT_FALSE(s.idle());
  EXPECT_EQ(s.outstanding_tokens(0), 103);
  StepPlan p = turn(s, w);
  ASSERT_EQ(p.admitted.size(), 1u);
  ASSERT_EQ(p.chunks.size(), 1u);
  EXPECT_EQ(p.chunks[0].count, 64);
  EXPECT_FALSE(p.chunks[0].last);
  EXPECT_EQ(p.grants[0].pages.size(), 4u);
  p = turn(s, w);
  EXPECT_EQ(p.chunks[0].start, 64);
  EXPECT_TRUE(p.chunks[0].last);
  turn(s, w);  // position 100: the second new token
  turn(s, w);  // position 101: the third
  EXPECT_EQ(s.free_pages(0), 1000);
  EXPECT_FALSE(s.idle()) << "the retirement is not told yet";
  p = turn(s, w);
  EXPECT_EQ(p.retired.size(), 1u);
  EXPECT_TRUE(s.idle());
  EXPECT_FALSE(s.plan(0, p));
}

TEST(Scheduler, RetiresAtTheLimitWithoutWaitingForTheResult) {
  ReplicaLimits l = roomy();
  Scheduler s(1, l);
  Worker w(l, Model{});
  s.submit(make_request(1, 10, 2));
  StepPlan p;
  std::vector<StepResult> results;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(s.plan(0, p));
    results.push_back(w.apply(p));
  }
  EXPECT_EQ(p.retired.size(), 1u);
  EXPECT_FALSE(s.plan(0, p));
  EXPECT_FALSE(s.idle()) << "its result is still to come";
  for (const StepResult& r : results) s.complete(0, r);
  EXPECT_TRUE(s.idle());
  EXPECT_EQ(s.counters(0).finished, 1u);
}

TEST(Scheduler, ResultsOutOfOrderOrOfStrangersThrow) {
  ReplicaLimits l = roomy();
  Scheduler s(1, l);
  StepResult r;
  EXPECT_THROW(s.complete(0, r), Error);  // nothing was planned
  s.submit(make_request(1, 10, 2));
  StepPlan p;
  ASSERT_TRUE(s.plan(0, p));
  r.step = 1;
  EXPECT_THROW(s.complete(0, r), Error);
  r.step = 0;
  r.finished.push_back({99, false, {}});
  EXPECT_THROW(s.complete(0, r), Error);
}

TEST(Scheduler, DecodingCostsNoBytes) {
  size_t bytes_of[2];
  int i = 0;
  for (int batch : {2, 1024}) {
    ReplicaLimits l = roomy();
    l.slots = 1024;
    l.pages = 4096;
    l.step_tokens = 1024;
    Scheduler s(1, l);
    Worker w(l, Model{});
    for (Request& r : requests(batch, 1, 400)) s.submit(std::move(r));
    turn(s, w);
    const StepPlan p = turn(s, w);
    EXPECT_EQ(w.last_decode_rows(), batch);
    std::vector<std::byte> bytes;
    encode(p, bytes);
    bytes_of[i++] = bytes.size();
  }
  EXPECT_EQ(bytes_of[0], bytes_of[1]);
  EXPECT_LT(bytes_of[0], 64u);
}

TEST(Scheduler, GroupsTakeTurnsAndShareTheLoad) {
  Case c;
  c.limits = roomy();
  c.limits.groups = 3;
  Driver run(c);
  int last = -1;
  int turns = 0, repeats = 0;
  std::set<int> groups;
  run.on_plan = [&](int, const StepPlan& p) {
    groups.insert(p.group);
    ++turns;
    repeats += p.group == last ? 1 : 0;
    last = p.group;
  };
  run.go(requests(48, 40, 60));
  EXPECT_EQ(groups.size(), 3u);
  EXPECT_GT(turns, 100);
  EXPECT_LE(repeats, 3) << "a group may follow itself only while the others have no rows";
}

TEST(Scheduler, ALoneGroupRunsAgainAndAgain) {
  Case c;
  c.limits = roomy();
  c.limits.groups = 4;
  Driver run(c);
  int steps = 0;
  run.on_plan = [&](int, const StepPlan& p) {
    EXPECT_EQ(p.group == 0 || p.chunks.empty(), true);
    ++steps;
  };
  run.go(requests(1, 10, 30));
  EXPECT_EQ(steps, 31);  // the prompt, 29 more tokens, the retirement
}

TEST(Scheduler, PreemptionStorm) {
  for (const int groups : {1, 2, 3}) {
    for (const bool lockstep : {false, true}) {
      Case c;
      c.limits = roomy();
      c.limits.groups = groups;
      c.limits.pages = 34;  // one sequence needs 20
      c.model.eos_rate = 0.005;
      c.seed = static_cast<uint64_t>(groups);
      c.lockstep = lockstep;
      Driver run(c);
      run.go(requests(60, 20, 300));
      const SchedulerCounters& n = run.scheduler().counters(0);
      EXPECT_GT(n.preemptions, 20u);
      EXPECT_GT(n.recomputed_rows, 100u);
      EXPECT_EQ(n.peak_pages <= 34, true);
    }
  }
}

TEST(Scheduler, TheFirstAdmittedIsNeverPreempted) {
  Case c;
  c.limits = roomy();
  c.limits.pages = 34;
  Driver run(c);
  int32_t first = -1;
  run.on_plan = [&](int, const StepPlan& p) {
    for (const Admission& a : p.admitted) {
      if (a.id == 0) first = a.slot;
    }
    for (int32_t s : p.retired) first = s == first ? -1 : first;
    for (int32_t s : p.suspended) EXPECT_NE(s, first);
  };
  run.go(requests(30, 20, 300));
  EXPECT_EQ(run.finish_order().front(), 0u);
  EXPECT_GT(run.scheduler().counters(0).preemptions, 0u);
}

TEST(Scheduler, AFinishOfASuspendedSequenceRetiresIt) {
  ReplicaLimits l = roomy();
  l.pages = 4;
  l.page_tokens = 4;
  l.max_positions = 17;
  Scheduler s(1, l);
  Worker w(l, Model{});
  s.submit(make_request(1, 7, 9));
  Request ends = make_request(2, 1, 8);
  ends.forced_length = 4;  // with the row of its position 3
  s.submit(ends);
  std::vector<StepResult> results;
  StepPlan p;
  bool seen = false;
  for (int i = 0; i < 6 && !seen; ++i) {  // no results: the scheduler knows nothing of the end
    ASSERT_TRUE(s.plan(0, p));
    results.push_back(w.apply(p));
    seen = !p.suspended.empty();
  }
  ASSERT_TRUE(seen);
  ASSERT_EQ(s.counters(0).preemptions, 1u);
  for (const StepResult& r : results) s.complete(0, r);
  EXPECT_EQ(s.counters(0).finished, 1u);
  ASSERT_TRUE(s.plan(0, p));
  EXPECT_EQ(p.retired.size(), 1u);
  s.complete(0, w.apply(p));
  while (!s.idle()) turn(s, w);
  EXPECT_EQ(s.counters(0).finished, 2u);
}

TEST(Scheduler, StaticBatchesRunToTheirEnd) {
  Case c;
  c.limits = roomy();
  c.limits.slots = 8;
  c.limits.batching = Batching::kStatic;
  c.model.eos_rate = 0.05;
  Driver run(c);
  std::set<int32_t> running;
  int batches = 0;
  bool open = false;
  run.on_plan = [&](int, const StepPlan& p) {
    for (int32_t s : p.retired) running.erase(s);
    if (!p.retired.empty()) open = false;
    if (!p.admitted.empty() && running.empty()) {
      ++batches;
      open = true;
    }
    EXPECT_TRUE(p.admitted.empty() || open) << "an admission to a batch that is ending";
    for (const Admission& a : p.admitted) running.insert(a.slot);
  };
  run.go(requests(40, 10, 50));
  EXPECT_EQ(batches, 5);
}

TEST(Scheduler, LongestFirst) {
  ReplicaLimits l = roomy();
  l.order = QueueOrder::kLongest;
  l.slots = 1;
  Scheduler s(1, l);
  Worker w(l, Model{});
  std::vector<size_t> order;
  for (int32_t n : {5, 30, 10, 30, 20}) {
    s.submit(make_request(static_cast<SequenceId>(100 * n) + order.size(), n, 1));
  }
  while (!s.idle()) {
    for (const Admission& a : turn(s, w).admitted) order.push_back(a.prompt.size());
  }
  EXPECT_EQ(order, (std::vector<size_t>{30, 30, 20, 10, 5}));
}

TEST(Scheduler, EarliestDeadlineFirst) {
  ReplicaLimits l = roomy();
  l.order = QueueOrder::kDeadline;
  l.slots = 1;
  Scheduler s(1, l);
  Worker w(l, Model{});
  for (int id : {3, 1, 4, 2}) {
    Request r = make_request(static_cast<SequenceId>(id), 10, 1);
    r.deadline = id;
    s.submit(std::move(r));
  }
  std::vector<SequenceId> order;
  while (!s.idle()) {
    for (const Admission& a : turn(s, w).admitted) order.push_back(a.id);
  }
  EXPECT_EQ(order, (std::vector<SequenceId>{1, 2, 3, 4}));
}

TEST(Scheduler, TheLatestDeadlineIsPreemptedFirst) {
  ReplicaLimits l = roomy();
  l.order = QueueOrder::kDeadline;
  l.pages = 12;
  l.page_tokens = 4;
  l.max_positions = 48;
  Scheduler s(1, l);
  Worker w(l, Model{});
  // Admitted first, but with the latest deadline.
  Request late = make_request(1, 8, 40);
  late.deadline = 9;
  s.submit(late);
  turn(s, w);
  Request early = make_request(2, 8, 40);
  early.deadline = 1;
  s.submit(early);
  StepPlan p = turn(s, w);
  ASSERT_EQ(p.admitted.size(), 1u);
  while (s.counters(0).preemptions == 0) p = turn(s, w);
  EXPECT_EQ(p.suspended, std::vector<int32_t>{0});
  while (!s.idle()) turn(s, w);
}

TEST(Scheduler, PlacesByOutstandingTokens) {
  Scheduler s(3, roomy());
  s.submit(make_request(1, 100, 10));
  s.submit(make_request(2, 50, 10));
  s.submit(make_request(3, 10, 10));
  s.submit(make_request(4, 10, 10));
  s.submit(make_request(5, 5, 5));
  EXPECT_EQ(s.outstanding_tokens(0), 110);
  EXPECT_EQ(s.outstanding_tokens(1), 60);
  EXPECT_EQ(s.outstanding_tokens(2), 50);
}

TEST(Scheduler, FreePagesDecideBetweenEquals) {
  ReplicaLimits l = roomy();
  Scheduler s(2, l);
  Worker w(l, Model{});
  s.submit(make_request(1, 11, 9));
  s.submit(make_request(2, 5, 4));
  turn(s, w, 0);
  ASSERT_EQ(s.outstanding_tokens(0), s.outstanding_tokens(1));
  ASSERT_LT(s.free_pages(0), s.free_pages(1));
  s.submit(make_request(3, 5, 5));
  EXPECT_EQ(s.outstanding_tokens(0), 9);
  EXPECT_EQ(s.outstanding_tokens(1), 19);
}

TEST(Scheduler, ADryReplicaTakesQueuedRequests) {
  ReplicaLimits l = roomy();
  l.slots = 4;
  Scheduler s(2, l);
  Worker fast(l, Model{}), slow(l, Model{});
  for (Request& r : requests(40, 20, 20)) s.submit(std::move(r));
  // Replica 1 does nothing but its first step; replica 0 must do nearly all of the work.
  turn(s, slow, 1);
  StepPlan p;
  while (s.plan(0, p)) s.complete(0, fast.apply(p));
  EXPECT_GE(s.counters(0).finished, 34u);
  EXPECT_EQ(s.counters(1).admitted, 4u);
  while (!s.idle(1)) turn(s, slow, 1);
  EXPECT_TRUE(s.idle());
  EXPECT_EQ(s.counters(0).finished + s.counters(1).finished, 40u);
}

TEST(Scheduler, WhatIsQueuedCanBeDropped) {
  ReplicaLimits l = roomy();
  l.slots = 4;
  Scheduler s(2, l);
  Worker a(l, Model{}), b(l, Model{});
  for (auto& r : requests(20, 30, 5)) s.submit(std::move(r));
  StepPlan plan = turn(s, a, 0);
  EXPECT_EQ(plan.admitted.size(), 4u);
  EXPECT_EQ(s.drop_queued(), 16u);
  EXPECT_EQ(s.drop_queued(), 0u);
  EXPECT_TRUE(s.idle(1));
  EXPECT_FALSE(s.plan(1, plan));
  for (int turns = 0; !s.idle() && turns < 50; ++turns) {
    EXPECT_TRUE(turn(s, a, 0).admitted.empty());
  }
  EXPECT_TRUE(s.idle());
  EXPECT_EQ(s.counters(0).finished, 4u);
  EXPECT_EQ(s.outstanding_tokens(0) + s.outstanding_tokens(1), 0);
}

TEST(Scheduler, ForcedLengthsChangeNoDecision) {
  ReplicaLimits l = roomy();
  l.pages = 60;
  l.groups = 2;
  Scheduler open(1, l), blind(1, l);
  Worker w(l, Model{});
  for (int i = 0; i < 30; ++i) {
    Request r = make_request(static_cast<SequenceId>(i), 5 + i, 100);
    r.ignore_eos = true;
    r.forced_length = 1 + i * 3;
    open.submit(r);
    r.forced_length = 0;
    blind.submit(std::move(r));
  }
  StepPlan a, b;
  std::vector<std::byte> bytes_a, bytes_b;
  while (open.plan(0, a)) {
    ASSERT_TRUE(blind.plan(0, b));
    const StepResult result = w.apply(a);
    for (Admission& x : a.admitted) x.forced_length = 0;
    encode(a, bytes_a);
    encode(b, bytes_b);
    ASSERT_EQ(bytes_a, bytes_b) << "step " << a.step;
    open.complete(0, result);
    blind.complete(0, result);
  }
  EXPECT_TRUE(open.idle());
  EXPECT_TRUE(blind.idle());
}

TEST(Scheduler, MoreSlotsThanRowsOfAStep) {
  Case c;
  c.limits = roomy();
  c.limits.slots = 64;
  c.limits.step_tokens = 10;
  Driver run(c);
  run.go(requests(50, 9, 30));
  EXPECT_EQ(run.scheduler().counters(0).peak_running, 10);
}

TEST(Scheduler, APromptIsRunBesideThoseWhoDecode) {
  ReplicaLimits l = roomy();
  l.step_tokens = 32;
  Scheduler s(1, l);
  Worker w(l, Model{});
  for (Request& r : requests(4, 4, 200)) s.submit(std::move(r));
  turn(s, w);
  s.submit(make_request(50, 100, 5));
  const StepPlan p = turn(s, w);
  ASSERT_EQ(p.chunks.size(), 1u);
  EXPECT_EQ(p.chunks[0].count, 28);
  EXPECT_EQ(w.last_decode_rows(), 4);
}

}  // namespace
}  // namespace drover::sim

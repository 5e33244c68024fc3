// Many random configurations and loads; every request must give exactly the tokens of the fake
// model, whatever was preempted, late or surplus. DROVER_FUZZ_SEED=N runs one seed.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "sim_run.h"

namespace drover::sim {
namespace {

struct Random {
  std::mt19937_64 engine;
  int32_t in(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(engine() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int n) { return engine() % static_cast<uint64_t>(n) == 0; }
};

Case random_case(Random& random, uint64_t seed) {
  Case c;
  c.seed = seed;
  c.model = {seed, 1000, random.one_in(3) ? 0.0 : 1.0 / random.in(2, 60)};
  c.replicas = random.one_in(3) ? random.in(2, 5) : 1;
  ReplicaLimits& l = c.limits;
  l.groups = random.one_in(2) ? 1 : random.in(2, 5);
  l.slots = random.in(1, random.one_in(4) ? 3 : 40);
  l.page_tokens = random.one_in(4) ? 1 : random.in(2, 16);
  l.max_positions = random.in(8, 160);
  const int32_t one = (l.max_positions + l.page_tokens - 1) / l.page_tokens;
  l.pages = random.one_in(3) ? one : one * random.in(1, 12) + random.in(0, 5);  // often too few
  l.step_tokens = random.one_in(4) ? random.in(1, 8) : random.in(8, 128);
  l.chunk_tokens = random.in(1, 64);
  l.batching = random.one_in(5) ? Batching::kStatic : Batching::kContinuous;
  l.order = static_cast<QueueOrder>(random.in(0, 2));
  c.lockstep = random.one_in(6);
  c.arrive_rate = random.one_in(2) ? 1.0 : 1.0 / random.in(2, 30);
  return c;
}

std::vector<Request> random_requests(Random& random, const Case& c) {
  std::vector<Request> requests;
  const int32_t count = random.in(1, 80);
  for (int32_t i = 0; i < count; ++i) {
    const int32_t prompt = random.in(1, c.limits.max_positions - 1);
    const int32_t room = c.limits.max_positions - prompt;
    Request r = make_request(static_cast<SequenceId>(i) * 7 + 3, prompt,
                             random.one_in(4) ? room : random.in(1, room));
    if (random.one_in(4)) r.forced_length = random.in(1, r.max_new_tokens);
    r.ignore_eos = r.forced_length > 0 || random.one_in(6);
    r.stream_tokens = random.one_in(3);
    r.deadline = random.in(0, 1000);
    requests.push_back(std::move(r));
  }
  return requests;
}

TEST(SchedulerFuzz, EveryRequestGivesItsTokens) {
  const char* chosen = std::getenv("DROVER_FUZZ_SEED");
  const uint64_t first = chosen != nullptr ? std::stoull(chosen) : 1;
  const uint64_t count = chosen != nullptr ? 1 : 1500;
  uint64_t preemptions = 0, recomputed = 0, surplus = 0, stepped = 0;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    SCOPED_TRACE("DROVER_FUZZ_SEED=" + std::to_string(seed));
    Random random{std::mt19937_64(seed)};
    const Case c = random_case(random, seed);
    Driver run(c);
    try {
      run.go(random_requests(random, c));
    } catch (const Error& e) {
      FAIL() << e.what();
    }
    ASSERT_FALSE(::testing::Test::HasFailure());
    for (int r = 0; r < c.replicas; ++r) {
      preemptions += run.scheduler().counters(r).preemptions;
      recomputed += run.scheduler().counters(r).recomputed_rows;
      stepped += run.scheduler().counters(r).steps;
      surplus += static_cast<uint64_t>(run.workers()[static_cast<size_t>(r)].surplus_rows());
    }
  }
  fmt::print("seeds {}..{}: {} steps, {} preemptions, {} rows recomputed, {} surplus rows\n", first,
             first + count - 1, stepped, preemptions, recomputed, surplus);
  if (chosen == nullptr) {  // the load must have reached the hard parts
    EXPECT_GT(preemptions, 1000u);
    EXPECT_GT(surplus, 1000u);
  }
}

}  // namespace
}  // namespace drover::sim

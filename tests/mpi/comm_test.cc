// The communicator, the mailbox and the grid under mpirun: data with an exact answer.
// A failure on any rank fails the run.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>

#include "base/formats.h"
#include "comm/grid.h"
#include "comm/world.h"

namespace drover {
namespace {

World* g_world = nullptr;

class CommTest : public testing::Test {
 protected:
  Interrupt interrupt;
  Progress progress;
  std::unique_ptr<Comm> comm = g_world->make_comm(interrupt, &progress, 20);
};

// Small integers: sums are exact in any order, so the answer has no tolerance.
TEST_F(CommTest, AllReduceSumIsExact) {
  for (size_t count : {1, 2, 7, 576, 16383, 16384, 16385, 100003}) {
    std::vector<float> data(count);
    for (size_t i = 0; i < count; ++i) {
      data[i] = static_cast<float>((i * 7 + static_cast<size_t>(comm->rank()) * 13) % 1001);
    }
    comm->all_reduce_sum(data.data(), count, Dtype::kF32, nullptr);
    for (size_t i = 0; i < count; ++i) {
      float want = 0;
      for (int r = 0; r < comm->size(); ++r) {
        want += static_cast<float>((i * 7 + static_cast<size_t>(r) * 13) % 1001);
      }
      ASSERT_EQ(data[i], want) << "element " << i << " of " << count;
    }
  }
}

// Random reals: all ranks must hold the same bits, or tensor-parallel ranks drift apart.
TEST_F(CommTest, AllReduceGivesEveryRankTheSameBits) {
  for (size_t count : {333, 40001}) {
    std::mt19937 random(static_cast<unsigned>(comm->rank() * 7919 + 1));
    std::normal_distribution<float> normal;
    std::vector<float> data(count);
    for (auto& x : data) x = normal(random);
    comm->all_reduce_sum(data.data(), count, Dtype::kF32, nullptr);
    std::vector<float> all(count * static_cast<size_t>(comm->size()));
    comm->all_gather(data.data(), all.data(), count * sizeof(float), nullptr);
    for (int r = 0; r < comm->size(); ++r) {
      ASSERT_EQ(0, std::memcmp(all.data() + count * static_cast<size_t>(r), data.data(),
                               count * sizeof(float)));
    }
  }
}

// bf16: summed in f32 in rank order and rounded once, whatever the size.
TEST_F(CommTest, AllReduceOfBf16RoundsOnce) {
  const auto value = [](size_t i, int rank) {
    std::mt19937 random(static_cast<unsigned>(i) * 31 + static_cast<unsigned>(rank));
    return bf16_from_float(std::uniform_real_distribution<float>(-2, 2)(random));
  };
  for (size_t count : {1, 3, 576, 32768, 32769, 50001}) {
    std::vector<uint16_t> data(count);
    for (size_t i = 0; i < count; ++i) data[i] = value(i, comm->rank());
    comm->all_reduce_sum(data.data(), count, Dtype::kBf16, nullptr);
    for (size_t i = 0; i < count; ++i) {
      float want = bf16_to_float(value(i, 0));
      for (int r = 1; r < comm->size(); ++r) want += bf16_to_float(value(i, r));
      if (comm->size() > 1) {
        ASSERT_EQ(data[i], bf16_from_float(want)) << "element " << i << " of " << count;
      }
    }
  }
}

TEST_F(CommTest, AllGatherKeepsRankOrder) {
  for (size_t bytes : {1, 8, 4096, 300000}) {
    std::vector<uint8_t> mine(bytes, static_cast<uint8_t>(comm->rank() + 1));
    std::vector<uint8_t> all(bytes * static_cast<size_t>(comm->size()), 0xEE);
    comm->all_gather(mine.data(), all.data(), bytes, nullptr);
    for (size_t i = 0; i < all.size(); ++i) ASSERT_EQ(all[i], i / bytes + 1);
  }
}

TEST_F(CommTest, BroadcastFromEveryRoot) {
  for (int root = 0; root < comm->size(); ++root) {
    std::vector<int> data(5000, comm->rank() == root ? root + 100 : -1);
    comm->broadcast(data.data(), data.size() * sizeof(int), root, nullptr);
    for (int x : data) ASSERT_EQ(x, root + 100);
  }
}

// Two stages that send to each other before either receives: send must not wait for its receiver.
TEST_F(CommTest, SendsCrossWithoutDeadlock) {
  const int next = (comm->rank() + 1) % comm->size();
  const int before = (comm->rank() + comm->size() - 1) % comm->size();
  std::vector<std::vector<float>> out;
  for (int m = 0; m < 3; ++m) {
    out.emplace_back(400000, static_cast<float>(comm->rank() * 10 + m));
    comm->send(out.back().data(), out.back().size() * sizeof(float), next, nullptr);
    std::fill(out.back().begin(), out.back().end(), -1.0f);  // the buffer is ours again
  }
  for (int m = 0; m < 3; ++m) {
    std::vector<float> in(400000, -2.0f);
    comm->recv(in.data(), in.size() * sizeof(float), before, nullptr);
    for (float x : in) ASSERT_EQ(x, static_cast<float>(before * 10 + m));
  }
}

TEST_F(CommTest, SplitOrdersByKeyAndLeavesOut) {
  const int color = comm->rank() == 0 ? -1 : comm->rank() % 2;
  auto part = comm->split(color, -comm->rank(), "odd and even");
  if (color < 0) {
    EXPECT_EQ(part, nullptr);
    return;
  }
  int mine = comm->rank();
  std::vector<int> all(static_cast<size_t>(part->size()));
  part->all_gather(&mine, all.data(), sizeof(int), nullptr);
  for (size_t i = 1; i < all.size(); ++i) EXPECT_EQ(all[i], all[i - 1] - 2);
}

// A wait ends at its deadline and names what it waited for.
TEST_F(CommTest, AWaitEndsAtItsDeadline) {
  if (comm->size() < 2) GTEST_SKIP() << "needs two ranks";
  Interrupt mine;
  auto impatient = g_world->make_comm(mine, nullptr, 0.3);
  static float x = 0;  // the receive that is given up stays posted: its buffer must live
  if (impatient->rank() == 0) {
    const auto begin = Clock::now();
    try {
      impatient->recv(&x, sizeof(x), 1, nullptr);
      FAIL() << "received what was never sent";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kLostPeer);
      EXPECT_NE(std::string(e.what()).find("receive"), std::string::npos);
    }
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 5.0);
  }
  g_world->barrier(interrupt, 20, "test");
  // The receive is still posted: satisfy it, so that freeing the communicator does not hang.
  if (impatient->rank() == 1) {
    const float one = 1;
    impatient->send(&one, sizeof(x), 0, nullptr);
  }
  mine.raise(ExitCode::kInternal, "end of test");
}

// Another thread raises the interrupt: the wait throws its first cause.
TEST_F(CommTest, AnInterruptEndsAWait) {
  if (comm->size() < 2) GTEST_SKIP() << "needs two ranks";
  Interrupt mine;
  auto c = g_world->make_comm(mine, nullptr, 20);
  if (c->rank() == 0) {
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      mine.raise(ExitCode::kBadInput, "the first cause");
    });
    static float x = 0;
    EXPECT_THROW(c->recv(&x, sizeof(x), 1, nullptr), Error);
    EXPECT_EQ(mine.cause(), "the first cause");
    other.join();
  }
  mine.raise(ExitCode::kInternal, "end of test");
  g_world->barrier(interrupt, 20, "test");
}

TEST_F(CommTest, MailboxDeliversInOrderAndToSelf) {
  auto mailbox = g_world->make_mailbox();
  // Everybody, rank 0 too, posts to rank 0.
  for (int i = 0; i < 50; ++i) {
    mailbox->post(0, Mailbox::Channel::kResult,
                  std::vector<std::byte>(static_cast<size_t>(i * 997), static_cast<std::byte>(i)));
  }
  if (comm->rank() == 0) {
    std::vector<int> next(static_cast<size_t>(comm->size()), 0);
    std::vector<std::byte> bytes;
    int from = -1;
    for (int n = 0; n < 50 * comm->size(); ++n) {
      wait_until([&] { return mailbox->poll(Mailbox::Channel::kResult, bytes, &from); },
                 deadline_in(20), interrupt, "a posted message");
      const int i = next[static_cast<size_t>(from)]++;
      ASSERT_EQ(bytes.size(), static_cast<size_t>(i * 997));
      for (auto b : bytes) ASSERT_EQ(b, static_cast<std::byte>(i));
    }
  }
  g_world->barrier(interrupt, 20, "test");
}

TEST_F(CommTest, AgreeMin) {
  EXPECT_EQ(g_world->agree_min(100 - comm->rank(), interrupt, 20), 100 - (comm->size() - 1));
}

TEST(Grid, TensorNeighboursAreNeighbours) {
  const Grid g = make_grid(3, 2, 2, 12);
  for (int rank = 0; rank < 12; ++rank) {
    EXPECT_EQ(rank, (g.replica_of(rank) * g.pp + g.stage_of(rank)) * g.tp + g.slot_of(rank));
  }
  EXPECT_EQ(make_grid(3, 2, 0, 12).dp, 2);
}

TEST(Grid, WrongSizesSayWhatWouldWork) {
  try {
    make_grid(3, 2, 1, 4);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_NE(std::string(e.what()).find("mpirun -np 6"), std::string::npos) << e.what();
  }
  EXPECT_THROW(make_grid(0, 0, 1, 4), Error);
  EXPECT_THROW(make_grid(-1, 1, 1, 4), Error);
}

}  // namespace
}  // namespace drover

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  drover::World world;
  drover::g_world = &world;
  // One rank speaks; all fail together.
  if (world.rank() != 0) {
    delete testing::UnitTest::GetInstance()->listeners().Release(
        testing::UnitTest::GetInstance()->listeners().default_result_printer());
  }
  const int failed = RUN_ALL_TESTS();
  const drover::Interrupt none;
  const auto worst = -world.agree_min(-static_cast<int64_t>(failed), none, 30);
  if (failed != 0) fprintf(stderr, "rank %d: tests failed\n", world.rank());
  return static_cast<int>(worst);
}

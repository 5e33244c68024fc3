// Communicators between GPUs under mpirun: data with an exact answer. Over NCCL where every rank
// has a GPU of its own, and through the host on the GPUs there are. A failure on any rank fails the
// run.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>

#include "base/formats.h"
#include "gpu/mpi/ranks.h"

namespace drover {
namespace {

enum Transport { kNccl, kStaged };
Comm* g_comms[2] = {nullptr, nullptr};  // over all ranks; null: not here

std::unique_ptr<Comm> make_comm(Transport transport, Interrupt& interrupt, double seconds) {
  void* const stream = g_device->stream();
  return transport == kStaged ? g_world->make_staged_comm(interrupt, nullptr, seconds, stream)
                              : g_world->make_nccl_comm(interrupt, nullptr, seconds, stream);
}

class GpuCommTest : public testing::TestWithParam<Transport> {
 protected:
  void SetUp() override {
    if (g_comms[GetParam()] == nullptr) GTEST_SKIP() << "every rank needs a GPU of its own";
  }
  // Messages of one transport move on while a rank waits for MPI, not while it waits for NCCL (in a
  // run the watchdog sees to it): nobody leaves a test before all have what was sent.
  void TearDown() override { g_world->barrier(g_none, 60, "end of a test"); }
  bool staged() const { return GetParam() == kStaged; }
  // A rank to the left and the right, in a ring.
  int next() const { return (comm.rank() + 1) % comm.size(); }
  int before() const { return (comm.rank() + comm.size() - 1) % comm.size(); }

  // What rank 0 waits for and nobody else comes to.
  void wait_in_vain(Comm& c) const {
    static int x = 0;
    static void* device = g_device->alloc(sizeof(x));
    staged() ? c.recv(device, sizeof(x), 1, stream) : (void)c.split(0, 0, "nobody else");
  }

  Comm& comm = *g_comms[g_comms[GetParam()] == nullptr ? kStaged : GetParam()];
  void* stream = g_device->stream();
};

// Small integers: sums are exact in any order, so the answer has no tolerance.
template <class T, class FromFloat>
void check_sums(Comm& comm, Dtype type, size_t modulus, FromFloat from_float) {
  const auto value = [&](size_t i, int rank) {
    return static_cast<float>((i * 7 + static_cast<size_t>(rank) * 13) % modulus);
  };
  for (size_t count : {1, 2, 7, 576, 8192, 16385, 100003, 3000000}) {
    std::vector<T> mine(count), want(count);
    for (size_t i = 0; i < count; ++i) {
      float sum = 0;
      for (int r = 0; r < comm.size(); ++r) sum += value(i, r);
      mine[i] = from_float(value(i, comm.rank()));
      want[i] = from_float(sum);
    }
    const Array<T> data(mine);
    comm.all_reduce_sum(data.data(), count, type, g_device->stream());
    ASSERT_EQ(data.host(), want) << count << " elements";
  }
}

TEST_P(GpuCommTest, AllReduceSumIsExact) {
  check_sums<float>(comm, Dtype::kF32, 1001, [](float x) { return x; });
}

TEST_P(GpuCommTest, AllReduceSumOfBf16IsExact) {
  check_sums<uint16_t>(comm, Dtype::kBf16, 31, bf16_from_float);
}

// Random reals: all ranks must hold the same bits, or tensor-parallel ranks drift apart.
TEST_P(GpuCommTest, AllReduceGivesEveryRankTheSameBits) {
  for (size_t count : {333, 40001, 2000000}) {
    std::mt19937 random(static_cast<unsigned>(comm.rank() * 7919 + 1));
    std::normal_distribution<float> normal;
    std::vector<float> f32(count);
    std::vector<uint16_t> bf16(count);
    for (auto& x : f32) x = normal(random);
    for (auto& x : bf16) x = bf16_from_float(normal(random));
    const auto check = [&](const auto& mine, Dtype type) {
      using T = typename std::decay_t<decltype(mine)>::value_type;
      const Array<T> data(mine);
      const Array<T> all(std::vector<T>(count * static_cast<size_t>(comm.size())));
      comm.all_reduce_sum(data.data(), count, type, stream);
      comm.all_gather(data.data(), all.data(), data.bytes(), stream);
      const auto sum = data.host();
      const auto everybody = all.host();
      for (size_t r = 0; r < static_cast<size_t>(comm.size()); ++r) {
        ASSERT_EQ(0, std::memcmp(everybody.data() + r * count, sum.data(), data.bytes()));
      }
    };
    check(f32, Dtype::kF32);
    check(bf16, Dtype::kBf16);
  }
}

TEST_P(GpuCommTest, AllGatherKeepsRankOrder) {
  for (size_t bytes : {1, 8, 4096, 300001}) {
    const Array<uint8_t> mine(std::vector<uint8_t>(bytes, static_cast<uint8_t>(comm.rank() + 1)));
    const Array<uint8_t> all(
        std::vector<uint8_t>(bytes * static_cast<size_t>(comm.size()), uint8_t{0xEE}));
    comm.all_gather(mine.data(), all.data(), bytes, stream);
    const auto host = all.host();
    for (size_t i = 0; i < host.size(); ++i) ASSERT_EQ(host[i], i / bytes + 1);
  }
}

TEST_P(GpuCommTest, BroadcastFromEveryRoot) {
  for (int root = 0; root < comm.size(); ++root) {
    const Array<int> data(std::vector<int>(5000, comm.rank() == root ? root + 100 : -1));
    comm.broadcast(data.data(), data.bytes(), root, stream);
    for (int x : data.host()) ASSERT_EQ(x, root + 100);
  }
}

// All send to each other before any receives, and use the buffer again at once.
TEST_P(GpuCommTest, SendsCrossWithoutDeadlock) {
  if (comm.size() < 2) GTEST_SKIP() << "needs two ranks";
  constexpr size_t kCount = 4000000;
  const auto value = [](int rank, int m) { return static_cast<float>(rank * 10 + m); };
  for (int r = 0; r < comm.size(); ++r) {
    comm.connect(r, (r + 1) % comm.size(), kCount * sizeof(float), 3);
  }
  std::vector<std::unique_ptr<Array<float>>> out, in;
  for (int m = 0; m < 3; ++m) {
    out.push_back(
        std::make_unique<Array<float>>(std::vector<float>(kCount, value(comm.rank(), m))));
    in.push_back(std::make_unique<Array<float>>(std::vector<float>(kCount, -2.0f)));
  }
  const Array<float> other(std::vector<float>(kCount, -1.0f));
  const Array<float> buffer(std::vector<float>(kCount, 0.0f));
  for (int m = 0; m < 3; ++m) {
    comm.send(out[static_cast<size_t>(m)]->data(), out[0]->bytes(), next(), stream);
  }
  for (int m = 0; m < 3; ++m) {
    comm.recv(in[static_cast<size_t>(m)]->data(), in[0]->bytes(), before(), stream);
  }
  for (int m = 0; m < 3; ++m) {
    for (float x : in[static_cast<size_t>(m)]->host()) ASSERT_EQ(x, value(before(), m));
  }
}

// A pipeline: activations go down one communicator, what the last stage makes of them comes back on
// another. Two groups are under way, so the first stage sends before it takes what it waits for.
TEST_P(GpuCommTest, StagesPassActivationsAndFeedback) {
  constexpr size_t kCount = 500000;
  constexpr int kSteps = 40, kGroups = 2;
  auto pipeline = comm.split(0, comm.rank(), "pipeline");
  auto feedback = comm.split(0, comm.rank(), "feedback");
  const int last = comm.size() - 1;
  if (last == 0) GTEST_SKIP() << "needs two ranks";
  for (int s = 0; s < last; ++s) pipeline->connect(s, s + 1, kCount * sizeof(float), kGroups);
  feedback->connect(last, 0, sizeof(float), kGroups);
  const Array<float> data(std::vector<float>(kCount, 0.0f));
  const Array<float> back(std::vector<float>(kSteps, -1.0f));
  const auto place = [&](int step) { return static_cast<float*>(back.data()) + step; };
  std::vector<float> step_values(kSteps);
  for (int i = 0; i < kSteps; ++i) step_values[static_cast<size_t>(i)] = static_cast<float>(i);
  const Array<float> values(step_values);
  for (int step = 0; step < kSteps; ++step) {
    if (comm.rank() == 0) {
      if (step >= kGroups) feedback->recv(place(step - kGroups), sizeof(float), last, stream);
      // What is sent holds the step in its first element.
      const auto* value = static_cast<const float*>(values.data()) + step;
      pipeline->send(value, sizeof(float), 1, stream);
      pipeline->send(data.data(), data.bytes(), 1, stream);
    } else {
      pipeline->recv(place(step), sizeof(float), comm.rank() - 1, stream);
      pipeline->recv(data.data(), data.bytes(), comm.rank() - 1, stream);
      if (comm.rank() < last) {
        pipeline->send(place(step), sizeof(float), comm.rank() + 1, stream);
        pipeline->send(data.data(), data.bytes(), comm.rank() + 1, stream);
      } else {
        feedback->send(place(step), sizeof(float), 0, stream);
      }
    }
  }
  if (comm.rank() == 0) {
    for (int step = kSteps - kGroups; step < kSteps; ++step) {
      feedback->recv(place(step), sizeof(float), last, stream);
    }
  }
  EXPECT_EQ(back.host(), step_values);
}

TEST_P(GpuCommTest, SplitOrdersByKeyAndLeavesOut) {
  auto reversed = comm.split(7, -comm.rank(), "reversed");
  ASSERT_EQ(reversed->size(), comm.size());
  EXPECT_EQ(reversed->rank(), comm.size() - 1 - comm.rank());
  const Array<int> mine({comm.rank()});
  const Array<int> all(std::vector<int>(static_cast<size_t>(comm.size()), -1));
  reversed->all_gather(mine.data(), all.data(), sizeof(int), stream);
  const auto order = all.host();
  for (size_t i = 0; i < order.size(); ++i) {
    EXPECT_EQ(order[i], comm.size() - 1 - static_cast<int>(i));
  }
  auto part = comm.split(comm.rank() == 0 ? -1 : 0, comm.rank(), "all but one");
  EXPECT_EQ(part == nullptr, comm.rank() == 0);
  if (part != nullptr) {
    EXPECT_EQ(part->size(), comm.size() - 1);
  }
  auto alone = comm.split(comm.rank(), 0, "alone");
  EXPECT_EQ(alone->size(), 1);
  const Array<int> copy(std::vector<int>{-1});
  alone->all_gather(mine.data(), copy.data(), sizeof(int), stream);
  alone->all_reduce_sum(copy.data(), 1, Dtype::kF32, stream);
  EXPECT_EQ(copy.host().front(), comm.rank());
}

TEST_P(GpuCommTest, AGraphReplaysCalls) {
  if (!comm.capturable()) GTEST_SKIP() << "not recorded in graphs";
  auto part = comm.split(0, comm.rank(), "recorded");
  part->reserve(1 << 20);
  const auto n = static_cast<float>(comm.size());
  for (size_t count : {8192, 200000}) {
    const Array<float> data(std::vector<float>(count, static_cast<float>(comm.rank() + 1)));
    const Array<float> all(std::vector<float>(count * static_cast<size_t>(comm.size()), -1.0f));
    {
      const auto replay = g_device->record([&] {
        for (int i = 0; i < 3; ++i) {
          part->all_reduce_sum(data.data(), count, Dtype::kF32, stream);
        }
        part->all_gather(data.data(), all.data(), data.bytes(), stream);
      });
      replay();
      // Beside calls that are not in a graph.
      part->all_reduce_sum(data.data(), count, Dtype::kF32, stream);
      replay();
      const float want = n * (n + 1) / 2 * n * n * n * n * n * n;
      for (float x : data.host()) ASSERT_EQ(x, want);
      for (float x : all.host()) ASSERT_EQ(x, want);
    }
  }
}

TEST_P(GpuCommTest, AMessageNeedsAWay) {
  if (comm.size() < 2) GTEST_SKIP() << "needs two ranks";
  if (staged()) GTEST_SKIP() << "the host needs none";
  auto part = comm.split(0, comm.rank(), "without ways");
  const Array<int> data({1});
  try {
    part->send(data.data(), sizeof(int), next(), stream);
    FAIL() << "sent without connect()";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kInternal);
    EXPECT_NE(std::string(e.what()).find("connect("), std::string::npos) << e.what();
  }
}

TEST_P(GpuCommTest, AWaitEndsAtItsDeadlineAndSaysWhoWaits) {
  if (comm.size() < 2) GTEST_SKIP() << "needs two ranks";
  Interrupt mine;
  auto impatient = make_comm(GetParam(), mine, 5);
  if (comm.rank() == 0) {
    const auto begin = Clock::now();
    try {
      wait_in_vain(*impatient);
      FAIL() << "nobody came, and yet it ended";
    } catch (const Error& e) {
      const std::string text = e.what();
      EXPECT_EQ(e.code(), ExitCode::kLostPeer) << text;
      EXPECT_NE(text.find(staged() ? "receive" : "'world', rank 0 of"), std::string::npos) << text;
      if (!staged()) {
        EXPECT_NE(text.find("NCCL_SOCKET_IFNAME"), std::string::npos) << text;
      }
    }
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 8.0);
  }
  mine.raise(ExitCode::kInternal, "end of test");
  g_world->barrier(g_none, 30, "test");
}

TEST_P(GpuCommTest, AnInterruptEndsAWait) {
  if (comm.size() < 2) GTEST_SKIP() << "needs two ranks";
  Interrupt mine;
  auto c = make_comm(GetParam(), mine, 20);
  if (comm.rank() == 0) {
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      mine.raise(ExitCode::kBadInput, "the first cause");
    });
    const auto begin = Clock::now();
    try {
      wait_in_vain(*c);
      FAIL() << "nobody came, and yet it ended";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_STREQ(e.what(), "the first cause");
    }
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 3.0);
    other.join();
  }
  mine.raise(ExitCode::kInternal, "end of test");
  g_world->barrier(g_none, 30, "test");
}

// The last test: nothing works afterwards. Kernels wait for a rank that never calls: launched,
// recorded in a graph, and of a message; then all is aborted and the GPU is free again.
TEST_P(GpuCommTest, ZAbortEndsKernelsThatWait) {
  if (comm.size() < 2) GTEST_SKIP() << "needs two ranks";
  if (staged()) GTEST_SKIP() << "nothing waits on the GPU";
  EXPECT_EQ(nccl_async_error(), "");
  Interrupt mine;
  auto c = make_comm(GetParam(), mine, 20);
  c->reserve(1 << 16);
  c->connect(0, 1, 1 << 24, 1);
  if (comm.rank() == 0) {
    const Array<float> data(std::vector<float>(1 << 22, 0.0f));
    const auto replay =
        g_device->record([&] { c->all_reduce_sum(data.data(), 1024, Dtype::kF32, stream); });
    c->send(data.data(), data.bytes(), 1, stream);
    replay();
    c->all_reduce_sum(data.data(), 1024, Dtype::kF32, stream);
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    mine.raise(ExitCode::kLostPeer, "a peer is lost");
    const auto begin = Clock::now();
    abort_all_nccl(2);
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 3.0);
    data.host();  // waits for the stream, 20 s at most
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 4.0);
    EXPECT_THROW(c->all_reduce_sum(data.data(), 1, Dtype::kF32, stream), Error);
  }
  g_world->barrier(g_none, 60, "test");
  if (!mine.raised()) mine.raise(ExitCode::kInternal, "end of test");
  abort_all_nccl();
}

INSTANTIATE_TEST_SUITE_P(Over, GpuCommTest, testing::Values(kNccl, kStaged),
                         [](const auto& p) { return p.param == kNccl ? "Nccl" : "Staged"; });

int run_tests(World& world) {
  const int gpus = comm_gpu_count();
  if (gpus == 0) {
    if (world.rank() == 0) printf("no GPU here\n");
    return 0;
  }
  Interrupt interrupt;
  const auto device = make_gpu_device(world.local_rank() % gpus, interrupt, 20);
  g_device = device.get();
  const bool own = world.agree_min(gpus >= world.local_size() ? 1 : 0, g_none, 30) == 1;
  const auto nccl = own ? make_comm(kNccl, interrupt, 30) : nullptr;
  const auto staged = make_comm(kStaged, interrupt, 30);
  g_comms[kNccl] = nccl.get();
  g_comms[kStaged] = staged.get();
  if (world.rank() == 0) {
    printf("%d ranks, %d GPUs: %s, NCCL %s\n", world.size(), gpus, device->name().c_str(),
           nccl_version().c_str());
  }
  const int failed = RUN_ALL_TESTS();
  if (failed != 0) interrupt.raise(ExitCode::kInternal, "a test failed");
  return failed;
}

}  // namespace
}  // namespace drover

int main(int argc, char** argv) { return drover::run_ranks_tests(argc, argv, drover::run_tests); }

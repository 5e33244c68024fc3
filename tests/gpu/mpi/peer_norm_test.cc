// Sums over the GPUs' memory with residual and norm (Backend::Norm::peers) under mpirun, a GPU a
// rank, against NCCL's sums and the norm. A failure on any rank fails the run.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <thread>

#include "backend/cuda/cuda_backend.h"
#include "base/formats.h"
#include "gpu/mpi/ranks.h"

namespace drover {
namespace {

constexpr int64_t kFeatures = 8192;
Comm* g_comm = nullptr;  // over NCCL; null: ranks share GPUs
Backend* g_backend = nullptr;

enum class Out { kNone, kBf16, kFp8 };

// A rank's buffers of one size, and memory that all reach.
struct Rows {
  Rows(int64_t rows, int64_t features)
      : rows(rows),
        features(features),
        residual(zeros(2)),
        delta(zeros(2)),
        out(zeros(2)),
        scale(std::vector<float>(static_cast<size_t>(rows))),
        weight(weights(features)) {}

  std::vector<uint8_t> zeros(int64_t bytes) const {
    return std::vector<uint8_t>(static_cast<size_t>(rows * features * bytes));
  }
  static std::vector<float> weights(int64_t features) {
    std::vector<float> w(static_cast<size_t>(features));
    for (size_t i = 0; i < w.size(); ++i) w[i] = 0.5f + static_cast<float>(i % 17) / 16;
    return w;
  }
  Backend::Norm norm(Out kind) const {
    Backend::Norm a;
    a.residual = residual.data(), a.delta = delta.data();
    if (kind != Out::kNone) {
      a.weight = static_cast<const float*>(weight.data());
      a.out = {out.data(), kind == Out::kFp8 ? static_cast<float*>(scale.data()) : nullptr};
    }
    a.rows = a.out_rows = rows, a.features = features, a.epsilon = 1e-5f;
    return a;
  }
  void fill(const std::vector<uint16_t>& x, const std::vector<uint16_t>& d) const {
    g_device->copy_in(residual.data(), x.data(), residual.bytes());
    g_device->copy_in(delta.data(), d.data(), delta.bytes());
    const auto poison = std::vector<uint8_t>(out.bytes(), 0x5a);
    g_device->copy_in(out.data(), poison.data(), out.bytes());
  }
  // What a call left, one after the other.
  std::vector<uint8_t> results() const {
    std::vector<uint8_t> all = residual.host();
    const auto written = out.host();
    all.insert(all.end(), written.begin(), written.end());
    const auto scales = scale.host();
    const auto* bytes = reinterpret_cast<const uint8_t*>(scales.data());
    all.insert(all.end(), bytes, bytes + scale.bytes());
    return all;
  }

  int64_t rows, features;
  Array<uint8_t> residual, delta, out;
  Array<float> scale, weight;
};

class PeerNormTest : public testing::Test {
 protected:
  void SetUp() override {
    if (g_world->size() == 1) GTEST_SKIP() << "two GPUs are needed";
    if (g_comm == nullptr)
      GTEST_SKIP() << "every rank needs a GPU of its own: more GPUs are needed";
    open(*g_comm, kFeatures);
    ASSERT_NE(memory_, nullptr) << "the GPUs do not reach each other";
  }
  void TearDown() override {
    memory_.reset();
    g_world->barrier(g_none, 60, "end of a test");
  }

  void open(Comm& comm, int64_t features) {
    memory_.reset();
    memory_ = comm.share(g_backend->peer_sums(comm.size(), features).bytes);
    peers_ = {};
    if (memory_ == nullptr) return;
    peers_.rank = comm.rank();
    for (int r = 0; r < comm.size(); ++r) peers_.memory.push_back(memory_->of(r));
    peers_.stop = memory_->stop();
  }
  void sum(Backend::Norm a) const {
    a.peers = &peers_;
    g_backend->norm(a, stream());
  }
  static void sum_over_nccl(const Backend::Norm& a) {
    g_comm->all_reduce_sum(const_cast<void*>(a.delta), static_cast<size_t>(a.rows * a.features),
                           Dtype::kBf16, stream());
    g_backend->norm(a, stream());
  }
  static void* stream() { return g_device->stream(); }
  static int rank() { return g_world->rank(); }
  static int ranks() { return g_world->size(); }
  static bool exact() { return ranks() == 2; }  // one order of sums only

  static void expect_same_bits_everywhere(const std::vector<uint8_t>& mine) {
    const Array<uint8_t> own(mine);
    const Array<uint8_t> all(std::vector<uint8_t>(mine.size() * static_cast<size_t>(ranks())));
    g_comm->all_gather(own.data(), all.data(), mine.size(), stream());
    const auto everybody = all.host();
    for (size_t r = 0; r < static_cast<size_t>(ranks()); ++r)
      EXPECT_EQ(0, std::memcmp(everybody.data() + r * mine.size(), mine.data(), mine.size()))
          << "rank " << r;
  }

  // The same inputs over peers and over NCCL. x is the same on all ranks, d is not.
  void compare(int64_t rows, int64_t features, Out kind, bool equal,
               const std::function<float()>& same, const std::function<float()>& own) {
    std::vector<uint16_t> x(static_cast<size_t>(rows * features)), d(x.size());
    for (auto& v : x) v = bf16_from_float(same());
    for (auto& v : d) v = bf16_from_float(own());
    const Rows a(rows, features), b(rows, features);
    a.fill(x, d), b.fill(x, d);
    sum(a.norm(kind));
    sum_over_nccl(b.norm(kind));
    const auto got = a.results(), want = b.results();
    if (equal) {
      EXPECT_EQ(got, want) << rows << " rows of " << features << ", to " << static_cast<int>(kind);
    }
    expect_same_bits_everywhere(got);
  }

  std::unique_ptr<Comm> part_;  // outlives its memory
  std::unique_ptr<PeerMemory> memory_;
  PeerBuffers peers_;
};

TEST_F(PeerNormTest, IntegersAreSummedExactly) {
  for (const int64_t features : {kFeatures, int64_t{576}, int64_t{1000}, int64_t{8}}) {
    open(*g_comm, features);
    for (const int64_t rows : {1, 2, 3, 17, 64}) {
      if (rows > g_backend->peer_sums(ranks(), features).rows) continue;
      for (const Out kind : {Out::kNone, Out::kBf16, Out::kFp8}) {
        int i = 0, j = 0;
        compare(
            rows, features, kind, true, [&] { return static_cast<float>(++i * 7 % 23 - 11); },
            [&] { return static_cast<float>((++j * 5 + rank() * 13) % 15 - 7); });
      }
    }
  }
}

TEST_F(PeerNormTest, RealsHaveTheSameBitsEverywhere) {
  std::mt19937 same(7), own(static_cast<unsigned>(rank() * 7919 + 1));
  std::normal_distribution<float> normal;
  for (int round = 0; round < 3; ++round) {
    for (const int64_t rows : {1, 2, 3, 17, 64}) {
      if (rows > g_backend->peer_sums(ranks(), kFeatures).rows) continue;
      for (const Out kind : {Out::kNone, Out::kBf16, Out::kFp8})
        compare(
            rows, kFeatures, kind, exact(), [&] { return normal(same); },
            [&] { return 0.1f * normal(own); });
    }
  }
}

// A word of all ones is how a missing part looks.
TEST_F(PeerNormTest, NotANumberComesThrough) {
  std::vector<uint16_t> x(static_cast<size_t>(2 * kFeatures), bf16_from_float(1)), d(x.size());
  if (rank() == ranks() - 1) std::fill_n(d.begin(), 64, uint16_t{0xffff});
  if (rank() == 0) d[100] = 0xffff, d[102] = 0x7f80;  // infinity
  const Rows a(2, kFeatures);
  a.fill(x, d);
  sum(a.norm(Out::kBf16));
  const auto bytes = a.residual.host();
  for (size_t i = 0; i < x.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, bytes.data() + 2 * i, 2);
    const float value = bf16_to_float(bits);
    const bool lost = i < 64 || i == 100;
    ASSERT_EQ(std::isnan(value), lost) << i;
    if (!lost) {
      ASSERT_EQ(std::isinf(value), i == 102) << i;
    }
  }
  expect_same_bits_everywhere(a.results());
}

// What call i adds to column c of a row, of rank q: -1, 0 or 1.
float step_value(int i, int q, int64_t row, int64_t c) {
  const int k = (i + 2 * q) % 6 + 1;
  const int sign = static_cast<int>((row + c) % 3) - 1;
  return static_cast<float>(sign * (k <= 3 ? 1 : -1));
}

// Back to back, of changing sizes, with ranks that are late by turns, recorded in a graph and not.
TEST_F(PeerNormTest, ManyCallsInARow) {
  constexpr int kKinds = 6, kCalls = 35, kReplays = 40;
  const int64_t most = std::min<int64_t>(64, g_backend->peer_sums(ranks(), kFeatures).rows);
  const int64_t sizes[] = {1, most, 2, 17, 1, 3, most};
  const Rows a(most, kFeatures);
  std::vector<std::unique_ptr<Array<uint16_t>>> deltas;
  std::vector<uint16_t> host(static_cast<size_t>(most * kFeatures));
  for (int i = 0; i < kKinds; ++i) {
    for (size_t j = 0; j < host.size(); ++j)
      host[j] = bf16_from_float(step_value(i, rank(), static_cast<int64_t>(j) / kFeatures,
                                           static_cast<int64_t>(j) % kFeatures));
    deltas.push_back(std::make_unique<Array<uint16_t>>(host));
  }
  const Array<uint8_t> large(std::vector<uint8_t>(size_t{64} << 20));
  auto* half = static_cast<uint8_t*>(large.data()) + large.bytes() / 2;
  // Of each row and column modulo 3, as bf16 keeps it.
  std::vector<float> want(static_cast<size_t>(most) * 3, 0.0f);
  const auto expect = [&](int i) {
    for (int64_t r = 0; r < sizes[i % 7]; ++r) {
      for (int64_t c = 0; c < 3; ++c) {
        float& x = want[static_cast<size_t>(r * 3 + c)];
        float sum = 0;
        for (int q = 0; q < ranks(); ++q) sum += step_value(i % kKinds, q, r, c);
        x = bf16_to_float(bf16_from_float(x + sum));
      }
    }
  };
  const auto be_late = [&] {
    for (int i = 0; i < 4; ++i) g_backend->copy(half, large.data(), large.bytes() / 2, stream());
  };
  const auto call = [&](int i) {
    Backend::Norm n = a.norm(i % 2 == 0 ? Out::kBf16 : Out::kFp8);
    n.rows = n.out_rows = sizes[i % 7];
    n.delta = deltas[static_cast<size_t>(i % kKinds)]->data();
    sum(n);
  };
  const auto check = [&](const char* when) {
    const auto bytes = a.residual.host();
    for (int64_t r = 0; r < most; ++r) {
      for (int64_t c = 0; c < kFeatures; ++c) {
        uint16_t bits;
        std::memcpy(&bits, bytes.data() + 2 * (r * kFeatures + c), 2);
        ASSERT_EQ(bf16_to_float(bits), want[static_cast<size_t>(r * 3 + c % 3)])
            << when << ": row " << r << ", column " << c;
      }
    }
  };
  for (int i = 0; i < 20 * kCalls; ++i) {
    if (i % 29 == 10 * rank()) be_late();
    call(i);
    expect(i);
  }
  check("one by one");
  // An odd number of calls: replays begin with either half.
  const auto replay = g_device->record([&] {
    for (int i = 0; i < kCalls; ++i) call(i);
  });
  for (int k = 0; k < kReplays; ++k) {
    replay();
    for (int i = 0; i < kCalls; ++i) expect(i);
    if (k % 7 == rank()) be_late();
    if (k % 5 == 0) call(1), expect(1);
  }
  check("in a graph");
}

TEST_F(PeerNormTest, MemoryIsSharedAgainAndInParts) {
  for (int i = 0; i < 3; ++i) {
    part_ = g_comm->split(0, -rank(), "reversed");
    open(*part_, 576);
    ASSERT_NE(memory_, nullptr);
    const Rows a(3, 576);
    a.fill(std::vector<uint16_t>(3 * 576, bf16_from_float(1)),
           std::vector<uint16_t>(3 * 576, bf16_from_float(static_cast<float>(rank() + 1))));
    sum(a.norm(Out::kNone));
    const uint16_t want = bf16_from_float(static_cast<float>(1 + ranks() * (ranks() + 1) / 2));
    const auto bytes = a.residual.host();
    for (size_t j = 0; j < bytes.size(); j += 2)
      ASSERT_EQ(0, std::memcmp(bytes.data() + j, &want, 2)) << j;
    memory_.reset();
  }
}

TEST_F(PeerNormTest, TooManyRowsAreRefused) {
  const int64_t most = g_backend->peer_sums(ranks(), kFeatures).rows;
  const Rows a(most + 1, kFeatures);
  EXPECT_THROW(sum(a.norm(Out::kBf16)), Error);
}

TEST(SharedMemory, IsNotOfOneRankOrThroughTheHost) {
  Interrupt mine;
  const auto staged = g_world->make_staged_comm(mine, nullptr, 20, g_device->stream());
  EXPECT_EQ(staged->share(1 << 20), nullptr);
  EXPECT_EQ(g_backend->peer_sums(1, kFeatures).rows, 0);
  EXPECT_EQ(g_backend->peer_sums(16, kFeatures).rows, 0);
  EXPECT_EQ(g_backend->peer_sums(2, kFeatures + 8).rows, 0);
  EXPECT_EQ(g_backend->peer_sums(2, 100).rows, 0);
}

// The last test: nothing works afterwards. Calls that the other ranks never make, in a graph and
// not, end once all is aborted.
TEST_F(PeerNormTest, ZAbortEndsTheWait) {
  if (rank() == 0) {
    const Rows a(64 / (ranks() - 1), kFeatures);
    const auto norm = a.norm(Out::kFp8);
    const auto replay = g_device->record([&] {
      for (int i = 0; i < 160; ++i) sum(norm);
    });
    sum(norm);
    replay();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    const DeviceEvent after = g_backend->record(stream());
    EXPECT_FALSE(g_backend->done(after)) << "nobody came, and yet it ended";
    const auto begin = Clock::now();
    abort_all_nccl(2);
    g_backend->wait(after, deadline_in(10), g_none);
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 4.0);
    // Nor does what comes later wait.
    sum(norm);
    a.results();
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 5.0);
  }
  g_world->barrier(g_none, 60, "test");
  if (rank() != 0) abort_all_nccl(2);
  (void)memory_.release();  // collective, and there are no communicators any more
}

int run_tests(World& world) {
  const int gpus = comm_gpu_count();
  if (gpus == 0) {
    if (world.rank() == 0) printf("no GPU here\n");
    return 0;
  }
  Interrupt interrupt;
  const int gpu = world.local_rank() % gpus;
  const auto device = make_gpu_device(gpu, interrupt, 20);
  g_device = device.get();
  const auto backend = make_cuda_backend({.device = gpu});
  g_backend = backend.get();
  const bool own = world.agree_min(gpus >= world.local_size() ? 1 : 0, g_none, 30) == 1;
  const auto nccl = own ? world.make_nccl_comm(interrupt, nullptr, 30, device->stream()) : nullptr;
  g_comm = nccl.get();
  const int failed = RUN_ALL_TESTS();
  interrupt.raise(ExitCode::kInternal, "the last test has aborted NCCL");
  return failed;
}

}  // namespace
}  // namespace drover

int main(int argc, char** argv) { return drover::run_ranks_tests(argc, argv, drover::run_tests); }

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "model/weights.h"
#include "unit/store_writer.h"

namespace drover {
namespace {

using namespace drover::testing;

// Counts what is read, and what is held at once at most.
class Counting : public WeightSource {
 public:
  explicit Counting(std::string fails = "") : fails_(std::move(fails)) {}
  const Architecture& architecture() const override { return inner_->architecture(); }
  WeightTensor read(const std::string& name, Range rows, Range cols) override {
    ++reads;
    WeightTensor w;
    {
      const std::lock_guard lock(mutex_);
      w = inner_->read(name, rows, cols);
    }
    bytes += w.bytes();
    if (name == fails_) DROVER_FAIL(ExitCode::kBadInput, "{} is damaged", name);
    return w;
  }
  int group() const override { return inner_->group(); }
  std::string fingerprint() const override { return inner_->fingerprint(); }
  bool synthetic() const override { return inner_->synthetic(); }
  std::string description() const override { return inner_->description(); }
  std::string tokenizer_sha256() const override { return inner_->tokenizer_sha256(); }
  std::map<std::string, std::string> provenance() const override { return inner_->provenance(); }

  std::atomic<int> reads{0};
  std::atomic<size_t> bytes{0};

 private:
  std::unique_ptr<WeightSource> inner_ = synthetic_weights("tiny", 3);
  std::mutex mutex_;
  std::string fails_;
};

struct Fixture {
  explicit Fixture(size_t most_bytes, int threads, const std::string& fails = "") {
    auto counting = std::make_unique<Counting>(fails);
    inner = counting.get();
    shard = make_shard(inner->architecture(), 2, 1, 1, 0, 32);
    order = load_order(inner->architecture(), shard);
    source = read_ahead(std::move(counting), shard, most_bytes, threads);
  }
  WeightTensor take(const WeightPiece& p) const { return source->read(p.name, p.rows, p.cols); }
  Counting* inner;
  Shard shard;
  std::vector<WeightPiece> order;
  std::unique_ptr<WeightSource> source;
};

void expect_same(const WeightTensor& a, const WeightTensor& b, const std::string& name) {
  EXPECT_EQ(a.rows, b.rows) << name;
  EXPECT_EQ(a.cols, b.cols) << name;
  EXPECT_TRUE(a.codes == b.codes && a.scales == b.scales) << name;
}

TEST(ReadAhead, OrderIsThatOfTheDecoder) {
  const auto a = named_architecture("tiny");
  const auto whole = load_order(a, make_shard(a, 1, 0, 1, 0, 32));
  ASSERT_EQ(whole.size(), 1u + 4 * 9 + 2);
  EXPECT_EQ(whole.front().name, "embed");
  EXPECT_EQ(whole[1].name, "layers.0.attn_norm");
  EXPECT_EQ(whole[9].name, "layers.0.down");
  EXPECT_EQ(whole.back().name, "output");
  const auto last = load_order(a, make_shard(a, 1, 0, 2, 1, 32));
  EXPECT_EQ(last.front().name, "layers.2.attn_norm");
  auto tied = a;
  tied.tied_embeddings = true;
  EXPECT_EQ(load_order(tied, make_shard(tied, 1, 0, 1, 0, 32)).back().name, "embed");
}

TEST(ReadAhead, GivesTheSamePieces) {
  for (const int threads : {1, 4}) {
    for (const size_t most : {size_t{0}, size_t{50'000}, size_t{1} << 30}) {
      const Fixture f(most, threads);
      const auto direct = synthetic_weights("tiny", 3);
      for (const auto& p : f.order)
        expect_same(f.take(p), direct->read(p.name, p.rows, p.cols), p.name);
      EXPECT_EQ(f.inner->reads, static_cast<int>(f.order.size())) << "each piece once";
    }
  }
}

TEST(ReadAhead, LayersComeThroughIt) {
  const Fixture f(size_t{1} << 30, 2);
  const auto direct = synthetic_weights("tiny", 3);
  f.take(f.order.front());
  for (int64_t i = 0; i < 4; ++i) {
    const LayerWeights got = read_layer(*f.source, f.shard, i);
    const LayerWeights want = read_layer(*direct, f.shard, i);
    expect_same(got.qkv[2], want.qkv[2], "v");
    expect_same(got.gate_up[1], want.gate_up[1], "up");
    expect_same(got.down, want.down, "down");
  }
}

TEST(ReadAhead, HoldsNoMoreThanItMay) {
  const size_t most = 40'000;
  const Fixture f(most, 1);
  const auto settled = [&] {
    for (int before = -1; before != f.inner->reads;) {
      before = f.inner->reads;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return f.inner->bytes.load();
  };
  size_t largest = 0, taken = 0;
  for (const auto& p : f.order) {
    const size_t read = settled();
    ASSERT_GE(read, taken);
    EXPECT_LE(read - taken, most + (size_t{1} << 18)) << p.name;
    const WeightTensor w = f.take(p);
    taken += w.bytes();
    largest = std::max(largest, w.bytes());
  }
  EXPECT_LT(largest, size_t{1} << 18);
  EXPECT_GT(taken, most * 5) << "or the bound is never met";
}

TEST(ReadAhead, AnyOrderAndOtherPieces) {
  // Backwards, with no room to read ahead: nothing waits for what nobody takes.
  const Fixture f(1, 2);
  const auto direct = synthetic_weights("tiny", 3);
  for (auto p = f.order.rbegin(); p != f.order.rend(); ++p)
    expect_same(f.take(*p), direct->read(p->name, p->rows, p->cols), p->name);
  // Not planned, and planned but taken.
  expect_same(f.source->read("layers.1.q", {3, 5}, {0, 64}),
              direct->read("layers.1.q", {3, 5}, {0, 64}), "part of q");
  expect_same(f.take(f.order[5]), f.take(f.order[5]), "again");
}

TEST(ReadAhead, ErrorsReachWhoAsks) {
  const Fixture f(size_t{1} << 30, 3, "layers.2.o");
  for (const auto& p : f.order) {
    if (p.name == "layers.2.o") {
      expect_bad([&] { f.take(p); }, "layers.2.o is damaged");
    } else {
      EXPECT_NO_THROW(f.take(p)) << p.name;
    }
  }
}

TEST(ReadAhead, EndsBeforeItIsThrough) {
  for (int i = 0; i < 5; ++i) {
    const Fixture f(100'000, 3);
    f.take(f.order.front());
  }
}

TEST(ReadAhead, OverAStore) {
  Folder folder;
  write_model(folder.file("m.h5"));
  const auto direct = open_weights(folder.file("m.h5"), "");
  const Shard shard = make_shard(direct->architecture(), 2, 1, 1, 0, 32);
  const auto ahead = read_ahead(open_weights(folder.file("m.h5"), ""), shard, 1 << 20, 4);
  EXPECT_EQ(ahead->fingerprint(), direct->fingerprint());
  for (const auto& p : load_order(direct->architecture(), shard)) {
    const WeightTensor got = ahead->read(p.name, p.rows, p.cols);
    const WeightTensor want = direct->read(p.name, p.rows, p.cols);
    expect_same(got, want, p.name);
    EXPECT_TRUE(got.zeros == want.zeros && got.minimums == want.minimums &&
                got.permutation == want.permutation);
  }
}

}  // namespace
}  // namespace drover

// Replicas that learn what their weights are from the first one, under mpirun. A failure on any
// rank fails the run.
#include "engine/share_weights.h"

#include <gtest/gtest.h>

#include "comm/world.h"

namespace drover {
namespace {

World* g_world = nullptr;

// Every kind of tensor a store can hold; counts what is read.
class EveryKind final : public WeightSource {
 public:
  explicit EveryKind(int& reads) : reads_(reads) {}
  const Architecture& architecture() const override { return architecture_; }
  int group() const override { return 32; }
  std::string fingerprint() const override { return "every kind"; }
  bool synthetic() const override { return false; }
  std::string description() const override { return "every kind"; }
  std::string tokenizer_sha256() const override { return {}; }
  std::map<std::string, std::string> provenance() const override { return {}; }

  static WeightTensor make(const std::string& name) {
    WeightTensor t;
    t.rows = name == "norm" ? 1 : 6;
    t.cols = 64;
    t.format = name == "norm" ? WeightFormat::kF32 : WeightFormat::kInt4;
    t.group = name == "norm" ? 0 : 32;
    t.scale_dtype = Dtype::kBf16;
    t.zero = name == "zeros"      ? ZeroKind::kZeroPoints
             : name == "minimums" ? ZeroKind::kMinimums
                                  : ZeroKind::kSymmetric;
    t.codes.assign(t.code_bytes(), 0x5a);
    t.scales.assign(t.groups(), 0x3f80);
    if (t.zero == ZeroKind::kZeroPoints) t.zeros.assign(t.groups(), 7);
    if (t.zero == ZeroKind::kMinimums) t.minimums.assign(t.groups(), 0xbf80);
    if (name == "permuted") {
      for (int32_t i = 0; i < 64; ++i) t.permutation.push_back(63 - i);
    }
    return t;
  }
  WeightTensor read(const std::string& name, Range, Range) override {
    ++reads_;
    return make(name);
  }

 private:
  Architecture architecture_;
  int& reads_;
};

TEST(ShareWeights, OnlyTheFirstReplicaReadsAndAllKnowWhatTheyGet) {
  Interrupt interrupt;
  Progress progress;
  const auto replicas = g_world->make_comm(interrupt, &progress, 20);
  int reads = 0;
  const auto source = share_weights(std::make_unique<EveryKind>(reads), *replicas);
  for (const std::string name : {"plain", "norm", "zeros", "minimums", "permuted"}) {
    const WeightTensor want = EveryKind::make(name);
    const WeightTensor got = source->read(name, {0, want.rows}, {0, want.cols});
    EXPECT_EQ(got.format, want.format) << name;
    EXPECT_EQ(got.zero, want.zero) << name;
    EXPECT_EQ(got.group, want.group) << name;
    EXPECT_EQ(got.scale_dtype, want.scale_dtype) << name;
    EXPECT_EQ(got.rows, want.rows) << name;
    EXPECT_EQ(got.cols, want.cols) << name;
    EXPECT_EQ(got.permutation, want.permutation) << name;
    EXPECT_EQ(got.zeros.size(), want.zeros.size()) << name;
    EXPECT_EQ(got.minimums.size(), want.minimums.size()) << name;
    const bool whole = replicas->rank() == 0 || name == "norm";
    EXPECT_EQ(got.recipe == nullptr, whole) << name;
    if (whole) {
      EXPECT_EQ(got.codes, want.codes) << name;
    } else {
      EXPECT_TRUE(got.recipe->awaited && got.codes.empty() && got.scales.empty()) << name;
    }
  }
  EXPECT_EQ(reads, replicas->rank() == 0 ? 5 : 0);
}

}  // namespace
}  // namespace drover

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  drover::World world;
  drover::g_world = &world;
  const int failed = RUN_ALL_TESTS();
  const drover::Interrupt none;
  return static_cast<int>(-world.agree_min(-static_cast<int64_t>(failed), none, 30));
}

// The budget of a step: every microsecond once, linears by their place in the forward.
#include <gtest/gtest.h>

#include <numeric>

#include "serve/step_budget.h"

namespace drover {
namespace {

// Names as CUPTI's on an H100.
constexpr const char* kNorm = "write_kernel<4, 8, true>(NormRows, Output)";
constexpr const char* kLinear = "hopper::linear_kernel<hopper::Kernel<128> >";
constexpr const char* kRope = "rope_kernel<4, true>(RopeArgs)";
constexpr const char* kDecode = "decode_kernel<128, 0, 1>(AttentionArgs)";
constexpr const char* kPrefill = "prefill_kernel<128, 0, 1>(AttentionArgs)";
constexpr const char* kQuantize = "write_kernel<4, 8, true>(PlainRows, Output)";
constexpr const char* kSilu = "write_kernel<4, 8, true>(GateRows, Output)";
constexpr const char* kReduce =
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage)";
constexpr const char* kPeers = "peer_norm_kernel<2, true>(PeerRows)";
constexpr const char* kLibrary = "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT";
constexpr const char* kArgmax = "argmax_kernel";

class Recording {
 public:
  int64_t now = 1000;  // nanoseconds
  std::vector<trace::Span> spans;
  void kernel(const char* name, int64_t ns) {
    spans.push_back({"kernel", name, now, now + ns, {}});
    now += ns;
  }
  void step(const char* kind, int64_t rows, int64_t begin) {
    spans.push_back({"step", kind, begin, now, {{"step", 0}, {"rows", rows}}});
  }
  void sum_and_norm(bool over_peers) {
    if (over_peers) return kernel(kPeers, 500);
    kernel(kReduce, 300);
    kernel(kNorm, 200);
  }
  // One layer and the output, 10,000 ns with 350 of gaps.
  void decode_step(int64_t rows, bool over_peers = false) {
    const int64_t begin = now;
    kernel("embed_kernel", 100);
    kernel(kNorm, 200);
    kernel(kLinear, 1000);
    kernel(kRope, 150);
    kernel(kDecode, 1500);
    kernel(kQuantize, 100);
    kernel(kLinear, 800);
    sum_and_norm(over_peers);
    now += 350;
    kernel(kLinear, 2000);
    kernel(kSilu, 200);
    kernel(kLinear, 1500);
    sum_and_norm(over_peers);
    kernel(kLibrary, 900);
    kernel(kArgmax, 200);
    step("decode step", rows, begin);
  }
};

double us(const StepBudget& b, const std::string& operation) {
  for (const auto& p : b.parts) {
    if (p.operation == operation) return p.us;
  }
  return -1;
}

double sum(const StepBudget& b) {
  return std::accumulate(b.parts.begin(), b.parts.end(), 0.0,
                         [](double s, const auto& p) { return s + p.us; });
}

TEST(StepBudget, TellsLinearsByTheirPlace) {
  Recording r;
  for (int i = 0; i < 5; ++i) r.decode_step(64);
  const auto all = step_budgets(r.spans);
  ASSERT_EQ(all.size(), 1u);
  const StepBudget& b = all[0];
  EXPECT_EQ(b.kind, "decode step");
  EXPECT_EQ(b.rows, 64);
  EXPECT_EQ(b.steps, 5);
  EXPECT_DOUBLE_EQ(b.us, 10);
  EXPECT_DOUBLE_EQ(us(b, "qkv"), 1);
  EXPECT_DOUBLE_EQ(us(b, "o"), 0.8);
  EXPECT_DOUBLE_EQ(us(b, "gate_up"), 2);
  EXPECT_DOUBLE_EQ(us(b, "down"), 1.5);
  EXPECT_DOUBLE_EQ(us(b, "output"), 0.9);
  EXPECT_DOUBLE_EQ(us(b, "norm"), 0.6);
  EXPECT_DOUBLE_EQ(us(b, "attention decode"), 1.5);
  EXPECT_DOUBLE_EQ(us(b, "quantize"), 0.1);
  EXPECT_DOUBLE_EQ(us(b, "communication"), 0.6);
  EXPECT_NEAR(us(b, "idle"), 0.35, 1e-9);
  EXPECT_EQ(us(b, "linear"), -1);
  EXPECT_NEAR(sum(b), b.us, 1e-9);
  const Json j = to_json(all);
  EXPECT_EQ(j.at(0).at("operations").back().at("operation"), "idle");
  const std::string text = budget_text(std::vector<Json>(2, j));
  EXPECT_NE(text.find("decode step of 64 rows, the mean of 5\n"), std::string::npos) << text;
  EXPECT_NE(text.find("rank 1 us"), std::string::npos) << text;
}

TEST(StepBudget, TellsLinearsBesideSumsOverPeers) {
  Recording r;
  for (int i = 0; i < 5; ++i) r.decode_step(1, true);
  const auto all = step_budgets(r.spans);
  ASSERT_EQ(all.size(), 1u);
  const StepBudget& b = all[0];
  EXPECT_DOUBLE_EQ(us(b, "sum + norm"), 1);
  EXPECT_DOUBLE_EQ(us(b, "norm"), 0.2);
  EXPECT_DOUBLE_EQ(us(b, "o"), 0.8);
  EXPECT_DOUBLE_EQ(us(b, "gate_up"), 2);
  EXPECT_DOUBLE_EQ(us(b, "output"), 0.9);
  EXPECT_EQ(us(b, "communication"), -1);
}

TEST(StepBudget, OverlapsCountOnce) {
  Recording r;
  for (int i = 0; i < 4; ++i) {
    const int64_t begin = r.now;
    r.kernel(kNorm, 1000);
    // Launched before the norm ends; a message of another stream beside both and after.
    r.spans.push_back({"kernel", kPrefill, begin + 600, begin + 3000, {}});
    r.spans.push_back({"kernel",
                       "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)",
                       begin + 100,
                       begin + 3500,
                       {}});
    r.spans.push_back({"copy", "copy host to device", begin + 3400, begin + 3700, {}});
    r.now = begin + 4000;
    r.step("mixed step", 2048, begin);
  }
  const auto all = step_budgets(r.spans);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_DOUBLE_EQ(us(all[0], "norm"), 1);
  EXPECT_DOUBLE_EQ(us(all[0], "attention prefill"), 2);
  EXPECT_DOUBLE_EQ(us(all[0], "communication"), 0.5);
  EXPECT_DOUBLE_EQ(us(all[0], "copies"), 0.2);
  EXPECT_NEAR(us(all[0], "idle"), 0.3, 1e-9);
}

TEST(StepBudget, AKernelOnTheBorderIsInBothSteps) {
  Recording r;
  for (int i = 0; i < 4; ++i) {
    r.spans.push_back({"kernel", kSilu, r.now + 700, r.now + 1300, {}});
    r.now += 1000;
    r.step("decode step", 1, r.now - 1000);
  }
  const auto all = step_budgets(r.spans);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_DOUBLE_EQ(us(all[0], "silu"), (4 * 300 + 3 * 300) / 4.0 / 1000);
  EXPECT_NEAR(sum(all[0]), 1, 1e-9);
}

TEST(StepBudget, KindsAndSizesApartAndRareOnesLeftOut) {
  Recording r;
  for (int i = 0; i < 50; ++i) r.decode_step(64);
  for (int i = 0; i < 50; ++i) r.decode_step(8);
  for (int i = 0; i < 2; ++i) r.decode_step(3);
  const auto all = step_budgets(r.spans);
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].rows, 8);
  EXPECT_EQ(all[1].rows, 64);
}

TEST(StepBudget, WithoutKernelsThereIsNone) {
  Recording r;
  r.now += 1000;
  for (int i = 0; i < 9; ++i) r.step("decode step", 1, r.now - 1000);
  EXPECT_TRUE(step_budgets(r.spans).empty());
  EXPECT_EQ(budget_text(std::vector<Json>(1, to_json(std::vector<StepBudget>()))), "");
}

TEST(StepBudget, OperationsOfACpuRankAsTheyAreNamed) {
  Recording r;
  for (int i = 0; i < 3; ++i) {
    const int64_t begin = r.now;
    r.spans.push_back({"operation", "qkv", begin, begin + 600, {}});
    r.spans.push_back({"operation", "communication", begin + 600, begin + 900, {}});
    r.now += 1000;
    r.step("decode step", 2, begin);
  }
  const auto all = step_budgets(r.spans);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_DOUBLE_EQ(us(all[0], "qkv"), 0.6);
  EXPECT_DOUBLE_EQ(us(all[0], "communication"), 0.3);
  EXPECT_NEAR(us(all[0], "idle"), 0.1, 1e-9);
}

}  // namespace
}  // namespace drover

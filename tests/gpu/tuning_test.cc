// Every way that `drover bench tune` may choose gives the rule's results but for rounding, and a
// layer runs in the way that a tuning names for its rows.
#include "backend/tuning.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "backend/cuda/cuda_backend.h"
#include "base/error.h"
#include "base/formats.h"

namespace drover {
namespace {

constexpr int64_t kN = 1280, kK = 2048, kMost = 300;

WeightTensor some_weights() {
  WeightTensor w;
  w.format = WeightFormat::kInt4, w.rows = kN, w.cols = kK, w.group = 128;
  std::mt19937 random(5);
  w.codes.resize(w.code_bytes());
  for (auto& c : w.codes) c = static_cast<uint8_t>(random());
  for (size_t i = 0; i < w.groups(); ++i) {
    w.scales.push_back(f16_from_float(0.004f + 0.00001f * static_cast<float>(random() % 100)));
  }
  return w;
}

// A backend with one layer, and rows for it.
struct Case {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Linear> linear;
  void *in = nullptr, *coded = nullptr, *scale = nullptr, *out = nullptr, *weight = nullptr;

  Case(Dtype inputs, Tuning tuning) {
    backend = make_cuda_backend({.device = 0, .inputs = inputs, .tuning = std::move(tuning)});
    const WeightTensor w = some_weights();
    linear = backend->load_linear({&w, 1});
    backend->loaded();
    std::mt19937 random(6);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> host(kMost * kK);
    for (auto& x : host) x = bf16_from_float(normal(random));
    const std::vector<float> ones(kK, 1.0f);
    const size_t room = 304;  // padded rows
    in = backend->alloc(room * kK * 2, "a test");
    coded = backend->alloc(room * kK * 2, "a test");
    scale = backend->alloc(room * 4, "a test");
    out = backend->alloc(room * kN * 4, "a test");
    weight = backend->alloc(kK * 4, "a test");
    backend->copy_in(in, host.data(), host.size() * 2, backend->stream());
    backend->copy_in(weight, ones.data(), ones.size() * 4, backend->stream());
  }
  ~Case() {
    linear.reset();
    for (void* p : {in, coded, scale, out, weight}) backend->free(p);
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  std::vector<float> run(int64_t rows) {
    const Stream s = backend->stream();
    LinearInput input{in, nullptr};
    if (linear->quantized_input) {
      input = {coded, static_cast<float*>(scale)};
      backend->norm({.residual = in,
                     .weight = static_cast<const float*>(weight),
                     .out = input,
                     .rows = rows,
                     .features = kK,
                     .epsilon = 1e-5f,
                     .out_rows = rows},
                    s);
    }
    std::vector<float> values(static_cast<size_t>(rows * kN), std::nanf(""));
    backend->copy_in(out, values.data(), values.size() * 4, s);
    backend->linear(*linear, input, out, rows, true, s);
    backend->copy_out(values.data(), out, values.size() * 4, s);
    backend->wait(backend->record(s), deadline_in(60), Interrupt());
    return values;
  }
};

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += std::pow(double{a[i]} - b[i], 2), size += std::pow(double{b[i]}, 2);
  }
  return std::sqrt(error / size);
}

class TunedLinear : public ::testing::TestWithParam<Dtype> {
 protected:
  void SetUp() override {
    if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU here";
    if (cuda_capability(0) / 10 != 9) GTEST_SKIP() << "no GPU here with several ways";
  }
  bool fp8() const { return GetParam() == Dtype::kFp8E4m3; }
  Tuning tuning(const LinearWay& way, int64_t rows) const {
    return {cuda_device_name(0),
            {{.format = fp8() ? "w4a8" : "w4a16",
              .n = kN,
              .k = kK,
              .rows = rows,
              .way = way,
              .us = 1,
              .rule_us = 2}}};
  }
};

TEST_P(TunedLinear, EveryWayIsRight) {
  Case c(GetParam(), {});
  for (const int64_t rows :
       std::initializer_list<int64_t>{1, 8, 9, 16, 31, 64, 65, 128, 160, kMost}) {
    const auto ways = c.backend->linear_ways(*c.linear, rows);
    ASSERT_GE(ways.size(), 2u) << rows;
    const auto rule = c.run(rows);
    double worst = 0;
    for (const LinearWay& way : ways) {
      c.backend->run_linear_as(*c.linear, &way);
      const auto got = c.run(rows);
      const double d = difference(got, rule);
      EXPECT_LT(d, fp8() ? 1e-3 : 1e-5)
          << rows << " rows, " << way.tokens << " tokens, cluster " << way.cluster << ", "
          << way.per_sm << " a multiprocessor, " << way.stages << " stages, split " << way.split;
      if (!(d <= worst)) worst = d;
    }
    std::cout << rows << " rows: " << ways.size() << " ways, worst difference " << worst << "\n";
    c.backend->run_linear_as(*c.linear, &ways[0]);
    EXPECT_EQ(c.run(rows), rule) << "the first way is the rule's";
    c.backend->run_linear_as(*c.linear, nullptr);
    EXPECT_EQ(c.run(rows), rule);
  }
}

TEST_P(TunedLinear, ATuningIsHeededUpToItsRows) {
  constexpr int64_t kRows = 100;
  Case plain(GetParam(), {});
  // One that sums in another order, so that the bits tell.
  const auto rule = plain.run(kRows);
  for (const LinearWay& way : plain.backend->linear_ways(*plain.linear, kRows)) {
    plain.backend->run_linear_as(*plain.linear, &way);
    const auto other = plain.run(kRows);
    plain.backend->run_linear_as(*plain.linear, nullptr);
    if (other == rule) continue;
    Case tuned(GetParam(), tuning(way, kRows));
    EXPECT_EQ(tuned.run(kRows), other);
    EXPECT_EQ(tuned.run(kRows + 1), plain.run(kRows + 1));
    return;
  }
  GTEST_FAIL() << "all ways give the same bits: nothing shows that a tuning is heeded";
}

TEST_P(TunedLinear, AKernelThatIsNoneIsRefused) {
  for (const LinearWay& way : {LinearWay{24, 1, 1, 32, true}, LinearWay{8, 81, 1, 32, true},
                               LinearWay{128, 1, 2, 32, true}, LinearWay{8, 1, 1, 1, true}}) {
    try {
      Case c(GetParam(), tuning(way, 64));
      FAIL() << way.tokens << " tokens were taken";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_NE(std::string(e.what()).find("bench tune"), std::string::npos) << e.what();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Inputs, TunedLinear, ::testing::Values(Dtype::kFp8E4m3, Dtype::kBf16),
                         [](const auto& i) { return i.param == Dtype::kBf16 ? "bf16" : "e4m3"; });

}  // namespace
}  // namespace drover

// The yardstick of `drover bench linear` is the product that it says it is.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "backend/cuda/cuda_backend.h"
#include "base/formats.h"

namespace drover {
namespace {

constexpr int64_t kN = 512, kK = 384;

class LibraryLinear : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU here";
    backend_ = make_cuda_backend({.device = 0, .inputs = Dtype::kFp8E4m3});
    linear_ = backend_->library_linear(kN, kK);
    if (!linear_) {
      ASSERT_NE(cuda_capability(0), 90) << "on Hopper cuBLASLt scales by rows from 12.9 on";
      GTEST_SKIP() << "no GPU here that cuBLASLt scales e4m3 by rows on";
    }
  }

  // out [rows, kN] of codes [rows, kK] with a scale a row.
  std::vector<float> run(std::vector<uint8_t> codes, std::vector<float> scales) {
    const auto rows = static_cast<int64_t>(scales.size()), padded = (rows + 15) / 16 * 16;
    codes.resize(static_cast<size_t>(padded * kK));
    scales.resize(static_cast<size_t>(padded));
    std::vector<uint16_t> host(static_cast<size_t>(padded * kN), 0xffff);
    void* in = backend_->alloc(codes.size(), "a test");
    void* scale = backend_->alloc(scales.size() * 4, "a test");
    void* out = backend_->alloc(host.size() * 2, "a test");
    const Stream s = backend_->stream();
    backend_->copy_in(in, codes.data(), codes.size(), s);
    backend_->copy_in(scale, scales.data(), scales.size() * 4, s);
    backend_->copy_in(out, host.data(), host.size() * 2, s);
    backend_->linear(*linear_, {in, static_cast<float*>(scale)}, out, rows, false, s);
    backend_->copy_out(host.data(), out, host.size() * 2, s);
    backend_->wait(backend_->record(s), deadline_in(60), Interrupt());
    for (void* p : {in, scale, out}) backend_->free(p);
    std::vector<float> values;
    for (int64_t i = 0; i < rows * kN; ++i) {
      values.push_back(bf16_to_float(host[static_cast<size_t>(i)]));
    }
    return values;
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Linear> linear_;
};

TEST_F(LibraryLinear, MultipliesWithWeightsOfItsOwn) {
  EXPECT_EQ(linear_->rows, kN);
  EXPECT_EQ(linear_->cols, kK);
  EXPECT_TRUE(linear_->quantized_input);
  // A row for each column shows the weights: e4m3 times a power of two, exact in bf16.
  std::vector<uint8_t> ones(static_cast<size_t>(kK * kK));
  for (int64_t i = 0; i < kK; ++i) ones[static_cast<size_t>(i * kK + i)] = fp8_from_float(1);
  const auto w = run(ones, std::vector<float>(kK, 1.0f));
  double squares = 0;
  int zeros = 0;
  for (const float x : w) squares += double{x} * x, zeros += x == 0;
  const double deviation = std::sqrt(squares / static_cast<double>(w.size())) * 8192;
  EXPECT_GT(deviation, 80);  // bell-shaped up to e4m3's largest
  EXPECT_LT(deviation, 140);
  EXPECT_LT(zeros, static_cast<int>(w.size()) / 50);
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 100);
  for (const int64_t rows : {1, 16, 37, 256}) {
    std::vector<uint8_t> x(static_cast<size_t>(rows * kK));
    for (auto& c : x) c = fp8_from_float(normal(random));
    std::vector<float> scales;
    for (int64_t r = 0; r < rows; ++r) {
      scales.push_back(0.001f * static_cast<float>(1 + random() % 7));
    }
    const auto out = run(x, scales);
    double worst = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < kN; ++n) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < kK; ++k) {
          const double t = double{fp8_to_float(x[static_cast<size_t>(r * kK + k)])} *
                           w[static_cast<size_t>(k * kN + n)] * scales[static_cast<size_t>(r)];
          sum += t, magnitude += std::abs(t);
        }
        const double error = std::abs(out[static_cast<size_t>(r * kN + n)] - sum);
        // bf16's rounding, and the few bits less than f32 that Hopper's FP8 sums have.
        const double ratio = error / (std::abs(sum) * 0x1p-8 + magnitude * 1e-3);
        if (!(ratio <= worst)) worst = ratio;
      }
    }
    std::cout << rows << " rows: worst error " << worst << " of the tolerance\n";
    EXPECT_LT(worst, 1) << rows << " rows";
  }
}

}  // namespace
}  // namespace drover

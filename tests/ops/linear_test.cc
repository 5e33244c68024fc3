#include "ops/harness.h"
#include "ops/reference.h"

namespace drover::ops {
namespace {

class LinearTest : public OpsTest {
 protected:
  // Weights and inputs as the definition has them (rounded or not), in double.
  double rounded(double x) const { return GetParam().bf16_linears ? reference::round_bf16(x) : x; }

  std::vector<float> run(const Linear& w, std::vector<float>& in, int64_t rows) {
    const auto padded = static_cast<size_t>(backend_->padded_rows(rows));
    Buffer from(*backend_, activation_bytes(padded * w.cols));
    Buffer to(*backend_, padded * w.rows * 4);
    put_activations(from, in);
    backend_->linear(w, from.as<void>(), to.as<void>(), rows, true, backend_->stream());
    return to.get<float>(static_cast<size_t>(rows * w.rows));
  }

  void compare(std::span<const WeightTensor> parts, int64_t rows, const std::string& what) {
    const auto w = backend_->load_linear(parts);
    const int64_t k = w->cols;
    auto in = normals(static_cast<size_t>(rows * k));
    const auto out = run(*w, in, rows);
    std::vector<double> x(in.begin(), in.end()), row(static_cast<size_t>(k));
    for (double& v : x) v = rounded(v);
    int64_t n = 0;
    for (const WeightTensor& part : parts)
      for (int64_t r = 0; r < part.rows; ++r, ++n) {
        // A weight is first a float (s * q + m may round), then what the linear makes of it.
        for (int64_t c = 0; c < k; ++c)
          row[c] = rounded(static_cast<float>(reference::weight(part, r, c)));
        for (int64_t m = 0; m < rows; ++m) {
          const auto want = reference::dot(x.data() + m * k, row.data(), k);
          // A sum of k terms in f32, in chains of at most k / 8 terms; and where a weight's own
          // rounding to f32 may be done in two steps, its last bit.
          const double bound = want.magnitude * 0x1p-24 * (2.0 + std::sqrt(k));
          check(out[m * w->rows + n], want.value, bound, what);
        }
      }
  }
};

TEST_P(LinearTest, EveryRowCount) {
  for (const int64_t rows : kRowCounts) {
    const WeightTensor w =
        random_weights(random_, WeightFormat::kInt4, ZeroKind::kMinimums, 32, Dtype::kF16, 72, 576);
    compare({&w, 1}, rows, "rows " + std::to_string(rows));
  }
}

TEST_P(LinearTest, EveryQuantization) {
  for (const int group : {32, 64, 128})
    for (const WeightFormat format : {WeightFormat::kInt4, WeightFormat::kInt8})
      for (const ZeroKind zero : {ZeroKind::kSymmetric, ZeroKind::kZeroPoints, ZeroKind::kMinimums})
        for (const Dtype scales : {Dtype::kF16, Dtype::kBf16}) {
          const WeightTensor w = random_weights(random_, format, zero, group, scales, 40, 256);
          compare({&w, 1}, 5, std::string(to_string(format)) + " g" + std::to_string(group));
        }
  for (const WeightFormat format : {WeightFormat::kF16, WeightFormat::kBf16, WeightFormat::kF32}) {
    const WeightTensor w =
        random_weights(random_, format, ZeroKind::kSymmetric, 0, Dtype::kF16, 40, 100);
    compare({&w, 1}, 5, to_string(format));
  }
}

TEST_P(LinearTest, StackedParts) {
  std::vector<WeightTensor> parts;
  for (const int64_t rows : {192, 64, 33})
    parts.push_back(random_weights(random_, WeightFormat::kInt4, ZeroKind::kZeroPoints, 64,
                                   Dtype::kBf16, rows, 192));
  compare(parts, 9, "stacked");
}

// The sums of a row have the same order in every batch: chunked prefill equals whole prefill, and a
// batch of 64 equals one by one, bit for bit.
TEST_P(LinearTest, ARowDoesNotDependOnItsBatch) {
  const int64_t shapes[][2] = {{960, 576}, {576, 1536}, {320, 576}, {100, 64}, {512, 2048}};
  for (const auto& [n, k] : shapes) {
    const WeightTensor w =
        random_weights(random_, WeightFormat::kInt4, ZeroKind::kSymmetric, 32, Dtype::kF16, n, k);
    const auto linear = backend_->load_linear({&w, 1});
    auto in = normals(static_cast<size_t>(1000 * k));
    const auto whole = run(*linear, in, 1000);
    for (const int64_t rows : {1, 2, 3, 7, 8, 17, 33, 64, 65, 129, 256, 300}) {
      const int64_t first = integer(0, 1000 - rows);
      std::vector<float> part(in.begin() + first * k, in.begin() + (first + rows) * k);
      const auto out = run(*linear, part, rows);
      EXPECT_EQ(0, std::memcmp(out.data(), whole.data() + first * n, out.size() * 4))
          << rows << " rows of " << n << " x " << k << " differ from 1000 rows";
    }
  }
}

TEST_P(LinearTest, PaddedRowsAreFewAndEnough) {
  int64_t distinct = 0, last = 0;
  for (int64_t rows = 1; rows <= 256; ++rows) {
    const int64_t padded = backend_->padded_rows(rows);
    ASSERT_GE(padded, rows);
    ASSERT_LE(padded, rows + 31);
    ASSERT_GE(padded, last);
    distinct += padded != last;
    last = padded;
  }
  EXPECT_LE(distinct, 32);
}

TEST_P(LinearTest, PartsOfDifferentWidthAreRefused) {
  std::vector<WeightTensor> parts;
  for (const int64_t cols : {64, 128})
    parts.push_back(
        random_weights(random_, WeightFormat::kF32, ZeroKind::kSymmetric, 0, Dtype::kF16, 8, cols));
  EXPECT_THROW(backend_->load_linear(parts), Error);
}

DROVER_OPS_SUITE(LinearTest);

}  // namespace
}  // namespace drover::ops

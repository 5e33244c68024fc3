#include "ops/harness.h"
#include "ops/reference.h"

namespace drover::ops {
namespace {

class LinearTest : public OpsTest {
 protected:
  // Weights and inputs as the definition has them (rounded or not), in double.
  double rounded(double x) const { return GetParam().bf16_linears ? reference::round_bf16(x) : x; }

  // Rounds rows to e4m3 with a scale a row and returns their codes; `in` becomes what they stand
  // for.
  static std::vector<uint8_t> quantize(std::vector<float>& in, int64_t rows,
                                       std::vector<float>& scales) {
    std::vector<double> numbers;  // ascending, of codes 0..126
    for (int code = 0; code < 127; ++code)
      numbers.push_back(reference::fp8(static_cast<uint8_t>(code)));
    std::vector<uint8_t> codes(in.size());
    const size_t k = in.size() / static_cast<size_t>(rows);
    for (size_t i = 0; i < in.size(); i += k) {
      float amax = 0;
      for (size_t j = i; j < i + k; ++j) amax = std::max(amax, std::abs(in[j]));
      scales.push_back(amax / 448);
      for (size_t j = i; j < i + k; ++j) {
        const double x = std::abs(in[j]) / scales.back();
        auto at = std::lower_bound(numbers.begin(), numbers.end(), x);
        if (at == numbers.end() || (at != numbers.begin() && x - at[-1] < *at - x)) --at;
        codes[j] = static_cast<uint8_t>((at - numbers.begin()) | (in[j] < 0 ? 128 : 0));
        in[j] = static_cast<float>((in[j] < 0 ? -*at : *at) * scales.back());
      }
    }
    return codes;
  }

  std::vector<float> run(const Linear& w, std::vector<float>& in, int64_t rows) {
    if (!w.quantized_input) return run_codes(w, in, {}, {}, rows, true);
    std::vector<float> scales;
    const auto codes = quantize(in, rows, scales);
    return run_codes(w, in, codes, scales, rows, true);
  }

  // With codes and scales where w wants them, else with `in`.
  std::vector<float> run_codes(const Linear& w, std::vector<float>& in,
                               const std::vector<uint8_t>& codes, const std::vector<float>& scales,
                               int64_t rows, bool f32_out) {
    const auto padded = static_cast<size_t>(backend_->padded_rows(rows));
    Buffer from(*backend_, activation_bytes(padded * w.cols)), scale(*backend_, padded * 4);
    Buffer to(*backend_, padded * w.rows * (f32_out || wide() ? 4 : 2));
    if (w.quantized_input)
      from.put(codes), scale.put(scales);
    else
      put_activations(from, in);
    backend_->linear(w, {from.as<void>(), w.quantized_input ? scale.as<float>() : nullptr},
                     to.as<void>(), rows, f32_out, backend_->stream());
    const auto count = static_cast<size_t>(rows * w.rows);
    return f32_out ? to.get<float>(count) : get_activations(to, count);
  }

  // A sum of k terms in f32, in chains of at most k / 8 terms; and where a weight's own rounding to
  // f32 may be done in two steps, its last bit. Hopper's FP8 tensor cores line the 33 terms of a
  // step up at the largest and cut them after some 13 bits: a group of 128 is wrong by a share of
  // its terms' sum that is 2^-17 in the mean of random data and below 2^-12.
  static double bound(const Linear& w, const reference::Sum& s) {
    return s.magnitude * (w.quantized_input ? 0x1p-12 : 0x1p-24 * (2.0 + std::sqrt(w.cols)));
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
          check(out[m * w->rows + n], want.value, bound(*w, want), what);
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

// A gate and an up projection in one: as a linear of both and silu_gate after it would have it, but
// that sums may be in another order, so that either may be rounded to its neighbour.
TEST_P(LinearTest, GateUp) {
  struct Shape {
    int64_t inner, cols;
    int group;
  };
  for (const auto& [inner, cols, group] :
       {Shape{8, 128, 128}, {352, 1280, 128}, {1004, 384, 128}, {2056, 1152, 128}, {40, 192, 64}}) {
    const auto part = [&] {
      return random_weights(random_, WeightFormat::kInt4,
                            group == 128 ? ZeroKind::kSymmetric : ZeroKind::kZeroPoints, group,
                            Dtype::kF16, inner, cols);
    };
    const WeightTensor parts[] = {part(), part()};
    const auto apart = backend_->load_linear(parts), both = backend_->load_gate_up(parts);
    ASSERT_EQ(both->rows, 2 * inner);
    for (const int64_t rows : {1, 2, 17, 64, 129, 300}) {
      const std::string what = fmt::format("{} rows, {} x {}", rows, inner, cols);
      auto in = normals(static_cast<size_t>(rows * cols));
      std::vector<float> scales;
      const auto codes =
          both->quantized_input ? quantize(in, rows, scales) : std::vector<uint8_t>();
      const auto sums = run_codes(*apart, in, codes, scales, rows, false);

      const auto padded = static_cast<size_t>(backend_->padded_rows(rows));
      Buffer from(*backend_, activation_bytes(padded * cols)), scale(*backend_, padded * 4),
          scratch(*backend_, activation_bytes(padded * 2 * inner)),
          out(*backend_, activation_bytes(padded * inner));
      if (both->quantized_input)
        from.put(codes), scale.put(scales);
      else
        put_activations(from, in);
      const LinearInput input{from.as<void>(), both->quantized_input ? scale.as<float>() : nullptr};
      backend_->gate_up(*both, input, scratch.as<void>(), {out.as<void>()}, rows,
                        backend_->stream());
      const auto got = get_activations(out, static_cast<size_t>(rows * inner));
      Quantized quantized(*backend_, rows, inner);
      backend_->gate_up(*both, input, scratch.as<void>(), quantized.input(), rows,
                        backend_->stream());
      check_quantized(quantized, got, what);
      const double unit = activation_unit(), terms = std::sqrt(static_cast<double>(cols));
      for (int64_t r = 0; r < rows; ++r) {
        // Where terms cancel the order changes more than the last bit: bound(), with the terms'
        // magnitude from the deviation of the row's sums.
        double squares = 0;
        for (int64_t j = 0; j < 2 * inner; ++j) squares += std::pow(sums[r * 2 * inner + j], 2);
        const double order = std::sqrt(squares / static_cast<double>(2 * inner)) * terms *
                             (both->quantized_input ? 0x1p-12 : 0x1p-24 * (2 + terms));
        for (int64_t j = 0; j < inner; ++j) {
          const double gate = sums[r * 2 * inner + j], up = sums[r * 2 * inner + inner + j];
          // Silu's slope is 1.1 at most.
          const double silu = std::abs(reference::silu(gate));
          const double neighbours = (1.1 * std::abs(gate) + silu) * std::abs(up) * 2 * unit +
                                    (1.1 * std::abs(up) + silu + order) * order;
          const double want = reference::silu(gate) * up;
          check(got[r * inner + j], want, neighbours + std::abs(want) * (6e-7 + 2 * unit) + 1e-30,
                what);
        }
      }
    }
  }
}

// INT4 in symmetric groups of 128, which GPUs have kernels of their own for: row counts around
// their tiles, widths that tiles do not divide, deep and shallow. Some outputs of each are
// compared, all are written, and the same call gives the same bits.
TEST_P(LinearTest, SymmetricGroupsOf128) {
  const int64_t shapes[][2] = {{256, 128}, {1000, 384}, {1001, 1280}, {2304, 8192}, {384, 28672}};
  double error = 0, sum = 0;
  for (const auto& [n, k] : shapes) {
    if (backend_->name() == "cpu" && n * k > 2000000) continue;
    std::vector<WeightTensor> parts;  // a stack that shares tiles
    for (const int64_t rows : {n / 3, n - n / 3})
      parts.push_back(random_weights(random_, WeightFormat::kInt4, ZeroKind::kSymmetric, 128,
                                     k == 1280 ? Dtype::kBf16 : Dtype::kF16, rows, k));
    const auto w = backend_->load_linear(parts);
    std::vector<double> x(static_cast<size_t>(k)), row(static_cast<size_t>(k));
    for (const int64_t rows : {1, 2, 3, 8, 9, 17, 33, 64, 65, 129, 257, 1000}) {
      auto in = normals(static_cast<size_t>(rows * k), 0.1);
      std::vector<float> scales;
      std::vector<uint8_t> codes;
      if (w->quantized_input) codes = quantize(in, rows, scales);
      const auto out = run_codes(*w, in, codes, scales, rows, true);
      const auto again = run_codes(*w, in, codes, scales, rows, true);
      const auto narrow = run_codes(*w, in, codes, scales, rows, false);
      EXPECT_EQ(0, std::memcmp(out.data(), again.data(), out.size() * 4)) << rows << " of " << n;
      for (const float v : out) ASSERT_TRUE(std::isfinite(v)) << rows << " rows of " << n;
      for (int i = 0; i < 200; ++i) {
        const int64_t m = i == 0 ? rows - 1 : integer(0, rows - 1);
        const int64_t r = i == 0 ? n - 1 : integer(0, n - 1);
        const bool second = r >= parts[0].rows;
        for (int64_t c = 0; c < k; ++c) {
          x[c] = rounded(in[m * k + c]);
          row[c] = rounded(static_cast<float>(
              reference::weight(parts[second], second ? r - parts[0].rows : r, c)));
        }
        const auto want = reference::dot(x.data(), row.data(), k);
        const std::string where =
            std::to_string(rows) + " rows of " + std::to_string(n) + " x " + std::to_string(k);
        check(out[m * n + r], want.value, bound(*w, want), where);
        check(narrow[m * n + r], want.value,
              bound(*w, want) + std::abs(want.value) * activation_unit(), where + ", activations");
        error += std::abs(out[m * n + r] - want.value) / want.magnitude, sum += 1;
      }
    }
  }
  std::cout << "mean error " << error / sum << " of the terms' sum\n";
  EXPECT_LE(error / sum, 0x1p-16);
}

// What a linear was loaded for is what it must be given.
TEST_P(LinearTest, InputsOfTheOtherKindAreRefused) {
  const WeightTensor w =
      random_weights(random_, WeightFormat::kInt4, ZeroKind::kSymmetric, 128, Dtype::kF16, 64, 128);
  const auto linear = backend_->load_linear({&w, 1});
  if (!linear->quantized_input) GTEST_SKIP() << "inputs are activations here";
  Buffer from(*backend_, 8 * 128 * 2), to(*backend_, 8 * 64 * 4);
  EXPECT_THROW(backend_->linear(*linear, {from.as<void>(), nullptr}, to.as<void>(), 8, true,
                                backend_->stream()),
               Error);
}

// The sums of a row have the same order in every batch (Hopper's own kernels apart): chunked
// prefill equals whole prefill, and a batch of 64 equals one by one, bit for bit.
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

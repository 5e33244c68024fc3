// What the tests of operations share. They are written over a factory, so that another backend is
// held to the same: add it to backends(), and its activation rounding widens the tolerances.
//
// Inputs are fresh at every run; the seed is printed, and DROVER_TEST_SEED repeats it. Outputs are
// full of NaN before an operation, so that what it forgets to write is found.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"
#include "base/formats.h"
#include "ops/reference.h"

namespace drover::ops {

struct BackendCase {
  std::string name;
  std::function<std::unique_ptr<Backend>()> make;
  bool bf16_linears = false;  // inputs and weights of linears are rounded to bf16
};

inline std::vector<BackendCase> backends() {
  const auto cpu = [](Dtype type, int threads) {
    return [=] { return make_cpu_backend({type, threads}); };
  };
  return {{"cpu_f32", cpu(Dtype::kF32, 1), false},
          {"cpu_bf16", cpu(Dtype::kBf16, 1), true},
          {"cpu_bf16_2_threads", cpu(Dtype::kBf16, 2), true}};
}

inline void PrintTo(const BackendCase& c, std::ostream* out) { *out << c.name; }

// Device memory with a host's view.
class Buffer {
 public:
  Buffer(Backend& backend, size_t bytes, int poison = 0xff)
      : backend_(backend), bytes_(bytes), p_(backend.alloc(bytes, "a test")) {
    const std::vector<uint8_t> fill(bytes, static_cast<uint8_t>(poison));  // 0xff..: NaN
    backend.copy_in(p_, fill.data(), bytes, backend.stream());
  }
  ~Buffer() { backend_.free(p_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T>
  T* as() {
    return static_cast<T*>(p_);
  }
  template <typename T>
  void put(const std::vector<T>& host) {
    ASSERT_LE(host.size() * sizeof(T), bytes_);
    backend_.copy_in(p_, host.data(), host.size() * sizeof(T), backend_.stream());
  }
  template <typename T>
  std::vector<T> get(size_t count) {
    std::vector<T> host(count);
    EXPECT_LE(count * sizeof(T), bytes_);
    backend_.copy_out(host.data(), p_, count * sizeof(T), backend_.stream());
    Interrupt none;
    backend_.wait(backend_.record(backend_.stream()), deadline_in(60), none);
    return host;
  }
  template <typename T>
  std::vector<T> get() {
    return get<T>(bytes_ / sizeof(T));
  }

 private:
  Backend& backend_;
  size_t bytes_;
  void* p_;
};

class OpsTest : public ::testing::TestWithParam<BackendCase> {
 protected:
  void SetUp() override {
    const char* fixed = std::getenv("DROVER_TEST_SEED");
    const unsigned seed = fixed ? static_cast<unsigned>(std::atoll(fixed)) : std::random_device{}();
    std::cout << "DROVER_TEST_SEED=" << seed << "\n";
    random_.seed(seed);
    backend_ = GetParam().make();
  }

  double normal(double deviation = 1.0) {
    return std::normal_distribution<double>(0, deviation)(random_);
  }
  int64_t integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  std::vector<float> normals(size_t count, double deviation = 1.0) {
    std::normal_distribution<float> d(0, static_cast<float>(deviation));
    std::vector<float> v(count);
    for (float& x : v) x = d(random_);
    return v;
  }

  // Activations: floats to and from the backend's type. What was lost on the way in is lost in
  // `host` too, so that the reference starts from the same numbers.
  bool wide() const { return backend_->activation_dtype() == Dtype::kF32; }
  size_t activation_bytes(size_t count) const { return count * (wide() ? 4 : 2); }
  void put_activations(Buffer& b, std::vector<float>& host) {
    if (wide()) return b.put(host);
    std::vector<uint16_t> narrow(host.size());
    for (size_t i = 0; i < host.size(); ++i) {
      narrow[i] = bf16_from_float(host[i]);
      host[i] = bf16_to_float(narrow[i]);
    }
    b.put(narrow);
  }
  std::vector<float> get_activations(Buffer& b, size_t count) {
    if (wide()) return b.get<float>(count);
    std::vector<float> out(count);
    const auto narrow = b.get<uint16_t>(count);
    for (size_t i = 0; i < count; ++i) out[i] = bf16_to_float(narrow[i]);
    return out;
  }
  // The relative rounding of one stored activation.
  double activation_unit() const { return wide() ? 0x1p-24 : 0x1p-8; }

  // Room for a linear's input in e4m3 with a scale a row, poisoned.
  struct Quantized {
    Quantized(Backend& backend, int64_t row_count, int64_t feature_count)
        : rows(row_count),
          features(feature_count),
          data(backend, static_cast<size_t>(rows * features) *
                            (backend.activation_dtype() == Dtype::kF32 ? 4 : 1)),
          scale(backend, static_cast<size_t>(rows) * 4) {}
    LinearInput input() { return {data.as<void>(), scale.as<float>()}; }
    int64_t rows, features;
    Buffer data, scale;
  };
  // What `out` holds must be what `plain`, written by the same operation as activations, becomes:
  // scale = amax / 448 exactly, codes the nearest ones (x / scale may be rounded once before).
  void check_quantized(Quantized& out, const std::vector<float>& plain, const std::string& where) {
    const auto n = static_cast<size_t>(out.rows * out.features);
    const auto scales = out.scale.get<float>();
    const auto codes = wide() ? std::vector<uint8_t>() : out.data.get<uint8_t>(n);
    const auto values = wide() ? out.data.get<float>(n) : std::vector<float>();
    for (int64_t r = 0; r < out.rows; ++r) {
      const float* x = &plain[static_cast<size_t>(r * out.features)];
      float amax = 0;
      bool finite = true;
      for (int64_t j = 0; j < out.features; ++j) {
        amax = std::max(amax, std::abs(x[j]));
        finite = finite && std::isfinite(x[j]);
      }
      const float scale = scales[static_cast<size_t>(r)];
      if (!finite) {
        EXPECT_TRUE(std::isnan(scale)) << where << " row " << r;
        continue;
      }
      const float least = std::numeric_limits<float>::min();
      EXPECT_EQ(scale, amax / 448 < least ? 0.0f : amax / 448) << where << " row " << r;
      if (scale == 0) {
        for (int64_t j = 0; j < out.features; ++j) {
          const auto i = static_cast<size_t>(r * out.features + j);
          ASSERT_EQ(wide() ? values[i] : static_cast<float>(codes[i] & 127), 0.0f) << where;
        }
        continue;
      }
      int exponent;
      const bool exact = std::frexp(scale, &exponent) == 0.5f;
      // The step between numbers of e4m3 near a number.
      const auto step = [](double y) {
        return std::ldexp(1.0, std::max(std::ilogb(std::max(std::abs(y), 1e-30)), -6) - 3);
      };
      for (int64_t j = 0; j < out.features; ++j) {
        const auto i = static_cast<size_t>(r * out.features + j);
        const double unit = scale, want = x[j] / unit;
        const double got = wide() ? values[i] / unit : reference::fp8(codes[i]);
        // A hair more than half a step where x / scale was rounded; on the CPU values are code *
        // scale, rounded once.
        const double slack = exact && !wide() ? 0 : std::abs(want) * 0x1p-21;
        const double grid = step(got);
        if (std::abs(got - want) <= step(want) / 2 + slack &&
            std::abs(got - std::nearbyint(got / grid) * grid) <= std::abs(got) * 0x1p-22)
          continue;
        FAIL() << where << ": code " << got << " for " << want << ", row " << r << " column " << j;
      }
    }
  }

  // |got - want| <= tolerance, NaN never. Remembers the worst ratio of error to tolerance.
  void check(double got, double want, double tolerance, const std::string& where) {
    const double ratio = std::abs(got - want) / tolerance;
    if (!(ratio <= worst_)) {
      worst_ = std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
      worst_text_ = where + ": " + std::to_string(got) + " for " + std::to_string(want);
    }
    ++compared_;
  }
  void TearDown() override {
    if (compared_ == 0) return;
    std::cout << compared_ << " values, worst error " << worst_ << " of its tolerance ("
              << worst_text_ << ")\n";
    EXPECT_LE(worst_, 1.0) << worst_text_;
  }

  std::mt19937_64 random_;
  std::unique_ptr<Backend> backend_;
  double worst_ = 0;
  std::string worst_text_ = "all exact";
  int64_t compared_ = 0;
};

#define DROVER_OPS_SUITE(Suite)                                                        \
  INSTANTIATE_TEST_SUITE_P(All, Suite, ::testing::ValuesIn(::drover::ops::backends()), \
                           [](const auto& info) { return info.param.name; })

// A random weight tensor of the neutral layout.
inline WeightTensor random_weights(std::mt19937_64& random, WeightFormat format, ZeroKind zero,
                                   int group, Dtype scale_dtype, int64_t rows, int64_t cols) {
  WeightTensor w;
  w.format = format, w.zero = zero, w.scale_dtype = scale_dtype, w.rows = rows, w.cols = cols;
  std::normal_distribution<float> d(0, 1);
  const auto n = static_cast<size_t>(rows * cols);
  const auto narrow = [](Dtype t, float x) {
    return t == Dtype::kF16 ? f16_from_float(x) : bf16_from_float(x);
  };
  if (format == WeightFormat::kF32) {
    w.codes.resize(4 * n);
    for (size_t i = 0; i < n; ++i) {
      const float x = d(random);
      std::memcpy(&w.codes[4 * i], &x, 4);
    }
  } else if (format == WeightFormat::kF16 || format == WeightFormat::kBf16) {
    w.codes.resize(2 * n);
    for (size_t i = 0; i < n; ++i) {
      const uint16_t x =
          narrow(format == WeightFormat::kF16 ? Dtype::kF16 : Dtype::kBf16, d(random));
      std::memcpy(&w.codes[2 * i], &x, 2);
    }
  } else {
    w.group = group;
    w.codes.resize(format == WeightFormat::kInt4 ? n / 2 : n);
    for (uint8_t& c : w.codes) c = static_cast<uint8_t>(random());
    const size_t groups = n / static_cast<size_t>(group);
    const float unit = format == WeightFormat::kInt4 ? 0.2f : 0.012f;
    for (size_t i = 0; i < groups; ++i) {
      w.scales.push_back(narrow(scale_dtype, unit * (1.0f + 0.3f * d(random))));
      if (zero == ZeroKind::kZeroPoints) w.zeros.push_back(static_cast<uint8_t>(random() % 17));
      if (zero == ZeroKind::kMinimums) w.minimums.push_back(narrow(scale_dtype, d(random)));
    }
  }
  return w;
}

inline const int64_t kRowCounts[] = {1, 2, 3, 17, 64, 129, 1000};

}  // namespace drover::ops

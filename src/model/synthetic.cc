// Weights that no one trained, for performance work where no checkpoint is at hand.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "base/error.h"
#include "base/formats.h"
#include "model/weights.h"

namespace drover {
namespace {

// splitmix64 (Steele, Lea, Flood, OOPSLA 2014) of a counter: eight elements a call.
// backend/cuda/device_weights.cu computes the same.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t seed_of(uint64_t seed, const std::string& name) {
  uint64_t h = mix(seed);
  for (unsigned char c : name) h = mix(h ^ c);
  return h;
}

// 256 equally likely values of a normal distribution, symmetric about 0.
const std::array<double, 256>& normal_table() {
  static const auto table = [] {
    std::array<double, 256> t{};
    for (int i = 0; i < 128; ++i) {
      const double p = (i + 0.5) / 256;
      double low = -10, high = 0;
      for (int step = 0; step < 100; ++step) {
        const double mid = (low + high) / 2;
        (0.5 * std::erfc(-mid / std::sqrt(2.0)) < p ? low : high) = mid;
      }
      t[i] = low;
      t[255 - i] = -low;
    }
    return t;
  }();
  return table;
}

constexpr double kInt4Spread = 2.5;  // standard deviation of the codes, in codes
constexpr double kInt8Spread = 40.0;

uint8_t int4_code(int i) {
  return static_cast<uint8_t>(
      std::clamp(8 + std::lround(kInt4Spread * normal_table()[i]), 1L, 15L));
}
uint8_t int8_code(int i) {
  return static_cast<uint8_t>(
      static_cast<int8_t>(std::clamp(std::lround(kInt8Spread * normal_table()[i]), -127L, 127L)));
}

template <typename T, typename F>
std::array<T, 256> table_of(F f) {
  std::array<T, 256> t{};
  for (int i = 0; i < 256; ++i) t[i] = f(i);
  return t;
}

// The random bytes of elements [begin, begin + out.size()).
void random_bytes(uint64_t seed, uint64_t begin, std::span<uint8_t> out) {
  for (size_t i = 0; i < out.size();) {
    const uint64_t at = begin + i;
    const size_t skip = at % 8, count = std::min(8 - skip, out.size() - i);
    const uint64_t word = mix(seed + at / 8);
    if (count == 8 && std::endian::native == std::endian::little) {
      std::memcpy(&out[i], &word, 8);
    } else {
      for (size_t k = 0; k < count; ++k)
        out[i + k] = static_cast<uint8_t>(word >> (8 * (skip + k)));
    }
    i += count;
  }
}

// The lowest N bytes, in the order of the store.
template <size_t N>
void store_le(uint8_t* out, uint32_t bits) {
  for (size_t k = 0; k < N; ++k) out[k] = static_cast<uint8_t>(bits >> (8 * k));
}

struct Plan {  // of one whole tensor
  int64_t rows, cols;
  WeightFormat format;
  int32_t group;
  double deviation;
  double mean;
};

class SyntheticSource : public WeightSource {
 public:
  SyntheticSource(const std::string& name, uint64_t seed)
      : name_(name), seed_(seed), architecture_(named_architecture(name)) {
    small_ = architecture_.parameters() < 1'000'000'000;
  }

  const Architecture& architecture() const override { return architecture_; }
  int group() const override { return small_ ? 32 : 128; }
  std::string fingerprint() const override { return fmt::format("synthetic:{}:{}", name_, seed_); }
  bool synthetic() const override { return true; }
  std::string description() const override {
    return fmt::format("synthetic int4 g{} symmetric, embeddings {}", group(),
                       small_ ? "int8" : "bf16");
  }
  std::string tokenizer_sha256() const override { return {}; }
  std::map<std::string, std::string> provenance() const override {
    return {{"source_files", "[]"},
            {"quantization", description()},
            {"calibration_set", "none"},
            {"license", "none"},
            {"importer", fingerprint()}};
  }
  WeightTensor read(const std::string& name, Range rows, Range cols) override;
  void allow_recipes() override { recipes_ = true; }

 private:
  Plan plan(const std::string& name) const;
  std::string name_;
  uint64_t seed_;
  Architecture architecture_;
  bool small_;
  bool recipes_ = false;
};

Plan SyntheticSource::plan(const std::string& name) const {
  const Architecture& a = architecture_;
  const int64_t q = int64_t{a.heads} * a.head_size, kv = int64_t{a.kv_heads} * a.head_size;
  const WeightFormat table = small_ ? WeightFormat::kInt8 : WeightFormat::kBf16;
  const int32_t table_group = small_ ? 32 : 0;
  const double hidden_scale = 1.0 / std::sqrt(a.hidden);
  // The embedding is small beside what the layers add: were it not, a tied output layer would
  // always find the token that just came in.
  const double embed = a.tied_embeddings ? hidden_scale : 0.05;
  if (name == "embed") return {a.vocab, a.hidden, table, table_group, embed, 0};
  if (name == "output" && !a.tied_embeddings) {
    return {a.vocab, a.hidden, table, table_group, hidden_scale, 0};
  }
  const Plan norm{1, a.hidden, WeightFormat::kF32, 0, 0.05, 1.0};
  if (name == "final_norm") return norm;
  int64_t layer = -1;
  char part[16] = "";
  int used = 0;
  const bool parsed = std::sscanf(name.c_str(), "layers.%6ld.%15s%n", &layer, part, &used) == 2 &&
                      used == static_cast<int>(name.size());
  if (parsed && layer >= 0 && layer < a.layers) {
    const std::string p = part;
    const auto linear = [&](int64_t rows, int64_t cols, double scale) {
      return Plan{rows, cols, WeightFormat::kInt4, group(), scale / std::sqrt(cols), 0};
    };
    // Each layer adds twice to the residual stream.
    const double branch = 1.0 / std::sqrt(2.0 * a.layers);
    if (p == "attn_norm" || p == "mlp_norm") return norm;
    if (p == "q") return linear(q, a.hidden, 1);
    if (p == "k" || p == "v") return linear(kv, a.hidden, 1);
    if (p == "o") return linear(a.hidden, q, branch);
    if (p == "gate" || p == "up") return linear(a.intermediate, a.hidden, 1);
    if (p == "down") return linear(a.hidden, a.intermediate, branch);
  }
  DROVER_FAIL(ExitCode::kBadInput, "{}: there is no tensor {}", fingerprint(), name);
}

std::shared_ptr<const WeightRecipe> recipe_of(const Plan& p, uint64_t seed, Range rows,
                                              Range cols) {
  static const auto int4 = table_of<uint32_t>(int4_code);
  static const auto int8 = table_of<uint32_t>(int8_code);
  auto recipe = std::make_shared<WeightRecipe>();
  recipe->seed = seed;
  recipe->row_begin = rows.begin;
  recipe->col_begin = cols.begin;
  recipe->all_cols = p.cols;
  const auto value = [&](int i) {
    return static_cast<float>(p.mean + p.deviation * normal_table()[i]);
  };
  switch (p.format) {
    case WeightFormat::kInt4:
      recipe->elements = int4;
      break;
    case WeightFormat::kInt8:
      recipe->elements = int8;
      break;
    case WeightFormat::kBf16:
      recipe->elements = table_of<uint32_t>([&](int i) { return bf16_from_float(value(i)); });
      break;
    default:
      recipe->elements =
          table_of<uint32_t>([&](int i) { return std::bit_cast<uint32_t>(value(i)); });
  }
  if (p.group > 0) {
    const double spread = p.format == WeightFormat::kInt4 ? kInt4Spread : kInt8Spread;
    // Groups differ by up to a fifth, so that a mix-up of scales shows.
    recipe->scales = table_of<uint16_t>([&](int i) {
      return f16_from_float(static_cast<float>(p.deviation / spread * (0.8 + 0.4 * i / 255)));
    });
  }
  return recipe;
}

WeightTensor SyntheticSource::read(const std::string& name, Range rows, Range cols) {
  const Plan p = plan(name);
  const int64_t unit = std::max(p.group, 1);
  DROVER_CHECK(rows.begin >= 0 && rows.size() >= 0 && rows.end <= p.rows && cols.begin >= 0 &&
                   cols.size() >= 0 && cols.end <= p.cols && cols.begin % unit == 0 &&
                   cols.end % unit == 0,
               ExitCode::kInternal, "{}: rows [{}, {}) and columns [{}, {}) of {} x {}, group {}",
               name, rows.begin, rows.end, cols.begin, cols.end, p.rows, p.cols, p.group);
  WeightTensor w;
  w.format = p.format;
  w.rows = rows.size();
  w.cols = cols.size();
  w.group = p.group;
  w.recipe = recipe_of(p, seed_of(seed_, name), rows, cols);
  if (!recipes_ || p.rows == 1) materialize(w);
  return w;
}

}  // namespace

void materialize(WeightTensor& w) {
  if (!w.recipe) return;
  const WeightRecipe& from = *w.recipe;
  const auto width = static_cast<size_t>(w.cols);
  w.codes.resize(w.code_bytes());
  const size_t row_bytes = w.rows == 0 ? 0 : w.codes.size() / static_cast<size_t>(w.rows);
  std::vector<uint8_t> random(width);
  for (int64_t r = 0; r < w.rows; ++r) {
    const int64_t begin = (from.row_begin + r) * from.all_cols + from.col_begin;
    random_bytes(from.seed, static_cast<uint64_t>(begin), random);
    uint8_t* out = w.codes.data() + static_cast<size_t>(r) * row_bytes;
    switch (w.format) {
      case WeightFormat::kInt4:
        for (size_t j = 0; j < width; j += 2)
          out[j / 2] =
              static_cast<uint8_t>(from.elements[random[j]] | from.elements[random[j + 1]] << 4);
        break;
      case WeightFormat::kInt8:
        for (size_t j = 0; j < width; ++j) out[j] = static_cast<uint8_t>(from.elements[random[j]]);
        break;
      case WeightFormat::kF32:
        for (size_t j = 0; j < width; ++j) store_le<4>(out + 4 * j, from.elements[random[j]]);
        break;
      default:
        for (size_t j = 0; j < width; ++j) store_le<2>(out + 2 * j, from.elements[random[j]]);
    }
  }
  if (w.group > 0) {
    w.scales.resize(w.groups());
    std::vector<uint8_t> groups(width / static_cast<size_t>(w.group));
    auto out = w.scales.begin();
    for (int64_t r = 0; r < w.rows; ++r) {
      const int64_t begin = (from.row_begin + r) * from.all_cols + from.col_begin;
      random_bytes(~from.seed, static_cast<uint64_t>(begin / w.group), groups);
      for (uint8_t b : groups) *out++ = from.scales[b];
    }
  }
  w.recipe.reset();
}

std::unique_ptr<WeightSource> synthetic_weights(const std::string& name, uint64_t seed) {
  return std::make_unique<SyntheticSource>(name, seed);
}

}  // namespace drover

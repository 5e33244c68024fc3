#include <algorithm>
#include <charconv>

#include "base/error.h"
#include "base/sha256.h"
#include "drover_openorca_lengths.h"  // made by cmake/openorca_lengths.cmake
#include "store/store.h"

namespace drover {
namespace {

constexpr std::string_view kPrefix = "synthetic:";
constexpr int64_t kMaxSamples = 16'777'216;
constexpr int64_t kMaxTokens = 1'048'576;
constexpr int32_t kFirstId = 16;  // below lie the special ids of the usual tokenizers

[[noreturn]] void fail_spec(const std::string& spec) {
  DROVER_FAIL(ExitCode::kUsage,
              "{} is not a synthetic dataset; expected synthetic:openorca[:n] or "
              "synthetic:INxOUT[:n], such as synthetic:128x128:256",
              spec);
}

int64_t parse(std::string_view text, int64_t most, const std::string& spec) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > most) {
    fail_spec(spec);
  }
  return value;
}

// splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

class SyntheticDataset : public Dataset {
 public:
  SyntheticDataset(const std::string& spec, int32_t vocab, uint64_t seed)
      : vocab_(vocab), seed_(seed) {
    DROVER_CHECK(vocab > kFirstId, ExitCode::kUsage,
                 "{}: needs a vocabulary of more than {} tokens, the model has {}", spec, kFirstId,
                 vocab);
    std::string_view rest = std::string_view(spec).substr(kPrefix.size());
    const size_t colon = rest.find(':');
    const std::string_view what = rest.substr(0, colon);
    openorca_ = what == "openorca";
    count_ = openorca_ ? std::size(kOpenOrcaLengths) : 256;
    if (colon != std::string_view::npos) count_ = parse(rest.substr(colon + 1), kMaxSamples, spec);
    if (!openorca_) {
      const size_t by = what.find('x');
      if (by == std::string_view::npos) fail_spec(spec);
      input_ = parse(what.substr(0, by), kMaxTokens, spec);
      output_ = parse(what.substr(by + 1), kMaxTokens, spec);
    }
    name_ = fmt::format("synthetic:{}:{}", what, count_);
  }

  std::string name() const override { return name_; }
  size_t size() const override { return static_cast<size_t>(count_); }
  Sample sample(size_t index) override {
    check(index);
    const auto& row = kOpenOrcaLengths[index % std::size(kOpenOrcaLengths)];
    Sample out;
    out.output_length = openorca_ ? row.output : static_cast<int32_t>(output_);
    out.input.resize(openorca_ ? static_cast<size_t>(row.input) : static_cast<size_t>(input_));
    const auto range = static_cast<uint64_t>(vocab_ - kFirstId);
    const uint64_t stream = mix(mix(seed_) ^ index);
    for (size_t i = 0; i < out.input.size(); ++i) {
      // The high half times the range: uniform to within range / 2^32.
      out.input[i] = kFirstId + static_cast<int32_t>(((mix(stream + i) >> 32) * range) >> 32);
    }
    return out;
  }
  std::string reference_text(size_t index) override { return check(index), std::string(); }
  std::string question_text(size_t index) override { return check(index), std::string(); }
  int32_t vocab() const override { return vocab_; }
  std::string tokenizer_sha256() const override { return {}; }
  DecodingTable decoding_table() override {
    DecodingTable out;
    out.special.resize(static_cast<size_t>(vocab_));
    for (int32_t id = 0; id < vocab_; ++id) out.pieces.push_back(fmt::format(" {}", id));
    return out;
  }
  std::string fingerprint() const override {
    return sha256_hex(fmt::format("{};{};{}", name_, vocab_, seed_));
  }
  bool synthetic() const override { return true; }
  void verify_all() override {}  // nothing is stored

 private:
  void check(size_t index) const {
    DROVER_CHECK(index < size(), ExitCode::kUsage, "{}: there is no sample {}; it holds {}", name_,
                 index, count_);
  }
  std::string name_;
  int32_t vocab_;
  uint64_t seed_;
  bool openorca_ = false;
  int64_t count_ = 0, input_ = 0, output_ = 0;
};

}  // namespace

bool is_synthetic_dataset(const std::string& spec) { return spec.starts_with(kPrefix); }

std::unique_ptr<Dataset> synthetic_dataset(const std::string& spec, int32_t vocab, uint64_t seed) {
  if (!is_synthetic_dataset(spec)) fail_spec(spec);
  return std::make_unique<SyntheticDataset>(spec, vocab, seed);
}

}  // namespace drover

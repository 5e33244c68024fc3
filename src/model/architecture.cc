#include "model/architecture.h"

#include <cmath>
#include <map>
#include <numbers>

#include "base/error.h"

namespace drover {
namespace {

void check_size(const std::string& where, const char* name, int64_t value, int64_t most) {
  DROVER_CHECK(value >= 1 && value <= most, ExitCode::kBadInput, "{}: {} is {}; expected 1 to {}",
               where, name, value, most);
}

void check_rope(const Architecture& a, const std::string& where) {
  DROVER_CHECK(a.rope_dims >= 2 && a.rope_dims % 2 == 0 && a.rope_dims <= a.head_size,
               ExitCode::kBadInput,
               "{}: rope_dims is {}; expected an even number up to the head "
               "size of {}",
               where, a.rope_dims, a.head_size);
  DROVER_CHECK(std::isfinite(a.rope_base) && a.rope_base > 1.0, ExitCode::kBadInput,
               "{}: rope_base is {}; expected more than 1", where, a.rope_base);
  const RopeScaling& s = a.rope_scaling;
  if (s.kind == RopeScaling::Kind::kNone) return;
  DROVER_CHECK(std::isfinite(s.factor) && s.factor >= 1.0, ExitCode::kBadInput,
               "{}: rope_factor is {}; expected at least 1", where, s.factor);
  if (s.kind != RopeScaling::Kind::kLlama3) return;
  DROVER_CHECK(std::isfinite(s.high_freq_factor) && s.low_freq_factor > 0 &&
                   s.high_freq_factor > s.low_freq_factor && s.original_max_positions >= 1,
               ExitCode::kBadInput,
               "{}: llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor and original "
               "positions; found {}, {}, {}",
               where, s.low_freq_factor, s.high_freq_factor, s.original_max_positions);
}

Architecture llama(int32_t layers, int32_t hidden, int32_t heads, int32_t kv_heads,
                   int32_t head_size, int32_t intermediate, int32_t vocab, int32_t max_positions) {
  Architecture a;
  a.layers = layers;
  a.hidden = hidden;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.head_size = head_size;
  a.rope_dims = head_size;
  a.intermediate = intermediate;
  a.vocab = vocab;
  a.max_positions = max_positions;
  a.bos_id = 1;
  a.eos_ids = {2};
  return a;
}

Architecture llama3(Architecture a) {
  a.rope_base = 500000.0;
  a.bos_id = 128000;
  a.eos_ids = {128001, 128009};
  return a;
}

std::map<std::string, Architecture> known() {
  std::map<std::string, Architecture> all;
  all["llama2-7b"] = llama(32, 4096, 32, 32, 128, 11008, 32000, 4096);
  all["llama2-70b"] = llama(80, 8192, 64, 8, 128, 28672, 32000, 4096);
  all["llama3-8b"] = llama3(llama(32, 4096, 32, 8, 128, 14336, 128256, 8192));
  all["llama3-70b"] = llama3(llama(80, 8192, 64, 8, 128, 28672, 128256, 8192));
  Architecture& smol = all["smollm2-135m"] = llama(30, 576, 9, 3, 64, 1536, 49152, 8192);
  smol.rope_base = 100000.0;
  smol.tied_embeddings = true;
  all["tiny"] = llama(4, 256, 8, 8, 32, 512, 1024, 2048);
  return all;
}

}  // namespace

void Architecture::validate(const std::string& where) const {
  DROVER_CHECK(family == "llama", ExitCode::kBadInput,
               "{}: family `{}` is not supported; known: llama", where, family);
  check_size(where, "layers", layers, 1024);
  check_size(where, "hidden", hidden, 1048576);
  check_size(where, "heads", heads, 4096);
  check_size(where, "kv_heads", kv_heads, heads);
  check_size(where, "head_size", head_size, 1024);
  check_size(where, "intermediate", intermediate, 1048576);
  check_size(where, "vocab", vocab, 4194304);
  check_size(where, "max_positions", max_positions, 16777216);
  DROVER_CHECK(heads % kv_heads == 0, ExitCode::kBadInput,
               "{}: {} heads cannot share {} KV heads evenly", where, heads, kv_heads);
  DROVER_CHECK(std::isfinite(norm_epsilon) && norm_epsilon > 0 && norm_epsilon < 1,
               ExitCode::kBadInput, "{}: norm_epsilon is {}; expected between 0 and 1", where,
               norm_epsilon);
  check_rope(*this, where);
  DROVER_CHECK(!eos_ids.empty() && eos_ids.size() <= 64, ExitCode::kBadInput,
               "{}: {} end-of-sequence ids; expected 1 to 64", where, eos_ids.size());
  for (int32_t id : eos_ids) {
    DROVER_CHECK(id >= 0 && id < vocab, ExitCode::kBadInput,
                 "{}: end-of-sequence id {} is not in the vocabulary of {}", where, id, vocab);
  }
  DROVER_CHECK(bos_id >= -1 && bos_id < vocab, ExitCode::kBadInput,
               "{}: bos_id {} is not in the vocabulary of {}", where, bos_id, vocab);
}

std::vector<float> Architecture::inverse_frequencies() const {
  std::vector<float> out;
  for (int32_t i = 0; i < rope_dims / 2; ++i) {
    double f = std::pow(rope_base, -2.0 * i / rope_dims);
    const RopeScaling& s = rope_scaling;
    if (s.kind == RopeScaling::Kind::kLinear) f /= s.factor;
    if (s.kind == RopeScaling::Kind::kLlama3) {
      // Long waves are slowed down, short ones kept, those between blended.
      const double turns =
          static_cast<double>(s.original_max_positions) * f / (2 * std::numbers::pi);
      if (turns < s.low_freq_factor) {
        f /= s.factor;
      } else if (turns <= s.high_freq_factor) {
        const double smooth =
            (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
        f = (1 - smooth) * f / s.factor + smooth * f;
      }
    }
    out.push_back(static_cast<float>(f));
  }
  return out;
}

int64_t Architecture::parameters() const {
  const int64_t h = hidden, q = int64_t{heads} * head_size, kv = int64_t{kv_heads} * head_size;
  const int64_t layer = 2 * h + 2 * h * q + 2 * h * kv + 3 * h * intermediate;
  return layers * layer + h + (tied_embeddings ? 1 : 2) * int64_t{vocab} * h;
}

std::string Architecture::summary() const {
  const double n = static_cast<double>(parameters());
  const std::string size =
      n >= 1e9 ? fmt::format("{:.1f} B", n * 1e-9) : fmt::format("{:.1f} M", n * 1e-6);
  return fmt::format(
      "{}, {} parameters: {} layers, hidden {}, {} heads ({} KV) of {}, intermediate {}, "
      "vocabulary "
      "{}{}, {} positions, rope base {}",
      family, size, layers, hidden, heads, kv_heads, head_size, intermediate, vocab,
      tied_embeddings ? " (tied)" : "", max_positions, rope_base);
}

Architecture named_architecture(const std::string& name) {
  const auto all = known();
  const auto found = all.find(name);
  if (found != all.end()) return found->second;
  std::string names;
  for (const auto& [key, value] : all) names += (names.empty() ? "" : ", ") + key;
  DROVER_FAIL(ExitCode::kUsage, "there is no architecture named `{}`; known: {}", name, names);
}

}  // namespace drover

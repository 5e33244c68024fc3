#include "model/store_source.h"

#include <limits>

#include "base/error.h"

namespace drover {
namespace {

// One attribute after another, each checked for its type.
class Reader {
 public:
  Reader(const Attributes& a, const std::string& where) : attributes_(a), where_(where) {}

  const Attribute& get(const char* name) const {
    const auto found = attributes_.find(name);
    DROVER_CHECK(found != attributes_.end(), ExitCode::kBadInput, "{}: attribute {} is missing",
                 where_, name);
    return found->second;
  }
  bool has(const char* name) const { return attributes_.contains(name); }
  int32_t integer(const char* name) const {
    const auto* value = std::get_if<int64_t>(&get(name));
    DROVER_CHECK(value != nullptr, ExitCode::kBadInput, "{}: attribute {}: expected an integer",
                 where_, name);
    return narrow(*value, name);
  }
  double number(const char* name) const {
    const Attribute& a = get(name);
    if (const auto* i = std::get_if<int64_t>(&a)) return static_cast<double>(*i);
    const auto* value = std::get_if<double>(&a);
    DROVER_CHECK(value != nullptr, ExitCode::kBadInput, "{}: attribute {}: expected a number",
                 where_, name);
    return *value;
  }
  // The place of the value in `known`.
  int choice(const char* name, const std::vector<std::string>& known) const {
    const auto* value = std::get_if<std::string>(&get(name));
    for (size_t i = 0; value != nullptr && i < known.size(); ++i) {
      if (known[i] == *value) return static_cast<int>(i);
    }
    DROVER_FAIL(ExitCode::kBadInput, "{}: attribute {} is {}; known: {}", where_, name,
                value == nullptr ? "not a string" : "`" + *value + "`", fmt::join(known, ", "));
  }
  std::vector<int32_t> integers(const char* name) const {
    const Attribute& a = get(name);
    if (std::holds_alternative<int64_t>(a)) return {integer(name)};
    const auto* values = std::get_if<std::vector<int64_t>>(&a);
    DROVER_CHECK(values != nullptr, ExitCode::kBadInput,
                 "{}: attribute {}: expected a list of integers", where_, name);
    std::vector<int32_t> out;
    for (int64_t v : *values) out.push_back(narrow(v, name));
    return out;
  }

 private:
  int32_t narrow(int64_t value, const char* name) const {
    using Limits = std::numeric_limits<int32_t>;
    DROVER_CHECK(value >= Limits::min() && value <= Limits::max(), ExitCode::kBadInput,
                 "{}: attribute {} is {}, which is absurd", where_, name, value);
    return static_cast<int32_t>(value);
  }
  const Attributes& attributes_;
  const std::string& where_;
};

struct Expected {
  const char* name;
  int64_t rows, cols;
  bool vector;  // a norm: one row of floats
};

std::vector<Expected> layer_tensors(const Architecture& a) {
  const int64_t q = int64_t{a.heads} * a.head_size, kv = int64_t{a.kv_heads} * a.head_size;
  return {{"attn_norm", 1, a.hidden, true},
          {"q", q, a.hidden, false},
          {"k", kv, a.hidden, false},
          {"v", kv, a.hidden, false},
          {"o", a.hidden, q, false},
          {"mlp_norm", 1, a.hidden, true},
          {"gate", a.intermediate, a.hidden, false},
          {"up", a.intermediate, a.hidden, false},
          {"down", a.hidden, a.intermediate, false}};
}

void check_shape(const TensorInfo& t, const Expected& e, const std::string& where) {
  DROVER_CHECK(t.rows == e.rows && t.cols == e.cols, ExitCode::kBadInput,
               "{}: tensor {} is {} x {}; the architecture calls for {} x {}", where, t.name,
               t.rows, t.cols, e.rows, e.cols);
  DROVER_CHECK(!e.vector || t.group == 0, ExitCode::kBadInput,
               "{}: tensor {} is {}; norms are f16, bf16 or f32", where, t.name,
               to_string(t.format));
}

}  // namespace

Architecture read_architecture(const Attributes& attributes, const std::string& where) {
  const Reader r(attributes, where);
  Architecture a;
  r.choice("family", {"llama"});
  a.layers = r.integer("layers");
  a.hidden = r.integer("hidden");
  a.heads = r.integer("heads");
  a.kv_heads = r.integer("kv_heads");
  a.head_size = r.integer("head_size");
  a.intermediate = r.integer("intermediate");
  a.vocab = r.integer("vocab");
  a.max_positions = r.integer("max_positions");
  r.choice("norm", {"rms"});
  a.norm_epsilon = static_cast<float>(r.number("norm_epsilon"));
  a.rope_pairing = r.choice("rope_pairing", {"half", "adjacent"}) == 0 ? RopePairing::kHalf
                                                                       : RopePairing::kAdjacent;
  a.rope_dims = r.integer("rope_dims");
  a.rope_base = r.number("rope_base");
  a.rope_scaling.kind =
      static_cast<RopeScaling::Kind>(r.choice("rope_scaling", {"none", "linear", "llama3"}));
  if (a.rope_scaling.kind != RopeScaling::Kind::kNone) {
    a.rope_scaling.factor = r.number("rope_factor");
  }
  if (a.rope_scaling.kind == RopeScaling::Kind::kLlama3) {
    a.rope_scaling.low_freq_factor = r.number("rope_low_freq_factor");
    a.rope_scaling.high_freq_factor = r.number("rope_high_freq_factor");
    a.rope_scaling.original_max_positions = r.integer("rope_original_max_positions");
  }
  r.choice("activation", {"silu_gated"});
  a.tied_embeddings = r.integer("tied_embeddings") != 0;
  a.eos_ids = r.integers("eos_ids");
  a.bos_id = r.integer("bos_id");
  a.validate(where);
  return a;
}

int check_tensors(const ModelStore& store, const Architecture& a, const std::string& where) {
  std::map<std::string, const TensorInfo*> found;
  for (const auto& t : store.tensors()) found[t.name] = &t;
  const auto take = [&](const std::string& name, const Expected& e) -> const TensorInfo& {
    const auto it = found.find(name);
    DROVER_CHECK(it != found.end(), ExitCode::kBadInput,
                 "{}: tensor {} is missing; the architecture calls for it", where, name);
    const TensorInfo& t = *it->second;
    check_shape(t, e, where);
    found.erase(it);
    return t;
  };
  take("embed", {"embed", a.vocab, a.hidden, false});
  take("final_norm", {"final_norm", 1, a.hidden, true});
  if (!a.tied_embeddings) take("output", {"output", a.vocab, a.hidden, false});
  int group = 0;
  std::string group_of;
  for (int32_t layer = 0; layer < a.layers; ++layer) {
    for (const Expected& e : layer_tensors(a)) {
      const TensorInfo& t = take(fmt::format("layers.{}.{}", layer, e.name), e);
      if (t.group == 0) continue;
      DROVER_CHECK(group == 0 || group == t.group, ExitCode::kBadInput,
                   "{}: tensor {} has groups of {} and {} of {}; one size is expected", where,
                   t.name, t.group, group_of, group);
      group = t.group;
      group_of = t.name;
    }
  }
  DROVER_CHECK(found.empty(), ExitCode::kBadInput,
               "{}: tensor {} is not one that the architecture calls for", where,
               found.begin()->first);
  return group;
}

std::string describe(const ModelStore& store) {
  const auto text = [](const TensorInfo& t) {
    if (t.group == 0) return std::string(to_string(t.format));
    return fmt::format("{} g{} {}", to_string(t.format), t.group, to_string(t.zero));
  };
  // Layers may mix formats; the kind that holds the most bytes speaks for them, the others follow.
  std::map<std::string, uint64_t> bytes;
  std::string embed = "none";
  for (const auto& t : store.tensors()) {
    if (t.name == "embed") embed = to_string(t.format);
    if (t.name.starts_with("layers.") && t.rows > 1) bytes[text(t)] += t.stored_bytes;
  }
  std::string out;
  for (uint64_t best = 1; best > 0;) {
    best = 0;
    std::string kind;
    for (const auto& [name, count] : bytes) {
      if (count > best) best = count, kind = name;
    }
    if (best == 0) break;
    out += (out.empty() ? "" : " + ") + kind;
    bytes.erase(kind);
  }
  return out + ", embeddings " + embed;
}

}  // namespace drover

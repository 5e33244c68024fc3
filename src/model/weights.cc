#include "model/weights.h"

#include <charconv>

#include "base/error.h"
#include "model/store_source.h"

namespace drover {
namespace {

class StoreSource : public WeightSource {
 public:
  explicit StoreSource(const std::string& file)
      : file_(file),
        store_(ModelStore::open(file)),
        architecture_(read_architecture(store_->architecture(), file + ": /architecture")),
        group_(check_tensors(*store_, architecture_, file)) {}

  const Architecture& architecture() const override { return architecture_; }
  WeightTensor read(const std::string& name, Range rows, Range cols) override {
    WeightTensor w = store_->read(name, rows.begin, rows.end, cols.begin, cols.end);
    // Only the layers' linears have an input that can be put into another order.
    DROVER_CHECK(w.permutation.empty() || name.starts_with("layers."), ExitCode::kBadInput,
                 "{}: tensor {} has a permutation, which only the layers' weights may have", file_,
                 name);
    return w;
  }
  int group() const override { return group_; }
  std::string fingerprint() const override { return store_->fingerprint(); }
  bool synthetic() const override { return false; }
  std::string description() const override { return describe(*store_); }
  std::string tokenizer_sha256() const override { return store_->tokenizer_sha256(); }
  std::map<std::string, std::string> provenance() const override {
    std::map<std::string, std::string> out;
    for (const auto& [name, value] : store_->provenance()) {
      if (const auto* text = std::get_if<std::string>(&value)) out[name] = *text;
    }
    return out;
  }

 private:
  std::string file_;
  std::unique_ptr<ModelStore> store_;
  Architecture architecture_;
  int group_;
};

// Stacked parts form one linear operation, so that they must take their input in one order.
void check_same_order(const std::vector<WeightTensor>& parts, int64_t layer, const char* names) {
  for (const auto& p : parts) {
    DROVER_CHECK(p.permutation == parts.front().permutation, ExitCode::kBadInput,
                 "layer {}: {} have different act-order permutations; import the model again",
                 layer, names);
  }
}

}  // namespace

std::unique_ptr<WeightSource> open_weights(const std::string& spec, const std::string& stage_dir) {
  constexpr std::string_view kPrefix = "synthetic:";
  if (!spec.starts_with(kPrefix)) {
    return std::make_unique<StoreSource>(stage_dir.empty() ? spec : stage_file(spec, stage_dir));
  }
  const std::string rest = spec.substr(kPrefix.size());
  const size_t colon = rest.find(':');
  uint64_t seed = 0;
  if (colon != std::string::npos) {
    const char* end = rest.data() + rest.size();
    const auto [at, error] = std::from_chars(rest.data() + colon + 1, end, seed);
    DROVER_CHECK(error == std::errc() && at == end, ExitCode::kUsage,
                 "{}: expected synthetic:NAME or synthetic:NAME:SEED, the seed a number", spec);
  }
  return synthetic_weights(rest.substr(0, colon), seed);
}

namespace {

Range times(Range r, int64_t n) { return {r.begin * n, r.end * n}; }

std::vector<WeightPiece> layer_pieces(const Architecture& a, const Shard& shard, int64_t layer) {
  const auto name = [&](const char* part) { return fmt::format("layers.{}.{}", layer, part); };
  const Range one{0, 1}, hidden{0, a.hidden};
  const Range q = times(shard.heads, a.head_size), kv = times(shard.kv_heads, a.head_size);
  return {{name("attn_norm"), one, hidden},
          {name("mlp_norm"), one, hidden},
          {name("q"), q, hidden},
          {name("k"), kv, hidden},
          {name("v"), kv, hidden},
          {name("o"), hidden, q},
          {name("gate"), shard.intermediate, hidden},
          {name("up"), shard.intermediate, hidden},
          {name("down"), hidden, shard.intermediate}};
}

}  // namespace

LayerWeights read_layer(WeightSource& source, const Shard& shard, int64_t layer) {
  const auto pieces = layer_pieces(source.architecture(), shard, layer);
  auto piece = pieces.begin();
  const auto next = [&] {
    const WeightPiece& p = *piece++;
    return source.read(p.name, p.rows, p.cols);
  };
  LayerWeights w;
  w.attn_norm = next();
  w.mlp_norm = next();
  for (int i = 0; i < 3; ++i) w.qkv.push_back(next());
  w.o = next();
  for (int i = 0; i < 2; ++i) w.gate_up.push_back(next());
  w.down = next();
  check_same_order(w.qkv, layer, "q, k and v");
  check_same_order(w.gate_up, layer, "gate and up");
  return w;
}

std::vector<WeightPiece> load_order(const Architecture& a, const Shard& shard) {
  const Range one{0, 1}, hidden{0, a.hidden};
  std::vector<WeightPiece> order;
  if (shard.first()) order.push_back({"embed", shard.vocab, hidden});
  for (int64_t i = shard.layers.begin; i < shard.layers.end; ++i) {
    for (auto& p : layer_pieces(a, shard, i)) order.push_back(std::move(p));
  }
  if (shard.last()) {
    order.push_back({"final_norm", one, hidden});
    order.push_back({a.tied_embeddings ? "embed" : "output", shard.vocab, hidden});
  }
  return order;
}

}  // namespace drover

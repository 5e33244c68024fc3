#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <set>
#include <sstream>

#include "model/inspect.h"
#include "model/weights.h"
#include "unit/store_writer.h"

namespace drover {
namespace {

using namespace drover::testing;

using Matrix = std::vector<std::vector<float>>;

Matrix dequantize(const WeightTensor& w) {
  Matrix out(static_cast<size_t>(w.rows), std::vector<float>(static_cast<size_t>(w.cols)));
  for (int64_t r = 0; r < w.rows; ++r) dequantize_row(w, r, out[static_cast<size_t>(r)]);
  return out;
}

void expect_part(const Matrix& whole, const WeightTensor& part, Range rows, Range cols) {
  ASSERT_EQ(part.rows, rows.size());
  ASSERT_EQ(part.cols, cols.size());
  const Matrix got = dequantize(part);
  for (size_t r = 0; r < got.size(); ++r) {
    const float* want = whole[static_cast<size_t>(rows.begin) + r].data() + cols.begin;
    ASSERT_EQ(std::memcmp(got[r].data(), want, got[r].size() * 4), 0) << "row " << r;
  }
}

// Every shard of a layer is the slice of the whole tensors that its ranges say.
void check_layer(WeightSource& source, int tp, int64_t layer) {
  const Architecture& a = source.architecture();
  const Shard whole = make_shard(a, 1, 0, 1, 0, source.group());
  const LayerWeights all = read_layer(source, whole, layer);
  const Range one{0, 1}, hidden{0, a.hidden};
  for (int slot = 0; slot < tp; ++slot) {
    const Shard s = make_shard(a, tp, slot, 1, 0, source.group());
    const LayerWeights w = read_layer(source, s, layer);
    const Range q{s.heads.begin * a.head_size, s.heads.end * a.head_size};
    const Range kv{s.kv_heads.begin * a.head_size, s.kv_heads.end * a.head_size};
    expect_part(dequantize(all.attn_norm), w.attn_norm, one, hidden);
    expect_part(dequantize(all.mlp_norm), w.mlp_norm, one, hidden);
    ASSERT_EQ(w.qkv.size(), 3u);
    expect_part(dequantize(all.qkv[0]), w.qkv[0], q, hidden);
    expect_part(dequantize(all.qkv[1]), w.qkv[1], kv, hidden);
    expect_part(dequantize(all.qkv[2]), w.qkv[2], kv, hidden);
    expect_part(dequantize(all.o), w.o, hidden, q);
    ASSERT_EQ(w.gate_up.size(), 2u);
    expect_part(dequantize(all.gate_up[0]), w.gate_up[0], s.intermediate, hidden);
    expect_part(dequantize(all.gate_up[1]), w.gate_up[1], s.intermediate, hidden);
    expect_part(dequantize(all.down), w.down, hidden, s.intermediate);
    const WeightTensor embed = source.read("embed", s.vocab, hidden);
    expect_part(dequantize(source.read("embed", {0, a.vocab}, hidden)), embed, s.vocab, hidden);
  }
}

TEST(StoreWeights, ShardsAreSlicesOfTheWhole) {
  Folder folder;
  write_model(folder.file("m.h5"));
  const auto source = open_weights(folder.file("m.h5"), "");
  EXPECT_EQ(source->group(), 32);
  EXPECT_FALSE(source->synthetic());
  EXPECT_EQ(source->architecture().eos_ids, (std::vector<int32_t>{2, 5}));
  EXPECT_EQ(source->provenance().at("quantization"), "a test's");
  EXPECT_NE(source->description().find("int4 g32 symmetric"), std::string::npos);
  EXPECT_NE(source->description().find("embeddings int8"), std::string::npos);
  for (int tp : {1, 2}) check_layer(*source, tp, 0);
}

TEST(StoreWeights, AStagedStoreIsTheSameModel) {
  Folder folder;
  write_model(folder.file("m.h5"));
  const auto here = open_weights(folder.file("m.h5"), "");
  const auto staged = open_weights(folder.file("m.h5"), folder.file("stage"));
  EXPECT_TRUE(std::filesystem::exists(folder.file("stage/m.h5")));
  EXPECT_EQ(staged->fingerprint(), here->fingerprint());
  check_layer(*staged, 2, 0);
}

struct Change {
  const char* name;
  const char* message;
  std::function<void(H5File&)> act;
};
void PrintTo(const Change& c, std::ostream* out) { *out << c.name; }

const Change kChanges[] = {
    {"Hidden", "tensor embed is 600 x 64; the architecture calls for 600 x 96",
     [](H5File& f) { f.attribute("/architecture", "hidden", int64_t{96}); }},
    {"Heads", "tensor layers.0.k",
     [](H5File& f) { f.attribute("/architecture", "kv_heads", int64_t{1}); }},
    {"Layers", "layers.1.attn_norm is missing",
     [](H5File& f) { f.attribute("/architecture", "layers", int64_t{2}); }},
    {"Overflow", "absurd",
     [](H5File& f) { f.attribute("/architecture", "intermediate", int64_t{1} << 40); }},
    {"Tied", "tensor output is not one",
     [](H5File& f) { f.attribute("/architecture", "tied_embeddings", int64_t{1}); }},
    {"Family", "`mamba`; known: llama",
     [](H5File& f) { f.attribute("/architecture", "family", std::string("mamba")); }},
    {"Scaling", "rope_factor is missing",
     [](H5File& f) { f.attribute("/architecture", "rope_scaling", std::string("linear")); }},
    {"EosText", "eos_ids: expected a list",
     [](H5File& f) { f.attribute("/architecture", "eos_ids", std::string("2")); }},
    {"NoDown", "layers.0.down is missing", [](H5File& f) { f.remove("/tensors/layers.0.down"); }},
    {"QuantizedNorm", "norms are",
     [](H5File& f) {
       std::mt19937 random(1);
       f.remove("/tensors/final_norm");
       write_tensor(f, "final_norm", random_tensor(random, WeightFormat::kInt8, 1, 64, 32));
     }},
    {"TwoGroupSizes", "one size is expected",
     [](H5File& f) {
       std::mt19937 random(1);
       f.remove("/tensors/layers.0.up");
       write_tensor(f, "layers.0.up", random_tensor(random, WeightFormat::kInt4, 1280, 64, 64));
     }},
};

class Contradiction : public ::testing::TestWithParam<Change> {};
TEST_P(Contradiction, IsFoundOnOpening) {
  Folder folder;
  write_model(folder.file("m.h5"));
  {
    H5File f = H5File::modify(folder.file("m.h5"));
    GetParam().act(f);
  }
  expect_bad([&] { open_weights(folder.file("m.h5"), ""); }, GetParam().message);
}
INSTANTIATE_TEST_SUITE_P(All, Contradiction, ::testing::ValuesIn(kChanges),
                         [](const auto& info) { return info.param.name; });

TEST(StoreWeights, StackedPartsMustShareOneOrder) {
  Folder folder;
  write_model(folder.file("m.h5"));
  {
    H5File f = H5File::modify(folder.file("m.h5"));
    f.remove("/tensors/layers.0.k");
    auto k = small_tensors().at("layers.0.k");
    std::swap(k.permutation[3], k.permutation[4]);
    write_tensor(f, "layers.0.k", k);
  }
  const auto source = open_weights(folder.file("m.h5"), "");
  const Shard s = make_shard(source->architecture(), 1, 0, 1, 0, 32);
  expect_bad([&] { read_layer(*source, s, 0); }, "act-order");
}

TEST(Inspect, PrintsAndVerifies) {
  Folder folder;
  write_model(folder.file("m.h5"));
  write_dataset(folder.file("d.h5"));
  std::ostringstream model, data;
  inspect(folder.file("m.h5"), true, model);
  EXPECT_NE(model.str().find("1 layers, hidden 64"), std::string::npos) << model.str();
  EXPECT_NE(model.str().find("every checksum agrees"), std::string::npos);
  inspect(folder.file("d.h5"), false, data);
  EXPECT_NE(data.str().find("2 to 4 tokens, median 3"), std::string::npos) << data.str();
  EXPECT_EQ(data.str().find("every checksum agrees"), std::string::npos);
  flip(folder.file("m.h5"), "/tensors/layers.0.up/codes", 9);
  std::ostringstream out;
  expect_bad([&] { inspect(folder.file("m.h5"), true, out); }, "layers.0.up/codes: chunk [0, 0]");
}

TEST(SyntheticWeights, TheSameModelForEveryGrid) {
  const auto source = synthetic_weights("tiny", 11);
  EXPECT_TRUE(source->synthetic());
  EXPECT_EQ(source->group(), 32);
  for (int tp : {1, 2, 4, 8}) check_layer(*source, tp, 3);
  const auto again = open_weights("synthetic:tiny:11", "");
  const auto other = open_weights("synthetic:tiny:12", "");
  const auto codes = [](WeightSource& s, const char* name) {
    return s.read(name, {0, 256}, {0, 256}).codes;
  };
  EXPECT_EQ(codes(*again, "layers.2.q"), codes(*source, "layers.2.q"));
  EXPECT_NE(codes(*other, "layers.2.q"), codes(*source, "layers.2.q"));
  EXPECT_NE(codes(*source, "layers.2.q"), codes(*source, "layers.2.k"));
  EXPECT_NE(codes(*source, "layers.2.q"), codes(*source, "layers.1.q"));
  EXPECT_EQ(source->fingerprint(), "synthetic:tiny:11");
  EXPECT_THROW(source->read("layers.4.q", {0, 1}, {0, 32}), Error);
  EXPECT_THROW(source->read("layers.0.qq", {0, 1}, {0, 32}), Error);
  EXPECT_THROW(source->read("layers.0.q", {0, 257}, {0, 32}), Error);
  EXPECT_THROW(source->read("layers.0.q", {0, 1}, {0, 16}), Error);
  EXPECT_THROW(open_weights("synthetic:tiny:x", ""), Error);
  EXPECT_THROW(open_weights("synthetic:giant", ""), Error);
}

// What the first release made: results of one seed stay comparable.
TEST(SyntheticWeights, BytesStayAsTheyWere) {
  const struct {
    const char *model, *name;
    uint64_t seed;
    Range rows, cols;
    uint32_t codes, scales;
  } known[] = {
      {"llama2-70b", "layers.79.down", 0, {8000, 8192}, {25088, 28672}, 0x4bdd8cbcu, 0x348508f0u},
      {"llama2-70b", "layers.0.q", 7, {0, 64}, {0, 8192}, 0x2777ae77u, 0x5d62a0bau},
      {"llama2-70b", "embed", 0, {31990, 32000}, {3, 4099}, 0x5c1902adu, 0},
      {"tiny", "layers.3.gate", 11, {5, 77}, {32, 224}, 0xb8fb39e9u, 0xd4160cf6u},
      {"tiny", "embed", 11, {1000, 1024}, {64, 256}, 0x2b1a563fu, 0x176f888eu},
      {"tiny", "layers.1.attn_norm", 11, {0, 1}, {0, 256}, 0x947446e8u, 0},
  };
  for (const auto& k : known) {
    const auto source = synthetic_weights(k.model, k.seed);
    WeightTensor w = source->read(k.name, k.rows, k.cols);
    EXPECT_EQ(w.recipe, nullptr);
    EXPECT_EQ(crc32c(w.codes.data(), w.codes.size()), k.codes) << k.name;
    EXPECT_EQ(crc32c(w.scales.data(), w.scales.size() * 2), k.scales) << k.name;
    EXPECT_EQ(w.code_bytes(), w.codes.size());
    EXPECT_EQ(w.groups(), w.scales.size());
    // A recipe comes to the same.
    source->allow_recipes();
    WeightTensor r = source->read(k.name, k.rows, k.cols);
    if (std::string(k.name).ends_with("norm")) {
      EXPECT_EQ(r.recipe, nullptr);
    } else {
      ASSERT_NE(r.recipe, nullptr);
      EXPECT_TRUE(r.codes.empty() && r.scales.empty());
      EXPECT_EQ(r.bytes(), w.bytes());
      materialize(r);
    }
    EXPECT_EQ(r.recipe, nullptr);
    EXPECT_TRUE(r.codes == w.codes && r.scales == w.scales) << k.name;
  }
}

TEST(SyntheticWeights, LargeModelsAreMadePiecewise) {
  const auto source = synthetic_weights("llama2-70b", 0);
  EXPECT_EQ(source->group(), 128);
  const WeightTensor w = source->read("layers.79.down", {8000, 8192}, {28672 - 3584, 28672});
  double sum = 0, squares = 0;
  for (const auto& row : dequantize(w)) {
    for (float v : row) sum += v, squares += static_cast<double>(v) * v;
  }
  const double count = 192.0 * 3584, mean = sum / count;
  const double want = 1.0 / std::sqrt(28672.0) / std::sqrt(160.0);
  EXPECT_NEAR(mean, 0.0, 0.01 * want);
  EXPECT_NEAR(std::sqrt(squares / count), want, 0.05 * want);
  const WeightTensor e = source->read("embed", {31999, 32000}, {3, 11});
  const WeightTensor row = source->read("embed", {31999, 32000}, {0, 8192});
  EXPECT_EQ(e.format, WeightFormat::kBf16);
  EXPECT_EQ(std::memcmp(e.codes.data(), row.codes.data() + 6, 16), 0);
}

// A forward pass in the plainest form, for the question below only.
std::vector<float> times(const Matrix& w, const std::vector<float>& x) {
  std::vector<float> y;
  for (const auto& row : w) {
    float sum = 0;
    for (size_t j = 0; j < x.size(); ++j) sum += row[j] * x[j];
    y.push_back(sum);
  }
  return y;
}

std::vector<float> rms_norm(const std::vector<float>& x, const std::vector<float>& weight) {
  double squares = 0;
  for (float v : x) squares += static_cast<double>(v) * v;
  const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) + 1e-5);
  std::vector<float> y;
  for (size_t i = 0; i < x.size(); ++i) y.push_back(static_cast<float>(x[i] * scale) * weight[i]);
  return y;
}

struct PlainLayer {
  std::vector<float> attn_norm, mlp_norm;
  Matrix q, k, v, o, gate, up, down;
  Matrix keys, values;  // of the positions so far
};

class PlainModel {
 public:
  explicit PlainModel(WeightSource& source) : a_(source.architecture()) {
    const Range hidden{0, a_.hidden};
    embed_ = dequantize(source.read("embed", {0, a_.vocab}, hidden));
    output_ = dequantize(source.read("output", {0, a_.vocab}, hidden));
    norm_ = dequantize(source.read("final_norm", {0, 1}, hidden))[0];
    const Shard s = make_shard(a_, 1, 0, 1, 0, source.group());
    for (int32_t i = 0; i < a_.layers; ++i) {
      const LayerWeights w = read_layer(source, s, i);
      layers_.push_back({dequantize(w.attn_norm)[0],
                         dequantize(w.mlp_norm)[0],
                         dequantize(w.qkv[0]),
                         dequantize(w.qkv[1]),
                         dequantize(w.qkv[2]),
                         dequantize(w.o),
                         dequantize(w.gate_up[0]),
                         dequantize(w.gate_up[1]),
                         dequantize(w.down),
                         {},
                         {}});
    }
  }

  // The best next token after one more token; also the largest size on the residual stream.
  int next(int token, float& largest) {
    std::vector<float> x = embed_[static_cast<size_t>(token)];
    for (auto& w : layers_) {
      const auto add = [&](const std::vector<float>& d) {
        for (size_t i = 0; i < x.size(); ++i) x[i] += d[i];
      };
      add(times(w.o, attend(w, rms_norm(x, w.attn_norm))));
      const auto in = rms_norm(x, w.mlp_norm);
      auto gate = times(w.gate, in);
      const auto up = times(w.up, in);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      add(times(w.down, gate));
    }
    for (float v : x) largest = std::max(largest, std::abs(v));
    ++position_;
    const auto logits = times(output_, rms_norm(x, norm_));
    return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }

 private:
  void rotate(std::vector<float>& x) const {
    const auto f = a_.inverse_frequencies();
    const size_t d = static_cast<size_t>(a_.head_size);
    for (size_t head = 0; head < x.size(); head += d) {
      for (size_t i = 0; i < d / 2; ++i) {
        const float c = std::cos(f[i] * position_), s = std::sin(f[i] * position_);
        const float l = x[head + i], r = x[head + i + d / 2];
        x[head + i] = l * c - r * s;
        x[head + i + d / 2] = r * c + l * s;
      }
    }
  }
  std::vector<float> attend(PlainLayer& w, const std::vector<float>& in) const {
    auto q = times(w.q, in), k = times(w.k, in);
    rotate(q);
    rotate(k);
    w.keys.push_back(k);
    w.values.push_back(times(w.v, in));
    const size_t d = static_cast<size_t>(a_.head_size);
    std::vector<float> out(q.size());
    for (size_t head = 0; head < q.size(); head += d) {
      std::vector<double> p;
      double sum = 0;
      for (const auto& key : w.keys) {
        double dot = 0;
        for (size_t i = 0; i < d; ++i) dot += q[head + i] * key[head + i];
        p.push_back(std::exp(dot / std::sqrt(static_cast<double>(d))));
        sum += p.back();
      }
      for (size_t t = 0; t < p.size(); ++t) {
        for (size_t i = 0; i < d; ++i) {
          out[head + i] += static_cast<float>(p[t] / sum * w.values[t][head + i]);
        }
      }
    }
    return out;
  }
  Architecture a_;
  Matrix embed_, output_;
  std::vector<float> norm_;
  std::vector<PlainLayer> layers_;
  float position_ = 0;
};

TEST(SyntheticWeights, TinyWritesVariedTextAndStaysInRange) {
  const auto source = synthetic_weights("tiny", 0);
  PlainModel model(*source);
  float largest = 0;
  int token = 1;
  for (int prompt : {1, 100, 200, 300, 400}) token = model.next(prompt, largest);
  std::set<int> seen;
  int repeats = 0;
  for (int i = 0; i < 64; ++i) {
    seen.insert(token);
    const int after = model.next(token, largest);
    repeats += after == token;
    token = after;
  }
  EXPECT_GE(seen.size(), 16u) << "greedy text goes round in a small circle";
  EXPECT_LE(repeats, 16);
  EXPECT_LT(largest, 50.0f);
  EXPECT_GT(largest, 0.05f);
  RecordProperty("distinct_tokens", static_cast<int>(seen.size()));
}

// The demo's store, where the build folder has it (launch/demo.sh makes it).
TEST(DemoStore, ShardsAreSlicesOfTheWhole) {
  const std::string file = std::string(DROVER_BUILD_DIR) + "/demo/smollm2-135m.h5";
  if (!std::filesystem::exists(file)) GTEST_SKIP() << file << " is not there: run launch/demo.sh";
  const auto source = open_weights(file, "");
  EXPECT_EQ(source->architecture().parameters(), 134515008);
  EXPECT_EQ(source->description(), "int4 g32 minimums, embeddings int8");
  for (int64_t layer : {0, 29}) check_layer(*source, 3, layer);
}

}  // namespace
}  // namespace drover

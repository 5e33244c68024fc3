#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "base/error.h"
#include "model/shard.h"

namespace drover {
namespace {

std::string failure(const Architecture& a, int tp, int pp, int group) {
  try {
    check_grid(a, tp, pp, group);
    return {};
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
}

// The parts lie one after another and cover [0, size).
void expect_tiles(const std::vector<Range>& parts, int64_t size) {
  int64_t at = 0;
  for (const Range& r : parts) {
    ASSERT_EQ(r.begin, at);
    ASSERT_GT(r.size(), 0);
    at = r.end;
  }
  ASSERT_EQ(at, size);
}

TEST(Shard, PartsTileTheWholeForEveryGridThatWorks) {
  int grids = 0;
  for (const char* name :
       {"tiny", "smollm2-135m", "llama2-7b", "llama2-70b", "llama3-8b", "llama3-70b"}) {
    const Architecture a = named_architecture(name);
    for (int group : {0, 32, 64, 128}) {
      for (int tp = 1; tp <= 64; ++tp) {
        if (!failure(a, tp, 1, group).empty()) continue;
        for (int pp : {1, 2, 3, 4, 5, 7, a.layers}) {
          if (pp > a.layers) continue;
          SCOPED_TRACE(fmt::format("{} tp {} pp {} group {}", name, tp, pp, group));
          ++grids;
          std::vector<Range> layers, heads, kv, inner, vocab;
          for (int stage = 0; stage < pp; ++stage) {
            layers.push_back(make_shard(a, tp, 0, pp, stage, group).layers);
          }
          for (int slot = 0; slot < tp; ++slot) {
            const Shard s = make_shard(a, tp, slot, pp, pp - 1, group);
            EXPECT_TRUE(s.last());
            EXPECT_EQ(s.first(), pp == 1);
            heads.push_back(s.heads);
            kv.push_back(s.kv_heads);
            inner.push_back(s.intermediate);
            vocab.push_back(s.vocab);
            // The query heads of a slot read its own KV heads and no other's.
            const int64_t share = a.heads / a.kv_heads;
            EXPECT_EQ(s.heads.begin, s.kv_heads.begin * share);
            EXPECT_EQ(s.heads.end, s.kv_heads.end * share);
            if (group > 0) {
              EXPECT_EQ(s.intermediate.begin % group, 0);
              EXPECT_EQ(s.heads.begin * a.head_size % group, 0);
            }
          }
          expect_tiles(layers, a.layers);
          expect_tiles(heads, a.heads);
          expect_tiles(kv, a.kv_heads);
          expect_tiles(inner, a.intermediate);
          expect_tiles(vocab, a.vocab);
          for (size_t i = 1; i < layers.size(); ++i) {
            EXPECT_LE(layers[i].size(), layers[i - 1].size());  // the last stage has the least
            EXPECT_LE(layers[0].size() - layers[i].size(), 1);
          }
        }
      }
    }
  }
  EXPECT_GT(grids, 100);
}

TEST(Shard, TheGridsOfTheTestsWork) {
  const Architecture smol = named_architecture("smollm2-135m"), tiny = named_architecture("tiny");
  for (int tp : {1, 3}) {
    for (int pp : {1, 2, 3, 5}) EXPECT_EQ(failure(smol, tp, pp, 32), "");
  }
  for (int tp : {1, 2, 4, 8}) {
    for (int pp : {1, 2, 4}) EXPECT_EQ(failure(tiny, tp, pp, 32), "");
  }
  for (int tp : {1, 2, 4, 8}) EXPECT_EQ(failure(named_architecture("llama2-70b"), tp, 8, 128), "");
}

TEST(Shard, MessagesSayWhatWouldWork) {
  const Architecture smol = named_architecture("smollm2-135m");
  EXPECT_EQ(failure(smol, 2, 1, 32),
            "tp 2 does not divide 9 heads and 3 KV heads; tp 1 or 3 would work");
  EXPECT_NE(failure(smol, 9, 1, 32).find("tp 1 or 3 would work"), std::string::npos);
  EXPECT_NE(failure(smol, 0, 1, 32).find("tp 1 or 3 would work"), std::string::npos);
  EXPECT_EQ(failure(smol, 1, 31, 32), "pp 31 cannot share 30 layers; pp 1 to 30 would work");
  EXPECT_NE(failure(smol, 1, 0, 32), "");
  // 11,008 features in groups of 128 are 86 groups.
  EXPECT_EQ(failure(named_architecture("llama2-7b"), 4, 1, 128),
            "tp 4 cuts the 11008 features of the MLP within a group of 128; tp 1 or 2 would work");
  EXPECT_EQ(failure(named_architecture("llama2-7b"), 4, 1, 0), "");
  EXPECT_NE(failure(smol, 3, 1, 128).find("attention's output within a group of 128"),
            std::string::npos);
  EXPECT_THROW(make_shard(smol, 3, 3, 1, 0, 32), Error);
  EXPECT_THROW(make_shard(smol, 3, -1, 1, 0, 32), Error);
  EXPECT_THROW(make_shard(smol, 3, 0, 2, 2, 32), Error);
}

TEST(Architecture, KnownModelsHaveTheirSizes) {
  const auto billions = [](const char* name) {
    return std::round(static_cast<double>(named_architecture(name).parameters()) * 1e-7) / 100;
  };
  EXPECT_EQ(billions("llama2-7b"), 6.74);
  EXPECT_EQ(billions("llama2-70b"), 68.98);
  EXPECT_EQ(billions("llama3-8b"), 8.03);
  EXPECT_EQ(billions("llama3-70b"), 70.55);
  EXPECT_EQ(named_architecture("smollm2-135m").parameters(), 134515008);
  for (const char* name : {"llama2-7b", "llama3-70b", "smollm2-135m", "tiny"}) {
    EXPECT_NO_THROW(named_architecture(name).validate(name));
  }
  try {
    named_architecture("gpt-5");
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_NE(std::string(e.what()).find("llama2-70b"), std::string::npos);
  }
}

TEST(Architecture, ValidateNamesTheFirstAbsurdSize) {
  const auto message = [](auto change) -> std::string {
    Architecture a = named_architecture("tiny");
    change(a);
    try {
      a.validate("x.h5");
      return {};
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      return e.what();
    }
  };
  const auto expect = [&](auto change, const char* part) {
    const std::string m = message(change);
    EXPECT_NE(m.find(part), std::string::npos) << m;
    EXPECT_EQ(m.rfind("x.h5: ", 0), 0u) << m;
  };
  expect([](Architecture& a) { a.layers = 0; }, "layers is 0");
  expect([](Architecture& a) { a.layers = 1025; }, "1 to 1024");
  expect([](Architecture& a) { a.hidden = 1 << 21; }, "hidden");
  expect([](Architecture& a) { a.heads = 5000; }, "heads");
  expect([](Architecture& a) { a.kv_heads = 3; }, "cannot share 3 KV heads");
  expect([](Architecture& a) { a.kv_heads = 16; }, "kv_heads");
  expect([](Architecture& a) { a.vocab = -5; }, "vocab");
  expect([](Architecture& a) { a.rope_dims = 33; }, "rope_dims");
  expect([](Architecture& a) { a.rope_dims = 64; }, "rope_dims");
  expect([](Architecture& a) { a.rope_base = std::nan(""); }, "rope_base");
  expect([](Architecture& a) { a.norm_epsilon = -1; }, "norm_epsilon");
  expect([](Architecture& a) { a.eos_ids = {}; }, "end-of-sequence");
  expect([](Architecture& a) { a.eos_ids = {1024}; }, "1024 is not in the vocabulary");
  expect([](Architecture& a) { a.bos_id = 1024; }, "bos_id");
  expect([](Architecture& a) { a.family = "gpt2"; }, "gpt2");
  expect([](Architecture& a) { a.max_positions = std::numeric_limits<int32_t>::max(); },
         "max_positions");
  expect(
      [](Architecture& a) {
        a.rope_scaling.kind = RopeScaling::Kind::kLlama3;
        a.rope_scaling.low_freq_factor = 8;
      },
      "llama3");
}

TEST(Architecture, RotaryFrequencies) {
  Architecture a = named_architecture("llama3-8b");
  const auto plain = a.inverse_frequencies();
  ASSERT_EQ(plain.size(), 64u);
  EXPECT_EQ(plain[0], 1.0f);
  EXPECT_FLOAT_EQ(plain[32], static_cast<float>(std::pow(500000.0, -0.5)));
  a.rope_scaling.kind = RopeScaling::Kind::kLinear;
  a.rope_scaling.factor = 4;
  EXPECT_FLOAT_EQ(a.inverse_frequencies()[10], plain[10] / 4);
  // Llama 3.1's own figures: factor 8, from 8,192 positions.
  a.rope_scaling = {RopeScaling::Kind::kLlama3, 8, 1, 4, 8192};
  const auto scaled = a.inverse_frequencies();
  int kept = 0, slowed = 0, blended = 0;
  for (size_t i = 0; i < 64; ++i) {
    const double wave = 2 * M_PI / plain[i];
    if (wave < 8192.0 / 4) {
      ++kept;
      EXPECT_EQ(scaled[i], plain[i]);
    } else if (wave > 8192.0) {
      ++slowed;
      EXPECT_FLOAT_EQ(scaled[i], plain[i] / 8);
    } else {
      const double smooth = (8192.0 / wave - 1) / 3;
      EXPECT_NEAR(scaled[i], (1 - smooth) * plain[i] / 8 + smooth * plain[i], 1e-6 * plain[i]);
      ++blended;
    }
  }
  EXPECT_GT(kept, 20);
  EXPECT_GT(slowed, 20);
  EXPECT_GT(blended, 2);
}

}  // namespace
}  // namespace drover

#include "ops/harness.h"

namespace drover::ops {
namespace {

class ArgmaxTest : public OpsTest {
 protected:
  std::vector<Candidate> run(const std::vector<float>& logits, int64_t rows, int64_t begin,
                             int64_t count, const std::vector<uint8_t>& forbid,
                             const std::vector<int32_t>& eos) {
    Buffer b_logits(*backend_, logits.size() * 4), b_forbid(*backend_, forbid.size() + 1),
        b_eos(*backend_, eos.size() * 4 + 4), out(*backend_, rows * sizeof(Candidate));
    b_logits.put(logits), b_forbid.put(forbid), b_eos.put(eos);
    Backend::Argmax a;
    a.logits = b_logits.as<float>(), a.rows = rows, a.vocab_begin = begin, a.vocab_count = count;
    a.forbid_eos = b_forbid.as<uint8_t>(), a.eos_ids = b_eos.as<int32_t>();
    a.eos_count = static_cast<int32_t>(eos.size()), a.out = out.as<Candidate>();
    backend_->argmax(a, backend_->stream());
    return out.get<Candidate>(static_cast<size_t>(rows));
  }
  std::vector<int32_t> merge(const std::vector<Candidate>& candidates, int shards, int64_t rows) {
    Buffer b(*backend_, candidates.size() * sizeof(Candidate)), ids(*backend_, rows * 4);
    b.put(candidates);
    backend_->merge_argmax(b.as<Candidate>(), shards, rows, ids.as<int32_t>(), backend_->stream());
    return ids.get<int32_t>(static_cast<size_t>(rows));
  }
};

TEST_P(ArgmaxTest, TiesNotANumberAndForbiddenEnds) {
  for (const int64_t rows : kRowCounts)
    for (const int64_t count : {1, 31, 33, 1000}) {
      const int64_t begin = 700;
      auto logits = normals(static_cast<size_t>(rows * count));
      for (float& x : logits) {
        x = std::round(x * 2);  // ties everywhere
        if (integer(0, 20) == 0) x = std::nanf("");
        if (integer(0, 50) == 0) x = -std::numeric_limits<float>::infinity();
      }
      std::vector<uint8_t> forbid(static_cast<size_t>(rows));
      for (auto& f : forbid) f = static_cast<uint8_t>(integer(0, 1));
      // Ends within, at the borders, before and after the shard, in no order, one of them twice.
      std::vector<int32_t> eos = {static_cast<int32_t>(begin + count), 2,
                                  static_cast<int32_t>(begin + count - 1)};
      eos.push_back(static_cast<int32_t>(begin + integer(0, count - 1)));
      eos.push_back(static_cast<int32_t>(begin)), eos.push_back(eos[3]);
      const auto got = run(logits, rows, begin, count, forbid, eos);
      for (int64_t r = 0; r < rows; ++r) {
        int32_t best = -1;
        for (int64_t i = 0; i < count; ++i) {
          const float x = logits[r * count + i];
          const auto id = static_cast<int32_t>(begin + i);
          if (std::isnan(x)) continue;
          if (forbid[r] && std::find(eos.begin(), eos.end(), id) != eos.end()) continue;
          if (best < 0 || x > logits[r * count + best - begin]) best = id;
        }
        ASSERT_EQ(got[r].token, best) << "row " << r << " of " << rows << " x " << count;
        if (best >= 0) {
          ASSERT_EQ(got[r].logit, logits[r * count + best - begin]);
        }
      }
    }
}

TEST_P(ArgmaxTest, MergeOfShardsEqualsTheWhole) {
  const int64_t rows = 129, vocab = 3001;
  auto logits = normals(static_cast<size_t>(rows * vocab));
  for (float& x : logits) x = std::round(x);
  const std::vector<uint8_t> forbid(rows, 1);
  const std::vector<int32_t> eos = {0, 1500};
  const auto whole = run(logits, rows, 0, vocab, forbid, eos);
  for (const int shards : {1, 2, 3, 8}) {
    std::vector<Candidate> all;
    const int64_t size = (vocab + shards - 1) / shards;
    for (int64_t s = 0; s < shards; ++s) {
      const int64_t begin = s * size, end = std::min(vocab, begin + size);
      std::vector<float> part;
      for (int64_t r = 0; r < rows; ++r)
        part.insert(part.end(), logits.begin() + r * vocab + begin,
                    logits.begin() + r * vocab + end);
      const auto c = run(part, rows, begin, end - begin, forbid, eos);
      all.insert(all.end(), c.begin(), c.end());
    }
    const auto ids = merge(all, shards, rows);
    for (int64_t r = 0; r < rows; ++r) ASSERT_EQ(ids[r], whole[r].token) << shards << " shards";
  }
}

// A shard in which nothing is allowed or a number has token -1 and never wins.
TEST_P(ArgmaxTest, ShardsWithoutACandidate) {
  const float none = -std::numeric_limits<float>::infinity();
  const std::vector<Candidate> candidates = {{none, -1}, {none, -1}, {none, 40},
                                             {none, -1}, {1.0f, 9},  {none, -1}};
  EXPECT_EQ(merge(candidates, 3, 2), (std::vector<int32_t>{9, -1}));
  EXPECT_EQ(merge({{none, -1}, {none, 40}, {none, 7}}, 3, 1), (std::vector<int32_t>{7}));
}

DROVER_OPS_SUITE(ArgmaxTest);

}  // namespace
}  // namespace drover::ops

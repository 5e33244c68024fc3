// Operations on the KV cache: rope_append, attention, gather and scatter of pages.
#include <numeric>

#include "ops/harness.h"
#include "ops/reference.h"

namespace drover::ops {
namespace {

size_t element(KvFormat f) { return f == KvFormat::kF32 ? 4 : f == KvFormat::kBf16 ? 2 : 1; }
const char* text(KvFormat f) {
  return f == KvFormat::kF32 ? "f32" : f == KvFormat::kBf16 ? "bf16" : "fp8";
}

// One layer's cache, full of NaN at first, for a number of slots with shuffled page tables.
struct Cache {
  Cache(Backend& backend, std::mt19937_64& random, const KvShape& s, int slots, int per_slot)
      : shape(s),
        max_pages(per_slot),
        values(static_cast<size_t>(s.pages) * s.kv_heads * s.page_tokens * s.head_size),
        scales(static_cast<size_t>(s.pages) * s.kv_heads * s.page_tokens),
        k(backend, values * element(s.format)),
        v(backend, values * element(s.format)),
        k_scale(backend, scales * 4),
        v_scale(backend, scales * 4),
        table(backend, static_cast<size_t>(slots * per_slot) * 4),
        pages(static_cast<size_t>(s.pages)) {
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), random);
    pages.resize(static_cast<size_t>(slots * per_slot));
    table.put(pages);
    layer.k = k.as<void>(), layer.v = v.as<void>();
    if (s.format == KvFormat::kFp8)
      layer.k_scale = k_scale.as<float>(), layer.v_scale = v_scale.as<float>();
  }
  int64_t token(int slot, int64_t position, int head) const {
    const int64_t page = pages[slot * max_pages + position / shape.page_tokens];
    return (page * shape.kv_heads + head) * shape.page_tokens + position % shape.page_tokens;
  }

  KvShape shape;
  int max_pages;
  size_t values, scales;
  Buffer k, v, k_scale, v_scale, table;
  std::vector<int32_t> pages;
  KvLayer layer;
};

struct Piece {
  int slot;
  int start, count;
};

// The device's view of the rows of some pieces of sequences.
struct Rows {
  // Pieces of slot -1 are padding. decodes: pieces of one row at the end go as decode.
  Rows(Backend& backend, const Cache& cache, const std::vector<Piece>& pieces, bool decodes = true)
      : slot(count(pieces)),
        position(count(pieces)),
        b_slot(backend, slot.size() * 4),
        b_position(backend, slot.size() * 4),
        b_chunk(backend, (pieces.size() + 1) * 4) {
    std::vector<int32_t> chunk = {0};
    size_t r = 0;
    for (const Piece& p : pieces) {
      for (int i = 0; i < p.count; ++i, ++r) slot[r] = p.slot, position[r] = p.start + i;
      chunk.push_back(static_cast<int32_t>(r));
    }
    b_slot.put(slot), b_position.put(position), b_chunk.put(chunk);
    step.rows = static_cast<int32_t>(slot.size());
    step.chunks = static_cast<int32_t>(pieces.size());
    for (size_t i = pieces.size(); decodes && i > 0 && pieces[i - 1].count == 1; --i)
      ++step.decode_rows;
    step.row_slot = b_slot.as<int32_t>();
    step.row_position = b_position.as<int32_t>();
    step.chunk_row = b_chunk.as<int32_t>();
    step.page_table = const_cast<Cache&>(cache).table.as<int32_t>();
    step.max_pages = cache.max_pages;
  }
  static size_t count(const std::vector<Piece>& pieces) {
    size_t n = 0;
    for (const Piece& p : pieces) n += static_cast<size_t>(p.count);
    return n;
  }
  std::vector<int32_t> slot, position;
  Buffer b_slot, b_position, b_chunk;
  StepRows step;
};

class CacheTest : public OpsTest {
 protected:
  KvShape shape(KvFormat f, int kv_heads, int head_size, int page_tokens, int slots,
                int context) const {
    KvShape s;
    s.format = f, s.kv_heads = kv_heads, s.head_size = head_size, s.page_tokens = page_tokens;
    s.pages = slots * ((context + page_tokens - 1) / page_tokens) + 5;
    return s;
  }

  std::vector<float> frequencies(int dims) const {
    std::vector<float> f;
    for (int i = 0; i < dims / 2; ++i)
      f.push_back(static_cast<float>(std::pow(100000.0, -2.0 * i / dims)));
    return f;
  }

  // Runs rope_append; returns qkv as it leaves it.
  std::vector<float> append(Cache& cache, int heads, int dims, bool half_pairing,
                            const std::vector<Piece>& pieces, std::vector<float>& qkv) {
    Rows rows(*backend_, cache, pieces);
    Buffer b_qkv(*backend_, activation_bytes(qkv.size()));
    const auto f = frequencies(dims);
    Buffer b_f(*backend_, f.size() * 4 + 4);
    put_activations(b_qkv, qkv), b_f.put(f);
    Backend::RopeAppend a;
    a.qkv = b_qkv.as<void>(), a.heads = heads, a.inverse_frequencies = b_f.as<float>();
    a.rope_dims = dims, a.half_pairing = half_pairing, a.shape = cache.shape, a.cache = cache.layer;
    backend_->rope_append(a, rows.step, backend_->stream());
    return get_activations(b_qkv, qkv.size());
  }

  std::vector<float> attend(Cache& cache, int heads, const std::vector<Piece>& pieces,
                            std::vector<float> qkv, bool decodes = true) {
    Rows rows(*backend_, cache, pieces, decodes);
    const size_t n = rows.slot.size() * static_cast<size_t>(heads * cache.shape.head_size);
    Buffer b_qkv(*backend_, activation_bytes(qkv.size())), out(*backend_, activation_bytes(n));
    put_activations(b_qkv, qkv);
    Backend::Attention a;
    a.qkv = b_qkv.as<void>(), a.out.data = out.as<void>(), a.heads = heads;
    a.shape = cache.shape, a.cache = cache.layer;
    backend_->attention(a, rows.step, backend_->stream());
    const auto plain = get_activations(out, n);
    // Quantized: the last use of qkv.
    const int features = heads * cache.shape.head_size;
    Quantized quantized(*backend_, rows.step.rows, features);
    a.out = quantized.input();
    backend_->attention(a, rows.step, backend_->stream());
    check_quantized(quantized, plain, "attention");
    return plain;
  }

  // Attention of `pieces` against the reference over what the cache holds.
  void compare_attention(Cache& cache, int heads, const std::vector<Piece>& pieces,
                         const std::vector<float>& qkv, const std::vector<float>& out,
                         const std::string& what) {
    const KvShape& s = cache.shape;
    const int d = s.head_size, group = heads / s.kv_heads;
    const auto k = cache.k.get<uint8_t>(), v = cache.v.get<uint8_t>();
    const auto ks = cache.k_scale.get<float>(), vs = cache.v_scale.get<float>();
    const int64_t width = (heads + 2ll * s.kv_heads) * d;
    std::vector<double> keys, values, q(static_cast<size_t>(d)), want, magnitude;
    int64_t first = 0;
    for (const Piece& p : pieces) {
      const int64_t context = p.start + p.count;
      for (int h = 0; p.slot >= 0 && h < s.kv_heads; ++h) {
        keys.resize(static_cast<size_t>(context * d)), values.resize(keys.size());
        for (int64_t t = 0; t < context; ++t)
          for (int i = 0; i < d; ++i) {
            const int64_t token = cache.token(p.slot, t, h);
            keys[t * d + i] = reference::cached(s.format, k.data(), ks.data(), token, d, i);
            values[t * d + i] = reference::cached(s.format, v.data(), vs.data(), token, d, i);
          }
        // Long contexts: the first, the last and a few rows between stand for all.
        const int stride = context * p.count > 40000 ? std::max(1, p.count / 5) : 1;
        for (int r = 0; r < p.count; ++r) {
          if (r % stride != 0 && r != p.count - 1) continue;
          for (int g = 0; g < group; ++g) {
            const int head = h * group + g;
            for (int i = 0; i < d; ++i) q[i] = qkv[(first + r) * width + head * d + i];
            reference::attention(q.data(), keys, values, p.start + r + 1, d, want, magnitude);
            for (int i = 0; i < d; ++i)
              // Scores of size ~4 wrong by 1e-6 move every probability by as much; exp adds 2e-7.
              check(out[((first + r) * heads + head) * d + i], want[i],
                    magnitude[i] * (6e-6 + 2 * activation_unit()) + 1e-30, what);
          }
        }
      }
      first += p.count;
    }
  }

  void round_trip(KvFormat format, int kv_heads, int group, int d, int page_tokens,
                  const std::vector<int>& contexts, const std::string& what) {
    const int longest = *std::max_element(contexts.begin(), contexts.end());
    const int slots = static_cast<int>(contexts.size()), heads = kv_heads * group;
    const KvShape s = shape(format, kv_heads, d, page_tokens, slots, longest);
    Cache cache(*backend_, random_, s, slots, (longest + page_tokens - 1) / page_tokens);
    const auto width = static_cast<size_t>((heads + 2 * kv_heads) * d);
    // All but the last rows are appended first; then prompts' ends and decodes in one step.
    std::vector<Piece> before, now;
    for (int i = 0; i < slots; ++i) {
      const int tail = i % 2 == 0 ? 1 : std::min(contexts[i], 1 + i * 13 % 40);
      if (contexts[i] > tail) before.push_back({i, 0, contexts[i] - tail});
      now.push_back({i, contexts[i] - tail, tail});
    }
    std::stable_partition(now.begin(), now.end(), [](const Piece& p) { return p.count > 1; });
    if (!before.empty()) {
      auto qkv = normals(Rows::count(before) * width);
      append(cache, heads, d, true, before, qkv);
    }
    auto qkv = normals(Rows::count(now) * width);
    const auto rotated = append(cache, heads, d, true, now, qkv);
    compare_attention(cache, heads, now, rotated, attend(cache, heads, now, rotated), what);
  }
};

TEST_P(CacheTest, RopeAppend) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kBf16, KvFormat::kF32})
    for (const int d : {64, 128})
      for (const bool half : {true, false})
        for (const int dims : {d, d / 2}) {
          const int heads = 6, kv_heads = 2, slots = 3;
          const KvShape s = shape(format, kv_heads, d, 16, slots, 8192);
          Cache cache(*backend_, random_, s, slots, 512);
          const std::vector<Piece> pieces = {{2, 0, 17}, {0, 8191, 1}, {1, 700, 33}};
          const int64_t width = (heads + 2 * kv_heads) * d;
          auto qkv = normals(Rows::count(pieces) * width, 2.0);
          // Zero vectors, one large element, tiny numbers: the first rows' heads.
          std::fill_n(qkv.begin() + heads * d, 2 * kv_heads * d, 0.0f);
          qkv[width + heads * d + 5] = 3e4f;
          for (int i = 0; i < 2 * kv_heads * d; ++i) qkv[2 * width + heads * d + i] *= 1e-20f;
          const auto got = append(cache, heads, dims, half, pieces, qkv);
          const auto f = frequencies(dims);
          const auto k = cache.k.get<uint8_t>(), v = cache.v.get<uint8_t>();
          const auto ks = cache.k_scale.get<float>(), vs = cache.v_scale.get<float>();
          int64_t r = 0;
          for (const Piece& p : pieces)
            for (int i = 0; i < p.count; ++i, ++r)
              for (int h = 0; h < heads + 2 * kv_heads; ++h) {
                const float* input = &qkv[r * width + h * d];
                const float* output = &got[r * width + h * d];
                std::vector<double> want(input, input + d);
                if (h < heads + kv_heads)
                  reference::rope(want.data(), p.start + i, f.data(), dims, half);
                double amax = 0;
                for (int j = 0; j < d; ++j) {
                  // Two products and a sum of numbers up to |x| + |y|; an angle's cosine in f32.
                  const double size = std::abs(want[j]) + std::abs(input[j]) +
                                      std::abs(input[(j + dims / 2) % dims]) +
                                      std::abs(input[j ^ 1]) +
                                      std::abs(input[(j + dims - dims / 2) % dims]);
                  check(output[j], want[j], size * (3 * 0x1p-24 + activation_unit()) + 1e-37,
                        "rotated");
                  amax = std::max(amax, static_cast<double>(std::abs(output[j])));
                }
                if (h < heads) continue;
                const bool key = h < heads + kv_heads;
                const int64_t token = cache.token(p.slot, p.start + i, (h - heads) % kv_heads);
                const double scale = key ? ks[token] : vs[token];
                if (format == KvFormat::kFp8)
                  check(scale, amax / 448, amax / 448 * 0x1p-22 + 1e-42, "scale");
                for (int j = 0; j < d; ++j) {
                  const double stored = reference::cached(format, key ? k.data() : v.data(),
                                                          key ? ks.data() : vs.data(), token, d, j);
                  double bound = std::abs(output[j]) * activation_unit() * (wide() ? 0 : 1);
                  if (format == KvFormat::kBf16) bound += std::abs(output[j]) * 0x1p-8;
                  // Half a step: 2^-4 of the number's power of two, 2^-10 of a scale below 2^-6.
                  if (format == KvFormat::kFp8)
                    bound += std::max(std::abs(output[j]) * 0x1p-4, scale * 0x1p-10) * 1.000001;
                  check(stored, output[j], bound + 1e-42, "stored");
                }
              }
        }
}

// The codes themselves, against the nearest of all 127 numbers, also in the subnormal range.
TEST_P(CacheTest, Fp8RoundsToTheNearestCode) {
  const int d = 128, rows = 40;
  const KvShape s = shape(KvFormat::kFp8, 1, d, 16, 1, rows);
  Cache cache(*backend_, random_, s, 1, 3);
  auto qkv = normals(rows * 3 * d);
  for (int r = 0; r < rows; ++r) {
    float* v = &qkv[(r * 3 + 2) * d];
    // amax is 448 times a power of two: scales are exact, and x / scale hits codes and ties.
    const float unit = std::ldexp(1.0f, static_cast<int>(integer(-20, 20)));
    for (int j = 0; j < d; ++j) {
      const double code = reference::fp8(static_cast<uint8_t>(integer(0, 125)));
      const double next = reference::fp8(static_cast<uint8_t>(integer(0, 125)));
      double x = code;
      if (r % 3 == 1) x = (code + next) / 2;
      if (r % 3 == 2) x = std::ldexp(normal(), static_cast<int>(integer(-14, 6)));
      v[j] = static_cast<float>(std::clamp(x, -448.0, 448.0) * (integer(0, 1) ? 1 : -1)) * unit;
    }
    v[integer(0, d - 1)] = 448.0f * unit;
  }
  append(cache, 1, d, true, {{0, 0, rows}}, qkv);
  const auto v = cache.v.get<uint8_t>();
  const auto vs = cache.v_scale.get<float>();
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < d; ++j) {
      const int64_t token = cache.token(0, r, 0);
      const double x = qkv[(r * 3 + 2) * d + j] / static_cast<double>(vs[token]);
      check(reference::fp8(v[token * d + j]), reference::round_fp8(x), 1e-30, "code");
    }
}

// A NaN or an infinity in a head must not become an ordinary number, and not touch other heads.
TEST_P(CacheTest, NotANumberStaysVisible) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kBf16, KvFormat::kF32}) {
    const int d = 64;
    const KvShape s = shape(format, 2, d, 16, 1, 16);
    Cache cache(*backend_, random_, s, 1, 1);
    auto qkv = normals(4 * 6 * d);
    qkv[(2 * 6 + 4) * d + 7] = std::nanf("");  // position 2, v of head 0
    const auto rotated = append(cache, 2, d, true, {{0, 0, 4}}, qkv);
    const auto out = attend(cache, 2, {{0, 0, 4}}, rotated);
    for (int r = 0; r < 4; ++r) {
      EXPECT_EQ(std::isnan(out[r * 2 * d + 7]), r >= 2) << text(format) << " row " << r;
      EXPECT_FALSE(std::isnan(out[(r * 2 + 1) * d + 7])) << text(format) << " row " << r;
    }
  }
}

TEST_P(CacheTest, AttentionEveryShape) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kBf16, KvFormat::kF32})
    for (const int d : {64, 128})
      for (const int group : {1, 3, 4, 8, 9, 16})
        round_trip(format, group == 3 ? 3 : 2, group, d, 16, {1, 2, 3, 15, 16, 17, 64, 129, 250},
                   std::string(text(format)) + " d" + std::to_string(d) + " group " +
                       std::to_string(group));
}

TEST_P(CacheTest, AttentionOtherPagesAndHeads) {
  for (const int page_tokens : {1, 5, 24, 64, 128})
    round_trip(KvFormat::kFp8, 1, 3, 64, page_tokens, {1, 7, 33, 140, 200},
               "pages of " + std::to_string(page_tokens));
  for (const int d : {16, 32, 256})
    round_trip(KvFormat::kBf16, 2, 2, d, 16, {1, 40, 90}, "head size");
  round_trip(KvFormat::kF32, 1, 71, 64, 16, {1, 30, 50}, "71 query heads on one KV head");
}

TEST_P(CacheTest, AttentionLongContexts) {
  round_trip(KvFormat::kFp8, 1, 3, 64, 16, {8192, 1000, 4097, 2048}, "long");
  round_trip(KvFormat::kBf16, 1, 1, 128, 16, {8192}, "long");
}

// Decode alone, as generation has it: around the ends of tiles and spans, and up to 8,192 tokens.
TEST_P(CacheTest, DecodeContexts) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kBf16})
    for (const int group : {format == KvFormat::kFp8 ? 8 : 13, 5}) {
      if (group == 5 && format == KvFormat::kBf16) continue;
      const int kv_heads = 2, heads = kv_heads * group, d = 128;
      std::vector<int> contexts = {8192, 1, 63, 64, 65, 255, 256, 257, 513};
      for (int i = 0; i < 5; ++i) contexts.push_back(static_cast<int>(integer(1, 1000)));
      const int slots = static_cast<int>(contexts.size());
      const KvShape s = shape(format, kv_heads, d, 16, slots, 8192);
      Cache cache(*backend_, random_, s, slots, 512);
      const auto width = static_cast<size_t>((heads + 2 * kv_heads) * d);
      std::vector<Piece> before, now;
      for (int i = 0; i < slots; ++i) {
        if (contexts[i] > 1) before.push_back({i, 0, contexts[i] - 1});
        now.push_back({i, contexts[i] - 1, 1});
      }
      auto past = normals(Rows::count(before) * width), qkv = normals(Rows::count(now) * width);
      append(cache, heads, d, true, before, past);
      const auto rotated = append(cache, heads, d, true, now, qkv);
      compare_attention(cache, heads, now, rotated, attend(cache, heads, now, rotated),
                        std::string("decode ") + text(format));
    }
}

// So many that a GPU's blocks go from one to the next: as if alone, to the bit.
TEST_P(CacheTest, DecodeManyContexts) {
  for (const int d : {128, 64}) {
    const int kv_heads = 1024 / d, group = d / 64, heads = kv_heads * group, slots = 110;
    std::vector<Piece> before, now;
    for (int i = 0; i < slots; ++i)  // with padding
      before.push_back({i, 0, static_cast<int>(integer(1, i % 50 == 7 ? 1199 : 50))}),
          now.push_back({i % 40 == 9 ? -1 : i, before[i].count, 1});
    Cache cache(*backend_, random_, shape(KvFormat::kFp8, kv_heads, d, 16, slots, 1200), slots, 75);
    const auto width = static_cast<size_t>((heads + 2 * kv_heads) * d);
    auto past = normals(Rows::count(before) * width), qkv = normals(Rows::count(now) * width);
    append(cache, heads, d, true, before, past);
    const auto rotated = append(cache, heads, d, true, now, qkv);
    const auto out = attend(cache, heads, now, rotated);
    compare_attention(cache, heads, now, rotated, out, "many");
    EXPECT_EQ(0, std::memcmp(attend(cache, heads, now, rotated).data(), &out[0], out.size() * 4));
    for (size_t i = 7; i < now.size(); i += 10) {
      const auto row = rotated.begin() + i * width;
      const auto alone = attend(cache, heads, {now[i]}, {row, row + width});
      EXPECT_EQ(0, std::memcmp(alone.data(), &out[i * alone.size()], alone.size() * 4)) << i;
    }
  }
}

// Chunks, decoding sequences and padding in one step; each row as if it were alone.
TEST_P(CacheTest, MixedSteps) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kBf16, KvFormat::kF32})
    for (const int page_tokens : {16, 5}) {
      const int kv_heads = 2, group = 4, heads = kv_heads * group, d = 64;
      const std::vector<Piece> past = {{0, 0, 100}, {2, 0, 300}, {3, 0, 700}, {4, 0, 1}};
      const std::vector<Piece> now = {{0, 100, 50}, {1, 0, 33},       {5, 0, 1},
                                      {-1, 0, 3},   {2, 300, 1},      {3, 700, 1},
                                      {4, 1, 1},    {-1, 1 << 30, 1}, {-1, -7, 1}};
      const KvShape s = shape(format, kv_heads, d, page_tokens, 6, 701);
      Cache cache(*backend_, random_, s, 6, (701 + page_tokens - 1) / page_tokens);
      const auto width = static_cast<size_t>((heads + 2 * kv_heads) * d);
      auto old = normals(Rows::count(past) * width), qkv = normals(Rows::count(now) * width);
      append(cache, heads, d, true, past, old);
      const auto before = cache.k.get<uint8_t>();
      const auto rotated = append(cache, heads, d, true, now, qkv);
      const auto out = attend(cache, heads, now, rotated);
      compare_attention(cache, heads, now, rotated, out, "mixed");
      // The pages of no sequence are as they were.
      const auto after = cache.k.get<uint8_t>();
      const size_t page_bytes = after.size() / static_cast<size_t>(s.pages);
      for (int32_t p = 0; p < s.pages; ++p) {
        if (std::find(cache.pages.begin(), cache.pages.end(), p) != cache.pages.end()) continue;
        EXPECT_EQ(0, std::memcmp(&before[p * page_bytes], &after[p * page_bytes], page_bytes));
      }
      // Alone, as decode and as a chunk, to the bit.
      size_t row = 0;
      for (const Piece& p : now) {
        const size_t first = row, n = static_cast<size_t>(heads * d);
        row += static_cast<size_t>(p.count);
        if (p.slot < 0) continue;
        const std::vector<float> part(rotated.begin() + first * width,
                                      rotated.begin() + row * width);
        for (const bool decodes : {true, false}) {
          const auto alone = attend(cache, heads, {p}, part, decodes);
          EXPECT_EQ(0, std::memcmp(alone.data(), &out[first * n], alone.size() * 4))
              << text(format) << " slot " << p.slot << (decodes ? " decode" : " chunk");
        }
      }
    }
}

TEST_P(CacheTest, AttentionRowCounts) {
  for (const int rows : kRowCounts) {
    const int d = 64, heads = 3;
    const KvShape s = shape(KvFormat::kFp8, 1, d, 16, 2, rows + 9);
    Cache cache(*backend_, random_, s, 2, (rows + 9 + 15) / 16);
    auto qkv = normals(static_cast<size_t>(rows + 9) * 5 * d);
    const std::vector<Piece> pieces = {{1, 0, rows}, {0, 0, 9}};
    const auto rotated = append(cache, heads, d, true, pieces, qkv);
    compare_attention(cache, heads, pieces, rotated, attend(cache, heads, pieces, rotated),
                      "rows " + std::to_string(rows));
  }
}

// Bit for bit: a prompt in one chunk, in uneven chunks, and token by token; alone or among others.
TEST_P(CacheTest, ChunkingChangesNothing) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kBf16, KvFormat::kF32}) {
    const int d = 64, heads = 9, kv_heads = 3, rows = 333, width = 15 * d;
    const KvShape s = shape(format, kv_heads, d, 16, 2, rows);
    auto qkv = normals(static_cast<size_t>(rows) * width);
    std::vector<float> whole;
    // 0: token by token, but as chunks.
    for (const int size : {rows, 100, 16, 7, 1, 0}) {
      const int chunk = std::max(size, 1);
      Cache cache(*backend_, random_, s, 2, (rows + 15) / 16);
      std::vector<float> out;
      for (int start = 0; start < rows; start += chunk) {
        const int count = std::min(chunk, rows - start);
        std::vector<float> part(qkv.begin() + start * width, qkv.begin() + (start + count) * width);
        part.insert(part.end(), qkv.begin(), qkv.begin() + count * width);
        const std::vector<Piece> pieces = {{0, start, count}, {1, 0, count}};
        const auto rotated = append(cache, heads, d, true, pieces, part);
        const auto got = attend(cache, heads, pieces, rotated, size > 0);
        out.insert(out.end(), got.begin(), got.begin() + count * heads * d);
      }
      if (whole.empty()) whole = out;
      ASSERT_EQ(out.size(), whole.size());
      EXPECT_EQ(0, std::memcmp(out.data(), whole.data(), out.size() * 4))
          << text(format) << ", chunks of " << size;
    }
  }
}

// Heads of 128 features, whose prefill has a kernel of its own on some GPUs: long chunks from the
// start and in the middle, sequences that meet within a block of rows, groups that divide nothing.
// Against the reference, and to the bit: a prompt whole, in uneven chunks, and among others.
TEST_P(CacheTest, LongChunks) {
  for (const int group : {8, 1, 3}) {
    const int d = 128, kv_heads = 2, heads = kv_heads * group, rows = 600;
    const auto width = static_cast<size_t>((heads + 2 * kv_heads) * d);
    const KvShape s = shape(KvFormat::kFp8, kv_heads, d, group == 3 ? 5 : 16, 3, rows);
    const int per_slot = (rows + s.page_tokens - 1) / s.page_tokens;
    auto qkv = normals(rows * width);
    // Sizes of values' scales far apart, zeros among them.
    for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
      const float size = r % 50 < 3 ? 0.0f : std::ldexp(1.0f, static_cast<int>(integer(-9, 3)));
      for (size_t i = 0; i < static_cast<size_t>(kv_heads * d); ++i)
        qkv[r * width + static_cast<size_t>((heads + kv_heads) * d) + i] *= size;
    }
    std::vector<float> whole;
    for (const int size : {rows, 257, 100, 7}) {
      if (wide() && size < 100) continue;  // the CPU's, which has nothing of its own here
      Cache cache(*backend_, random_, s, 3, per_slot);
      std::vector<float> out;
      for (int start = 0; start < rows; start += size) {
        const int count = std::min(size, rows - start), others = std::min(count, 150);
        std::vector<float> part(qkv.begin() + start * width, qkv.begin() + (start + count) * width);
        part.insert(part.end(), qkv.begin(), qkv.begin() + others * width);
        const std::vector<Piece> pieces = {{0, start, count}, {1, 0, others}};
        const auto rotated = append(cache, heads, d, true, pieces, part);
        const auto got = attend(cache, heads, pieces, rotated, false);
        if (count == size)
          compare_attention(cache, heads, pieces, rotated, got,
                            "chunks of " + std::to_string(size));
        out.insert(out.end(), got.begin(), got.begin() + count * heads * d);
      }
      if (whole.empty()) whole = out;
      ASSERT_EQ(out.size(), whole.size());
      EXPECT_EQ(0, std::memcmp(out.data(), whole.data(), out.size() * 4))
          << "groups of " << group << ", chunks of " << size;
    }
  }
}

// Much more padding than a step has, between chunks: what goes through blocks of rows in turn finds
// nothing to do in many of them.
TEST_P(CacheTest, PaddingBetweenChunks) {
  const int d = 128, heads = 64, padding = wide() ? 40 : 3000;
  const size_t width = 66 * d;
  const KvShape s = shape(KvFormat::kFp8, 1, d, 16, 2, 140);
  Cache cache(*backend_, random_, s, 2, 9);
  const std::vector<Piece> pieces = {{0, 0, 140}, {-1, 0, padding}, {1, 0, 21}};
  auto qkv = normals(140 * width), last = normals(21 * width);
  qkv.resize(qkv.size() + static_cast<size_t>(padding) * width);
  qkv.insert(qkv.end(), last.begin(), last.end());
  const auto rotated = append(cache, heads, d, true, pieces, qkv);
  const auto out = attend(cache, heads, pieces, rotated);
  compare_attention(cache, heads, pieces, rotated, out, "between padding");
}

// A value's NaN reaches the rows that see it and no other, in a block of tokens that all see and in
// one that some do.
TEST_P(CacheTest, NotANumberInLongChunks) {
  const int d = 128, heads = 8, rows = 300;
  const size_t width = 10 * d;
  const KvShape s = shape(KvFormat::kFp8, 1, d, 16, 1, rows);
  Cache cache(*backend_, random_, s, 1, (rows + 15) / 16);
  auto qkv = normals(rows * width);
  const size_t bad = 205;
  qkv[bad * width + 9 * d + 7] = std::nanf("");
  const std::vector<Piece> pieces = {{0, 0, rows}};
  const auto rotated = append(cache, heads, d, true, pieces, qkv);
  const auto out = attend(cache, heads, pieces, rotated);
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r)
    for (size_t i = 0; i < static_cast<size_t>(heads * d); ++i)
      ASSERT_EQ(std::isnan(out[r * heads * d + i]), r >= bad) << "row " << r;
}

TEST_P(CacheTest, UnknownHeadSizeIsRefused) {
  const KvShape s = shape(KvFormat::kF32, 1, 48, 16, 1, 16);
  Cache cache(*backend_, random_, s, 1, 1);
  EXPECT_THROW(attend(cache, 1, {{0, 0, 1}}, normals(3 * 48)), Error);
}

TEST_P(CacheTest, PagesTravel) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kBf16, KvFormat::kF32}) {
    KvShape s = shape(format, 3, 64, 7, 1, 7 * 20);
    std::vector<std::unique_ptr<Cache>> from, to;
    std::vector<KvLayer> from_layers, to_layers;
    for (int i = 0; i < 3; ++i) {
      from.push_back(std::make_unique<Cache>(*backend_, random_, s, 1, 20));
      to.push_back(std::make_unique<Cache>(*backend_, random_, s, 1, 20));
      for (Buffer* b :
           {&from.back()->k, &from.back()->v, &from.back()->k_scale, &from.back()->v_scale}) {
        auto bytes = b->get<uint8_t>();
        for (auto& x : bytes) x = static_cast<uint8_t>(random_());
        b->put(bytes);
      }
      from_layers.push_back(from.back()->layer), to_layers.push_back(to.back()->layer);
    }
    const size_t vectors = 3 * 7;
    const size_t page = backend_->page_bytes(s);
    EXPECT_EQ(page, 2 * vectors * (64 * element(format) + (format == KvFormat::kFp8 ? 4 : 0)));
    const std::vector<int32_t> out = {3, 24, 0, 11, 7}, in = {9, 1, 24, 2, 17};
    Buffer b_out(*backend_, 20), b_in(*backend_, 20), packed(*backend_, 5 * 3 * page);
    b_out.put(out), b_in.put(in);
    backend_->gather_pages(s, from_layers, b_out.as<int32_t>(), 5, packed.as<void>(),
                           backend_->stream());
    backend_->scatter_pages(s, to_layers, b_in.as<int32_t>(), 5, packed.as<void>(),
                            backend_->stream());
    for (size_t layer = 0; layer < 3; ++layer) {
      const auto same = [&](Buffer& a, Buffer& b, size_t size) {
        const auto x = a.get<uint8_t>(), y = b.get<uint8_t>();
        std::vector<bool> touched(static_cast<size_t>(s.pages));
        for (size_t i = 0; i < 5; ++i) {
          touched[in[i]] = true;
          EXPECT_EQ(0, std::memcmp(&x[out[i] * size], &y[in[i] * size], size)) << text(format);
        }
        for (size_t p = 0; p < touched.size(); ++p)
          for (size_t i = p * size; !touched[p] && i < (p + 1) * size; ++i) ASSERT_EQ(y[i], 0xff);
      };
      same(from[layer]->k, to[layer]->k, vectors * 64 * element(format));
      same(from[layer]->v, to[layer]->v, vectors * 64 * element(format));
      if (format != KvFormat::kFp8) continue;
      same(from[layer]->k_scale, to[layer]->k_scale, vectors * 4);
      same(from[layer]->v_scale, to[layer]->v_scale, vectors * 4);
    }
  }
}

DROVER_OPS_SUITE(CacheTest);

}  // namespace
}  // namespace drover::ops

#include <atomic>
#include <cstring>
#include <thread>

#include "store/store.h"
#include "unit/store_writer.h"

namespace drover {
namespace {

using namespace drover::testing;

void expect_slice(const WeightTensor& whole, const WeightTensor& part, int64_t r0, int64_t c0) {
  ASSERT_EQ(part.format, whole.format);
  std::vector<float> a(static_cast<size_t>(whole.cols)), b(static_cast<size_t>(part.cols));
  for (int64_t r = 0; r < part.rows; ++r) {
    dequantize_row(whole, r0 + r, a);
    dequantize_row(part, r, b);
    ASSERT_EQ(std::memcmp(a.data() + c0, b.data(), b.size() * 4), 0) << "row " << r;
  }
  if (!whole.permutation.empty()) {
    ASSERT_TRUE(std::equal(part.permutation.begin(), part.permutation.end(),
                           whole.permutation.begin() + c0));
    ASSERT_EQ(static_cast<int64_t>(part.permutation.size()), part.cols);
  }
}

class Store : public ::testing::TestWithParam<bool> {};

TEST_P(Store, EveryPieceIsTheSliceOfWhatWasWritten) {
  Folder folder;
  write_model(folder.file("m.h5"), GetParam());
  const auto store = ModelStore::open(folder.file("m.h5"));
  store->verify_all();
  std::mt19937 random(3);
  const auto tensors = small_tensors();
  EXPECT_EQ(store->tensors().size(), tensors.size());
  for (const auto& [name, w] : tensors) {
    ASSERT_TRUE(store->has(name));
    const auto whole = store->read(name, 0, w.rows, 0, w.cols);
    EXPECT_EQ(whole.codes, w.codes) << name;
    EXPECT_EQ(whole.scales, w.scales);
    EXPECT_EQ(whole.zeros, w.zeros);
    EXPECT_EQ(whole.minimums, w.minimums);
    EXPECT_EQ(whole.permutation, w.permutation);
    const int64_t unit = std::max(w.group, 1);
    for (int i = 0; i < 40; ++i) {
      int64_t r0 = static_cast<int64_t>(random()) % w.rows;
      int64_t r1 = r0 + 1 + static_cast<int64_t>(random()) % (w.rows - r0);
      int64_t c0 = static_cast<int64_t>(random()) % (w.cols / unit) * unit;
      int64_t c1 = c0 + (1 + static_cast<int64_t>(random()) % ((w.cols - c0) / unit)) * unit;
      SCOPED_TRACE(fmt::format("{} [{}, {}) x [{}, {})", name, r0, r1, c0, c1));
      expect_slice(w, store->read(name, r0, r1, c0, c1), r0, c0);
    }
  }
}
INSTANTIATE_TEST_SUITE_P(PlainAndDeflated, Store, ::testing::Bool());

TEST(StoreFile, TellsWhatItHolds) {
  Folder folder;
  write_model(folder.file("m.h5"));
  const auto store = ModelStore::open(folder.file("m.h5"));
  EXPECT_EQ(std::get<int64_t>(store->architecture().at("hidden")), 64);
  EXPECT_EQ(std::get<double>(store->architecture().at("rope_base")), 10000.0);
  EXPECT_EQ(std::get<std::string>(store->architecture().at("family")), "llama");
  EXPECT_EQ(std::get<std::vector<int64_t>>(store->architecture().at("eos_ids")),
            (std::vector<int64_t>{2, 5}));
  EXPECT_EQ(std::get<std::string>(store->provenance().at("quantization")), "a test's");
  EXPECT_EQ(sha256_hex(store->tokenizer_json()), store->tokenizer_sha256());
  EXPECT_EQ(store->chat_template(), "");
  const DecodingTable table = store->decoding_table();
  const int32_t ids[] = {1, 10, 599, 2, -1, 600, 11};
  EXPECT_EQ(table.decode(ids, 7), "w10 w599\xef\xbf\xbd\xef\xbf\xbd w11");
  EXPECT_EQ(table.decode(ids, 0), "");
  EXPECT_THROW(store->read("absent", 0, 1, 0, 1), Error);
  EXPECT_THROW(store->read("embed", 0, 1, 16, 32), Error);  // cuts a group
  EXPECT_THROW(store->read("embed", 0, 601, 0, 64), Error);
}

TEST(StoreFile, FingerprintFollowsContents) {
  Folder folder;
  write_model(folder.file("a.h5"));
  write_model(folder.file("b.h5"));
  const auto print = [&](const char* f) { return ModelStore::open(folder.file(f))->fingerprint(); };
  EXPECT_EQ(print("a.h5"), print("b.h5"));
  EXPECT_EQ(print("a.h5").size(), 64u);
  H5File::modify(folder.file("b.h5")).attribute("/architecture", "rope_base", 20000.0);
  EXPECT_NE(print("a.h5"), print("b.h5"));
}

TEST(StoreFile, OnlyTouchedChunksAreVerified) {
  Folder folder;
  const std::string file = folder.file("m.h5");
  write_model(file);
  flip(file, "/tensors/layers.0.gate/codes", 700 * 32);  // chunk row 1 of 3
  const auto store = ModelStore::open(file);
  EXPECT_NO_THROW(store->read("layers.0.gate", 0, 512, 0, 64));
  EXPECT_NO_THROW(store->read("layers.0.gate", 1024, 1280, 0, 64));
  for (const auto& [r0, r1] : {std::pair{512, 513}, {0, 1280}, {1023, 1024}}) {
    expect_bad([&] { store->read("layers.0.gate", r0, r1, 0, 64); },
               "layers.0.gate/codes: chunk [1, 0]");
  }
  expect_bad([&] { store->verify_all(); }, "layers.0.gate/codes: chunk [1, 0]");

  const std::string other = folder.file("n.h5");
  write_model(other);
  flip(other, "/tensors/layers.0.down/codes", 3 * 640 + 300);  // column chunk 1: columns 512..1023
  const auto damaged = ModelStore::open(other);
  EXPECT_NO_THROW(damaged->read("layers.0.down", 0, 64, 0, 512));
  EXPECT_NO_THROW(damaged->read("layers.0.down", 0, 64, 1024, 1280));
  expect_bad([&] { damaged->read("layers.0.down", 0, 1, 992, 1024); },
             "layers.0.down/codes: chunk [0, 1]");
}

TEST(StoreFile, AFlippedBitInAnyDatasetIsFound) {
  Folder folder;
  for (const char* path :
       {"/tensors/layers.0.q/codes", "/tensors/layers.0.q/scales", "/tensors/layers.0.q/zeros",
        "/tensors/layers.0.q/permutation", "/tensors/layers.0.o/minimums",
        "/tensors/final_norm/values", "/tensors/embed/codes", "/tensors/embed/codes_crc32c",
        "/tokenizer/pieces", "/tokenizer/offsets", "/tokenizer/special",
        "/tokenizer/tokenizer_json"}) {
    const std::string file = folder.file("m.h5");
    write_model(file);
    flip(file, path, 0);
    expect_bad([&] { ModelStore::open(file)->verify_all(); }, "CRC-32C", path);
  }
}

TEST(StoreFile, ManyThreadsMayRead) {
  Folder folder;
  write_model(folder.file("m.h5"));
  const auto store = ModelStore::open(folder.file("m.h5"));
  const auto want = small_tensors().at("layers.0.down").codes;
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 20; ++k)
        good += store->read("layers.0.down", 0, 64, 0, 1280).codes == want;
    });
  }
  for (auto& t : threads) t.join();
  EXPECT_EQ(good, 80);
}

TEST(Stage, CopiesOnceAndAgainWhenTheSourceChanges) {
  namespace fs = std::filesystem;
  Folder folder;
  const std::string source = folder.file("m.h5"), dir = folder.file("local/disk");
  write_model(source);
  const std::string copy = stage_file(source, dir);
  EXPECT_NE(copy, source);
  ModelStore::open(copy)->verify_all();
  // A second name keeps the first copy; a new copy is a file of its own.
  const auto names = [&] { return fs::hard_link_count(copy); };
  fs::create_hard_link(copy, folder.file("same"));
  EXPECT_EQ(stage_file(source, dir), copy);
  EXPECT_EQ(names(), 2u) << "the copy was replaced although nothing changed";
  fs::last_write_time(source, fs::last_write_time(source) + std::chrono::seconds(10));
  EXPECT_EQ(stage_file(source, dir), copy);
  EXPECT_EQ(names(), 1u) << "the copy of an older source was kept";
  EXPECT_EQ(stage_file(copy, dir), copy);
  for (const auto& entry : fs::directory_iterator(dir)) EXPECT_NE(entry.path().extension(), ".tmp");
  EXPECT_THROW(stage_file(folder.file("absent"), dir), Error);
  EXPECT_THROW(stage_file(source, source), Error);  // the folder is a file
}

}  // namespace
}  // namespace drover

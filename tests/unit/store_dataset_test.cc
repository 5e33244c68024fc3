#include <set>

#include "store/store.h"
#include "unit/store_writer.h"

namespace drover {
namespace {

using namespace drover::testing;

TEST(DatasetFile, HoldsWhatWasWritten) {
  Folder folder;
  write_dataset(folder.file("d.h5"));
  const auto d = Dataset::open(folder.file("d.h5"));
  ASSERT_EQ(d->size(), 3u);
  EXPECT_EQ(d->name(), "three");
  EXPECT_EQ(d->vocab(), kVocab);
  EXPECT_FALSE(d->synthetic());
  EXPECT_EQ(d->sample(0).input, (std::vector<int32_t>{1, 20, 30}));
  EXPECT_EQ(d->sample(1).input, (std::vector<int32_t>{1, 599}));
  EXPECT_EQ(d->sample(2).input, (std::vector<int32_t>{1, 7, 8, 9}));
  EXPECT_EQ(d->sample(2).output_length, 9);
  EXPECT_EQ(d->reference_text(1), "two");
  EXPECT_EQ(d->reference_text(2), "three");
  EXPECT_EQ(d->question_text(2), "");
  EXPECT_EQ(d->fingerprint(), Dataset::open(folder.file("d.h5"))->fingerprint());
  const auto ids = d->sample(2).input;
  EXPECT_EQ(d->decoding_table().decode(ids.data(), ids.size()), "w7 w8 w9");
  EXPECT_THROW(d->sample(3), Error);
  d->verify_all();
  EXPECT_TRUE(holds_dataset(folder.file("d.h5")));
  write_model(folder.file("m.h5"));
  EXPECT_FALSE(holds_dataset(folder.file("m.h5")));
}

TEST(DatasetFile, SamplesAcrossChunksAndOnlyTouchedChunksVerified) {
  Folder folder;
  const std::string file = folder.file("d.h5");
  write_dataset(file);
  constexpr int kSamples = 300, kLength = 700;  // 210,000 ids: four chunks
  std::vector<int32_t> ids(kSamples * kLength), lengths(kSamples, 1);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 7 % kVocab);
  std::vector<uint64_t> offsets(kSamples + 1), none(kSamples + 1);
  for (int i = 0; i <= kSamples; ++i) offsets[i] = static_cast<uint64_t>(i) * kLength;
  {
    H5File f = H5File::modify(file);
    for (const char* name : {"input_ids", "input_offsets", "output_lengths", "reference_text",
                             "reference_offsets", "question_offsets"}) {
      f.remove(std::string("/") + name);
      f.remove(std::string("/") + name + "_crc32c");
    }
    f.vector("/input_ids", H5T_STD_I32LE, ids);
    f.vector("/input_offsets", H5T_STD_U64LE, offsets);
    f.vector("/output_lengths", H5T_STD_I32LE, lengths);
    f.text("/reference_text", "");
    f.vector("/reference_offsets", H5T_STD_U64LE, none);
    f.vector("/question_offsets", H5T_STD_U64LE, none);
  }
  auto d = Dataset::open(file);
  for (int i : {299, 0, 93, 94, 150, 187, 188}) {
    const std::vector<int32_t> want(ids.begin() + i * kLength, ids.begin() + (i + 1) * kLength);
    EXPECT_EQ(d->sample(static_cast<size_t>(i)).input, want) << i;
  }
  d.reset();
  flip(file, "/input_ids", 70000);  // chunk 1: samples 93 to 187
  d = Dataset::open(file);
  EXPECT_NO_THROW(d->sample(92));
  EXPECT_NO_THROW(d->sample(188));
  for (size_t i : {93u, 120u, 187u}) {
    expect_bad([&] { d->sample(i); }, "input_ids: chunk [0, 1]");
  }
}

TEST(SyntheticData, OpenOrcaLengths) {
  const auto d = synthetic_dataset("synthetic:openorca", 32000, 5);
  EXPECT_EQ(d->size(), 2000u);
  EXPECT_TRUE(d->synthetic());
  std::set<size_t> lengths;
  std::vector<int> seen(32000);
  for (size_t i = 0; i < d->size(); ++i) {
    const Sample s = d->sample(i);
    lengths.insert(s.input.size());
    ASSERT_GE(s.output_length, 1);
    for (int32_t id : s.input) {
      ASSERT_GE(id, 16);
      ASSERT_LT(id, 32000);
      ++seen[static_cast<size_t>(id)];
    }
  }
  EXPECT_GT(lengths.size(), 200u);
  EXPECT_EQ(std::count(seen.begin() + 16, seen.end(), 0), 0) << "ids are not spread";
  const auto more = synthetic_dataset("synthetic:openorca:4500", 32000, 5);
  EXPECT_EQ(more->size(), 4500u);
  EXPECT_EQ(more->sample(7).input, d->sample(7).input);
  EXPECT_EQ(more->sample(2007).input.size(), d->sample(7).input.size());
  EXPECT_NE(more->sample(2007).input, d->sample(7).input);
  EXPECT_NE(synthetic_dataset("synthetic:openorca", 32000, 6)->sample(7).input, d->sample(7).input);
}

TEST(SyntheticData, FixedLengthsAndBadSpecs) {
  const auto d = synthetic_dataset("synthetic:128x17:9", 1000, 0);
  EXPECT_EQ(d->size(), 9u);
  EXPECT_EQ(d->sample(8).input.size(), 128u);
  EXPECT_EQ(d->sample(8).output_length, 17);
  EXPECT_THROW(d->sample(9), Error);
  const auto ids = d->sample(0).input;
  EXPECT_EQ(d->decoding_table().decode(ids.data(), 1), fmt::format(" {}", ids[0]));
  for (const char* spec :
       {"synthetic:", "synthetic:orca", "synthetic:128", "synthetic:128x", "synthetic:0x5",
        "synthetic:-1x5", "synthetic:openorca:", "synthetic:openorca:0", "synthetic:openorca:x",
        "synthetic:1x1:99999999999999999999", "synthetic:2000000x1", "openorca"}) {
    try {
      synthetic_dataset(spec, 1000, 0);
      ADD_FAILURE() << spec << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage) << spec;
    }
  }
  EXPECT_THROW(synthetic_dataset("synthetic:openorca", 16, 0), Error);
}

}  // namespace
}  // namespace drover

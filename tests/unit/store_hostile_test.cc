// Files made to do harm, or damaged: each is refused with a message that names the place.
#include <functional>

#include "store/store.h"
#include "unit/store_writer.h"

namespace drover {
namespace {

using namespace drover::testing;

struct Harm {
  const char* name;
  const char* message;  // a part of it
  std::function<void(H5File&)> act;
};

void PrintTo(const Harm& h, std::ostream* out) { *out << h.name; }

constexpr hsize_t kFar = hsize_t{1} << 40;

void external_storage(H5File& f) {
  f.remove("/tensors/final_norm/values");
  f.dataset("/tensors/final_norm/values", H5T_IEEE_F32LE, {1, 64}, {}, nullptr,
            [](hid_t list) { H5Pset_external(list, "/etc/hostname", 0, 256); });
}

void virtual_dataset(H5File& f) {
  f.remove("/tensors/final_norm/values");
  f.dataset("/tensors/final_norm/values", H5T_IEEE_F32LE, {1, 64}, {}, nullptr, [](hid_t list) {
    const hsize_t dims[2] = {1, 64};
    const hid_t space = H5Screate_simple(2, dims, nullptr);
    H5Pset_virtual(list, space, "other.h5", "/x", space);
    H5Sclose(space);
  });
}

// A filter that this process knows while writing; its number is one of the plug-ins'.
void foreign_filter(H5File& f) {
  static const H5Z_class2_t kPass{
      H5Z_CLASS_T_VERS,
      32015,
      1,
      1,
      "pass",
      nullptr,
      nullptr,
      [](unsigned, size_t, const unsigned*, size_t bytes, size_t*, void**) { return bytes; }};
  H5Zregister(&kPass);
  f.remove("/tensors/final_norm/values");
  const std::vector<float> ones(64, 1.0f);
  f.dataset("/tensors/final_norm/values", H5T_IEEE_F32LE, {1, 64}, {1, 64}, ones.data(),
            [](hid_t list) { H5Pset_filter(list, 32015, H5Z_FLAG_MANDATORY, 0, nullptr); });
}

const Harm kModelHarms[] = {
    {"WrongFormat", "expected drover-model",
     [](H5File& f) { f.attribute("/", "format", std::string("something")); }},
    {"FormatIsANumber", "`format` is missing",
     [](H5File& f) { f.attribute("/", "format", int64_t{1}); }},
    {"NewerVersion", "format version 2",
     [](H5File& f) { f.attribute("/", "format_version", int64_t{2}); }},
    {"NoTensors", "tensors: missing", [](H5File& f) { f.remove("/tensors"); }},
    {"NoTokenizer", "tokenizer: missing", [](H5File& f) { f.remove("/tokenizer"); }},
    {"VocabOverflows", "vocab",
     [](H5File& f) { f.attribute("/architecture", "vocab", int64_t{1} << 62); }},
    {"VocabIsText", "vocab: expected an integer",
     [](H5File& f) { f.attribute("/architecture", "vocab", std::string("600")); }},
    {"VariableLengthText", "license: a variable-length string",
     [](H5File& f) { f.attribute("/provenance", "license", std::string("none"), true); }},
    {"UnknownKind", "kind is `int3`",
     [](H5File& f) { f.attribute("/tensors/embed", "kind", std::string("int3")); }},
    {"UnknownZeroKind", "zero_kind",
     [](H5File& f) { f.attribute("/tensors/embed", "zero_kind", std::string("none")); }},
    {"RowsOverflow", "rows",
     [](H5File& f) { f.attribute("/tensors/embed", "rows", int64_t{1} << 62); }},
    {"RowsNegative", "rows", [](H5File& f) { f.attribute("/tensors/embed", "rows", int64_t{-1}); }},
    {"RowsOfAnother", "shape [600, 64], expected [601, 64]",
     [](H5File& f) { f.attribute("/tensors/embed", "rows", int64_t{601}); }},
    {"GroupOfSeven", "group_size 7",
     [](H5File& f) { f.attribute("/tensors/embed", "group_size", int64_t{7}); }},
    {"GroupDoesNotDivide", "group_size 128",
     [](H5File& f) { f.attribute("/tensors/embed", "group_size", int64_t{128}); }},
    {"WrongType", "not of type little-endian int8",
     [](H5File& f) {
       f.remove("/tensors/embed/codes");
       const std::vector<uint8_t> data(kVocab * 64);
       f.dataset("/tensors/embed/codes", H5T_STD_U8LE, {kVocab, 64}, {512, 64}, data.data());
     }},
    {"BigEndian", "not of type little-endian float32",
     [](H5File& f) {
       f.remove("/tensors/final_norm/values");
       const std::vector<float> data(64);
       f.dataset("/tensors/final_norm/values", H5T_IEEE_F32BE, {1, 64}, {1, 64}, data.data());
     }},
    {"WrongRank", "expected 2 dimension",
     [](H5File& f) {
       f.remove("/tensors/final_norm/values");
       const std::vector<float> data(64);
       f.dataset("/tensors/final_norm/values", H5T_IEEE_F32LE, {64}, {64}, data.data());
     }},
    {"WrongChunks", "chunks of",
     [](H5File& f) {
       f.remove("/tensors/final_norm/values");
       const std::vector<float> data(64);
       f.dataset("/tensors/final_norm/values", H5T_IEEE_F32LE, {1, 64}, {1, 32}, data.data());
     }},
    {"NotChunked", "expected chunked",
     [](H5File& f) {
       f.remove("/tensors/final_norm/values");
       const std::vector<float> data(64);
       f.dataset("/tensors/final_norm/values", H5T_IEEE_F32LE, {1, 64}, {}, data.data());
     }},
    {"GroupInsteadOfDataset", "expected a dataset",
     [](H5File& f) {
       f.remove("/tensors/final_norm/values");
       f.group("/tensors/final_norm/values");
     }},
    {"NoCodes", "codes: missing", [](H5File& f) { f.remove("/tensors/embed/codes"); }},
    {"NoScales", "scales: missing", [](H5File& f) { f.remove("/tensors/embed/scales"); }},
    {"NoChecksums", "codes_crc32c: missing",
     [](H5File& f) { f.remove("/tensors/embed/codes_crc32c"); }},
    {"FewerChecksums", "codes_crc32c: [1, 1] checksums",
     [](H5File& f) {
       f.remove("/tensors/embed/codes_crc32c");
       const uint32_t one = 0;
       f.dataset("/tensors/embed/codes_crc32c", H5T_STD_U32LE, {1, 1}, {}, &one);
     }},
    {"ChunksNeverWritten", "was not written whole",
     [](H5File& f) {
       f.remove("/tensors/final_norm/values");
       f.dataset("/tensors/final_norm/values", H5T_IEEE_F32LE, {1, 64}, {1, 64}, nullptr);
     }},
    {"AbsurdTokenizer", "elements, at most",
     [](H5File& f) {
       f.remove("/tokenizer/tokenizer_json");
       f.dataset("/tokenizer/tokenizer_json", H5T_STD_U8LE, {kFar}, {65536}, nullptr);
     }},
    {"HugeTokenizerWithoutData", "was not written whole",
     [](H5File& f) {
       f.remove("/tokenizer/tokenizer_json");
       f.remove("/tokenizer/tokenizer_json_crc32c");
       f.dataset("/tokenizer/tokenizer_json", H5T_STD_U8LE, {1 << 28}, {65536}, nullptr);
       f.dataset("/tokenizer/tokenizer_json_crc32c", H5T_STD_U32LE, {4096}, {}, nullptr);
     }},
    {"ExternalLink", "an external link",
     [](H5File& f) {
       f.remove("/tensors/embed/codes");
       H5File::must(H5Lcreate_external("/etc/hostname", "/x", f.id(), "/tensors/embed/codes",
                                       H5P_DEFAULT, H5P_DEFAULT));
     }},
    {"ExternalLinkToATensor", "an external link",
     [](H5File& f) {
       H5File::must(
           H5Lcreate_external("other.h5", "/x", f.id(), "/tensors/more", H5P_DEFAULT, H5P_DEFAULT));
     }},
    {"SoftLink", "a soft link",
     [](H5File& f) {
       f.move("/tensors/embed/codes", "/hidden");
       H5File::must(
           H5Lcreate_soft("/hidden", f.id(), "/tensors/embed/codes", H5P_DEFAULT, H5P_DEFAULT));
     }},
    {"ExternalStorage", "another file", external_storage},
    {"VirtualDataset", "virtual dataset", virtual_dataset},
    {"ForeignFilter", "filter 32015", foreign_filter},
    {"ZeroPointOf17", "a zero point of 17",
     [](H5File& f) {
       f.remove("/tensors/layers.0.q/zeros");
       f.remove("/tensors/layers.0.q/zeros_crc32c");
       std::vector<uint8_t> zeros(128, 16);
       zeros[77] = 17;
       f.array("/tensors/layers.0.q/zeros", H5T_STD_U8LE, {64, 2}, {64, 2}, zeros.data());
     }},
    {"NotAPermutation", "not a permutation",
     [](H5File& f) {
       f.remove("/tensors/layers.0.q/permutation");
       f.remove("/tensors/layers.0.q/permutation_crc32c");
       const std::vector<int32_t> same(64, 3);
       f.array("/tensors/layers.0.q/permutation", H5T_STD_I32LE, {1, 64}, {1, 64}, same.data());
     }},
    {"PermutationOutOfRange", "not a permutation",
     [](H5File& f) {
       f.remove("/tensors/layers.0.q/permutation");
       f.remove("/tensors/layers.0.q/permutation_crc32c");
       std::vector<int32_t> far(64);
       for (int i = 0; i < 64; ++i) far[i] = i - 1;
       f.array("/tensors/layers.0.q/permutation", H5T_STD_I32LE, {1, 64}, {1, 64}, far.data());
     }},
    {"PieceOffsetsFall", "expected to rise",
     [](H5File& f) {
       f.remove("/tokenizer/offsets");
       f.remove("/tokenizer/offsets_crc32c");
       std::vector<uint32_t> offsets(kVocab + 1, 4000000000u);
       offsets[0] = 0;
       f.vector("/tokenizer/offsets", H5T_STD_U32LE, offsets);
     }},
    {"PiecesOfAnotherVocab", "offsets: 3 elements, expected 601",
     [](H5File& f) {
       f.remove("/tokenizer/offsets");
       f.remove("/tokenizer/offsets_crc32c");
       f.vector("/tokenizer/offsets", H5T_STD_U32LE, std::vector<uint32_t>{0, 1, 2});
     }},
    {"TokenizerOfAnotherHash", "SHA-256",
     [](H5File& f) { f.attribute("/tokenizer", "sha256", sha256_hex("other")); }},
    {"HashThatIsNone", "64 lower-case hex digits",
     [](H5File& f) { f.attribute("/tokenizer", "sha256", std::string("../x")); }},
};

class HostileModel : public ::testing::TestWithParam<Harm> {};

TEST_P(HostileModel, IsRefused) {
  Folder folder;
  const std::string file = folder.file("m.h5");
  write_model(file);
  ASSERT_NO_THROW(ModelStore::open(file)->verify_all());
  {
    H5File f = H5File::modify(file);
    GetParam().act(f);
  }
  expect_bad([&] { ModelStore::open(file)->verify_all(); }, GetParam().message);
  expect_bad([&] { ModelStore::open(file)->verify_all(); }, file);
}
INSTANTIATE_TEST_SUITE_P(All, HostileModel, ::testing::ValuesIn(kModelHarms),
                         [](const auto& info) { return info.param.name; });

template <typename T>
void replace(H5File& f, const std::string& path, hid_t type, const std::vector<T>& values) {
  f.remove(path);
  f.remove(path + "_crc32c");
  f.vector(path, type, values);
}

const Harm kDatasetHarms[] = {
    {"AModel", "expected drover-dataset",
     [](H5File& f) { f.attribute("/", "format", std::string("drover-model")); }},
    {"NoName", "name is missing", [](H5File& f) { H5Adelete(f.id(), "name"); }},
    {"IdBeyondTheVocab", "token id 600; expected 0 to 599",
     [](H5File& f) {
       replace(f, "/input_ids", H5T_STD_I32LE, std::vector<int32_t>{1, 20, 30, 1, 600, 1, 7, 8, 9});
     }},
    {"NegativeId", "token id -1",
     [](H5File& f) {
       replace(f, "/input_ids", H5T_STD_I32LE, std::vector<int32_t>{1, 20, 30, 1, -1, 1, 7, 8, 9});
     }},
    {"OffsetsFall", "expected to rise",
     [](H5File& f) {
       replace(f, "/input_offsets", H5T_STD_U64LE, std::vector<uint64_t>{0, 5, 3, 9});
     }},
    {"OffsetsBeyondTheData", "expected to rise",
     [](H5File& f) {
       replace(f, "/input_offsets", H5T_STD_U64LE,
               std::vector<uint64_t>{0, 3, 5, uint64_t{1} << 63});
     }},
    {"OffsetsBeginLate", "expected to rise",
     [](H5File& f) {
       replace(f, "/input_offsets", H5T_STD_U64LE, std::vector<uint64_t>{1, 3, 5, 9});
     }},
    {"TooFewOffsets", "3 elements, expected 4",
     [](H5File& f) {
       replace(f, "/input_offsets", H5T_STD_U64LE, std::vector<uint64_t>{0, 3, 9});
     }},
    {"AnEmptySample", "no input tokens",
     [](H5File& f) {
       replace(f, "/input_offsets", H5T_STD_U64LE, std::vector<uint64_t>{0, 3, 3, 9});
     }},
    {"NegativeLength", "output length of -4",
     [](H5File& f) {
       replace(f, "/output_lengths", H5T_STD_I32LE, std::vector<int32_t>{-4, 0, 9});
     }},
    {"ReferencesBeyondTheText", "expected to rise",
     [](H5File& f) {
       replace(f, "/reference_offsets", H5T_STD_U64LE, std::vector<uint64_t>{0, 3, 6, 12});
     }},
    {"NoSamples", "no samples",
     [](H5File& f) { replace(f, "/output_lengths", H5T_STD_I32LE, std::vector<int32_t>{}); }},
    {"AbsurdlyManySamples", "at most 16777216",
     [](H5File& f) {
       f.remove("/output_lengths");
       f.dataset("/output_lengths", H5T_STD_I32LE, {kFar}, {65536}, nullptr);
     }},
    {"AbsurdText", "at most 4294967296",
     [](H5File& f) {
       f.remove("/reference_text");
       f.dataset("/reference_text", H5T_STD_U8LE, {kFar}, {65536}, nullptr);
     }},
    {"IdsOfAnotherType", "not of type little-endian int32",
     [](H5File& f) {
       replace(f, "/input_ids", H5T_STD_I64LE, std::vector<int64_t>{1, 20, 30, 1, 5, 1, 7, 8, 9});
     }},
    {"ExternalLink", "an external link",
     [](H5File& f) {
       f.remove("/input_ids");
       H5File::must(H5Lcreate_external("/etc/hostname", "/x", f.id(), "/input_ids", H5P_DEFAULT,
                                       H5P_DEFAULT));
     }},
};

class HostileDataset : public ::testing::TestWithParam<Harm> {};

TEST_P(HostileDataset, IsRefused) {
  Folder folder;
  const std::string file = folder.file("d.h5");
  write_dataset(file);
  ASSERT_NO_THROW(Dataset::open(file)->verify_all());
  {
    H5File f = H5File::modify(file);
    GetParam().act(f);
  }
  expect_bad([&] { Dataset::open(file)->verify_all(); }, GetParam().message);
}
INSTANTIATE_TEST_SUITE_P(All, HostileDataset, ::testing::ValuesIn(kDatasetHarms),
                         [](const auto& info) { return info.param.name; });

TEST(HostileFile, MissingForeignAndEmpty) {
  Folder folder;
  expect_bad([&] { ModelStore::open(folder.file("absent.h5")); }, "no such file");
  expect_bad([&] { ModelStore::open(folder.path.string()); }, "not a regular file");
  std::ofstream(folder.file("text")) << "hello, this is no HDF5 file at all\n";
  expect_bad([&] { ModelStore::open(folder.file("text")); }, "not a whole HDF5 file");
  std::ofstream(folder.file("empty"));
  expect_bad([&] { Dataset::open(folder.file("empty")); }, "not a whole HDF5 file");
  write_dataset(folder.file("d.h5"));
  expect_bad([&] { ModelStore::open(folder.file("d.h5")); }, "expected drover-model");
}

TEST(HostileFile, TruncatedAnywhereIsRefused) {
  Folder folder;
  const std::string whole = folder.file("whole.h5"), cut = folder.file("cut.h5");
  write_model(whole);
  const auto size = std::filesystem::file_size(whole);
  for (int i = 0; i < 24; ++i) {
    std::filesystem::copy_file(whole, cut, std::filesystem::copy_options::overwrite_existing);
    std::filesystem::resize_file(cut, i == 23 ? size - 1 : size * i / 23);
    expect_bad([&] { ModelStore::open(cut)->verify_all(); }, cut);
  }
}

}  // namespace
}  // namespace drover

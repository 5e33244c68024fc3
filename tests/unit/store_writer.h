// Writes small model stores and datasets (data/FORMAT.md) for the tests, and lets them do harm.
#pragma once

#include <gtest/gtest.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/crc32c.h"
#include "base/dtype.h"
#include "base/error.h"
#include "base/formats.h"
#include "base/sha256.h"

namespace drover::testing {

struct Folder {
  std::filesystem::path path;
  Folder() {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    std::string name = std::string(info->test_suite_name()) + "." + info->name();
    std::replace(name.begin(), name.end(), '/', '_');
    path = std::filesystem::temp_directory_path() / fmt::format("drover_{}_{}", ::getpid(), name);
    std::filesystem::create_directories(path);
  }
  ~Folder() { std::filesystem::remove_all(path); }
  std::string file(const std::string& name) const { return (path / name).string(); }
};

// A file open for writing. Every call throws std::runtime_error on failure.
class H5File {
 public:
  static H5File create(const std::string& file) {
    // As the importers do: from 1.8 on, HDF5's own structures carry checksums.
    const hid_t access = must(H5Pcreate(H5P_FILE_ACCESS));
    must(H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_V110));
    const hid_t file_id = H5Fcreate(file.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
    H5Pclose(access);
    return H5File(file_id);
  }
  static H5File modify(const std::string& file) {
    return H5File(H5Fopen(file.c_str(), H5F_ACC_RDWR, H5P_DEFAULT));
  }
  ~H5File() { H5Fclose(id_); }
  H5File(const H5File&) = delete;
  hid_t id() const { return id_; }

  void group(const std::string& path) {
    H5Gclose(must(H5Gcreate2(id_, path.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT)));
  }
  void remove(const std::string& path) { must(H5Ldelete(id_, path.c_str(), H5P_DEFAULT)); }
  void move(const std::string& from, const std::string& to) {
    must(H5Lmove(id_, from.c_str(), id_, to.c_str(), H5P_DEFAULT, H5P_DEFAULT));
  }

  void attribute(const std::string& path, const char* name, int64_t value) {
    put(path, name, H5T_NATIVE_INT64, H5Screate(H5S_SCALAR), &value);
  }
  void attribute(const std::string& path, const char* name, double value) {
    put(path, name, H5T_NATIVE_DOUBLE, H5Screate(H5S_SCALAR), &value);
  }
  void attribute(const std::string& path, const char* name, const std::vector<int64_t>& values) {
    const hsize_t count = values.size();
    put(path, name, H5T_NATIVE_INT64, H5Screate_simple(1, &count, nullptr), values.data());
  }
  void attribute(const std::string& path, const char* name, const std::string& value,
                 bool variable = false) {
    const hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_cset(type, H5T_CSET_UTF8);
    H5Tset_size(type, variable ? H5T_VARIABLE : std::max<size_t>(1, value.size()));
    const char* text = value.c_str();
    put(path, name, type, H5Screate(H5S_SCALAR), variable ? static_cast<const void*>(&text) : text);
    H5Tclose(type);
  }

  // Chunked unless `chunk` is empty. `tune` may change the creation properties.
  template <typename F>
  void dataset(const std::string& path, hid_t type, std::vector<hsize_t> dims,
               std::vector<hsize_t> chunk, const void* data, F tune) {
    const hid_t list = H5Pcreate(H5P_DATASET_CREATE);
    std::vector<hsize_t> most = dims;
    if (!chunk.empty()) {
      must(H5Pset_chunk(list, static_cast<int>(chunk.size()), chunk.data()));
      if (dims[0] == 0) most[0] = H5S_UNLIMITED;
    }
    tune(list);
    const hid_t space =
        must(H5Screate_simple(static_cast<int>(dims.size()), dims.data(), most.data()));
    const hid_t d =
        must(H5Dcreate2(id_, path.c_str(), type, space, H5P_DEFAULT, list, H5P_DEFAULT));
    if (data != nullptr && dims[0] > 0) {
      must(H5Dwrite(d, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data));
    }
    H5Dclose(d);
    H5Sclose(space);
    H5Pclose(list);
  }
  void dataset(const std::string& path, hid_t type, const std::vector<hsize_t>& dims,
               const std::vector<hsize_t>& chunk, const void* data) {
    dataset(path, type, dims, chunk, data, [](hid_t) {});
  }

  // With checksums. A vector has one dimension.
  void array(const std::string& path, hid_t type, std::vector<hsize_t> dims,
             std::vector<hsize_t> chunk, const void* data, bool deflate = false) {
    dataset(path, type, dims, chunk, data, [&](hid_t list) {
      if (deflate) must(H5Pset_shuffle(list)), must(H5Pset_deflate(list, 4));
    });
    checksums(path, H5Tget_size(type), dims, chunk, static_cast<const uint8_t*>(data));
  }
  template <typename T>
  void vector(const std::string& path, hid_t type, const std::vector<T>& values) {
    const hsize_t n = values.size();
    array(path, type, {n}, {std::clamp<hsize_t>(n, 1, 65536)}, values.data());
  }
  void text(const std::string& path, const std::string& value) {
    vector(path, H5T_STD_U8LE, std::vector<uint8_t>(value.begin(), value.end()));
  }

  static hid_t must(hid_t id) {
    if (id < 0) throw std::runtime_error("the test's HDF5 call failed");
    return id;
  }

 private:
  explicit H5File(hid_t id) : id_(must(id)) {}
  void put(const std::string& path, const char* name, hid_t type, hid_t space, const void* data) {
    const hid_t object = must(H5Oopen(id_, path.c_str(), H5P_DEFAULT));
    if (H5Aexists(object, name) > 0) must(H5Adelete(object, name));
    const hid_t a = must(H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT));
    must(H5Awrite(a, type, data));
    H5Aclose(a);
    H5Sclose(space);
    H5Oclose(object);
  }
  void checksums(const std::string& path, size_t element, std::vector<hsize_t> dims,
                 std::vector<hsize_t> chunk, const uint8_t* data) {
    const bool matrix = dims.size() == 2;
    const hsize_t rows = matrix ? dims[0] : 1, cols = dims.back();
    const hsize_t high = matrix ? chunk[0] : 1, wide = chunk.back();
    std::vector<uint32_t> sums;
    for (hsize_t r = 0; r < rows; r += high) {
      for (hsize_t c = 0; c < cols; c += wide) {
        uint32_t crc = 0;
        for (hsize_t i = r; i < std::min(rows, r + high); ++i) {
          crc = crc32c(data + (i * cols + c) * element, std::min(wide, cols - c) * element, crc);
        }
        sums.push_back(crc);
      }
    }
    std::vector<hsize_t> shape{(cols + wide - 1) / wide};
    if (matrix) shape.insert(shape.begin(), (rows + high - 1) / high);
    dataset(path + "_crc32c", H5T_STD_U32LE, shape, {}, sums.data());
  }
  hid_t id_;
};

inline WeightTensor random_tensor(std::mt19937& random, WeightFormat format, int64_t rows,
                                  int64_t cols, int32_t group = 0,
                                  ZeroKind zero = ZeroKind::kSymmetric) {
  WeightTensor w;
  w.format = format;
  w.rows = rows;
  w.cols = cols;
  w.group = group;
  w.zero = zero;
  const auto small = [&] { return (static_cast<float>(random() % 2001) - 1000.0f) * 1e-4f; };
  const auto put = [&](uint32_t bits, int bytes) {
    for (int b = 0; b < bytes; ++b) w.codes.push_back(static_cast<uint8_t>(bits >> (8 * b)));
  };
  if (group == 0) {
    for (int64_t i = 0; i < rows * cols; ++i) {
      const float v = small();
      if (format == WeightFormat::kF32) put(std::bit_cast<uint32_t>(v), 4);
      if (format == WeightFormat::kF16) put(f16_from_float(v), 2);
      if (format == WeightFormat::kBf16) put(bf16_from_float(v), 2);
    }
    return w;
  }
  const int64_t bytes = format == WeightFormat::kInt4 ? rows * cols / 2 : rows * cols;
  for (int64_t i = 0; i < bytes; ++i) w.codes.push_back(static_cast<uint8_t>(random()));
  for (int64_t i = 0; i < rows * cols / group; ++i) {
    w.scales.push_back(f16_from_float(small()));
    if (zero == ZeroKind::kZeroPoints) w.zeros.push_back(static_cast<uint8_t>(random() % 17));
    if (zero == ZeroKind::kMinimums) w.minimums.push_back(f16_from_float(small()));
  }
  return w;
}

inline void write_tensor(H5File& f, const std::string& name, const WeightTensor& w,
                         bool deflate = false) {
  const std::string path = "/tensors/" + name;
  f.group(path);
  f.attribute(path, "kind", std::string(to_string(w.format)));
  f.attribute(path, "rows", w.rows);
  f.attribute(path, "cols", w.cols);
  const auto rows = static_cast<hsize_t>(w.rows), cols = static_cast<hsize_t>(w.cols);
  const hsize_t high = std::min<hsize_t>(rows, 512), wide = std::min<hsize_t>(cols, 512);
  if (w.group == 0) {
    f.array(path + "/values", w.format == WeightFormat::kF32 ? H5T_IEEE_F32LE : H5T_STD_U16LE,
            {rows, cols}, {high, wide}, w.codes.data(), deflate);
    return;
  }
  f.attribute(path, "group_size", int64_t{w.group});
  f.attribute(path, "zero_kind", std::string(to_string(w.zero)));
  f.attribute(path, "scale_type", std::string(to_string(w.scale_dtype)));
  const bool int4 = w.format == WeightFormat::kInt4;
  f.array(path + "/codes", int4 ? H5T_STD_U8LE : H5T_STD_I8LE, {rows, int4 ? cols / 2 : cols},
          {high, int4 ? wide / 2 : wide}, w.codes.data(), deflate);
  const hsize_t groups = cols / static_cast<hsize_t>(w.group);
  const std::vector<hsize_t> shape{rows, groups}, chunk{high, std::min<hsize_t>(groups, 512)};
  f.array(path + "/scales", H5T_STD_U16LE, shape, chunk, w.scales.data(), deflate);
  if (!w.zeros.empty()) {
    f.array(path + "/zeros", H5T_STD_U8LE, shape, chunk, w.zeros.data(), deflate);
  }
  if (!w.minimums.empty()) {
    f.array(path + "/minimums", H5T_STD_U16LE, shape, chunk, w.minimums.data(), deflate);
  }
  if (!w.permutation.empty()) {
    f.array(path + "/permutation", H5T_STD_I32LE, {1, cols}, {1, wide}, w.permutation.data(),
            deflate);
  }
}

constexpr int kVocab = 600;

inline std::string write_tokenizer(H5File& f) {
  const std::string json = R"({"model": "a test's"})";
  std::string pieces;
  std::vector<uint32_t> offsets{0};
  for (int i = 0; i < kVocab; ++i) {
    pieces += fmt::format(" w{}", i);
    offsets.push_back(static_cast<uint32_t>(pieces.size()));
  }
  std::vector<uint8_t> special(kVocab);
  special[0] = special[1] = special[2] = 1;
  f.group("/tokenizer");
  f.attribute("/tokenizer", "sha256", sha256_hex(json));
  f.attribute("/tokenizer", "strip_leading_space", int64_t{1});
  f.text("/tokenizer/tokenizer_json", json);
  f.text("/tokenizer/chat_template", "");
  f.text("/tokenizer/pieces", pieces);
  f.vector("/tokenizer/offsets", H5T_STD_U32LE, offsets);
  f.vector("/tokenizer/special", H5T_STD_U8LE, special);
  return sha256_hex(json);
}

// One layer; two heads of 32; some tensors wider and higher than a chunk; every zero kind.
inline std::map<std::string, WeightTensor> small_tensors() {
  std::mt19937 random(7);
  std::map<std::string, WeightTensor> t;
  t["embed"] = random_tensor(random, WeightFormat::kInt8, kVocab, 64, 32);
  t["final_norm"] = random_tensor(random, WeightFormat::kF32, 1, 64);
  t["output"] = random_tensor(random, WeightFormat::kBf16, kVocab, 64);
  t["layers.0.attn_norm"] = random_tensor(random, WeightFormat::kF16, 1, 64);
  t["layers.0.mlp_norm"] = random_tensor(random, WeightFormat::kBf16, 1, 64);
  for (const char* name : {"layers.0.q", "layers.0.k", "layers.0.v"}) {
    t[name] = random_tensor(random, WeightFormat::kInt4, 64, 64, 32, ZeroKind::kZeroPoints);
    for (int j = 0; j < 64; ++j) t[name].permutation.push_back((j * 13 + 5) % 64);
  }
  t["layers.0.o"] = random_tensor(random, WeightFormat::kInt4, 64, 64, 32, ZeroKind::kMinimums);
  for (const char* name : {"layers.0.gate", "layers.0.up"}) {
    t[name] = random_tensor(random, WeightFormat::kInt4, 1280, 64, 32);
  }
  t["layers.0.down"] = random_tensor(random, WeightFormat::kInt4, 64, 1280, 32);
  return t;
}

inline void write_model(const std::string& file, bool deflate = false) {
  H5File f = H5File::create(file);
  f.attribute("/", "format", std::string("drover-model"));
  f.attribute("/", "format_version", int64_t{1});
  f.group("/architecture");
  const std::string a = "/architecture";
  const std::pair<const char*, int64_t> sizes[] = {
      {"layers", 1},     {"hidden", 64},         {"heads", 2},           {"kv_heads", 2},
      {"head_size", 32}, {"intermediate", 1280}, {"vocab", kVocab},      {"max_positions", 128},
      {"rope_dims", 32}, {"bos_id", 1},          {"tied_embeddings", 0},
  };
  for (const auto& [name, value] : sizes) f.attribute(a, name, value);
  f.attribute(a, "family", std::string("llama"), false);
  f.attribute(a, "norm", std::string("rms"));
  f.attribute(a, "norm_epsilon", 1e-5);
  f.attribute(a, "rope_pairing", std::string("half"));
  f.attribute(a, "rope_base", 10000.0);
  f.attribute(a, "rope_scaling", std::string("none"));
  f.attribute(a, "activation", std::string("silu_gated"));
  f.attribute(a, "eos_ids", std::vector<int64_t>{2, 5});
  f.group("/provenance");
  f.attribute("/provenance", "source_files", std::string("[]"));
  f.attribute("/provenance", "quantization", std::string("a test's"));
  write_tokenizer(f);
  f.group("/tensors");
  for (const auto& [name, w] : small_tensors()) write_tensor(f, name, w, deflate);
}

// Three samples.
inline void write_dataset(const std::string& file) {
  H5File f = H5File::create(file);
  f.attribute("/", "format", std::string("drover-dataset"));
  f.attribute("/", "format_version", int64_t{1});
  f.attribute("/", "name", std::string("three"));
  f.attribute("/", "vocab", int64_t{kVocab});
  f.attribute("/", "source_files", std::string("[]"));
  f.attribute("/", "synthetic", int64_t{0});
  write_tokenizer(f);
  f.vector("/input_ids", H5T_STD_I32LE, std::vector<int32_t>{1, 20, 30, 1, 599, 1, 7, 8, 9});
  f.vector("/input_offsets", H5T_STD_U64LE, std::vector<uint64_t>{0, 3, 5, 9});
  f.vector("/output_lengths", H5T_STD_I32LE, std::vector<int32_t>{4, 0, 9});
  f.text("/reference_text", "onetwothree");
  f.vector("/reference_offsets", H5T_STD_U64LE, std::vector<uint64_t>{0, 3, 6, 11});
  f.text("/question_text", "");
  f.vector("/question_offsets", H5T_STD_U64LE, std::vector<uint64_t>{0, 0, 0, 0});
}

// Flips one bit of element `index` of a dataset, leaving its checksums as they were.
inline void flip(const std::string& file, const std::string& path, size_t index) {
  const hid_t f = H5File::must(H5Fopen(file.c_str(), H5F_ACC_RDWR, H5P_DEFAULT));
  const hid_t d = H5File::must(H5Dopen2(f, path.c_str(), H5P_DEFAULT));
  const hid_t type = H5Dget_type(d);
  const size_t element = H5Tget_size(type);
  const hid_t space = H5Dget_space(d);
  std::vector<uint8_t> all(static_cast<size_t>(H5Sget_simple_extent_npoints(space)) * element);
  H5File::must(H5Dread(d, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, all.data()));
  all.at(index * element) ^= 4;
  H5File::must(H5Dwrite(d, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, all.data()));
  H5Sclose(space);
  H5Tclose(type);
  H5Dclose(d);
  H5Fclose(f);
}

// Runs f, which must throw kBadInput with `part` in its message.
template <typename F>
void expect_bad(F f, const std::string& part, const std::string& what = "") {
  try {
    f();
    ADD_FAILURE() << what << ": accepted; expected an error with: " << part;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput) << what << ": " << e.what();
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << what << ": " << e.what();
  }
}

}  // namespace drover::testing

// The HDF5 model store and dataset (data/FORMAT.md). The only room that includes HDF5; no HDF5
// type leaves it. Files are treated as hostile: every size is checked against the limits here
// before an allocation, external links, virtual datasets and filters with plug-ins are refused.
// All errors are kBadInput and name the file, the object, what was expected and what to do.
// HDF5's serial build is not thread-safe: one lock of the room serializes all calls of all threads.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "base/dtype.h"

namespace drover {

using Attribute = std::variant<int64_t, double, std::string, std::vector<int64_t>>;
using Attributes = std::map<std::string, Attribute>;

// The decoding table: token ids to text without a tokenizer library.
struct DecodingTable {
  std::vector<std::string> pieces;   // raw bytes of each token
  std::vector<uint8_t> special;      // 1: skipped in text
  bool strip_leading_space = false;  // SentencePiece: the first piece's leading space is not text
  // Raw bytes joined, special ids skipped; ids out of range become U+FFFD; ill-formed UTF-8 stays.
  std::string decode(const int32_t* ids, size_t count) const;
};

struct TensorInfo {
  std::string name;
  WeightFormat format;
  ZeroKind zero;
  int64_t rows, cols;
  int32_t group;
  uint64_t stored_bytes;  // of the tensor's elements, before filters, without checksums
};

class ModelStore {
 public:
  static std::unique_ptr<ModelStore> open(const std::string& file);
  virtual ~ModelStore() = default;
  virtual const Attributes& architecture() const = 0;  // of group /architecture
  virtual const Attributes& provenance() const = 0;    // of group /provenance
  virtual const std::vector<TensorInfo>& tensors() const = 0;
  virtual bool has(const std::string& name) const = 0;
  // Rows [row_begin, row_end) and columns [col_begin, col_end) of a tensor; column bounds on group
  // bounds. Verifies the CRC-32C of every chunk touched, reads no other.
  virtual WeightTensor read(const std::string& name, int64_t row_begin, int64_t row_end,
                            int64_t col_begin, int64_t col_end) = 0;
  virtual DecodingTable decoding_table() = 0;
  virtual std::string tokenizer_json() = 0;
  virtual std::string chat_template() = 0;  // may be empty
  virtual std::string tokenizer_sha256() const = 0;
  virtual std::string fingerprint() const = 0;  // SHA-256 over provenance and all stored CRCs
  virtual void verify_all() = 0;                // every chunk of every object; throws at the first
};

struct Sample {
  std::vector<int32_t> input;
  int32_t output_length = 0;  // of the reference answer, in tokens; 0: unknown
};

class Dataset {
 public:
  static std::unique_ptr<Dataset> open(const std::string& file);
  virtual ~Dataset() = default;
  virtual std::string name() const = 0;
  virtual size_t size() const = 0;
  virtual Sample sample(size_t index) = 0;
  virtual std::string reference_text(size_t index) = 0;
  virtual std::string question_text(size_t index) = 0;  // may be empty
  virtual int32_t vocab() const = 0;
  virtual std::string tokenizer_sha256() const = 0;
  virtual DecodingTable decoding_table() = 0;
  virtual std::string fingerprint() const = 0;
  virtual bool synthetic() const = 0;
  virtual void verify_all() = 0;
};

// Random token ids (seeded, uniform over [16, vocab)) with lengths from the spec, for performance
// work where no data set is at hand. Specs:
//   synthetic:openorca[:n]  lengths like Open Orca's, 2,000 of them, repeated up to n (2,000)
//   synthetic:INxOUT[:n]    n (256) samples of IN prompt tokens and OUT new ones
// Texts are empty, tokenizer_sha256 too; a token's piece is its number. Other specs: kUsage.
bool is_synthetic_dataset(const std::string& spec);
std::unique_ptr<Dataset> synthetic_dataset(const std::string& spec, int32_t vocab, uint64_t seed);

// Copies FILE into DIR (name + size + mtime decide whether it is there already), through a
// temporary name; returns the copy's path. Checks free space first. kEnvironment on failure.
// Several processes of a host may call it at once: one copies, the others wait.
std::string stage_file(const std::string& file, const std::string& dir);

// Whether the file says that it is a dataset. Throws kBadInput when it is not an HDF5 file at all.
bool holds_dataset(const std::string& file);

std::string hdf5_version();  // of the library in use, "1.10.8"

}  // namespace drover

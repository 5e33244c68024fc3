#include <algorithm>

#include "base/sha256.h"
#include "store/h5.h"
#include "store/store.h"
#include "store/tokenizer.h"

namespace drover {
namespace {

constexpr uint64_t kMaxSamples = 16'777'216;
constexpr uint64_t kMaxSampleTokens = 1'048'576;
constexpr uint64_t kMaxText = uint64_t{4} << 30;

// Items of any length one after another, and where each begins.
struct Pieces {
  h5::Array values;
  std::vector<uint64_t> offsets;
  std::vector<uint32_t> offset_checksums;

  Pieces(const h5::Group& root, const char* values_name, h5::Element element, uint64_t max_values,
         const char* offsets_name, uint64_t count, uint64_t max_piece)
      : values(h5::Array::vector(root, values_name, element, max_values)) {
    auto array = h5::Array::vector_of(root, offsets_name, h5::Element::kU64, count + 1);
    offsets = h5::read_all<uint64_t>(array);
    offset_checksums = array.checksums();
    DROVER_CHECK(offsets.front() == 0 && offsets.back() == values.length() &&
                     std::is_sorted(offsets.begin(), offsets.end()),
                 ExitCode::kBadInput, "{}: expected to rise from 0 to the {} elements of {}",
                 array.where(), values.length(), values_name);
    for (uint64_t i = 0; i < count; ++i) {
      DROVER_CHECK(offsets[i + 1] - offsets[i] <= max_piece, ExitCode::kBadInput,
                   "{}: sample {} has {} elements, at most {} are allowed", array.where(), i,
                   offsets[i + 1] - offsets[i], max_piece);
    }
  }

  template <typename T>
  void read(uint64_t index, T& out) {
    out.resize(offsets[index + 1] - offsets[index]);
    values.read(0, 1, offsets[index], offsets[index + 1], out.data());
  }
  void add_checksums(std::vector<uint32_t>& sums) {
    const auto& mine = values.checksums();
    sums.insert(sums.end(), mine.begin(), mine.end());
    sums.insert(sums.end(), offset_checksums.begin(), offset_checksums.end());
  }
};

uint64_t sample_count(const h5::Group& root) {
  const auto lengths = h5::Array::vector(root, "output_lengths", h5::Element::kI32, kMaxSamples);
  DROVER_CHECK(lengths.length() > 0, ExitCode::kBadInput, "{}: the dataset holds no samples",
               root.where());
  return lengths.length();
}

class Hdf5Dataset : public Dataset {
 public:
  explicit Hdf5Dataset(const std::string& file)
      : file_(file),
        root_(h5::Group::open_file(file, "drover-dataset")),
        attributes_(root_.attributes()),
        name_(h5::get_string(attributes_, "name", root_.where())),
        synthetic_(h5::get_int(attributes_, "synthetic", root_.where()) != 0),
        vocab_(checked_vocab()),
        tokenizer_(root_, vocab_),
        count_(sample_count(root_)),
        inputs_(root_, "input_ids", h5::Element::kI32, kMaxSamples * kMaxSampleTokens,
                "input_offsets", count_, kMaxSampleTokens),
        references_(root_, "reference_text", h5::Element::kU8, kMaxText, "reference_offsets",
                    count_, kMaxText),
        questions_(root_, "question_text", h5::Element::kU8, kMaxText, "question_offsets", count_,
                   kMaxText) {
    auto lengths = h5::Array::vector_of(root_, "output_lengths", h5::Element::kI32, count_);
    output_lengths_ = h5::read_all<int32_t>(lengths);
    length_checksums_ = lengths.checksums();
    for (uint64_t i = 0; i < count_; ++i) {
      DROVER_CHECK(
          output_lengths_[i] >= 0 && output_lengths_[i] <= static_cast<int32_t>(kMaxSampleTokens),
          ExitCode::kBadInput, "{}: sample {} has an output length of {}; expected 0 to {}",
          lengths.where(), i, output_lengths_[i], kMaxSampleTokens);
      DROVER_CHECK(inputs_.offsets[i + 1] > inputs_.offsets[i], ExitCode::kBadInput,
                   "{}: sample {} has no input tokens", file_, i);
    }
  }

  std::string name() const override { return name_; }
  size_t size() const override { return count_; }

  Sample sample(size_t index) override {
    h5::Lock lock(h5::mutex());
    check_index(index);
    Sample out;
    inputs_.read(index, out.input);
    for (int32_t id : out.input) {
      DROVER_CHECK(id >= 0 && id < vocab_, ExitCode::kBadInput,
                   "{}: sample {} has token id {}; expected 0 to {}: the dataset was made for "
                   "another tokenizer, or is damaged",
                   file_, index, id, vocab_ - 1);
    }
    out.output_length = output_lengths_[index];
    return out;
  }

  std::string reference_text(size_t index) override { return text(references_, index); }
  std::string question_text(size_t index) override { return text(questions_, index); }
  int32_t vocab() const override { return vocab_; }
  std::string tokenizer_sha256() const override { return tokenizer_.sha256(); }
  DecodingTable decoding_table() override {
    h5::Lock lock(h5::mutex());
    return tokenizer_.decoding_table();
  }
  bool synthetic() const override { return synthetic_; }

  std::string fingerprint() const override {
    h5::Lock lock(h5::mutex());
    if (fingerprint_.empty()) fingerprint_ = make_fingerprint();
    return fingerprint_;
  }

  void verify_all() override {
    h5::Lock lock(h5::mutex());
    tokenizer_.verify_all();
    for (size_t i = 0; i < count_; ++i) sample(i);
    references_.values.verify();
    questions_.values.verify();
  }

 private:
  int32_t checked_vocab() const {
    const int64_t vocab = h5::get_int(attributes_, "vocab", root_.where());
    DROVER_CHECK(vocab >= 1 && vocab <= 4'194'304, ExitCode::kBadInput,
                 "{}: vocab {}; expected 1 to 4194304", root_.where(), vocab);
    return static_cast<int32_t>(vocab);
  }
  void check_index(size_t index) const {
    DROVER_CHECK(index < count_, ExitCode::kUsage, "{}: there is no sample {}; it holds {}", file_,
                 index, count_);
  }
  std::string text(Pieces& pieces, size_t index) {
    h5::Lock lock(h5::mutex());
    check_index(index);
    std::string out;
    pieces.read(index, out);
    return out;
  }
  std::string make_fingerprint() const {
    std::vector<uint32_t> words = length_checksums_;
    for (auto* p : {&inputs_, &references_, &questions_}) p->add_checksums(words);
    tokenizer_.add_checksums(words);
    Sha256 sum;
    sum.update(fmt::format("{};{};{};{};{}", name_, vocab_, count_, tokenizer_.sha256(),
                           fmt::join(words, ",")));
    return sum.hex();
  }

  std::string file_;
  h5::Group root_;
  Attributes attributes_;
  std::string name_;
  bool synthetic_;
  int32_t vocab_;
  TokenizerGroup tokenizer_;
  uint64_t count_;
  mutable Pieces inputs_, references_, questions_;  // checksums are read when first needed
  std::vector<int32_t> output_lengths_;
  std::vector<uint32_t> length_checksums_;
  mutable std::string fingerprint_;
};

}  // namespace

bool holds_dataset(const std::string& file) {
  h5::Lock lock(h5::mutex());
  const Attributes a = h5::Group::open_root(file).attributes();
  const auto found = a.find("format");
  return found != a.end() && found->second == Attribute(std::string("drover-dataset"));
}

std::unique_ptr<Dataset> Dataset::open(const std::string& file) {
  h5::Lock lock(h5::mutex());
  return std::make_unique<Hdf5Dataset>(file);
}

}  // namespace drover

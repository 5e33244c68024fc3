#include <algorithm>
#include <mutex>
#include <optional>

#include "base/sha256.h"
#include "store/h5.h"
#include "store/store.h"
#include "store/tokenizer.h"

namespace drover {
namespace {

constexpr int64_t kMaxVocab = 4'194'304;
constexpr int64_t kMaxRows = kMaxVocab;
constexpr int64_t kMaxCols = kMaxVocab;
constexpr uint64_t kMaxTensors = 1024 * 9 + 3;
constexpr uint64_t kChunk = 512;

template <typename T>
T choose(const std::string& value, const std::vector<std::pair<const char*, T>>& known,
         const std::string& where, const char* attribute) {
  std::string names;
  for (const auto& [name, result] : known) {
    if (value == name) return result;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  DROVER_FAIL(ExitCode::kBadInput, "{}: attribute {} is `{}`; known: {}", where, attribute, value,
              names);
}

struct Tensor {
  TensorInfo info;
  Dtype scale_dtype = Dtype::kF16;
  bool permuted = false;
  bool quantized() const { return info.group > 0; }
};

Tensor read_description(const h5::Group& g, const std::string& name) {
  const Attributes a = g.attributes();
  const std::string& where = g.where();
  Tensor t;
  t.info.name = name;
  t.info.format = choose<WeightFormat>(h5::get_string(a, "kind", where),
                                       {{"int4", WeightFormat::kInt4},
                                        {"int8", WeightFormat::kInt8},
                                        {"f16", WeightFormat::kF16},
                                        {"bf16", WeightFormat::kBf16},
                                        {"f32", WeightFormat::kF32}},
                                       where, "kind");
  t.info.zero = ZeroKind::kSymmetric;
  t.info.group = 0;
  t.info.rows = h5::get_int(a, "rows", where);
  t.info.cols = h5::get_int(a, "cols", where);
  DROVER_CHECK(t.info.rows >= 1 && t.info.rows <= kMaxRows, ExitCode::kBadInput,
               "{}: {} rows; expected 1 to {}", where, t.info.rows, kMaxRows);
  DROVER_CHECK(t.info.cols >= 1 && t.info.cols <= kMaxCols, ExitCode::kBadInput,
               "{}: {} columns; expected 1 to {}", where, t.info.cols, kMaxCols);
  if (t.info.format == WeightFormat::kInt4 || t.info.format == WeightFormat::kInt8) {
    const int64_t group = h5::get_int(a, "group_size", where);
    DROVER_CHECK((group == 32 || group == 64 || group == 128) && t.info.cols % group == 0,
                 ExitCode::kBadInput,
                 "{}: group_size {}; expected 32, 64 or 128, dividing the {} columns", where, group,
                 t.info.cols);
    t.info.group = static_cast<int32_t>(group);
    t.info.zero = choose<ZeroKind>(h5::get_string(a, "zero_kind", where),
                                   {{"symmetric", ZeroKind::kSymmetric},
                                    {"zero_points", ZeroKind::kZeroPoints},
                                    {"minimums", ZeroKind::kMinimums}},
                                   where, "zero_kind");
    t.scale_dtype =
        choose<Dtype>(h5::get_string(a, "scale_type", where),
                      {{"f16", Dtype::kF16}, {"bf16", Dtype::kBf16}}, where, "scale_type");
    t.permuted = g.has("permutation");
  }
  const auto rows = static_cast<uint64_t>(t.info.rows), cols = static_cast<uint64_t>(t.info.cols);
  uint64_t& bytes = t.info.stored_bytes;
  switch (t.info.format) {
    case WeightFormat::kInt4:
      bytes = rows * cols / 2;
      break;
    case WeightFormat::kInt8:
      bytes = rows * cols;
      break;
    case WeightFormat::kF32:
      bytes = rows * cols * 4;
      break;
    default:
      bytes = rows * cols * 2;
  }
  if (t.quantized()) {
    const uint64_t groups = rows * cols / static_cast<uint64_t>(t.info.group);
    bytes += groups * 2;
    if (t.info.zero == ZeroKind::kZeroPoints) bytes += groups;
    if (t.info.zero == ZeroKind::kMinimums) bytes += groups * 2;
    if (t.permuted) bytes += cols * 4;
  }
  return t;
}

// The datasets of a tensor; opening one checks it against the description.
class Fields {
 public:
  Fields(const h5::Group& g, const Tensor& t)
      : group_(g),
        tensor_(t),
        rows_(static_cast<uint64_t>(t.info.rows)),
        cols_(static_cast<uint64_t>(t.info.cols)) {}

  h5::Array codes() const {
    const uint64_t wide = std::min(cols_, kChunk);
    switch (tensor_.info.format) {
      case WeightFormat::kInt4:
        return open("codes", h5::Element::kU8, cols_ / 2, wide / 2);
      case WeightFormat::kInt8:
        return open("codes", h5::Element::kI8, cols_, wide);
      case WeightFormat::kF32:
        return open("values", h5::Element::kF32, cols_, wide);
      default:
        return open("values", h5::Element::kU16, cols_, wide);
    }
  }
  h5::Array scales() const { return groups("scales", h5::Element::kU16); }
  h5::Array zeros() const { return groups("zeros", h5::Element::kU8); }
  h5::Array minimums() const { return groups("minimums", h5::Element::kU16); }
  h5::Array permutation() const {
    return h5::Array::matrix(group_, "permutation", h5::Element::kI32,
                             {1, cols_, 1, std::min(cols_, kChunk)});
  }
  std::vector<h5::Array> all() const {
    std::vector<h5::Array> out;
    out.push_back(codes());
    if (tensor_.quantized()) out.push_back(scales());
    if (tensor_.info.zero == ZeroKind::kZeroPoints) out.push_back(zeros());
    if (tensor_.info.zero == ZeroKind::kMinimums) out.push_back(minimums());
    if (tensor_.permuted) out.push_back(permutation());
    return out;
  }

 private:
  h5::Array groups(const char* name, h5::Element e) const {
    const uint64_t count = cols_ / static_cast<uint64_t>(tensor_.info.group);
    return open(name, e, count, std::min(count, kChunk));
  }
  h5::Array open(const char* name, h5::Element e, uint64_t cols, uint64_t chunk_cols) const {
    return h5::Array::matrix(group_, name, e, {rows_, cols, std::min(rows_, kChunk), chunk_cols});
  }
  const h5::Group& group_;
  const Tensor& tensor_;
  uint64_t rows_, cols_;
};

std::vector<int32_t> read_permutation(h5::Array array, int64_t cols, int64_t c0, int64_t c1) {
  auto whole = h5::read_all<int32_t>(array);
  std::vector<bool> seen(static_cast<size_t>(cols));
  for (int32_t p : whole) {
    DROVER_CHECK(p >= 0 && p < cols && !seen[static_cast<size_t>(p)], ExitCode::kBadInput,
                 "{}: is not a permutation of {} columns: {} is out of range or there twice",
                 array.where(), cols, p);
    seen[static_cast<size_t>(p)] = true;
  }
  return {whole.begin() + c0, whole.begin() + c1};
}

class Hdf5ModelStore : public ModelStore {
 public:
  explicit Hdf5ModelStore(const std::string& file)
      : file_(file), root_(h5::Group::open_file(file, "drover-model")) {
    architecture_ = root_.group("architecture").attributes();
    provenance_ = root_.group("provenance").attributes();
    const int64_t vocab = h5::get_int(architecture_, "vocab", file + ": /architecture");
    DROVER_CHECK(vocab >= 1 && vocab <= kMaxVocab, ExitCode::kBadInput,
                 "{}: /architecture: vocab {}; expected 1 to {}", file, vocab, kMaxVocab);
    tokenizer_ = TokenizerGroup(root_, vocab);
    tensor_group_ = root_.group("tensors");
    for (const auto& name : tensor_group_.names(kMaxTensors)) {
      tensors_.emplace(name, read_description(tensor_group_.group(name), name));
      infos_.push_back(tensors_.at(name).info);
    }
  }

  const Attributes& architecture() const override { return architecture_; }
  const Attributes& provenance() const override { return provenance_; }
  const std::vector<TensorInfo>& tensors() const override { return infos_; }
  bool has(const std::string& name) const override { return tensors_.contains(name); }

  WeightTensor read(const std::string& name, int64_t r0, int64_t r1, int64_t c0,
                    int64_t c1) override;

  DecodingTable decoding_table() override {
    h5::Lock lock(h5::mutex());
    return tokenizer_.decoding_table();
  }
  std::string tokenizer_json() override {
    h5::Lock lock(h5::mutex());
    return tokenizer_.json();
  }
  std::string chat_template() override {
    h5::Lock lock(h5::mutex());
    return tokenizer_.chat_template();
  }
  std::string tokenizer_sha256() const override { return tokenizer_.sha256(); }
  std::string fingerprint() const override;
  void verify_all() override;

 private:
  h5::Group group_of(const Tensor& t) const { return tensor_group_.group(t.info.name); }

  std::string file_;
  h5::Group root_;
  h5::Group tensor_group_;
  Attributes architecture_, provenance_;
  TokenizerGroup tokenizer_;
  std::map<std::string, Tensor> tensors_;
  std::vector<TensorInfo> infos_;
  mutable std::string fingerprint_;
};

WeightTensor Hdf5ModelStore::read(const std::string& name, int64_t r0, int64_t r1, int64_t c0,
                                  int64_t c1) {
  const auto found = tensors_.find(name);
  DROVER_CHECK(found != tensors_.end(), ExitCode::kBadInput, "{}: tensor {} is missing", file_,
               name);
  const Tensor& t = found->second;
  const int64_t group = t.quantized() ? t.info.group : 1;
  DROVER_CHECK(0 <= r0 && r0 <= r1 && r1 <= t.info.rows && 0 <= c0 && c0 <= c1 &&
                   c1 <= t.info.cols && c0 % group == 0 && c1 % group == 0,
               ExitCode::kInternal, "{}: rows [{}, {}) and columns [{}, {}) of {} x {}, group {}",
               name, r0, r1, c0, c1, t.info.rows, t.info.cols, t.info.group);
  // HDF5's lock is held to open things; their bytes are read by several threads at once.
  std::unique_lock lock(h5::mutex());
  const h5::Group g = group_of(t);
  const Fields fields(g, t);
  h5::Array codes = fields.codes();
  std::optional<h5::Array> scales, zeros, minimums;
  if (t.quantized()) scales = fields.scales();
  if (t.info.zero == ZeroKind::kZeroPoints) zeros = fields.zeros();
  if (t.info.zero == ZeroKind::kMinimums) minimums = fields.minimums();
  WeightTensor w;
  if (t.permuted) w.permutation = read_permutation(fields.permutation(), t.info.cols, c0, c1);
  lock.unlock();
  w.format = t.info.format;
  w.rows = r1 - r0;
  w.cols = c1 - c0;
  w.group = t.info.group;
  w.zero = t.info.zero;
  w.scale_dtype = t.scale_dtype;
  if (!t.quantized()) {
    const int64_t element = t.info.format == WeightFormat::kF32 ? 4 : 2;
    w.codes.resize(static_cast<size_t>(w.rows * w.cols * element));
    codes.read(r0, r1, c0, c1, w.codes.data());
    return w;
  }
  const int64_t pack = t.info.format == WeightFormat::kInt4 ? 2 : 1;
  w.codes.resize(static_cast<size_t>(w.rows * w.cols / pack));
  codes.read(r0, r1, c0 / pack, c1 / pack, w.codes.data());
  const int64_t g0 = c0 / group, g1 = c1 / group;
  const auto count = static_cast<size_t>(w.rows * (g1 - g0));
  w.scales.resize(count);
  scales->read(r0, r1, g0, g1, w.scales.data());
  if (zeros) {
    w.zeros.resize(count);
    zeros->read(r0, r1, g0, g1, w.zeros.data());
    for (uint8_t z : w.zeros) {
      DROVER_CHECK(z <= 16, ExitCode::kBadInput, "{}: a zero point of {}; 0 to 16 are allowed",
                   zeros->where(), z);
    }
  }
  if (minimums) {
    w.minimums.resize(count);
    minimums->read(r0, r1, g0, g1, w.minimums.data());
  }
  return w;
}

void add_attributes(Sha256& sum, const Attributes& attributes) {
  for (const auto& [name, value] : attributes) {
    std::string text;
    if (const auto* i = std::get_if<int64_t>(&value)) text = fmt::format("{}", *i);
    if (const auto* d = std::get_if<double>(&value)) text = fmt::format("{}", *d);
    if (const auto* s = std::get_if<std::string>(&value)) text = *s;
    if (const auto* v = std::get_if<std::vector<int64_t>>(&value)) {
      text = fmt::format("{}", fmt::join(*v, ","));
    }
    sum.update(fmt::format("{}={}:{};", name, text.size(), text));
  }
}

void add_words(Sha256& sum, const std::vector<uint32_t>& words) {
  std::string bytes;
  for (uint32_t w : words) {
    for (int b = 0; b < 4; ++b) bytes += static_cast<char>(w >> (8 * b));
  }
  sum.update(bytes);
}

std::string Hdf5ModelStore::fingerprint() const {
  h5::Lock lock(h5::mutex());
  if (!fingerprint_.empty()) return fingerprint_;
  Sha256 sum;
  add_attributes(sum, architecture_);
  add_attributes(sum, provenance_);
  sum.update(tokenizer_.sha256());
  std::vector<uint32_t> words;
  tokenizer_.add_checksums(words);
  add_words(sum, words);
  for (const auto& [name, t] : tensors_) {
    sum.update(fmt::format("{}:{}:{}x{}:{};", name, to_string(t.info.format), t.info.rows,
                           t.info.cols, to_string(t.info.zero)));
    const h5::Group g = group_of(t);
    for (auto& array : Fields(g, t).all()) add_words(sum, array.checksums());
  }
  fingerprint_ = sum.hex();
  return fingerprint_;
}

void Hdf5ModelStore::verify_all() {
  h5::Lock lock(h5::mutex());
  tokenizer_.verify_all();
  for (const auto& [name, t] : tensors_) {
    const h5::Group g = group_of(t);
    const Fields fields(g, t);
    for (auto& array : fields.all()) array.verify();
    if (t.info.zero == ZeroKind::kZeroPoints) {
      // read() checks the values; in bands, so that a large tensor need not be held whole.
      for (int64_t row = 0; row < t.info.rows; row += 512) {
        read(name, row, std::min(row + 512, t.info.rows), 0, t.info.cols);
      }
    } else if (t.permuted) {
      read_permutation(fields.permutation(), t.info.cols, 0, t.info.cols);
    }
  }
}

}  // namespace

std::unique_ptr<ModelStore> ModelStore::open(const std::string& file) {
  h5::Lock lock(h5::mutex());
  return std::make_unique<Hdf5ModelStore>(file);
}

}  // namespace drover

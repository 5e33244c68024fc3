#include "store/tokenizer.h"

#include <algorithm>

#include "base/sha256.h"

namespace drover {
namespace {
constexpr uint64_t kMaxJson = uint64_t{256} << 20;
}  // namespace

TokenizerGroup::TokenizerGroup(const h5::Group& root, int64_t vocab)
    : group_(root.group("tokenizer")), vocab_(vocab) {
  const Attributes a = group_.attributes();
  sha256_ = h5::get_string(a, "sha256", group_.where());
  DROVER_CHECK(
      sha256_.size() == 64 && sha256_.find_first_not_of("0123456789abcdef") == std::string::npos,
      ExitCode::kBadInput, "{}: attribute sha256: expected 64 lower-case hex digits",
      group_.where());
  strip_leading_space_ = h5::get_int(a, "strip_leading_space", group_.where()) != 0;
}

std::string TokenizerGroup::json() const {
  auto array = h5::Array::vector(group_, "tokenizer_json", h5::Element::kU8, kMaxJson);
  std::string text = h5::read_text(array);
  DROVER_CHECK(text.empty() || sha256_hex(text) == sha256_, ExitCode::kBadInput,
               "{}: its SHA-256 is {}, attribute sha256 says {}; import the file again",
               array.where(), sha256_hex(text), sha256_);
  return text;
}

std::string TokenizerGroup::chat_template() const {
  auto array = h5::Array::vector(group_, "chat_template", h5::Element::kU8, h5::kMaxString);
  return h5::read_text(array);
}

h5::Array TokenizerGroup::pieces() const {
  return h5::Array::vector(group_, "pieces", h5::Element::kU8, kMaxJson);
}

DecodingTable TokenizerGroup::decoding_table() const {
  const auto vocab = static_cast<uint64_t>(vocab_);
  auto bytes_array = pieces();
  auto offset_array = h5::Array::vector_of(group_, "offsets", h5::Element::kU32, vocab + 1);
  auto special_array = h5::Array::vector_of(group_, "special", h5::Element::kU8, vocab);
  const std::string bytes = h5::read_text(bytes_array);
  const auto offsets = h5::read_all<uint32_t>(offset_array);
  DROVER_CHECK(offsets.front() == 0 && offsets.back() == bytes.size() &&
                   std::is_sorted(offsets.begin(), offsets.end()),
               ExitCode::kBadInput, "{}: expected to rise from 0 to the {} bytes of pieces",
               offset_array.where(), bytes.size());
  DecodingTable out;
  out.special = h5::read_all<uint8_t>(special_array);
  out.strip_leading_space = strip_leading_space_;
  out.pieces.reserve(vocab);
  for (uint64_t i = 0; i < vocab; ++i) {
    out.pieces.emplace_back(bytes, offsets[i], offsets[i + 1] - offsets[i]);
  }
  return out;
}

void TokenizerGroup::verify_all() const {
  json();
  chat_template();
  decoding_table();
}

void TokenizerGroup::add_checksums(std::vector<uint32_t>& sums) const {
  const auto vocab = static_cast<uint64_t>(vocab_);
  h5::Array arrays[] = {
      h5::Array::vector(group_, "tokenizer_json", h5::Element::kU8, kMaxJson),
      h5::Array::vector(group_, "chat_template", h5::Element::kU8, h5::kMaxString),
      pieces(),
      h5::Array::vector_of(group_, "offsets", h5::Element::kU32, vocab + 1),
      h5::Array::vector_of(group_, "special", h5::Element::kU8, vocab),
  };
  for (auto& a : arrays) sums.insert(sums.end(), a.checksums().begin(), a.checksums().end());
}

}  // namespace drover

// The /tokenizer group, which stores and datasets share. Private to the store room.
#pragma once

#include <string>

#include "store/h5.h"

namespace drover {

class TokenizerGroup {
 public:
  TokenizerGroup() = default;
  // Reads the attributes only.
  TokenizerGroup(const h5::Group& root, int64_t vocab);
  const std::string& sha256() const { return sha256_; }
  std::string json() const;  // verified against sha256 unless empty
  std::string chat_template() const;
  DecodingTable decoding_table() const;
  void verify_all() const;
  // All stored checksums, in a fixed order.
  void add_checksums(std::vector<uint32_t>& sums) const;

 private:
  h5::Array pieces() const;
  h5::Group group_;
  int64_t vocab_ = 0;
  std::string sha256_;
  bool strip_leading_space_ = false;
};

}  // namespace drover

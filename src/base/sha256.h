// SHA-256 (FIPS 180-4), through OpenSSL's libcrypto. The one room that includes OpenSSL.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace drover {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  void update(const void* data, size_t bytes);
  void update(std::string_view text) { update(text.data(), text.size()); }
  // 64 lower-case hex digits. Ends the digest: call once.
  std::string hex();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string sha256_hex(std::string_view bytes);
// Of a whole file, read piecewise. Throws kBadInput when it cannot be read.
std::string sha256_file(const std::string& file);

}  // namespace drover

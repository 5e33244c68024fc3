#include "base/sha256.h"

#include <openssl/evp.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <vector>

#include "base/error.h"

namespace drover {

struct Sha256::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  ~State() { EVP_MD_CTX_free(context); }
};

Sha256::Sha256() : state_(std::make_unique<State>()) {
  DROVER_CHECK(
      state_->context != nullptr && EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr) == 1,
      ExitCode::kEnvironment, "libcrypto cannot start a SHA-256 digest");
}

Sha256::~Sha256() = default;

void Sha256::update(const void* data, size_t bytes) {
  DROVER_CHECK(EVP_DigestUpdate(state_->context, data, bytes) == 1, ExitCode::kInternal,
               "libcrypto: SHA-256 update failed");
}

std::string Sha256::hex() {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int size = 0;
  DROVER_CHECK(EVP_DigestFinal_ex(state_->context, digest.data(), &size) == 1, ExitCode::kInternal,
               "libcrypto: SHA-256 end failed");
  std::string out;
  for (unsigned int i = 0; i < size; ++i) out += fmt::format("{:02x}", digest[i]);
  return out;
}

std::string sha256_hex(std::string_view bytes) {
  Sha256 sum;
  sum.update(bytes);
  return sum.hex();
}

std::string sha256_file(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  DROVER_CHECK(in.good(), ExitCode::kBadInput, "cannot open {}: {}", file, std::strerror(errno));
  Sha256 sum;
  std::vector<char> buffer(1 << 20);
  while (in) {
    in.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    sum.update(buffer.data(), static_cast<size_t>(in.gcount()));
  }
  DROVER_CHECK(in.eof(), ExitCode::kBadInput, "cannot read {}: {}", file, std::strerror(errno));
  return sum.hex();
}

}  // namespace drover

#include "base/json.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "base/error.h"

namespace drover {
namespace {

[[noreturn]] void fail_write(const std::string& file, const char* step) {
  DROVER_FAIL(ExitCode::kEnvironment, "cannot write {}: {}: {}; check the folder and free space",
              file, step, std::strerror(errno));
}

// The name is on disk only after its folder is. Some file systems refuse this; the data are safe.
void sync_folder(const std::string& file) {
  const auto folder = std::filesystem::path(file).parent_path();
  const int fd = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);
  ::close(fd);
}

}  // namespace

void write_json(const std::string& file, const Json& value) {
  const std::string temporary = file + ".tmp";
  // Log text may hold bytes that are not UTF-8; a result is written all the same.
  const std::string text = value.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  std::FILE* out = std::fopen(temporary.c_str(), "we");
  if (out == nullptr) fail_write(file, "opening its temporary file");
  bool good = std::fwrite(text.data(), 1, text.size(), out) == text.size();
  good = std::fflush(out) == 0 && good;
  good = ::fsync(::fileno(out)) == 0 && good;
  int error = errno;
  if (std::fclose(out) != 0 && good) {
    good = false;
    error = errno;
  }
  if (!good) {
    ::unlink(temporary.c_str());
    errno = error;
    fail_write(file, "writing");
  }
  if (std::rename(temporary.c_str(), file.c_str()) != 0) {
    error = errno;
    ::unlink(temporary.c_str());
    errno = error;
    fail_write(file, "renaming the temporary file");
  }
  sync_folder(file);
}

Json read_json(const std::string& file) {
  std::ifstream in(file);
  DROVER_CHECK(in.good(), ExitCode::kBadInput, "cannot open {}: {}", file, std::strerror(errno));
  try {
    return Json::parse(in);
  } catch (const Json::exception& e) {
    DROVER_FAIL(ExitCode::kBadInput, "{} is not valid JSON: {}", file, e.what());
  }
}

}  // namespace drover

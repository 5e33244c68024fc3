#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>

#include "base/error.h"
#include "store/store.h"

namespace drover {
namespace fs = std::filesystem;
namespace {

// Some file systems keep times in whole seconds.
bool same_time(fs::file_time_type a, fs::file_time_type b) {
  const auto apart = a > b ? a - b : b - a;
  return apart < std::chrono::seconds(1);
}

constexpr std::chrono::minutes kLongestCopy{30};

// Held by the process that copies. The file stays: removing it would let two copy at once.
class HostLock {
 public:
  explicit HostLock(const std::string& file)
      : fd_(::open(file.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0666)) {
    DROVER_CHECK(fd_ >= 0, ExitCode::kEnvironment, "cannot open {}: {}", file,
                 std::strerror(errno));
    // A file system without locks: all copy, each under a temporary name of its own.
    const auto deadline = std::chrono::steady_clock::now() + kLongestCopy;
    while (::flock(fd_, LOCK_EX | LOCK_NB) != 0 && (errno == EINTR || errno == EWOULDBLOCK)) {
      DROVER_CHECK(std::chrono::steady_clock::now() < deadline, ExitCode::kEnvironment,
                   "{} is held by another process for half an hour: is a copy stuck?", file);
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
  ~HostLock() { ::close(fd_); }
  HostLock(const HostLock&) = delete;
  HostLock& operator=(const HostLock&) = delete;

 private:
  int fd_;
};

}  // namespace

std::string stage_file(const std::string& file, const std::string& dir) {
  DROVER_CHECK(fs::is_regular_file(file), ExitCode::kBadInput, "{}: no such file to stage", file);
  fs::path temporary;
  try {
    fs::create_directories(dir);
    const uint64_t bytes = fs::file_size(file);
    const auto time = fs::last_write_time(file);
    const fs::path copy = fs::path(dir) / fs::path(file).filename();
    if (fs::exists(copy) && fs::equivalent(copy, file)) return file;
    const HostLock lock(fmt::format("{}.lock", copy.string()));
    if (fs::exists(copy) && fs::file_size(copy) == bytes &&
        same_time(fs::last_write_time(copy), time)) {
      return copy.string();
    }
    const uint64_t available = fs::space(dir).available;
    DROVER_CHECK(available >= bytes, ExitCode::kEnvironment,
                 "staging {}: {} has {:.2f} GB free and {:.2f} GB are needed; make room or give "
                 "another --stage folder",
                 file, dir, available * 1e-9, bytes * 1e-9);
    temporary = fmt::format("{}.{}.tmp", copy.string(), ::getpid());
    fs::copy_file(file, temporary, fs::copy_options::overwrite_existing);
    DROVER_CHECK(fs::file_size(temporary) == bytes, ExitCode::kEnvironment,
                 "staging {}: the copy has {} bytes, expected {}; did the file change?", file,
                 fs::file_size(temporary), bytes);
    fs::last_write_time(temporary, time);
    fs::rename(temporary, copy);
    return copy.string();
  } catch (const std::exception& e) {
    std::error_code ignored;
    if (!temporary.empty()) fs::remove(temporary, ignored);
    if (dynamic_cast<const Error*>(&e) != nullptr) throw;
    DROVER_FAIL(ExitCode::kEnvironment, "staging {} into {}: {}", file, dir, e.what());
  }
}

}  // namespace drover

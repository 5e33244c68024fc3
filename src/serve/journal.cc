#include "serve/journal.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace drover {

Journal::Journal(const std::string& file, const std::vector<std::string>& lines) : file_(file) {
  const std::string temporary = file + ".tmp";
  fd_ = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
  DROVER_CHECK(fd_ >= 0, ExitCode::kEnvironment,
               "{}: cannot be created: {}; choose another --out folder", file, strerror(errno));
  try {
    for (const auto& line : lines) append(line);
    sync();
    DROVER_CHECK(::rename(temporary.c_str(), file.c_str()) == 0, ExitCode::kEnvironment,
                 "{}: cannot be renamed from {}: {}", file, temporary, strerror(errno));
  } catch (const Error&) {
    ::close(fd_);
    throw;
  }
}

Journal::~Journal() {
  if (fd_ >= 0) ::close(fd_);
}

void Journal::append(std::string line) {
  line += '\n';
  size_t done = 0;
  while (done < line.size()) {
    const ssize_t n = ::write(fd_, line.data() + done, line.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int why = errno;
      // What comes later must not be joined to half a line.
      const bool undone = ::ftruncate(fd_, whole_) == 0;
      DROVER_FAIL(ExitCode::kEnvironment,
                  "{}: writing a finished sample failed: {}; free some space or choose another "
                  "--out folder (the samples before it are kept{})",
                  file_, strerror(why), undone ? "" : ", behind them stands a torn line");
    }
    done += static_cast<size_t>(n);
  }
  whole_ += static_cast<off_t>(line.size());
  unsynced_ = true;
}

void Journal::sync() {
  if (!unsynced_.exchange(false)) return;
  DROVER_CHECK(::fsync(fd_) == 0, ExitCode::kEnvironment, "{}: fsync failed: {}; check the disk",
               file_, strerror(errno));
}

void sync_path(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  DROVER_CHECK(fd >= 0, ExitCode::kEnvironment, "{}: cannot be opened: {}; check the --out folder",
               path, strerror(errno));
  const int rc = ::fsync(fd);
  const int why = errno;
  ::close(fd);
  // Some file systems cannot sync a folder: EINVAL tells so, and there is nothing to wait for.
  DROVER_CHECK(rc == 0 || why == EINVAL, ExitCode::kEnvironment,
               "{}: fsync failed: {}; check the "
               "disk",
               path, strerror(why));
}

}  // namespace drover

#include "serve/journal.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace drover {

Journal::Journal(const std::string& file) : file_(file) {
  fd_ = ::open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
  DROVER_CHECK(fd_ >= 0, ExitCode::kEnvironment,
               "{}: cannot be created: {}; choose another --out folder", file, strerror(errno));
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
    DROVER_CHECK(n > 0, ExitCode::kEnvironment,
                 "{}: writing a finished sample failed: {}; free some space or choose another "
                 "--out folder",
                 file_, strerror(errno));
    done += static_cast<size_t>(n);
  }
}

void Journal::sync() {
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

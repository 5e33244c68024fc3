// One JSON line for every finished sample, on disk as it completes: LoadGen's own accuracy log is
// valid only once it was shut down. After a kill, all lines up to the last newline are good.
#pragma once

#include <string>

namespace drover {

class Journal {
 public:
  // Creates or truncates. Throws kEnvironment.
  explicit Journal(const std::string& file);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;
  // Appends the line and its newline with one write. Throws kEnvironment (a full disk).
  void append(std::string line);
  // To the disk itself. Throws kEnvironment.
  void sync();

 private:
  std::string file_;
  int fd_ = -1;
};

// Flushes a file that somebody else wrote, or a folder, to the disk. Throws kEnvironment.
void sync_path(const std::string& path);

}  // namespace drover

// One JSON line for every finished sample, on disk as it completes: LoadGen's own accuracy log is
// valid only once it was shut down. After a kill, all lines up to the last newline are good.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <string>
#include <vector>

namespace drover {

class Journal {
 public:
  // Creates or replaces the file with these lines, all of them or (after a kill) as it was. Throws
  // kEnvironment.
  explicit Journal(const std::string& file, const std::vector<std::string>& lines = {});
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;
  // Appends the line and its newline with one write. Throws kEnvironment (a full disk), and takes
  // back what of the line was written.
  void append(std::string line);
  // To the disk itself, if there is something new. Throws kEnvironment. From any thread.
  void sync();

 private:
  std::string file_;
  int fd_ = -1;
  off_t whole_ = 0;  // bytes of whole lines
  std::atomic<bool> unsynced_{false};
};

// Flushes a file that somebody else wrote, or a folder, to the disk. Throws kEnvironment.
void sync_path(const std::string& path);

}  // namespace drover

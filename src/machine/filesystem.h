// The file system under a path.
#pragma once

#include <cstdint>
#include <string>

namespace drover {

struct FileSystem {
  std::string type;              // "ext4", "nfs", "lustre", ...; a number where it is not known
  bool shared = false;           // between hosts
  uint64_t total = 0, free = 0;  // bytes, free to this user
};
// Of the path, or of the nearest folder above it that is there. May wait long where a server does
// not answer: call it with a deadline. Throws kEnvironment.
FileSystem file_system_of(const std::string& path);

}  // namespace drover

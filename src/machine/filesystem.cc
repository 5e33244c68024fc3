#include "machine/filesystem.h"

#include <sys/vfs.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <map>

#include "base/error.h"

namespace drover {

namespace {

// linux/magic.h, and for those outside of the kernel their own sources.
struct Known {
  const char* name;
  bool shared;
};
const std::map<uint32_t, Known>& known() {
  static const std::map<uint32_t, Known> all{
      {0xef53, {"ext4", false}},      {0x58465342, {"xfs", false}},
      {0x9123683e, {"btrfs", false}}, {0x2fc12fc1, {"zfs", false}},
      {0x01021994, {"tmpfs", false}}, {0x794c7630, {"overlay", false}},
      {0x6969, {"nfs", true}},        {0x0bd00bd0, {"lustre", true}},
      {0x47504653, {"gpfs", true}},   {0x19830326, {"beegfs", true}},
      {0x00c36400, {"ceph", true}},   {0xff534d42, {"cifs", true}},
      {0xfe534d42, {"smb", true}},    {0x01021997, {"9p", true}},
      {0xaad7aaea, {"panfs", true}},  {0x65735546, {"fuse", true}},
      {0x5346414f, {"afs", true}},    {0x73717368, {"squashfs", false}},
  };
  return all;
}

}  // namespace

FileSystem file_system_of(const std::string& path) {
  std::error_code error;
  auto place = std::filesystem::absolute(path, error);
  while (!std::filesystem::exists(place, error) && place.has_relative_path()) {
    place = place.parent_path();
  }
  struct statfs info {};
  DROVER_CHECK(::statfs(place.c_str(), &info) == 0, ExitCode::kEnvironment, "{}: {}",
               place.string(), std::strerror(errno));
  FileSystem fs;
  const auto type = static_cast<uint32_t>(info.f_type);
  const auto found = known().find(type);
  fs.type = found != known().end() ? found->second.name : fmt::format("type {:#x}", type);
  fs.shared = found != known().end() && found->second.shared;
  const auto block = static_cast<uint64_t>(info.f_bsize);
  fs.total = info.f_blocks * block;
  fs.free = info.f_bavail * block;
  return fs;
}

}  // namespace drover

#include "base/host.h"

#include <hwloc.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>

namespace drover {

std::string hostname() {
  std::array<char, 256> name{};
  if (::gethostname(name.data(), name.size() - 1) != 0) return "unknown";
  return name.data();
}

std::string cpu_model() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    // x86 says "model name", some others "Model" or "cpu".
    if (!line.starts_with("model name") && !line.starts_with("Model") &&
        !line.starts_with("cpu\t")) {
      continue;
    }
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    if (begin != std::string::npos) return line.substr(begin);
  }
  return "unknown";
}

uint64_t memory_total_bytes() {
  const long pages = ::sysconf(_SC_PHYS_PAGES);
  const long size = ::sysconf(_SC_PAGESIZE);
  return pages > 0 && size > 0 ? static_cast<uint64_t>(pages) * static_cast<uint64_t>(size) : 0;
}

uint64_t peak_rss_bytes() {
  struct rusage usage {};
  if (::getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

namespace {

// hwloc's view of this machine; loading it takes milliseconds, so once.
class Topology {
 public:
  Topology() {
    good_ = hwloc_topology_init(&topology_) == 0 && hwloc_topology_load(topology_) == 0;
  }
  ~Topology() {
    if (topology_ != nullptr) hwloc_topology_destroy(topology_);
  }
  Topology(const Topology&) = delete;
  Topology& operator=(const Topology&) = delete;

  int all(hwloc_obj_type_t kind) const {
    return good_ ? hwloc_get_nbobjs_by_type(topology_, kind) : 0;
  }
  // Objects of a kind that this process's affinity touches.
  int touched(hwloc_obj_type_t kind) const {
    if (!good_) return 0;
    hwloc_bitmap_t mine = hwloc_bitmap_alloc();
    int count = 0;
    if (hwloc_get_cpubind(topology_, mine, HWLOC_CPUBIND_PROCESS) == 0) {
      for (hwloc_obj_t o = nullptr;
           (o = hwloc_get_next_obj_by_type(topology_, kind, o)) != nullptr;) {
        count += hwloc_bitmap_intersects(o->cpuset, mine) != 0 ? 1 : 0;
      }
    }
    hwloc_bitmap_free(mine);
    return count;
  }

 private:
  hwloc_topology_t topology_ = nullptr;
  bool good_ = false;
};

}  // namespace

int host_cores() {
  const Topology topology;
  return std::max(1, topology.all(HWLOC_OBJ_CORE));
}

int usable_cores() {
  // Hardware threads of one core share its vector units: one thread a core is what linears want.
  const Topology topology;
  const int cores = topology.touched(HWLOC_OBJ_CORE);
  return std::max(1, cores > 0 ? cores : topology.touched(HWLOC_OBJ_PU));
}

}  // namespace drover

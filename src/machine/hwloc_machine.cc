// hwloc's part: sockets, NUMA nodes, cores, and where GPUs and NICs hang on the PCI tree.
#include <hwloc.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>

#include "base/error.h"
#include "base/host.h"
#include "machine/machine.h"

namespace drover {

namespace {

struct Release {
  void operator()(hwloc_topology_t t) const { hwloc_topology_destroy(t); }
};
using Topology = std::unique_ptr<hwloc_topology, Release>;

void check(int code, const char* what) {
  DROVER_CHECK(code == 0, ExitCode::kEnvironment,
               "hwloc: {} failed: this host cannot be looked at (is /sys mounted?)", what);
}

// `xml` empty: this host, or what hwloc's own variables say.
Topology load(const std::string& xml) {
  hwloc_topology_t raw = nullptr;
  check(hwloc_topology_init(&raw), "hwloc_topology_init");
  Topology t(raw);
  // Those that would start a GPU's or a display's library for things nobody here asks, and the one
  // that binds this thread to each processor in turn: Linux tells the same.
  for (const char* name : {"opencl", "gl", "cuda", "nvml", "rsmi", "levelzero", "x86"}) {
    hwloc_topology_set_components(raw, HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST, name);
  }
  // Also what a container or batch system denies: shares are reckoned with the whole host in view.
  check(hwloc_topology_set_flags(raw, HWLOC_TOPOLOGY_FLAG_INCLUDE_DISALLOWED), "set_flags");
  check(hwloc_topology_set_io_types_filter(raw, HWLOC_TYPE_FILTER_KEEP_IMPORTANT), "set_io_types");
  if (!xml.empty()) {
    DROVER_CHECK(
        hwloc_topology_set_xmlbuffer(raw, xml.c_str(), static_cast<int>(xml.size() + 1)) == 0,
        ExitCode::kBadInput, "hwloc cannot read this XML description of a machine");
  }
  const int code = hwloc_topology_load(raw);
  DROVER_CHECK(xml.empty() || code == 0, ExitCode::kBadInput,
               "hwloc cannot read this XML description of a machine");
  check(code, "hwloc_topology_load");
  return t;
}

CpuSet cpus_of(hwloc_const_bitmap_t bitmap) {
  CpuSet cpus;
  if (bitmap == nullptr) return cpus;
  for (int i = hwloc_bitmap_first(bitmap); i >= 0; i = hwloc_bitmap_next(bitmap, i)) {
    DROVER_CHECK(static_cast<size_t>(i) < kMostCpus, ExitCode::kEnvironment,
                 "this host numbers processors up to {}, drover knows {}", i, kMostCpus);
    cpus.set(static_cast<size_t>(i));
  }
  return cpus;
}

// The NUMA node that an object hangs on; -1 where it hangs on several.
int numa_of(hwloc_obj_t o) {
  while (o != nullptr && o->nodeset == nullptr) o = o->parent;
  return o != nullptr && hwloc_bitmap_weight(o->nodeset) == 1 ? hwloc_bitmap_first(o->nodeset) : -1;
}

std::vector<Core> cores_of(hwloc_topology_t t) {
  // Some machines (and containers) tell no cores: then each processor is one.
  const auto type = hwloc_get_nbobjs_by_type(t, HWLOC_OBJ_CORE) > 0 ? HWLOC_OBJ_CORE : HWLOC_OBJ_PU;
  std::vector<Core> cores;
  for (hwloc_obj_t o = nullptr; (o = hwloc_get_next_obj_by_type(t, type, o)) != nullptr;) {
    const hwloc_obj_t socket = hwloc_get_ancestor_obj_by_type(t, HWLOC_OBJ_PACKAGE, o);
    cores.push_back({.socket = socket != nullptr ? static_cast<int>(socket->logical_index) : 0,
                     .numa = std::max(0, numa_of(o)),
                     .cpus = cpus_of(o->cpuset)});
  }
  return cores;
}

void read_numa(hwloc_topology_t t, Machine& m) {
  std::map<unsigned, size_t> place;  // logical index -> place in numa_nodes
  for (hwloc_obj_t o = nullptr;
       (o = hwloc_get_next_obj_by_type(t, HWLOC_OBJ_NUMANODE, o)) != nullptr;) {
    place[o->logical_index] = m.numa_nodes.size();
    m.numa_nodes.push_back(static_cast<int>(o->os_index));
    m.memory += o->attr->numanode.local_memory;
  }
  unsigned count = 1;
  hwloc_distances_s* d = nullptr;
  if (hwloc_distances_get_by_type(t, HWLOC_OBJ_NUMANODE, &count, &d, HWLOC_DISTANCES_KIND_FROM_OS,
                                  0) != 0 ||
      count == 0 || d == nullptr) {
    return;
  }
  if (d->nbobjs == m.numa_nodes.size()) {
    m.numa_distances.assign(d->nbobjs, std::vector<uint64_t>(d->nbobjs));
    for (unsigned i = 0; i < d->nbobjs; ++i) {
      for (unsigned j = 0; j < d->nbobjs; ++j) {
        m.numa_distances[place[d->objs[i]->logical_index]][place[d->objs[j]->logical_index]] =
            d->values[i * d->nbobjs + j];
      }
    }
  }
  hwloc_distances_release(t, d);
}

std::string address_of(hwloc_obj_t o) {
  const auto& p = o->attr->pcidev;
  return fmt::format("{:04x}:{:02x}:{:02x}.{:x}", p.domain, p.bus, p.dev, p.func);
}

hwloc_obj_t pci_device(hwloc_topology_t t, const std::string& address) {
  for (hwloc_obj_t o = nullptr; (o = hwloc_get_next_pcidev(t, o)) != nullptr;) {
    if (address_of(o) == address) return o;
  }
  return nullptr;
}

// hwloc's own common ancestor does not know I/O objects.
Nearness nearness(hwloc_obj_t a, hwloc_obj_t b) {
  if (a == nullptr || b == nullptr) return Nearness::kSystem;
  std::vector<hwloc_obj_t> above;
  for (hwloc_obj_t o = a; o != nullptr; o = o->parent) above.push_back(o);
  hwloc_obj_t common = b;
  while (std::find(above.begin(), above.end(), common) == above.end()) common = common->parent;
  if (common->type == HWLOC_OBJ_BRIDGE &&
      common->attr->bridge.upstream_type == HWLOC_OBJ_BRIDGE_HOST) {
    return Nearness::kHostBridge;
  }
  if (common->type == HWLOC_OBJ_BRIDGE || common->type == HWLOC_OBJ_PCI_DEVICE) {
    return Nearness::kSwitch;
  }
  return numa_of(common) >= 0 ? Nearness::kNuma : Nearness::kSystem;
}

// The kernel's word on a device: first line of a file under /sys, or nothing.
std::string line_of(const std::string& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

double leading_number(const std::string& text) {
  try {
    return std::stod(text);
  } catch (const std::exception&) {
    return 0;
  }
}

// What hwloc does not tell of a NIC of this host.
void ask_kernel(Nic& n) {
  if (n.fabric) {
    const std::string port = "/sys/class/infiniband/" + n.name + "/ports/1/";
    n.up = line_of(port + "state").find("ACTIVE") != std::string::npos;
    n.gbits = leading_number(line_of(port + "rate"));  // "400 Gb/sec (4X NDR)"
    return;
  }
  const std::string base = "/sys/class/net/" + n.interface + "/";
  n.up = line_of(base + "operstate") == "up";
  n.gbits = std::max(0.0, leading_number(line_of(base + "speed"))) / 1000;  // Mbit/s; -1: unknown
}

// One entry a PCI device: a fabric's name before its interface's.
std::vector<Nic> nics_of(hwloc_topology_t t, bool this_host, std::vector<hwloc_obj_t>& places) {
  std::vector<Nic> nics;
  for (hwloc_obj_t o = nullptr; (o = hwloc_get_next_osdev(t, o)) != nullptr;) {
    const auto type = o->attr->osdev.type;
    if (type != HWLOC_OBJ_OSDEV_NETWORK && type != HWLOC_OBJ_OSDEV_OPENFABRICS) continue;
    const bool fabric = type == HWLOC_OBJ_OSDEV_OPENFABRICS;
    hwloc_obj_t device = o->parent;
    while (device != nullptr && device->type != HWLOC_OBJ_PCI_DEVICE) device = device->parent;
    const auto known = std::find(places.begin(), places.end(), device);
    Nic* n = nullptr;
    if (device != nullptr && known != places.end()) {
      n = &nics[static_cast<size_t>(known - places.begin())];
    } else {
      places.push_back(device);
      n = &nics.emplace_back();
      n->pci = device != nullptr ? address_of(device) : "";
      n->numa = numa_of(o);
    }
    if (fabric || n->name.empty()) n->name = o->name;
    if (fabric) n->fabric = true;
    if (!fabric && n->interface.empty()) n->interface = o->name;
    // Of another machine only this is known.
    const char* state = hwloc_obj_get_info_by_name(o, "Port1State");
    if (!this_host) n->up = n->up || state == nullptr || std::string(state) == "4";
  }
  if (this_host) {
    for (Nic& n : nics) ask_kernel(n);
  }
  return nics;
}

// Interfaces of this host that hwloc does not know, as they hang on no PCI bus.
void add_other_nics(Machine& m, std::vector<hwloc_obj_t>& places) {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/class/net", error)) {
    const std::string name = entry.path().filename();
    const bool known = std::any_of(m.nics.begin(), m.nics.end(),
                                   [&](const Nic& n) { return n.interface == name; });
    if (known || !std::filesystem::exists(entry.path() / "device", error)) continue;
    Nic n;
    n.name = n.interface = name;
    ask_kernel(n);
    m.nics.push_back(n);
    places.push_back(nullptr);
  }
}

Machine describe(hwloc_topology_t t, DriverView driver) {
  Machine m;
  m.this_host = hwloc_topology_is_thissystem(t) != 0;
  m.cores = cores_of(t);
  m.sockets = std::max(1, hwloc_get_nbobjs_by_type(t, HWLOC_OBJ_PACKAGE));
  read_numa(t, m);
  // Nodes tell what is there at the moment, which a virtual machine may change.
  if (m.this_host) m.memory = memory_total_bytes();
  m.driver = std::move(driver);
  for (hwloc_obj_t o = nullptr; (o = hwloc_get_next_pcidev(t, o)) != nullptr;) {
    // NVIDIA's display and 3D controllers.
    if (o->attr->pcidev.vendor_id == 0x10de && (o->attr->pcidev.class_id >> 8) == 0x03)
      ++m.pci_gpus;
  }
  std::vector<hwloc_obj_t> nics, gpus;
  m.nics = nics_of(t, m.this_host, nics);
  if (m.this_host) add_other_nics(m, nics);
  const CpuSet all = cpus_of(hwloc_get_root_obj(t)->cpuset);
  for (Gpu& g : m.driver.gpus) {
    const hwloc_obj_t device = pci_device(t, g.pci);
    gpus.push_back(device);
    g.numa = numa_of(device);
    g.near = device != nullptr ? cpus_of(hwloc_get_non_io_ancestor_obj(t, device)->cpuset) : all;
    if (g.near.none()) g.near = all;
    auto& row = m.gpu_nic.emplace_back();
    for (const hwloc_obj_t n : nics) row.push_back(nearness(device, n));
  }
  for (size_t a = 0; a < gpus.size(); ++a) {
    for (size_t b = 0; b < gpus.size(); ++b) {
      m.driver.links[a][b].pci = nearness(gpus[a], gpus[b]);
    }
  }
  DROVER_CHECK(!m.cores.empty(), ExitCode::kEnvironment, "hwloc sees no processor on this host");
  return m;
}

}  // namespace

const Machine& this_machine() {
  static const Machine machine = describe(load("").get(), ask_driver());
  return machine;
}

Machine machine_from_xml(const std::string& xml, DriverView driver) {
  return describe(load(xml).get(), std::move(driver));
}

std::string synthetic_xml(const std::string& description) {
  hwloc_topology_t raw = nullptr;
  check(hwloc_topology_init(&raw), "hwloc_topology_init");
  const Topology t(raw);
  DROVER_CHECK(hwloc_topology_set_synthetic(raw, description.c_str()) == 0, ExitCode::kBadInput,
               "'{}' is no description of hwloc's (pack:2 numa:1 core:4 pu:2)", description);
  check(hwloc_topology_load(raw), "hwloc_topology_load");
  char* text = nullptr;
  int length = 0;
  check(hwloc_topology_export_xmlbuffer(raw, &text, &length, 0), "export_xmlbuffer");
  std::string xml(text);
  hwloc_free_xmlbuffer(raw, text);
  return xml;
}

const char* name_of(Nearness n) {
  switch (n) {
    case Nearness::kSwitch:
      return "switch";
    case Nearness::kHostBridge:
      return "host bridge";
    case Nearness::kNuma:
      return "NUMA node";
    case Nearness::kSystem:
      break;
  }
  return "system";
}

std::string hwloc_version() {
  const unsigned v = hwloc_get_api_version();
  return fmt::format("{}.{}.{}", v >> 16, v >> 8 & 0xff, v & 0xff);
}

}  // namespace drover

// What this host has, and how far its parts are from each other, as hwloc and NVML see it. The only
// room that includes hwloc; NVML is looked up when asked for, so that drover starts without a
// driver.
#pragma once

#include <bitset>
#include <cstdint>
#include <string>
#include <vector>

namespace drover {

// Logical processors by the system's number. More than 4096 on one host are an error
// (kEnvironment).
inline constexpr size_t kMostCpus = 4096;
using CpuSet = std::bitset<kMostCpus>;
std::string cpu_list(const CpuSet& cpus);        // "0-3,8"; "none"
CpuSet parse_cpu_list(const std::string& text);  // its reverse; throws kBadInput

struct Core {
  int socket = 0;  // numbered from 0
  int numa = 0;    // the system's number of its NUMA node
  CpuSet cpus;     // its hardware threads
};

// How two devices reach each other, nearest first (nvidia-smi calls them PIX or PXB, PHB, NODE,
// SYS).
enum class Nearness { kSwitch, kHostBridge, kNuma, kSystem };
const char* name_of(Nearness n);  // "switch", "host bridge", "NUMA node", "system"

struct Gpu {
  std::string uuid;  // "GPU-...", as NVML writes it
  std::string name;
  std::string pci;      // "0000:3b:00.0"
  uint64_t memory = 0;  // bytes
  int capability = 0;   // 90 for 9.0
  int numa = -1;        // the nearest NUMA node; -1: the host does not tell
  CpuSet near;          // processors of that node (all, where it is not known)
};

struct Nic {
  std::string name;       // "mlx5_0", "eth0"
  std::string interface;  // "eth0"; empty where a fabric has none
  std::string pci;        // empty: not on PCI
  bool fabric = false;    // InfiniBand or RoCE
  bool up = false;
  double gbits = 0;  // of the link, each way; 0: not told
  int numa = -1;
};

// What joins two GPUs.
struct GpuLink {
  int nvlinks = 0;           // that lead to the other, directly or over a switch
  double nvlink_gbytes = 0;  // GB/s each way, all of them together; 0: not told
  bool peer = false;         // NVML says that each can read the other's memory
  Nearness pci = Nearness::kSystem;
};

// Of NVML alone; the distances between GPU and host are hwloc's.
struct DriverView {
  std::string problem;                      // why there are no GPUs to be seen; empty otherwise
  std::string driver;                       // "580.65.06"
  int cuda = 0;                             // newest CUDA of the driver: 13000
  std::vector<Gpu> gpus;                    // in the order of their PCI addresses
  std::vector<std::vector<GpuLink>> links;  // [gpu][gpu], without `pci`
};

struct Machine {
  // False: hwloc was told of another machine (HWLOC_XMLFILE, HWLOC_SYNTHETIC): nothing may be
  // bound.
  bool this_host = true;
  int sockets = 1;
  std::vector<int> numa_nodes;                        // the system's numbers
  uint64_t memory = 0;                                // bytes
  std::vector<Core> cores;                            // in hwloc's order: neighbours share caches
  std::vector<std::vector<uint64_t>> numa_distances;  // as numa_nodes; empty: not told
  DriverView driver;                                  // its GPUs with what hwloc adds
  int pci_gpus = 0;                                   // NVIDIA's on the bus, driver or not
  std::vector<Nic> nics;
  std::vector<std::vector<Nearness>> gpu_nic;  // [gpu][nic]

  const std::vector<Gpu>& gpus() const { return driver.gpus; }
  const Gpu* gpu(const std::string& uuid) const;  // null: none such
  std::vector<int> numa_of(const CpuSet& cpus) const;
  int cores_in(const CpuSet& cpus) const;  // that have a hardware thread in it
};

// Of this host. Takes some ten milliseconds: once a process. Throws kEnvironment.
const Machine& this_machine();
// From hwloc's XML (a text, not a file) and what a driver would say: for tests and other hosts.
Machine machine_from_xml(const std::string& xml, DriverView driver);
// hwloc's short form, such as "pack:2 numa:1 core:4 pu:2", as XML.
std::string synthetic_xml(const std::string& description);

DriverView ask_driver();  // NVML; DROVER_NVML names its library
std::string hwloc_version();

// The affinity of the calling thread, and its change. bind_thread: false where the system refuses.
CpuSet given_cpus();
bool bind_thread(const CpuSet& cpus) noexcept;

int host_cores();    // cores of the machine, at least 1
int usable_cores();  // cores (not hardware threads) of this process's affinity, at least 1

}  // namespace drover

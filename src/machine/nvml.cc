#include "machine/nvml.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

#include "base/error.h"
#include "machine/energy.h"
#include "machine/machine.h"

namespace drover {

namespace {

class Nvml {
 public:
  Nvml() {
    const char* named = std::getenv("DROVER_NVML");
    const char* file = named != nullptr ? named : "libnvidia-ml.so.1";
    handle_ = ::dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) {
      problem = named != nullptr ? fmt::format("DROVER_NVML: {}", ::dlerror())
                                 : std::string("no NVIDIA driver (libnvidia-ml.so.1) here");
      return;
    }
    load(init, "nvmlInit_v2");
    load(shutdown, "nvmlShutdown");
    load(error, "nvmlErrorString");
    load(driver_version, "nvmlSystemGetDriverVersion");
    load(cuda_version, "nvmlSystemGetCudaDriverVersion_v2");
    load(count, "nvmlDeviceGetCount_v2");
    load(device, "nvmlDeviceGetHandleByIndex_v2");
    load(uuid, "nvmlDeviceGetUUID");
    load(name, "nvmlDeviceGetName");
    load(pci, "nvmlDeviceGetPciInfo_v3");
    load(memory, "nvmlDeviceGetMemoryInfo");
    load(capability, "nvmlDeviceGetCudaComputeCapability");
    load(p2p, "nvmlDeviceGetP2PStatus");
    load(link_state, "nvmlDeviceGetNvLinkState");
    load(link_remote, "nvmlDeviceGetNvLinkRemotePciInfo_v2");
    load(link_remote_type, "nvmlDeviceGetNvLinkRemoteDeviceType", false);  // since driver 470
    load(fields, "nvmlDeviceGetFieldValues");
    load(energy, "nvmlDeviceGetTotalEnergyConsumption", false);  // since driver 384
    if (!problem.empty()) return;
    const int code = init();
    if (code != kNvmlSuccess) problem = fmt::format("the driver does not answer: {}", error(code));
    started_ = code == kNvmlSuccess;
  }
  // The library stays: it may have started threads.
  ~Nvml() {
    if (started_) shutdown();
  }
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  std::string problem;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  const char* (*error)(int) = nullptr;
  int (*driver_version)(char*, unsigned) = nullptr;
  int (*cuda_version)(int*) = nullptr;
  int (*count)(unsigned*) = nullptr;
  int (*device)(unsigned, nvml_device*) = nullptr;
  int (*uuid)(nvml_device, char*, unsigned) = nullptr;
  int (*name)(nvml_device, char*, unsigned) = nullptr;
  int (*pci)(nvml_device, NvmlPci*) = nullptr;
  int (*memory)(nvml_device, NvmlMemory*) = nullptr;
  int (*capability)(nvml_device, int*, int*) = nullptr;
  int (*p2p)(nvml_device, nvml_device, int, int*) = nullptr;
  int (*link_state)(nvml_device, unsigned, unsigned*) = nullptr;
  int (*link_remote)(nvml_device, unsigned, NvmlPci*) = nullptr;
  int (*link_remote_type)(nvml_device, unsigned, int*) = nullptr;
  int (*fields)(nvml_device, int, NvmlField*) = nullptr;
  int (*energy)(nvml_device, unsigned long long*) = nullptr;  // millijoules

 private:
  template <class Function>
  void load(Function& f, const char* symbol, bool needed = true) {
    f = reinterpret_cast<Function>(::dlsym(handle_, symbol));
    if (f == nullptr && needed && problem.empty()) {
      problem = fmt::format("the driver's NVML lacks {}: a newer driver is needed", symbol);
    }
  }
  void* handle_ = nullptr;
  bool started_ = false;
};

std::string address_of(const NvmlPci& p) {
  return fmt::format("{:04x}:{:02x}:{:02x}.0", p.domain, p.bus, p.device);
}

struct Device {
  nvml_device handle = nullptr;
  Gpu gpu;
};

std::vector<Device> devices_of(Nvml& nvml, std::string& problem) {
  std::vector<Device> devices;
  unsigned count = 0;
  const auto good = [&](int code, const char* what, unsigned i) {
    if (code != kNvmlSuccess && problem.empty()) {
      problem =
          fmt::format("the driver does not tell the {} of GPU {}: {}", what, i, nvml.error(code));
    }
    return code == kNvmlSuccess;
  };
  if (!good(nvml.count(&count), "number", 0)) return devices;
  for (unsigned i = 0; i < count; ++i) {
    Device d;
    std::array<char, 96> text{};
    NvmlPci pci{};
    NvmlMemory memory{};
    int major = 0, minor = 0;
    if (!good(nvml.device(i, &d.handle), "handle", i)) continue;
    if (!good(nvml.uuid(d.handle, text.data(), text.size()), "UUID", i)) continue;
    d.gpu.uuid = text.data();
    if (!good(nvml.pci(d.handle, &pci), "PCI address", i)) continue;
    d.gpu.pci = address_of(pci);
    if (nvml.name(d.handle, text.data(), text.size()) == kNvmlSuccess) d.gpu.name = text.data();
    if (nvml.memory(d.handle, &memory) == kNvmlSuccess) d.gpu.memory = memory.total;
    if (nvml.capability(d.handle, &major, &minor) == kNvmlSuccess) {
      d.gpu.capability = 10 * major + minor;
    }
    devices.push_back(d);
  }
  std::sort(devices.begin(), devices.end(),
            [](const Device& a, const Device& b) { return a.gpu.pci < b.gpu.pci; });
  return devices;
}

// NVLinks of a GPU: those to other GPUs by address, and how many go to a switch.
struct Links {
  std::vector<std::string> direct;
  int to_switch = 0;
  double gbytes = 0;  // of one, each way
};

Links links_of(Nvml& nvml, nvml_device device) {
  Links links;
  for (unsigned i = 0; i < kNvmlMostLinks; ++i) {
    unsigned active = 0;
    NvmlPci remote{};
    int type = kNvmlRemoteGpu;
    if (nvml.link_state(device, i, &active) != kNvmlSuccess || active == 0) continue;
    if (nvml.link_remote_type != nullptr) nvml.link_remote_type(device, i, &type);
    if (type == kNvmlRemoteSwitch) {
      ++links.to_switch;
    } else if (nvml.link_remote(device, i, &remote) == kNvmlSuccess) {
      links.direct.push_back(address_of(remote));
    }
  }
  NvmlField speed{};
  speed.field = kNvmlFieldNvlinkSpeed;
  if (nvml.fields(device, 1, &speed) == kNvmlSuccess && speed.result == kNvmlSuccess) {
    links.gbytes = speed.value.u / 1000.0;  // MB/s
  }
  return links;
}

class GpuEnergy : public EnergyMeter {
 public:
  explicit GpuEnergy(const std::string& uuid) {
    if (!nvml_.problem.empty() || nvml_.energy == nullptr) return;
    std::string problem;
    for (const Device& d : devices_of(nvml_, problem)) {
      if (d.gpu.uuid == uuid) device_ = d.handle;
    }
  }
  std::optional<double> joules() override {
    unsigned long long millijoules = 0;
    if (device_ == nullptr || nvml_.energy(device_, &millijoules) != kNvmlSuccess)
      return std::nullopt;
    return static_cast<double>(millijoules) / 1e3;
  }

 private:
  Nvml nvml_;
  nvml_device device_ = nullptr;
};

}  // namespace

std::unique_ptr<EnergyMeter> gpu_energy(const std::string& uuid) {
  auto meter = std::make_unique<GpuEnergy>(uuid);
  if (!meter->joules()) return nullptr;
  return meter;
}

DriverView ask_driver() {
  DriverView view;
  Nvml nvml;
  if (!nvml.problem.empty()) {
    view.problem = nvml.problem;
    return view;
  }
  std::array<char, 96> text{};
  if (nvml.driver_version(text.data(), text.size()) == kNvmlSuccess) view.driver = text.data();
  nvml.cuda_version(&view.cuda);
  const std::vector<Device> devices = devices_of(nvml, view.problem);
  if (devices.empty() && view.problem.empty()) view.problem = "the driver sees no GPU";
  std::vector<Links> links;
  for (const Device& d : devices) {
    view.gpus.push_back(d.gpu);
    links.push_back(links_of(nvml, d.handle));
  }
  view.links.assign(devices.size(), std::vector<GpuLink>(devices.size()));
  for (size_t a = 0; a < devices.size(); ++a) {
    for (size_t b = 0; b < devices.size(); ++b) {
      if (a == b) continue;
      GpuLink& l = view.links[a][b];
      const auto& direct = links[a].direct;
      l.nvlinks = static_cast<int>(std::count(direct.begin(), direct.end(), devices[b].gpu.pci)) +
                  std::min(links[a].to_switch, links[b].to_switch);
      l.nvlink_gbytes = l.nvlinks * links[a].gbytes;
      int reads = 1, writes = 1;  // 0 is NVML_P2P_STATUS_OK
      l.peer =
          nvml.p2p(devices[a].handle, devices[b].handle, kNvmlP2pRead, &reads) == kNvmlSuccess &&
          nvml.p2p(devices[a].handle, devices[b].handle, kNvmlP2pWrite, &writes) == kNvmlSuccess &&
          reads == 0 && writes == 0;
    }
  }
  return view;
}

}  // namespace drover

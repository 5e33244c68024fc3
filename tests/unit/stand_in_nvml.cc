// Answers as NVML does on a host of four GPUs, for tests on machines without a driver: two joined
// by three NVLinks, two on a switch. Told out of the order of their addresses.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine/nvml.h"

namespace {

constexpr unsigned kBuses[] = {0x51, 0x12, 0x11, 0x52};
unsigned bus_of(nvml_device d) { return *reinterpret_cast<const unsigned*>(d); }
bool on_switch(unsigned bus) { return bus >= 0x50; }
unsigned partner(unsigned bus) { return bus ^ 3; }
int copy(char* to, unsigned room, const char* text) {
  std::snprintf(to, room, "%s", text);
  return kNvmlSuccess;
}
int fill(NvmlPci* p, unsigned bus) {
  std::memset(p, 0, sizeof(*p));
  p->bus = bus;
  return kNvmlSuccess;
}

}  // namespace

extern "C" {

int nvmlInit_v2() { return std::getenv("STAND_IN_NVML_FAILS") != nullptr ? 9 : kNvmlSuccess; }
int nvmlShutdown() { return kNvmlSuccess; }
const char* nvmlErrorString(int) { return "Driver Not Loaded"; }
int nvmlSystemGetDriverVersion(char* text, unsigned room) { return copy(text, room, "999.1"); }
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 13000;
  return kNvmlSuccess;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = 4;
  return kNvmlSuccess;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned i, nvml_device* d) {
  *d = reinterpret_cast<nvml_device>(const_cast<unsigned*>(&kBuses[i]));
  return kNvmlSuccess;
}
int nvmlDeviceGetUUID(nvml_device d, char* text, unsigned room) {
  std::snprintf(text, room, "GPU-stand-in-%02x00", bus_of(d));
  return kNvmlSuccess;
}
int nvmlDeviceGetName(nvml_device, char* text, unsigned room) {
  return copy(text, room, "Stand-in GPU");
}
int nvmlDeviceGetPciInfo_v3(nvml_device d, NvmlPci* p) { return fill(p, bus_of(d)); }
int nvmlDeviceGetMemoryInfo(nvml_device, NvmlMemory* m) {
  m->total = 80ull << 30;
  m->free = m->total;
  m->used = 0;
  return kNvmlSuccess;
}
int nvmlDeviceGetCudaComputeCapability(nvml_device, int* major, int* minor) {
  *major = 9;
  *minor = 0;
  return kNvmlSuccess;
}
int nvmlDeviceGetP2PStatus(nvml_device a, nvml_device b, int, int* status) {
  *status = on_switch(bus_of(a)) == on_switch(bus_of(b)) ? 0 : 3;
  return kNvmlSuccess;
}
int nvmlDeviceGetNvLinkState(nvml_device d, unsigned link, unsigned* active) {
  *active = on_switch(bus_of(d)) || link < 3 ? 1 : 0;
  return kNvmlSuccess;
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(nvml_device d, unsigned, NvmlPci* p) {
  return fill(p, partner(bus_of(d)));
}
int nvmlDeviceGetNvLinkRemoteDeviceType(nvml_device d, unsigned, int* type) {
  *type = on_switch(bus_of(d)) ? kNvmlRemoteSwitch : kNvmlRemoteGpu;
  return kNvmlSuccess;
}
int nvmlDeviceGetFieldValues(nvml_device, int count, NvmlField* fields) {
  for (int i = 0; i < count; ++i) {
    fields[i].result = fields[i].field == kNvmlFieldNvlinkSpeed ? kNvmlSuccess : 3;
    fields[i].value.u = 25000;
  }
  return kNvmlSuccess;
}
// 350 J at first, 1.5 J more at each asking; one GPU is too old to count.
int nvmlDeviceGetTotalEnergyConsumption(nvml_device d, unsigned long long* millijoules) {
  static unsigned long long counted = 348500;
  if (bus_of(d) == 0x52) return 3;  // NVML_ERROR_NOT_SUPPORTED
  *millijoules = counted += 1500;
  return kNvmlSuccess;
}

}  // extern "C"

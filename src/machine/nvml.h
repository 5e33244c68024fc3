// The part of NVML that drover asks: declared here, so that drover is built without its header and
// starts without a driver. Names, numbers and layouts are those of NVIDIA's NVML API reference
// (docs.nvidia.com/deploy/nvml-api), which keeps them for good and gives changed ones a new suffix.
#pragma once

extern "C" {

using nvml_device = struct nvmlDevice_st*;

struct NvmlPci {  // nvmlPciInfo_t, _v3
  char bus_id_legacy[16];
  unsigned domain, bus, device, device_id, subsystem_id;
  char bus_id[32];
};

struct NvmlMemory {  // nvmlMemory_t
  unsigned long long total, free, used;
};

struct NvmlField {  // nvmlFieldValue_t
  unsigned field, scope;
  long long timestamp, latency;
  int type;  // of the value: 1 is unsigned int
  int result;
  union {
    double d;
    unsigned u;
    unsigned long long ull;
  } value;
};

}  // extern "C"

inline constexpr int kNvmlSuccess = 0;
inline constexpr unsigned kNvmlMostLinks = 18;         // NVML_NVLINK_MAX_LINKS
inline constexpr unsigned kNvmlFieldNvlinkSpeed = 90;  // NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON
inline constexpr int kNvmlRemoteGpu = 0;               // nvmlIntNvLinkDeviceType_t
inline constexpr int kNvmlRemoteSwitch = 2;
inline constexpr int kNvmlP2pRead = 0, kNvmlP2pWrite = 1;  // nvmlGpuP2PCapsIndex_t

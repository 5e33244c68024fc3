// What a device has used so far, in joules, as its own counter tells.
#pragma once

#include <memory>
#include <optional>
#include <string>

namespace drover {

class EnergyMeter {
 public:
  virtual ~EnergyMeter() = default;
  // Since some moment in the past; nothing when the counter does not answer. From one thread. Some
  // counters wrap: one that is not read for ten minutes may have lost a turn.
  virtual std::optional<double> joules() = 0;
};

// Of one GPU, by the UUID that CUDA or the driver tells: nvmlDeviceGetTotalEnergyConsumption, which
// GPUs have from Volta on. Null: no driver, no such GPU, or it does not count.
std::unique_ptr<EnergyMeter> gpu_energy(const std::string& uuid);

// Of this host's processors and their memory: RAPL's packages and DRAM as Linux shows them under
// /sys/class/powercap (DROVER_POWERCAP names another folder). Null: there are none, or this user
// may not read one of them.
std::unique_ptr<EnergyMeter> host_energy();

}  // namespace drover

// RAPL's counters (Documentation/power/powercap in Linux): a folder a zone with `name`, `energy_uj`
// and `max_energy_range_uj`, from which the counter goes back to 0.
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#include "machine/energy.h"

namespace drover {

namespace {

namespace fs = std::filesystem;

template <typename T>
std::optional<T> read_value(const fs::path& file) {
  std::ifstream in(file);
  T value{};
  if (!(in >> value)) return std::nullopt;
  return value;
}

struct Zone {
  fs::path counter;
  double turn = 0, last = 0;  // microjoules
};

class Rapl : public EnergyMeter {
 public:
  explicit Rapl(std::vector<Zone> zones) : zones_(std::move(zones)) {}

  std::optional<double> joules() override {
    for (Zone& z : zones_) {
      const auto now = read_value<double>(z.counter);
      if (!now) return std::nullopt;
      microjoules_ += *now >= z.last ? *now - z.last : *now - z.last + z.turn;
      z.last = *now;
    }
    return microjoules_ / 1e6;
  }

 private:
  std::vector<Zone> zones_;
  double microjoules_ = 0;
};

}  // namespace

std::unique_ptr<EnergyMeter> host_energy() {
  const char* named = std::getenv("DROVER_POWERCAP");
  const fs::path root = named != nullptr ? named : "/sys/class/powercap";
  std::vector<Zone> zones;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(root, error)) {
    // "intel-rapl:0" on AMD too. The same counters over MMIO, a package's cores and the platform
    // would count twice.
    if (!entry.path().filename().string().starts_with("intel-rapl:")) continue;
    const auto name = read_value<std::string>(entry.path() / "name");
    if (!name || (!name->starts_with("package") && *name != "dram")) continue;
    const auto now = read_value<double>(entry.path() / "energy_uj");
    const auto turn = read_value<double>(entry.path() / "max_energy_range_uj");
    if (!now || !turn) return nullptr;
    zones.push_back({entry.path() / "energy_uj", *turn, *now});
  }
  if (zones.empty()) return nullptr;
  return std::make_unique<Rapl>(std::move(zones));
}

}  // namespace drover

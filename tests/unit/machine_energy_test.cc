// Counters of energy: the driver's, through the library that stands in for it, and RAPL's, of a
// folder as Linux has it.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "machine/energy.h"

namespace drover {
namespace {

namespace fs = std::filesystem;

TEST(GpuEnergy, CountsOfTheGpuThatIsNamed) {
  ::setenv("DROVER_NVML", STAND_IN_NVML, 1);
  const auto meter = gpu_energy("GPU-stand-in-1100");
  ASSERT_NE(meter, nullptr);
  const double first = meter->joules().value();
  EXPECT_GT(first, 300);
  EXPECT_DOUBLE_EQ(meter->joules().value() - first, 1.5);
  EXPECT_NE(gpu_energy("GPU-stand-in-1200"), nullptr);
  EXPECT_EQ(gpu_energy("GPU-stand-in-5200"), nullptr);  // does not count
  EXPECT_EQ(gpu_energy("GPU-stand-in-9900"), nullptr);  // is not there
  ::setenv("DROVER_NVML", "/nonexistent/libnvidia-ml.so.1", 1);
  EXPECT_EQ(gpu_energy("GPU-stand-in-1100"), nullptr);
  ::unsetenv("DROVER_NVML");
}

class HostEnergy : public testing::Test {
 protected:
  HostEnergy() {
    fs::remove_all(root_);
    fs::create_directories(root_);
    ::setenv("DROVER_POWERCAP", root_.c_str(), 1);
  }
  ~HostEnergy() override {
    ::unsetenv("DROVER_POWERCAP");
    fs::remove_all(root_);
  }
  void write(const std::string& zone, const std::string& file, const std::string& text) const {
    fs::create_directories(root_ / zone);
    std::ofstream(root_ / zone / file) << text << "\n";
  }
  void zone(const std::string& folder, const std::string& name, const std::string& now) const {
    write(folder, "name", name);
    write(folder, "energy_uj", now);
    write(folder, "max_energy_range_uj", "10000000");
  }
  const fs::path root_ = fs::path(testing::TempDir()) / "drover_powercap";
};

TEST_F(HostEnergy, SumsPackagesAndMemory) {
  zone("intel-rapl:0", "package-0", "1000000");
  zone("intel-rapl:0:0", "dram", "500000");
  zone("intel-rapl:0:1", "core", "700000");      // within the package
  zone("intel-rapl:1", "psys", "9000000");       // all of it again
  zone("intel-rapl-mmio:0", "package-0", "12");  // the first one again
  const auto meter = host_energy();
  ASSERT_NE(meter, nullptr);
  const double begin = meter->joules().value();
  zone("intel-rapl:0", "package-0", "3500000");
  zone("intel-rapl:0:0", "dram", "750000");
  zone("intel-rapl:1", "psys", "9900000");
  EXPECT_DOUBLE_EQ(meter->joules().value() - begin, 2.75);
  zone("intel-rapl:0", "package-0", "500000");  // past its range: 6.5 J to there, 0.5 J more
  EXPECT_DOUBLE_EQ(meter->joules().value() - begin, 9.75);
  fs::remove(root_ / "intel-rapl:0" / "energy_uj");
  EXPECT_FALSE(meter->joules().has_value());
}

TEST_F(HostEnergy, NoneWhereOneCannotBeRead) {
  EXPECT_EQ(host_energy(), nullptr);
  zone("intel-rapl:0", "package-0", "1000000");
  EXPECT_NE(host_energy(), nullptr);
  write("intel-rapl:1", "name", "package-1");
  EXPECT_EQ(host_energy(), nullptr);
  ::setenv("DROVER_POWERCAP", "/nonexistent", 1);
  EXPECT_EQ(host_energy(), nullptr);
}

}  // namespace
}  // namespace drover

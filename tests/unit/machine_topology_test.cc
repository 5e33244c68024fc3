// What drover reads from hwloc and NVML: of machines that are described, and of this one.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>

#include "base/error.h"
#include "machine/machine.h"
#include "two_sockets.h"

namespace drover {
namespace {

using testing::eight_gpus;
using testing::two_sockets_xml;

TEST(Machine, SocketsNodesAndCores) {
  const Machine m = machine_from_xml(synthetic_xml("pack:2 numa:2 core:4 pu:2"), {});
  EXPECT_FALSE(m.this_host);
  EXPECT_EQ(m.sockets, 2);
  EXPECT_EQ(m.numa_nodes, (std::vector<int>{0, 1, 2, 3}));
  ASSERT_EQ(m.cores.size(), 16u);
  EXPECT_EQ(m.cores[0].socket, 0);
  EXPECT_EQ(m.cores[15].socket, 1);
  EXPECT_EQ(m.cores[5].numa, 1);
  EXPECT_EQ(cpu_list(m.cores[15].cpus), "30-31");
  EXPECT_EQ(m.cores_in(parse_cpu_list("0,1,2")), 2);
  EXPECT_EQ(m.numa_of(parse_cpu_list("0,31")), (std::vector<int>{0, 3}));
}

TEST(Machine, GpusHangWhereTheirBusDoes) {
  const Machine m = machine_from_xml(two_sockets_xml(), eight_gpus());
  EXPECT_EQ(m.pci_gpus, 8);
  ASSERT_EQ(m.gpus().size(), 8u);
  for (size_t g = 0; g < 8; ++g) {
    EXPECT_EQ(m.gpus()[g].numa, g < 4 ? 0 : 1);
    EXPECT_EQ(cpu_list(m.gpus()[g].near), g < 4 ? "0-15" : "16-31");
  }
  EXPECT_EQ(m.driver.links[0][1].pci, Nearness::kSwitch);
  EXPECT_EQ(m.driver.links[0][2].pci, Nearness::kHostBridge);
  EXPECT_EQ(m.driver.links[0][4].pci, Nearness::kSystem);
}

TEST(Machine, NicsByDistance) {
  const Machine m = machine_from_xml(two_sockets_xml(), eight_gpus());
  std::vector<std::string> names;
  for (const Nic& n : m.nics) names.push_back(n.name);
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names,
            (std::vector<std::string>{"eth0", "eth1", "mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"}));
  for (size_t n = 0; n < m.nics.size(); ++n) {
    const Nic& nic = m.nics[n];
    EXPECT_EQ(nic.fabric, nic.name.starts_with("mlx5"));
    if (nic.name == "mlx5_1") {
      EXPECT_EQ(nic.interface, "ib1");
      EXPECT_EQ(nic.numa, 0);
      EXPECT_EQ(m.gpu_nic[2][n], Nearness::kSwitch);
      EXPECT_EQ(m.gpu_nic[0][n], Nearness::kHostBridge);
      EXPECT_EQ(m.gpu_nic[7][n], Nearness::kSystem);
    }
  }
}

TEST(Machine, AGpuThatTheBusDoesNotShowIsNearEverything) {
  DriverView one;
  one.gpus.resize(1);
  one.gpus[0].pci = "0000:99:00.0";
  one.links.assign(1, std::vector<GpuLink>(1));
  const Machine m = machine_from_xml(synthetic_xml("pack:2 numa:1 core:2 pu:1"), one);
  EXPECT_EQ(m.gpus()[0].numa, -1);
  EXPECT_EQ(cpu_list(m.gpus()[0].near), "0-3");
}

TEST(Machine, BadDescriptionsAreRefused) {
  EXPECT_THROW(synthetic_xml("pack:two"), Error);
  EXPECT_THROW(machine_from_xml("<topology>", {}), Error);
}

TEST(Machine, ThisOne) {
  const Machine& m = this_machine();
  EXPECT_GE(m.cores.size(), 1u);
  EXPECT_GE(m.numa_nodes.size(), 1u);
  EXPECT_GT(m.memory, uint64_t{64} << 20);
  EXPECT_EQ(host_cores(), static_cast<int>(m.cores.size()));
  EXPECT_GE(usable_cores(), 1);
  EXPECT_LE(usable_cores(), host_cores());
  EXPECT_NE(m.gpus().empty(), m.driver.problem.empty());
}

TEST(Cpus, ListsGoThereAndBack) {
  for (const char* text : {"0", "0-3", "1,3,5-7", "4095", "none", "0-4095"}) {
    EXPECT_EQ(cpu_list(parse_cpu_list(text)), text);
  }
  EXPECT_EQ(cpu_list(parse_cpu_list("3,1,2")), "1-3");
  for (const char* text : {"", "a", "1-", "-1", "3-1", "1,,2", "4096", "1 2", "1,", "99999"}) {
    EXPECT_THROW(parse_cpu_list(text), Error) << text;
  }
}

TEST(Cpus, AThreadIsBoundAndGivenBack) {
  const CpuSet before = given_cpus();
  ASSERT_TRUE(before.any());
  CpuSet one;
  one.set(before._Find_first());
  ASSERT_TRUE(bind_thread(one));
  EXPECT_EQ(given_cpus(), one);
  ASSERT_TRUE(bind_thread(before));
  EXPECT_EQ(given_cpus(), before);
  EXPECT_FALSE(bind_thread({}));
}

// The library that stands in for the driver's is built beside this test.
TEST(Nvml, ReadsWhatTheDriverTells) {
  ::setenv("DROVER_NVML", STAND_IN_NVML, 1);
  const DriverView view = ask_driver();
  EXPECT_EQ(view.problem, "");
  EXPECT_EQ(view.driver, "999.1");
  EXPECT_EQ(view.cuda, 13000);
  ASSERT_EQ(view.gpus.size(), 4u);
  EXPECT_EQ(view.gpus[0].pci, "0000:11:00.0");  // sorted by address, whatever the driver's order
  EXPECT_EQ(view.gpus[0].uuid, "GPU-stand-in-1100");
  EXPECT_EQ(view.gpus[0].capability, 90);
  EXPECT_EQ(view.gpus[0].memory, uint64_t{80} << 30);
  // 0 and 1 have three links between them; 2 and 3 have eighteen to a switch.
  EXPECT_EQ(view.links[0][1].nvlinks, 3);
  EXPECT_DOUBLE_EQ(view.links[0][1].nvlink_gbytes, 75);
  EXPECT_EQ(view.links[0][2].nvlinks, 0);
  EXPECT_EQ(view.links[2][3].nvlinks, 18);
  EXPECT_TRUE(view.links[0][1].peer);
  EXPECT_FALSE(view.links[1][2].peer);
}

TEST(Nvml, SaysWhyThereIsNone) {
  ::setenv("DROVER_NVML", "/nonexistent/libnvidia-ml.so.1", 1);
  EXPECT_NE(ask_driver().problem.find("DROVER_NVML"), std::string::npos);
  ::setenv("DROVER_NVML", "libm.so.6", 1);
  EXPECT_NE(ask_driver().problem.find("nvmlInit_v2"), std::string::npos);
  ::setenv("DROVER_NVML", STAND_IN_NVML, 1);
  ::setenv("STAND_IN_NVML_FAILS", "1", 1);
  EXPECT_EQ(ask_driver().problem, "the driver does not answer: Driver Not Loaded");
  ::unsetenv("STAND_IN_NVML_FAILS");
  ::unsetenv("DROVER_NVML");
}

}  // namespace
}  // namespace drover

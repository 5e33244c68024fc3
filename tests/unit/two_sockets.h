// A machine for tests: two sockets of eight cores (two threads each), a NUMA node each; on each
// socket a host bridge with two PCI switches, on each switch two GPUs and a fabric NIC, and beside
// the switches one Ethernet NIC. As hwloc's XML.
#pragma once

#include <fmt/format.h>

#include <string>

#include "machine/machine.h"

namespace drover::testing {

// gp_index must be unique: far above those of the cores.
inline std::string pci_xml(int socket) {
  int index = 1000 + 100 * socket;
  const int base = 0x10 + 0x40 * socket;  // buses of this socket
  const auto device = [&](int bus, const char* type, const std::string& inside) {
    return fmt::format(
        R"(<object type="PCIDev" gp_index="{}" pci_busid="0000:{:02x}:00.0" pci_type="{} 01" pci_link_speed="31.5">{}</object>)",
        index++, bus, type, inside);
  };
  const auto os_device = [&](const std::string& name, int type) {
    return fmt::format(R"(<object type="OSDev" gp_index="{}" name="{}" osdev_type="{}"/>)", index++,
                       name, type);
  };
  std::string inside;
  for (int s = 0; s < 2; ++s) {
    const int bus = base + 8 * s;
    std::string below;
    for (int g = 0; g < 2; ++g) {
      below += device(bus + 1 + g, "0302 [10de:2330] [10de:16c1]", "");
    }
    below += device(bus + 4, "0207 [15b3:1021] [15b3:0041]",
                    os_device(fmt::format("ib{}", 2 * socket + s), 2) +
                        os_device(fmt::format("mlx5_{}", 2 * socket + s), 3));
    inside += fmt::format(
        R"(<object type="Bridge" gp_index="{}" bridge_type="1-1" depth="1" bridge_pci="0000:[{:02x}-{:02x}]" pci_busid="0000:{:02x}:01.{}" pci_type="0604 [1000:c030] [1000:c030] b0" pci_link_speed="31.5">{}</object>)",
        index++, bus, bus + 7, base, s, below);
  }
  inside += device(base + 0x20, "0200 [8086:1593] [8086:0001]",
                   os_device(fmt::format("eth{}", socket), 2));
  return fmt::format(
      R"(<object type="Bridge" gp_index="{}" bridge_type="0-1" depth="0" bridge_pci="0000:[{:02x}-{:02x}]">{}</object>)",
      index++, base, base + 0x3f, inside);
}

inline std::string two_sockets_xml() {
  std::string xml = synthetic_xml("pack:2 numa:1 core:8 pu:2");
  // Before the end of each package: the second one's is the last but one of all objects.
  const std::string package = R"(<object type="Package")";
  const size_t second = xml.find(package, xml.find(package) + 1);
  const size_t machine_end = xml.rfind("</object>");
  const size_t second_end = xml.rfind("</object>", machine_end - 1);
  const size_t first_end = xml.rfind("</object>", second);
  xml.insert(second_end, pci_xml(1));
  xml.insert(first_end, pci_xml(0));
  return xml;
}

// Its eight GPUs as a driver would tell them; on pairs of the same switch four NVLinks.
inline DriverView eight_gpus() {
  DriverView view;
  for (int socket = 0; socket < 2; ++socket) {
    for (int s = 0; s < 2; ++s) {
      for (int g = 0; g < 2; ++g) {
        Gpu gpu;
        gpu.pci = fmt::format("0000:{:02x}:00.0", 0x10 + 0x40 * socket + 8 * s + 1 + g);
        gpu.uuid = fmt::format("GPU-{}", view.gpus.size());
        gpu.name = "a GPU of this test";
        gpu.memory = uint64_t{80} << 30;
        gpu.capability = 90;
        view.gpus.push_back(gpu);
      }
    }
  }
  view.links.assign(8, std::vector<GpuLink>(8));
  for (size_t a = 0; a < 8; ++a) {
    for (size_t b = 0; b < 8; ++b) {
      view.links[a][b].nvlinks = a != b && a / 2 == b / 2 ? 4 : 0;
      view.links[a][b].peer = a != b && a / 4 == b / 4;
    }
  }
  return view;
}

}  // namespace drover::testing

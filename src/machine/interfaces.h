// Network interfaces, and which of them NCCL, UCX and Open MPI choose when nobody tells them. The
// rules are theirs, as documented: NCCL's NCCL_SOCKET_IFNAME (NCCL user guide, environment
// variables), Open MPI's btl_tcp_if_include and _exclude (mca parameters of btl/tcp), UCX's
// UCX_NET_DEVICES (UCX FAQ).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "machine/machine.h"

namespace drover {

struct Interface {
  std::string name;
  std::vector<std::string>
      addresses;  // IPv4, with the length of the network's prefix: "10.0.0.2/24"
  bool up = false;
  bool loopback = false;
  bool bridge = false;  // of containers or virtual machines: docker0, veth..., virbr0
};
std::vector<Interface> interfaces();  // of this host, by name
bool is_bridge(const std::string& name);
std::string network_of(const std::string& address);  // "10.0.0.2/24" -> "10.0.0.0/24"

// A variable's value, or nothing.
using Variables = std::function<std::string(const std::string&)>;

struct Choice {
  std::string library;             // "NCCL", "Open MPI", "UCX"
  std::vector<std::string> names;  // interfaces, or fabrics
  bool fabric = false;             // the names are fabrics'
  std::string variable;            // that decided it; empty: the library's own rule
};
std::vector<Choice> choices(const std::vector<Interface>& all, const std::vector<Nic>& nics,
                            const Variables& variables);

}  // namespace drover

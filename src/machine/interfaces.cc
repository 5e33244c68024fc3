#include "machine/interfaces.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>

#include <algorithm>
#include <bit>
#include <map>
#include <sstream>

#include "base/error.h"

namespace drover {

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) {
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

bool usable(const Interface& i) { return i.up && !i.addresses.empty(); }

// NCCL's lists: prefixes; "=": whole names; "^" before either: all but these.
bool nccl_takes(const std::string& name, std::string list) {
  const bool all_but = list.starts_with("^");
  if (all_but) list.erase(0, 1);
  const bool whole = list.starts_with("=");
  if (whole) list.erase(0, 1);
  bool found = false;
  for (const std::string& part : split(list)) {
    found = found || (whole ? name == part : name.starts_with(part));
  }
  return found != all_but;
}

std::vector<std::string> taken_by_nccl(const std::vector<Interface>& all, const std::string& list) {
  std::vector<std::string> names;
  for (const Interface& i : all) {
    if (usable(i) && nccl_takes(i.name, list)) names.push_back(i.name);
  }
  return names;
}

Choice nccl(const std::vector<Interface>& all, const Variables& variables) {
  Choice c{.library = "NCCL", .names = {}, .fabric = false, .variable = ""};
  const std::string told = variables("NCCL_SOCKET_IFNAME");
  if (!told.empty()) {
    c.variable = "NCCL_SOCKET_IFNAME";
    c.names = taken_by_nccl(all, told);
    return c;
  }
  for (const char* list : {"ib", "^docker,lo,virbr", "docker", "lo"}) {
    c.names = taken_by_nccl(all, list);
    if (!c.names.empty()) break;
  }
  return c;
}

// Open MPI's lists: whole names, or networks.
bool open_mpi_names(const Interface& i, const std::string& list) {
  for (const std::string& part : split(list)) {
    if (part == i.name) return true;
    for (const std::string& address : i.addresses) {
      const std::string own = address.substr(0, address.find('/'));
      const size_t slash = part.find('/');
      if (slash != std::string::npos && network_of(own + part.substr(slash)) == network_of(part)) {
        return true;
      }
    }
  }
  return false;
}

Choice open_mpi(const std::vector<Interface>& all, const Variables& variables) {
  Choice c{.library = "Open MPI", .names = {}, .fabric = false, .variable = ""};
  const std::string only = variables("OMPI_MCA_btl_tcp_if_include");
  std::string without = variables("OMPI_MCA_btl_tcp_if_exclude");
  if (!only.empty()) c.variable = "OMPI_MCA_btl_tcp_if_include";
  if (only.empty() && !without.empty()) c.variable = "OMPI_MCA_btl_tcp_if_exclude";
  if (without.empty()) without = "127.0.0.1/8,sppp";
  for (const Interface& i : all) {
    if (!usable(i)) continue;
    if (only.empty() ? !open_mpi_names(i, without) : open_mpi_names(i, only)) {
      c.names.push_back(i.name);
    }
  }
  return c;
}

Choice ucx(const std::vector<Interface>& all, const std::vector<Nic>& nics,
           const Variables& variables) {
  Choice c{.library = "UCX", .names = {}, .fabric = false, .variable = ""};
  const std::string told = variables("UCX_NET_DEVICES");
  const auto chosen = [&](const std::string& name) {
    if (told.empty() || told == "all") return true;
    const auto list = split(told);
    return std::any_of(list.begin(), list.end(), [&](const std::string& part) {
      return part.substr(0, part.find(':')) == name;
    });
  };
  if (!told.empty() && told != "all") c.variable = "UCX_NET_DEVICES";
  for (const Nic& n : nics) {
    if (n.fabric && n.up && chosen(n.name)) c.names.push_back(n.name);
  }
  c.fabric = !c.names.empty();
  if (c.fabric) return c;
  for (const Interface& i : all) {
    // Bridges only where they are named.
    if (usable(i) && chosen(i.name) && (!c.variable.empty() || (!i.bridge && !i.loopback))) {
      c.names.push_back(i.name);
    }
  }
  return c;
}

}  // namespace

bool is_bridge(const std::string& name) {
  for (const char* prefix : {"docker", "br-", "veth", "virbr", "cni", "flannel", "podman", "lxc",
                             "lxdbr", "vmnet", "vboxnet", "cali", "tunl"}) {
    if (name.starts_with(prefix)) return true;
  }
  return false;
}

std::string network_of(const std::string& address) {
  const size_t slash = address.find('/');
  in_addr bytes{};
  if (slash == std::string::npos ||
      ::inet_pton(AF_INET, address.substr(0, slash).c_str(), &bytes) != 1) {
    return "";
  }
  const int length = std::clamp(std::atoi(address.c_str() + slash + 1), 0, 32);
  const uint32_t mask = length == 0 ? 0 : ~uint32_t{0} << (32 - length);
  bytes.s_addr = htonl(ntohl(bytes.s_addr) & mask);
  char text[INET_ADDRSTRLEN];
  ::inet_ntop(AF_INET, &bytes, text, sizeof(text));
  return fmt::format("{}/{}", text, length);
}

std::vector<Interface> interfaces() {
  std::map<std::string, Interface> found;
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return {};
  for (const ifaddrs* a = list; a != nullptr; a = a->ifa_next) {
    Interface& i = found[a->ifa_name];
    i.name = a->ifa_name;
    i.up = (a->ifa_flags & IFF_UP) != 0 && (a->ifa_flags & IFF_RUNNING) != 0;
    i.loopback = (a->ifa_flags & IFF_LOOPBACK) != 0;
    i.bridge = is_bridge(i.name);
    if (a->ifa_addr == nullptr || a->ifa_netmask == nullptr || a->ifa_addr->sa_family != AF_INET) {
      continue;
    }
    char text[INET_ADDRSTRLEN];
    const auto* address = reinterpret_cast<const sockaddr_in*>(a->ifa_addr);
    const auto* mask = reinterpret_cast<const sockaddr_in*>(a->ifa_netmask);
    ::inet_ntop(AF_INET, &address->sin_addr, text, sizeof(text));
    i.addresses.push_back(fmt::format("{}/{}", text, std::popcount(mask->sin_addr.s_addr)));
  }
  ::freeifaddrs(list);
  std::vector<Interface> all;
  for (auto& [name, i] : found) all.push_back(std::move(i));
  return all;
}

std::vector<Choice> choices(const std::vector<Interface>& all, const std::vector<Nic>& nics,
                            const Variables& variables) {
  return {nccl(all, variables), open_mpi(all, variables), ucx(all, nics, variables)};
}

}  // namespace drover

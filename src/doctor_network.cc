// Which interfaces NCCL, Open MPI and UCX would talk over, compared between hosts.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>

#include "doctor.h"
#include "machine/interfaces.h"

namespace drover {

namespace {

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& n : names) text += (text.empty() ? "" : " ") + n;
  return text;
}

// An interface of every host that could be told to the libraries: none of a container's, in a
// network that all hosts share.
struct Common {
  std::string name, network;
};

Common common_interface(const std::vector<std::pair<std::string, Json>>& hosts) {
  std::map<std::string, std::set<std::string>> hosts_of;  // network -> hosts
  std::map<std::string, std::set<std::string>> names_of;
  for (const auto& [host, facts] : hosts) {
    for (const auto& i : facts.at("interfaces")) {
      if (!i.at("up").get<bool>() || i.at("loopback").get<bool>() || i.at("bridge").get<bool>()) {
        continue;
      }
      for (const auto& a : i.at("addresses")) {
        const std::string network = network_of(a.get<std::string>());
        hosts_of[network].insert(host);
        names_of[network].insert(i.at("name").get<std::string>());
      }
    }
  }
  for (const auto& [network, there] : hosts_of) {
    if (there.size() != hosts.size()) continue;
    const auto& names = names_of[network];
    return {names.size() == 1 ? *names.begin() : "", network};
  }
  return {};
}

std::string setting(const std::string& library, const Common& common) {
  const std::string name = common.name.empty() ? "INTERFACE" : common.name;
  if (library == "NCCL") return fmt::format("export NCCL_SOCKET_IFNAME={}", name);
  if (library == "UCX") return fmt::format("export UCX_NET_DEVICES={}", name);
  return fmt::format("export OMPI_MCA_btl_tcp_if_include={}",
                     common.network.empty() ? name : common.network);
}

struct Chosen {
  std::set<std::string> lists;  // as told by the hosts
  std::set<std::string> bad;    // loopback or bridges among them
  std::map<std::string, std::set<std::string>> hosts_of_network;
  std::string variable;
  bool fabric = false, none = false;
};

Chosen chosen_by(const std::string& library,
                 const std::vector<std::pair<std::string, Json>>& hosts) {
  Chosen c;
  for (const auto& [host, facts] : hosts) {
    for (const auto& choice : facts.at("choices")) {
      if (choice.at("library") != library) continue;
      const auto names = choice.at("names").get<std::vector<std::string>>();
      c.lists.insert(joined(names));
      c.variable = choice.at("variable").get<std::string>();
      c.fabric = c.fabric || choice.at("fabric").get<bool>();
      c.none = c.none || names.empty();
      for (const auto& i : facts.at("interfaces")) {
        const auto name = i.at("name").get<std::string>();
        if (std::find(names.begin(), names.end(), name) == names.end()) continue;
        if (i.at("loopback").get<bool>() || i.at("bridge").get<bool>()) c.bad.insert(name);
        for (const auto& a : i.at("addresses")) {
          c.hosts_of_network[network_of(a.get<std::string>())].insert(host);
        }
      }
    }
  }
  return c;
}

}  // namespace

Json network_facts() {
  const auto all = interfaces();
  Json facts;
  facts["interfaces"] = Json::array();
  for (const Interface& i : all) {
    facts["interfaces"].push_back({{"name", i.name},
                                   {"addresses", i.addresses},
                                   {"up", i.up},
                                   {"loopback", i.loopback},
                                   {"bridge", i.bridge}});
  }
  facts["choices"] = Json::array();
  const auto variables = [](const std::string& name) {
    const char* text = std::getenv(name.c_str());
    return std::string(text != nullptr ? text : "");
  };
  for (const Choice& c : choices(all, this_machine().nics, variables)) {
    facts["choices"].push_back({{"library", c.library},
                                {"names", c.names},
                                {"fabric", c.fabric},
                                {"variable", c.variable}});
  }
  return facts;
}

std::vector<Finding> check_networks(const std::vector<std::pair<std::string, Json>>& hosts) {
  std::vector<Finding> all;
  const bool several = hosts.size() > 1;
  const Common common = common_interface(hosts);
  for (const char* library : {"NCCL", "Open MPI", "UCX"}) {
    const Chosen c = chosen_by(library, hosts);
    Finding f;
    f.check = fmt::format("{} over", library);
    for (const auto& list : c.lists) {
      f.text += fmt::format("{}{}", f.text.empty() ? "" : " | ", list.empty() ? "nothing" : list);
    }
    if (!c.variable.empty()) f.text += fmt::format(" ({})", c.variable);
    if (!several) {
      f.text += "; one host: memory is what matters";
      if (c.none && !c.variable.empty()) {
        f.verdict = Verdict::kWarn;
        f.advice = fmt::format("{} names no interface of this host: unset it", c.variable);
      }
      all.push_back(f);
      continue;
    }
    const bool shared =
        std::any_of(c.hosts_of_network.begin(), c.hosts_of_network.end(),
                    [&](const auto& network) { return network.second.size() == hosts.size(); });
    if (c.none) {
      f.verdict = Verdict::kBad;
      f.advice = c.variable.empty() ? "no interface is up" : fmt::format("correct {}", c.variable);
    } else if (!c.bad.empty()) {
      f.verdict = Verdict::kWarn;
      f.text +=
          fmt::format("; across hosts {} leads nowhere", joined({c.bad.begin(), c.bad.end()}));
      f.advice = setting(library, common);
    } else if (!c.fabric && !shared) {
      f.verdict = Verdict::kWarn;
      f.text += "; no network of them is on all hosts";
      f.advice = common.network.empty() ? "the hosts share no network that this can see"
                                        : setting(library, common);
    }
    all.push_back(f);
  }
  return all;
}

}  // namespace drover

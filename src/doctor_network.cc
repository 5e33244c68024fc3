// Which interfaces NCCL, Open MPI and UCX would talk over, compared between hosts.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>

#include "doctor.h"
#include "machine/interfaces.h"

namespace drover {

namespace {

template <class Names>
std::string joined(const Names& names, const char* between = " ") {
  std::string text;
  for (const auto& n : names) text += (text.empty() ? "" : between) + n;
  return text;
}

// Some hosts by name; a screen has no room for a hundred.
std::string hosts_text(const std::set<std::string>& hosts) {
  constexpr size_t kShown = 3;
  std::vector<std::string> shown(hosts.begin(), hosts.end());
  shown.resize(std::min(shown.size(), kShown));
  const std::string text = joined(shown, ", ");
  return hosts.size() > kShown ? fmt::format("{} and {} more", text, hosts.size() - kShown) : text;
}

// An interface of every host that could be told to the libraries: none of a container's, in a
// network that all hosts share.
struct Common {
  std::set<std::string> names;  // on one host or another
  std::string network;
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
    return {names_of[network], network};
  }
  return {};
}

std::string setting(const std::string& library, const Common& common) {
  // A list serves hosts that call it differently.
  const size_t count = common.names.size();
  const std::string name = count == 0 || count > 8 ? "INTERFACE" : joined(common.names, ",");
  if (library == "NCCL") return fmt::format("export NCCL_SOCKET_IFNAME={}", name);
  if (library == "UCX") return fmt::format("export UCX_NET_DEVICES={}", name);
  return fmt::format("export OMPI_MCA_btl_tcp_if_include={}",
                     common.network.empty() ? name : common.network);
}

struct Chosen {
  std::set<std::string> lists;  // as told by the hosts
  std::map<std::string, std::set<std::string>>
      bad;  // loopback or bridges among them: on which hosts
  std::map<std::string, std::set<std::string>> hosts_of_network;
  std::set<std::string> none;  // hosts where nothing is chosen
  std::string variable;
  bool fabric = false;
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
      if (names.empty()) c.none.insert(host);
      for (const auto& i : facts.at("interfaces")) {
        const auto name = i.at("name").get<std::string>();
        if (std::find(names.begin(), names.end(), name) == names.end()) continue;
        if (i.at("loopback").get<bool>() || i.at("bridge").get<bool>()) c.bad[name].insert(host);
        for (const auto& a : i.at("addresses")) {
          c.hosts_of_network[network_of(a.get<std::string>())].insert(host);
        }
      }
    }
  }
  return c;
}

// Hosts that are not in the network which most of the others talk over.
std::set<std::string> left_out(const Chosen& c,
                               const std::vector<std::pair<std::string, Json>>& hosts) {
  std::set<std::string> most;
  for (const auto& [network, there] : c.hosts_of_network) {
    if (there.size() > most.size()) most = there;
  }
  std::set<std::string> out;
  for (const auto& [host, facts] : hosts) {
    if (most.count(host) == 0) out.insert(host);
  }
  return out;
}

// Adds to `f` what does not fit between several hosts, and on which of them.
void compare(const std::string& library, const Chosen& c,
             const std::vector<std::pair<std::string, Json>>& hosts, const Common& common,
             Finding& f) {
  const auto out = left_out(c, hosts);
  if (!c.none.empty()) {
    f.verdict = Verdict::kBad;
    f.text += fmt::format("; nothing on {}", hosts_text(c.none));
    f.advice = c.variable.empty() ? "no interface is up there" : setting(library, common);
  } else if (!c.bad.empty()) {
    f.verdict = Verdict::kWarn;
    for (const auto& [name, there] : c.bad) {
      f.text += fmt::format("; {} ({}) leads to no other host", name,
                            there.size() == hosts.size() ? "all hosts" : hosts_text(there));
    }
    f.advice = setting(library, common);
  } else if (!c.fabric && !out.empty()) {
    f.verdict = Verdict::kWarn;
    f.text += fmt::format("; no network of them is on all hosts: not with the others: {}",
                          hosts_text(out));
    f.advice = common.network.empty() ? "the hosts share no network that this can see"
                                      : setting(library, common);
  }
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
      if (!c.none.empty() && !c.variable.empty()) {
        f.verdict = Verdict::kWarn;
        f.advice = fmt::format("{} names no interface of this host: unset it", c.variable);
      }
      all.push_back(f);
      continue;
    }
    compare(library, c, hosts, common, f);
    all.push_back(f);
  }
  return all;
}

}  // namespace drover

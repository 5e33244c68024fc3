#include "machine/placement.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"

namespace drover {

namespace {

size_t index_of(const Machine& m, const std::string& uuid) {
  for (size_t i = 0; i < m.gpus().size(); ++i) {
    if (m.gpus()[i].uuid == uuid) return i;
  }
  return m.gpus().size();
}

// How good the link between two GPUs is: more is better.
int link_rank(const Machine& m, size_t a, size_t b) {
  if (a >= m.gpus().size() || b >= m.gpus().size()) return -1;
  const GpuLink& l = m.driver.links[a][b];
  return l.nvlinks * 8 + (l.peer ? 4 : 0) + (3 - static_cast<int>(l.pci));
}

// The free GPU with the best link to the one before; of equals the first in CUDA's order.
std::string next_gpu(const Machine& m, const std::vector<std::string>& seen,
                     const std::set<std::string>& taken, const std::string& before) {
  const size_t last = index_of(m, before);
  std::string best;
  int best_rank = -2;
  for (const std::string& uuid : seen) {
    if (taken.contains(uuid)) continue;
    const int rank = link_rank(m, last, index_of(m, uuid));
    if (rank > best_rank) best = uuid, best_rank = rank;
  }
  return best;
}

void take_gpus(const Machine& m, const std::vector<RankGiven>& ranks, bool share,
               std::vector<RankPlace>& places) {
  std::set<std::string> taken;
  // Who has no choice goes first, or another would take it from under them.
  for (size_t r = 0; r < ranks.size(); ++r) {
    if (ranks[r].gpus.size() != 1) continue;
    places[r].gpu = ranks[r].gpus[0];
    taken.insert(places[r].gpu);
  }
  std::string before;
  for (size_t r = 0; r < ranks.size(); ++r) {
    const auto& seen = ranks[r].gpus;
    if (seen.size() > 1) {
      places[r].gpu = next_gpu(m, seen, taken, before);
      if (places[r].gpu.empty() && share) {
        // Round again, in the same order.
        std::vector<std::string> order;
        for (size_t i = 0; i < ranks.size(); ++i) {
          const bool mine = std::find(seen.begin(), seen.end(), places[i].gpu) != seen.end();
          if (mine && std::find(order.begin(), order.end(), places[i].gpu) == order.end()) {
            order.push_back(places[i].gpu);
          }
        }
        places[r].gpu = order[r % order.size()];
      }
      DROVER_CHECK(
          !places[r].gpu.empty(), ExitCode::kUsage,
          "{} ranks on a host with {} GPUs: start as many ranks a host as it has GPUs (mpirun "
          "--map-by ppr:{}:node), or say --share-gpu (slow: their communication goes through the "
          "host's memory)",
          ranks.size(), seen.size(), seen.size());
      taken.insert(places[r].gpu);
    }
    before = places[r].gpu;
  }
}

// Cores `of` in hwloc's order, dealt out in equal runs to `ranks`.
void deal(const Machine& m, const CpuSet& of, const std::vector<size_t>& ranks,
          std::vector<RankPlace>& places) {
  std::vector<CpuSet> cores;
  for (const Core& c : m.cores) {
    if ((c.cpus & of).any()) cores.push_back(c.cpus & of);
  }
  for (size_t i = 0; i < ranks.size(); ++i) {
    RankPlace& p = places[ranks[i]];
    p.cpus.reset();
    for (size_t c = i * cores.size() / ranks.size(); c < (i + 1) * cores.size() / ranks.size();
         ++c) {
      p.cpus |= cores[c];
    }
    p.shared_out = true;
  }
}

// Ranks that were given the very same processors.
void share_out(const Machine& m, const CpuSet& given, const std::vector<size_t>& ranks,
               std::vector<RankPlace>& places) {
  if (ranks.size() < 2) return;
  if (m.cores_in(given) < static_cast<int>(ranks.size())) return;
  // By what is near: the cores of a GPU's node go to the ranks with GPUs there.
  std::map<std::string, std::vector<size_t>> by_node;
  for (const size_t r : ranks) {
    const Gpu* g = m.gpu(places[r].gpu);
    by_node[g != nullptr ? (g->near & given).to_string() : ""].push_back(r);
  }
  const bool enough = std::all_of(by_node.begin(), by_node.end(), [&](const auto& node) {
    return !node.first.empty() &&
           m.cores_in(CpuSet(node.first)) >= static_cast<int>(node.second.size());
  });
  bool apart = enough;
  for (auto a = by_node.begin(); apart && a != by_node.end(); ++a) {
    for (auto b = std::next(a); b != by_node.end(); ++b) {
      apart = apart && (CpuSet(a->first) & CpuSet(b->first)).none();
    }
  }
  if (!apart) {
    deal(m, given, ranks, places);
    return;
  }
  for (const auto& [near, who] : by_node) deal(m, CpuSet(near), who, places);
}

bool meets_another(const std::vector<RankGiven>& ranks, size_t r) {
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (i != r && (ranks[i].cpus & ranks[r].cpus).any()) return true;
  }
  return false;
}

// Of a rank whose cores others use too: its cores, less where those it meets have not as many each.
int fair_share(const Machine& m, const std::vector<RankGiven>& ranks, size_t r) {
  CpuSet all;
  int count = 0;
  for (const RankGiven& other : ranks) {
    if ((other.cpus & ranks[r].cpus).none()) continue;
    all |= other.cpus;
    ++count;
  }
  return std::max(1, std::min(m.cores_in(ranks[r].cpus), m.cores_in(all) / std::max(1, count)));
}

// The nearest NIC that is up, a fabric before Ethernet; ranks equally near to several take turns.
void choose_nics(const Machine& m, std::vector<RankPlace>& places) {
  std::map<std::string, size_t> turns;
  for (RankPlace& p : places) {
    std::vector<size_t> best;
    std::pair<int, int> least{9, 9};
    for (size_t n = 0; n < m.nics.size(); ++n) {
      const Nic& nic = m.nics[n];
      if (!nic.up) continue;
      Nearness near = Nearness::kSystem;
      if (const size_t g = index_of(m, p.gpu); g < m.gpus().size()) {
        near = m.gpu_nic[g][n];
      } else if (std::find(p.numa.begin(), p.numa.end(), nic.numa) != p.numa.end()) {
        near = Nearness::kNuma;
      }
      const std::pair<int, int> cost{nic.fabric ? 0 : 1, static_cast<int>(near)};
      if (cost < least) best.clear(), least = cost;
      if (cost == least) best.push_back(n);
    }
    if (best.empty()) continue;
    std::string key;
    for (const size_t n : best) key += m.nics[n].name + " ";
    p.nic = m.nics[best[turns[key]++ % best.size()]].name;
    p.nic_nearness = static_cast<Nearness>(least.second);
  }
}

}  // namespace

std::vector<RankPlace> place_ranks(const Machine& machine, const std::vector<RankGiven>& ranks,
                                   bool share_gpus) {
  std::vector<RankPlace> places(ranks.size());
  take_gpus(machine, ranks, share_gpus, places);
  std::map<std::string, std::vector<size_t>> same;
  for (size_t r = 0; r < ranks.size(); ++r) {
    places[r].cpus = ranks[r].cpus;
    same[ranks[r].cpus.to_string()].push_back(r);
  }
  for (const auto& [given, who] : same) share_out(machine, CpuSet(given), who, places);
  for (size_t r = 0; r < ranks.size(); ++r) {
    RankPlace& p = places[r];
    if (!p.shared_out) p.crowded = meets_another(ranks, r);
    p.cores = std::max(1, machine.cores_in(p.cpus));
    p.threads = p.crowded ? fair_share(machine, ranks, r) : p.cores;
    p.numa = machine.numa_of(p.cpus);
  }
  choose_nics(machine, places);
  return places;
}

}  // namespace drover

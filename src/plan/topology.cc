#include "plan/topology.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <sstream>

#include "base/error.h"
#include "base/options.h"

namespace drover {

namespace {

struct Key {
  const char* name;
  double& (*of)(Topology&);
  bool whole = false;
  bool may_be_zero = false;
  int64_t most = 0;  // of whole ones; nodes times places for ranks fit an int
};

// Every number of a file but the grid's.
const std::vector<Key>& keys() {
  static const std::vector<Key> all{
      {"machine.nodes", [](Topology& t) -> double& { return t.nodes; }, true, false, 1 << 16},
      {"machine.gpus_per_node", [](Topology& t) -> double& { return t.gpus_per_node; }, true, true,
       1 << 10},
      {"gpu.memory_gib", [](Topology& t) -> double& { return t.memory_gib; }},
      {"gpu.copy_gb_per_s", [](Topology& t) -> double& { return t.copy_gb_per_s; }},
      {"gpu.bf16_tflops", [](Topology& t) -> double& { return t.bf16_tflops; }},
      {"gpu.fp8_tflops", [](Topology& t) -> double& { return t.fp8_tflops; }},
      {"gpu.compute_capability", [](Topology& t) -> double& { return t.compute_capability; }},
      {"link.latency_us", [](Topology& t) -> double& { return t.link.latency_us; }},
      {"link.gb_per_s", [](Topology& t) -> double& { return t.link.gb_per_s; }},
      {"link.send_latency_us", [](Topology& t) -> double& { return t.link.send_latency_us; }},
      {"link.send_gb_per_s", [](Topology& t) -> double& { return t.link.send_gb_per_s; }},
      {"network.latency_us", [](Topology& t) -> double& { return t.network.latency_us; }},
      {"network.gb_per_s", [](Topology& t) -> double& { return t.network.gb_per_s; }},
      {"network.send_latency_us", [](Topology& t) -> double& { return t.network.send_latency_us; }},
      {"network.send_gb_per_s", [](Topology& t) -> double& { return t.network.send_gb_per_s; }},
      {"host.cores", [](Topology& t) -> double& { return t.cores; }, true, false, 1 << 14},
      {"host.memory_gib", [](Topology& t) -> double& { return t.host_memory_gib; }},
      {"host.read_gb_per_s", [](Topology& t) -> double& { return t.read_gb_per_s; }},
      {"host.bf16_gflops", [](Topology& t) -> double& { return t.bf16_gflops; }},
  };
  return all;
}

// A file and what it says, while it is read.
class Reader {
 public:
  explicit Reader(const std::string& file) : values_(read_ini(file)) { t_.file = file; }

  Topology run() {
    for (const Key& k : keys()) number(k);
    for (const auto& [name, size] :
         {std::pair{"grid.tp", &t_.tp}, {"grid.pp", &t_.pp}, {"grid.dp", &t_.dp}}) {
      if (const auto text = take(name)) *size = static_cast<int>(whole(name, *text, 0, 1 << 20));
    }
    if (const auto text = take("gpu.name")) t_.gpu_name = *text;
    measured();
    DROVER_CHECK(values_.empty(), ExitCode::kBadInput,
                 "{}: unknown key {}; topology/README.md lists the keys (expected one of {})",
                 t_.file, values_.begin()->first, names());
    check();
    defaults();
    return t_;
  }

 private:
  std::optional<std::string> take(const std::string& name) {
    const auto found = values_.find(name);
    if (found == values_.end()) return std::nullopt;
    std::string text = found->second;
    values_.erase(found);
    given_.insert(name);
    return text;
  }

  int64_t whole(const std::string& name, const std::string& text, int64_t least,
                int64_t most) const {
    const bool digits = !text.empty() && text.size() < 10 &&
                        text.find_first_not_of("0123456789") == std::string::npos;
    const int64_t value = digits ? std::stoll(text) : -1;
    DROVER_CHECK(digits && value >= least && value <= most, ExitCode::kBadInput,
                 "{}: {} = {}: expected a whole number from {} to {}", t_.file, name, text, least,
                 most);
    return value;
  }

  void number(const Key& k) {
    const auto text = take(k.name);
    if (!text) return;
    double& to = k.of(t_);
    if (k.whole) {
      to = static_cast<double>(whole(k.name, *text, k.may_be_zero ? 0 : 1, k.most));
      return;
    }
    size_t used = 0;
    double value = 0;
    try {
      value = std::stod(*text, &used);
    } catch (const std::exception&) {
      used = std::string::npos;
    }
    DROVER_CHECK(used == text->size() && std::isfinite(value) && value > 0 && value < 1e9,
                 ExitCode::kBadInput,
                 "{}: {} = {}: expected a number above 0 (leave the key out if it is not known)",
                 t_.file, k.name, *text);
    to = value;
  }

  void measured() {
    const auto text = take("machine.measured");
    if (!text) return;
    std::istringstream words(*text);
    for (std::string word; words >> word;) {
      if (word.back() == ',') word.pop_back();
      DROVER_CHECK(given_.count(word) != 0, ExitCode::kBadInput,
                   "{}: machine.measured names {}, which this file does not give", t_.file, word);
      t_.measured.insert(word);
    }
  }

  bool any(const std::string& section) const {
    return std::any_of(given_.begin(), given_.end(),
                       [&](const std::string& name) { return name.rfind(section + ".", 0) == 0; });
  }

  void check() const {
    const bool machine = t_.describes_machine();
    for (const char* section : {"machine", "gpu", "link", "network", "host"}) {
      DROVER_CHECK(machine || !any(section), ExitCode::kBadInput,
                   "{}: it has [{}], but not both nodes and gpus_per_node in [machine]", t_.file,
                   section);
    }
    if (machine) check_machine();
    check_grid_size();
  }

  void check_machine() const {
    DROVER_CHECK(t_.gpu() || !any("gpu"), ExitCode::kBadInput,
                 "{}: [gpu] describes GPUs, but machine.gpus_per_node is 0", t_.file);
    DROVER_CHECK(t_.gpu() || t_.cores > 0, ExitCode::kBadInput,
                 "{}: machine.gpus_per_node is 0, so ranks run on cores: say how many a node has "
                 "(host.cores)",
                 t_.file);
    const auto link = [&](const char* name, const Topology::Link& l) {
      DROVER_CHECK((l.gb_per_s > 0) == (l.latency_us > 0), ExitCode::kBadInput,
                   "{}: [{}] needs both gb_per_s and latency_us", t_.file, name);
      DROVER_CHECK(t_.copy_gb_per_s == 0 || l.gb_per_s <= t_.copy_gb_per_s, ExitCode::kBadInput,
                   "{}: {}.gb_per_s = {} is faster than the GPU's own memory (gpu.copy_gb_per_s = "
                   "{}): gigabytes are meant, not gigabits",
                   t_.file, name, l.gb_per_s, t_.copy_gb_per_s);
    };
    link("link", t_.link);
    link("network", t_.network);
    DROVER_CHECK(t_.nodes == 1 || t_.network.gb_per_s > 0, ExitCode::kBadInput,
                 "{}: {} nodes, but no network between them: give network.gb_per_s and latency_us",
                 t_.file, t_.nodes);
    DROVER_CHECK(t_.ranks_per_node() == 1 || !t_.gpu() || t_.link.gb_per_s > 0, ExitCode::kBadInput,
                 "{}: {} GPUs a node, but nothing between them: give link.gb_per_s and latency_us",
                 t_.file, t_.gpus_per_node);
    DROVER_CHECK(t_.fp8_tflops == 0 || t_.bf16_tflops == 0 || t_.fp8_tflops >= t_.bf16_tflops,
                 ExitCode::kBadInput,
                 "{}: gpu.fp8_tflops = {} is below gpu.bf16_tflops = {}; dense rates are meant",
                 t_.file, t_.fp8_tflops, t_.bf16_tflops);
  }

  void check_grid_size() const {
    int open = 0;
    int64_t ranks = 1;
    for (const auto& size : {t_.tp, t_.pp, t_.dp}) {
      if (size && *size > 0) ranks *= *size;
      if (size && *size == 0) ++open;
    }
    DROVER_CHECK(open <= 1, ExitCode::kBadInput,
                 "{}: only one of tp, pp and dp in [grid] may be 0 (what is left)", t_.file);
    // Cores may be shared by ranks, GPUs are not.
    DROVER_CHECK(!t_.gpu() || ranks <= t_.ranks(), ExitCode::kBadInput,
                 "{}: [grid] needs {} ranks, but the machine has {} nodes x {} GPUs", t_.file,
                 ranks, t_.nodes, t_.gpus_per_node);
  }

  void defaults() {
    for (Topology::Link* l : {&t_.link, &t_.network}) {
      if (l->send_latency_us == 0) l->send_latency_us = l->latency_us;
      if (l->send_gb_per_s == 0) l->send_gb_per_s = l->gb_per_s;
    }
  }

  static std::string names() {
    std::string all = "machine.measured, gpu.name, grid.tp, grid.pp, grid.dp";
    for (const Key& k : keys()) all += fmt::format(", {}", k.name);
    return all;
  }

  std::map<std::string, std::string> values_;  // not taken yet
  std::set<std::string> given_;
  Topology t_;
};

}  // namespace

Topology read_topology(const std::string& file) { return Reader(file).run(); }

std::string topology_ini(const Topology& t) {
  std::map<std::string, std::string> sections;
  const std::vector<std::string> order{"machine", "gpu", "link", "network", "host", "grid"};
  if (!t.gpu_name.empty()) sections["gpu"] += fmt::format("name = {}\n", t.gpu_name);
  Topology copy = t;
  for (const Key& k : keys()) {
    const double value = k.of(copy);
    if (value < 0 || (value == 0 && !k.may_be_zero)) continue;
    const std::string name = k.name;
    const size_t dot = name.find('.');
    sections[name.substr(0, dot)] += fmt::format("{} = {}\n", name.substr(dot + 1), value);
  }
  if (!t.measured.empty()) {
    sections["machine"] += fmt::format("measured = {}\n", fmt::join(t.measured, ", "));
  }
  for (const auto& [name, size] : {std::pair{"tp", t.tp}, {"pp", t.pp}, {"dp", t.dp}}) {
    if (size) sections["grid"] += fmt::format("{} = {}\n", name, *size);
  }
  std::string text;
  for (const auto& name : order) {
    if (sections.count(name) == 0) continue;
    text += fmt::format("{}[{}]\n{}", text.empty() ? "" : "\n", name, sections[name]);
  }
  return text;
}

int nodes_of_tensor_group(const Grid& grid, int ranks_per_node) {
  int most = 1;
  // Where groups begin relative to nodes repeats after as many groups as a node has ranks.
  const int groups = std::min(grid.pp * grid.dp, ranks_per_node);
  for (int g = 0; g < groups; ++g) {
    const int first = g * grid.tp, last = first + grid.tp - 1;
    most = std::max(most, last / ranks_per_node - first / ranks_per_node + 1);
  }
  return most;
}

bool stages_cross_nodes(const Grid& grid, int ranks_per_node) {
  if (grid.pp == 1) return false;
  const int replicas = std::min(grid.dp, ranks_per_node);
  for (int r = 0; r < replicas; ++r) {
    const int first = grid.first_rank(r), last = first + grid.replica_ranks() - 1;
    if (first / ranks_per_node != last / ranks_per_node) return true;
  }
  return false;
}

}  // namespace drover

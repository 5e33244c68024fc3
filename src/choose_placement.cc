#include "choose_placement.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <set>

#include "base/log.h"
#ifdef DROVER_HAVE_CUDA
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cupti_trace.h"
#include "base/trace.h"
#endif

namespace drover {

namespace {

constexpr double kSeconds = 120;  // start-up of all ranks
constexpr size_t kMostGpus = 32;  // of a host

// What a rank tells the others of its host.
struct Given {
  CpuSet cpus;
  char gpus[kMostGpus][48] = {};  // UUIDs
};

const std::string& my_host(const World& world) {
  return world.peers()[static_cast<size_t>(world.rank())].host;
}

// The ranks of this host by their names for it, in order of rank.
std::vector<int> ranks_of_host(const World& world) {
  std::vector<int> ranks;
  for (int r = 0; r < world.size(); ++r) {
    if (world.peers()[static_cast<size_t>(r)].host == my_host(world)) ranks.push_back(r);
  }
  return ranks;
}

// All ranks alike: a host without a GPU decides for everybody.
bool choose_gpu_or_cpu(const Options& options, [[maybe_unused]] World& world,
                       [[maybe_unused]] Interrupt& interrupt) {
  const std::string name = options.text("backend");
  DROVER_CHECK(name == "auto" || name == "cpu" || name == "cuda", ExitCode::kUsage,
               "--backend {}: expected auto, cpu or cuda", name);
  if (name == "cpu") return false;
#ifdef DROVER_HAVE_CUDA
  // Before the first call of CUDA, so that all of it is seen.
  if (trace::on()) {
    const std::string unseen = cuda::start_device_trace();
    if (!unseen.empty()) log::warn("{}: the trace has whole steps of the GPU only", unseen);
  }
  const std::string problem = cuda_problem();
  if (world.agree_min(problem.empty() ? 1 : 0, interrupt, kSeconds) == 1) return true;
  const std::string why =
      problem.empty() ? "a rank on another host has no usable GPU (its log says why)" : problem;
  DROVER_CHECK(name == "auto", ExitCode::kEnvironment, "--backend cuda: {}", why);
  log::info("--backend auto takes the CPU: {}", why);
#else
  DROVER_CHECK(name == "auto", ExitCode::kUsage,
               "--backend cuda: this build has the cpu backend only (cmake said why: it found no "
               "CUDA, or no NCCL)");
#endif
  return false;
}

// Another machine's description is looked at as a whole.
CpuSet all_of(const Machine& m) {
  CpuSet cpus;
  for (const Core& c : m.cores) cpus |= c.cpus;
  return cpus;
}

std::vector<std::string> visible_gpus() {
  std::vector<std::string> uuids;
#ifdef DROVER_HAVE_CUDA
  for (int i = 0; i < cuda_device_count(); ++i) uuids.push_back(cuda_device_uuid(i));
#endif
  return uuids;
}

Given describe(const CpuSet& cpus, const std::vector<std::string>& gpus) {
  Given g;
  g.cpus = cpus;
  DROVER_CHECK(gpus.size() <= kMostGpus, ExitCode::kEnvironment,
               "this rank sees {} GPUs, drover knows up to {} a host", gpus.size(), kMostGpus);
  for (size_t i = 0; i < gpus.size(); ++i) {
    std::memcpy(g.gpus[i], gpus[i].data(), std::min(gpus[i].size(), sizeof(g.gpus[i]) - 1));
  }
  return g;
}

RankGiven read(const Given& g) {
  RankGiven r{.cpus = g.cpus, .gpus = {}};
  for (const auto& uuid : g.gpus) {
    if (uuid[0] != 0) r.gpus.emplace_back(uuid);
  }
  return r;
}

// Ranks that see different GPUs may still have come to the same one.
bool check_sharing(const std::vector<RankPlace>& places, const std::vector<int>& ranks, bool share,
                   const std::string& host) {
  bool shared = false;
  for (size_t a = 0; a < places.size(); ++a) {
    for (size_t b = a + 1; b < places.size(); ++b) {
      if (places[a].gpu.empty() || places[a].gpu != places[b].gpu) continue;
      DROVER_CHECK(share, ExitCode::kUsage,
                   "ranks {} and {} would share the GPU {} of host {}: give each rank a GPU of its "
                   "own (fewer ranks, or the launcher's GPU binding), or say --share-gpu (slow: "
                   "their communication goes through the host's memory)",
                   ranks[a], ranks[b], places[a].gpu, host);
      shared = true;
    }
  }
  return shared;
}

}  // namespace

PlacedRank choose_placement(const Options& options, World& world, Interrupt& interrupt) {
  PlacedRank p;
  p.gpu = choose_gpu_or_cpu(options, world, interrupt);
  p.given = this_machine().this_host ? given_cpus() : all_of(this_machine());
  const std::vector<std::string> gpus = p.gpu ? visible_gpus() : std::vector<std::string>{};
  const Machine& machine = this_machine();

  const std::vector<int> ranks = ranks_of_host(world);
  const auto all = world.make_comm(interrupt, nullptr, kSeconds);
  const auto host = all->split(ranks.front(), world.rank(), "host");
  const Given mine = describe(p.given, gpus);
  std::vector<Given> gathered(ranks.size());
  host->all_gather(&mine, gathered.data(), sizeof(mine), nullptr);

  std::vector<RankGiven> given;
  for (const Given& g : gathered) given.push_back(read(g));
  const bool share = options.flag("share-gpu");
  const auto places = place_ranks(machine, given, share);
  const bool shared = check_sharing(places, ranks, share, my_host(world));
  // Everybody alike: communicators over device memory are made by all ranks.
  p.gpu_shared = p.gpu && world.agree_min(shared ? 0 : 1, interrupt, kSeconds) == 0;
  p.mine = places[static_cast<size_t>(host->rank())];
  const auto first = std::find_if(places.begin(), places.end(),
                                  [&](const RankPlace& q) { return q.gpu == p.mine.gpu; });
  p.counts_energy = first - places.begin() == host->rank();
  if (p.gpu) {
    const auto found = std::find(gpus.begin(), gpus.end(), p.mine.gpu);
    p.device = static_cast<int>(found - gpus.begin());
    if (gpus.size() == 1 && ranks.size() > 1) {
      const char* narrowed = std::getenv("CUDA_VISIBLE_DEVICES");
      log::warn(
          "this rank sees one GPU only{}: peers' memory is out of its reach, NCCL alone will do; "
          "start it so that every rank sees all GPUs of its host (srun --gpu-bind=none)",
          narrowed != nullptr ? fmt::format(" (CUDA_VISIBLE_DEVICES={})", narrowed) : "");
    }
  }
  return p;
}

void bind_to_share(const PlacedRank& p, const Options& options) {
  if (!options.flag("bind") || !p.mine.shared_out || !this_machine().this_host) return;
  // Whoever asks for more threads than cores wants them spread.
  if (options.integer("threads", 0, 4096) > p.mine.cores) return;
  if (!bind_thread(p.mine.cpus)) {
    log::warn("the system refuses to bind this rank to the cores {}", cpu_list(p.mine.cpus));
  }
}

void unbind(const PlacedRank& p) {
  if (this_machine().this_host) bind_thread(p.given);
}

namespace {

// GPU, cores, NUMA nodes, NIC.
std::array<std::string, 4> columns_of(const PlacedRank& p) {
  const Machine& m = this_machine();
  std::string gpu = "-";
  if (p.gpu) {
    const Gpu* g = m.gpu(p.mine.gpu);
    gpu = g != nullptr ? fmt::format("{} {}", g->pci, p.mine.gpu) : p.mine.gpu;
  }
  const char* how = p.mine.shared_out ? "" : p.mine.crowded ? " crowded" : " as given";
  const std::string nic =
      p.mine.nic.empty()
          ? "-"
          : p.mine.nic + (p.gpu ? fmt::format(" (same {})", name_of(p.mine.nic_nearness)) : "");
  return {gpu, fmt::format("{} ({}{})", cpu_list(p.mine.cpus), p.mine.cores, how),
          fmt::format("{}", fmt::join(p.mine.numa, ",")), nic};
}

}  // namespace

std::string placement_text(const PlacedRank& p) {
  const auto [gpu, cores, nodes, nic] = columns_of(p);
  return fmt::format("GPU {}, cores {}, NUMA node {}, NIC {}", gpu, cores, nodes, nic);
}

void print_placement(const PlacedRank& p, const Grid& grid, World& world, Interrupt& interrupt) {
  struct Line {
    char text[320] = {};
  } mine;
  const auto [gpu, cores, nodes, nic] = columns_of(p);
  const std::string text = fmt::format("{:<56} {:<24} {:<6} {}", gpu, cores, nodes, nic);
  std::snprintf(mine.text, sizeof(mine.text), "%s", text.c_str());
  std::vector<Line> lines(static_cast<size_t>(world.size()));
  world.make_comm(interrupt, nullptr, kSeconds)
      ->all_gather(&mine, lines.data(), sizeof(mine), nullptr);
  if (world.rank() != 0) return;
  if (!this_machine().this_host) {
    std::cout << "(of the machine that hwloc's variables name, not of this one)\n";
  }
  std::cout << fmt::format("{:>5} {:<16} {:<20} {:<56} {:<24} {:<6} {}\n", "rank", "host",
                           "replica, stage, slot", "GPU", "cores", "NUMA", "NIC");
  for (int r = 0; r < world.size(); ++r) {
    std::cout << fmt::format(
        "{:>5} {:<16} {:<20} {}\n", r, world.peers()[static_cast<size_t>(r)].host,
        fmt::format("{}, {}, {}", grid.replica_of(r), grid.stage_of(r), grid.slot_of(r)),
        lines[static_cast<size_t>(r)].text);
  }
  std::cout.flush();
}

}  // namespace drover

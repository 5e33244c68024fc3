#include "planning.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <sstream>

#include "base/error.h"
#include "command_line.h"
#include "engine/kv_cache.h"
#include "model/weights.h"
#include "open_dataset.h"

namespace drover {

namespace {

// What CUDA and, with several ranks, NCCL hold of a GPU when drover asks how much is free: found
// from the pages of the bench files of H100s in tests/bench/results.
constexpr double kContextGib = 0.63;
constexpr double kNcclGib = 0.77;

// Options of a run that its sizes depend on.
constexpr const char* kSizeOptions[] = {"model",
                                        "activations",
                                        "kv",
                                        "kv-memory",
                                        "gpu-memory-fraction",
                                        "share-gpu",
                                        "page-tokens",
                                        "max-sequences",
                                        "max-length",
                                        "step-tokens",
                                        "chunk-tokens",
                                        "graphs",
                                        "groups",
                                        "batching",
                                        "threads",
                                        "step-seconds",
                                        "config",
                                        "help"};

std::string resolve_activations(const std::string& given, const Topology& t) {
  if (given != "auto") return given;
  return t.gpu() && t.compute_capability >= 9 ? "fp8" : "bf16";
}

}  // namespace

std::vector<OptionRow> planning_options() {
  std::vector<OptionRow> rows{
      {"topology", "", "INI file of the machine (topology/README.md)"},
      {"gpus", "0",
       "ranks (0: all of the topology, or of its [grid] on a CPU); nodes grow with it"},
      {"grid", "auto", "tp,pp,dp, or auto: every grid of so many ranks"},
      {"calibrate", "", "JSON files of drover bench step, linear, attention, comm, with commas"},
      {"dataset", "", "dataset (HDF5), or synthetic:openorca[:n] or synthetic:INxOUT[:n]"},
      {"prompt-tokens", "0", "without a dataset: tokens of a prompt"},
      {"output-tokens", "0", "tokens of an answer (0: the dataset's references)"},
      {"max-new-tokens", "1024", "longest answer"},
      {"json", "", "write all figures to this file"},
  };
  for (const OptionRow& row : engine_options()) {
    if (std::any_of(std::begin(kSizeOptions), std::end(kSizeOptions),
                    [&](const char* name) { return std::string(name) == row.name; })) {
      rows.push_back(row);
    }
  }
  return rows;
}

Planning::Planning(const Options& o) : options_(o) {
  DROVER_CHECK(!o.text("topology").empty(), ExitCode::kUsage,
               "--topology is missing: a file of topology/, or one that describes your machine");
  DROVER_CHECK(!o.text("model").empty(), ExitCode::kUsage,
               "--model is missing: give a model store, or synthetic:NAME");
  topology_ = read_topology(o.text("topology"));
  DROVER_CHECK(topology_.describes_machine(), ExitCode::kBadInput,
               "{}: it names a grid only; to plan, it needs [machine] and what follows "
               "(topology/README.md)",
               topology_.file);
  const auto source = open_weights(o.text("model"), "");
  model_ = {o.text("model"),
            source->architecture(),
            source->group(),
            topology_.gpu(),
            resolve_activations(o.text("activations"), topology_),
            o.text("kv")};
  kv_format(model_.kv);
  const int given = static_cast<int>(o.integer("gpus", 0, 1 << 20));
  ranks_ = given > 0 ? given : topology_.ranks();
  if (given == 0 && !topology_.gpu() && topology_.tp && topology_.pp && topology_.dp &&
      *topology_.tp * *topology_.pp * *topology_.dp > 0) {
    ranks_ = *topology_.tp * *topology_.pp * *topology_.dp;
  }
  if (topology_.gpu() && ranks_ > topology_.ranks()) {
    const int nodes = (ranks_ + topology_.ranks_per_node() - 1) / topology_.ranks_per_node();
    DROVER_CHECK(topology_.network.gb_per_s > 0, ExitCode::kUsage,
                 "--gpus {}: {} has {} x {} and no [network] to add nodes by", ranks_,
                 topology_.file, topology_.nodes, topology_.gpus_per_node);
    topology_.nodes = nodes;
  }
  const BenchFiles files = read_bench_files(o.list("calibrate"), model_);
  names_ = files.names;
  for (size_t i = 0; i < files.names.size(); ++i) {
    const std::string& device = files.devices[i];
    if (!topology_.gpu() || device.empty() || topology_.gpu_name.empty()) continue;
    // "NVIDIA H200 SXM" and "cuda: NVIDIA H200, sm_90, ...": the second word tells.
    std::istringstream words(topology_.gpu_name);
    std::string maker, kind;
    words >> maker >> kind;
    if (kind == "GeForce") words >> maker >> kind;
    if (device.find(kind) != std::string::npos) continue;
    warnings_.push_back(fmt::format("{} was measured on another device ({}) than {} ({})",
                                    files.names[i], device.substr(0, device.find(',')),
                                    topology_.file, topology_.gpu_name));
  }
  calibrate_with(files);
}

// One fit for each number of threads; figures that know of no threads (messages) help all of them.
void Planning::calibrate_with(const BenchFiles& files) {
  std::map<int, Fitted> by_threads;
  for (const StepBenchFile& f : files.steps) {
    const bool first = by_threads.count(f.threads) == 0;
    Fitted& fit = by_threads[f.threads];
    fit.threads = f.threads;
    // The fewest: rates are least disturbed by others.
    fit.ranks = first ? f.grid.ranks() : std::min(fit.ranks, f.grid.ranks());
  }
  for (const Observation& o : files.operations) {
    if (o.threads > 0 && by_threads.count(o.threads) == 0)
      by_threads[o.threads].threads = o.threads;
  }
  if (by_threads.empty()) by_threads[1] = {};
  for (auto& [threads, fit] : by_threads) {
    for (const Observation& o : files.operations) {
      if (o.threads == 0 || o.threads == threads) fit.observations.push_back(o);
    }
    for (const StepBenchFile& f : files.steps) {
      if (f.threads != threads) continue;
      const auto of_file = [this, kind = Fitted{fit.ranks, fit.threads, {}, {}},
                            ranks = f.grid.ranks()](const Rates& r) {
        return scaled(kind, r, ranks, kind.threads);
      };
      for (auto& o : step_observations(f, model_, of_file))
        fit.observations.push_back(std::move(o));
    }
    fit.calibration = calibrate(guesses(fit.ranks, fit.threads), fit.observations);
    fits_.push_back(std::move(fit));
  }
}

const Fitted& Planning::fit_of(int threads) const {
  const auto distance = [&](const Fitted& f) {
    return std::abs(std::log(static_cast<double>(f.threads) / threads));
  };
  return *std::min_element(fits_.begin(), fits_.end(), [&](const Fitted& a, const Fitted& b) {
    return distance(a) < distance(b);
  });
}

Rates Planning::guesses(int local_ranks, int threads) const {
  return guessed_rates(topology_, model_.activations, local_ranks, threads);
}

// A CPU rank's rates grow with its threads, shrink when the node's other cores are at work too, and
// are limited by its part of the node's.
Rates Planning::scaled(const Fitted& fit, const Rates& fitted, int local_ranks, int threads) const {
  if (topology_.gpu()) return fitted;
  Rates r = fitted;
  const double cores = topology_.cores;
  const auto working = [&](int ranks, int n) {
    return std::min(cores, static_cast<double>(ranks) * n);
  };
  const auto kept = [&](int ranks, int n) {
    return cores > 1 ? std::pow(fitted[kShare], (working(ranks, n) - 1) / (cores - 1)) : 1.0;
  };
  const double threaded =
      cpu_speed(cores, local_ranks, threads) / cpu_speed(cores, fit.ranks, fit.threads);
  const double share = kept(local_ranks, threads) / kept(fit.ranks, fit.threads);
  for (const RateId id : {kRead, kFlops, kCache, kPairs, kRowRate}) {
    r.value[id] *= threaded * share;
    if (threaded == 1) continue;
    r.origin[id] = Origin::kGuessed;
    r.covariance[id][id] += 0.09;
  }
  // The rank's part of what all cores at work can read.
  const double part = std::min(static_cast<double>(threads), cores / local_ranks);
  const double limit = topology_.read_gb_per_s * 1e9 * part / working(local_ranks, threads);
  r.value[kRead] = std::min(r.value[kRead], limit);
  return r;
}

Rates Planning::rates(const SizedGrid& g) const {
  const Fitted& fit = fit_of(g.threads);
  return scaled(fit, fit.calibration.rates, g.local_ranks, g.threads);
}

Rates Planning::rates_of(const StepBenchFile& f) const {
  const Fitted& fit = fit_of(f.threads);
  return scaled(fit, fit.calibration.rates, f.grid.ranks(), f.threads);
}

// On a CPU there may be as many ranks as the grid asks for; GPUs are as many as there are.
Grid Planning::whole_grid(Grid g) const {
  const bool told = options_.integer("gpus", 0, 1 << 20) > 0 || topology_.gpu();
  const int open = (g.tp == 0) + (g.pp == 0) + (g.dp == 0);
  constexpr int kMost = 1 << 20;
  DROVER_CHECK(g.tp >= 0 && g.pp >= 0 && g.dp >= 0 && open <= 1 && g.tp <= kMost && g.pp <= kMost &&
                   g.dp <= kMost,
               ExitCode::kUsage,
               "grid {},{},{}: expected sizes from 1 to {} (one of them may be 0: what is left)",
               g.tp, g.pp, g.dp, kMost);
  const int64_t fixed = int64_t{std::max(1, g.tp)} * std::max(1, g.pp) * std::max(1, g.dp);
  const int64_t ranks = told || open > 0 ? ranks_ : fixed;
  if (open > 0 && ranks % fixed == 0) {
    (g.tp == 0 ? g.tp : g.pp == 0 ? g.pp : g.dp) = static_cast<int>(ranks / fixed);
  }
  DROVER_CHECK(int64_t{g.tp} * g.pp * g.dp == ranks && ranks <= kMost, ExitCode::kUsage,
               "grid {},{},{} is of {} ranks, but {} are planned: say --gpus {}, or another --grid",
               g.tp, g.pp, g.dp, fixed, ranks, fixed);
  check_grid(model_.arch, g.tp, g.pp, model_.group);
  return g;
}

Grid Planning::one_grid() const {
  if (options_.text("grid") != "auto") return grids().front();
  const Topology& t = topology_;
  DROVER_CHECK(t.tp && t.pp && t.dp, ExitCode::kUsage,
               "--grid is missing, and {} suggests none: say --grid tp,pp,dp", t.file);
  return whole_grid({*t.tp, *t.pp, *t.dp});
}

std::vector<Grid> Planning::grids() const {
  const std::string text = options_.text("grid");
  if (text != "auto") {
    Grid g;
    int used = 0;
    DROVER_CHECK(std::sscanf(text.c_str(), "%d,%d,%d%n", &g.tp, &g.pp, &g.dp, &used) == 3 &&
                     static_cast<size_t>(used) == text.size(),
                 ExitCode::kUsage, "--grid {}: expected auto, or tp,pp,dp such as 2,2,4", text);
    return {whole_grid(g)};
  }
  std::vector<Grid> all;
  for (int tp = 1; tp <= std::min(ranks_, int{model_.arch.kv_heads}); ++tp) {
    for (int pp = 1; pp <= std::min(ranks_ / tp, int{model_.arch.layers}); ++pp) {
      if (ranks_ % (tp * pp) != 0) continue;
      try {
        check_grid(model_.arch, tp, pp, model_.group);
        all.push_back({tp, pp, ranks_ / (tp * pp)});
      } catch (const Error&) {
        // A grid that this model cannot have.
      }
    }
  }
  DROVER_CHECK(!all.empty(), ExitCode::kUsage, "no grid of {} ranks suits {}", ranks_,
               model_.arch.summary());
  return all;
}

SizedGrid Planning::size(const Grid& grid) const {
  SizedGrid g;
  g.grid = grid;
  const bool gpu = topology_.gpu();
  g.local_ranks = gpu || topology_.nodes > 1 ? std::min(grid.ranks(), topology_.ranks_per_node())
                                             : grid.ranks();
  const int threads = static_cast<int>(options_.integer("threads", 0, 4096));
  g.threads = gpu           ? 1
              : threads > 0 ? threads
                            : std::max(1, static_cast<int>(topology_.cores) / g.local_ranks);
  const double gib = static_cast<double>(size_t{1} << 30);
  const double taken = grid.ranks() > 1 ? kContextGib + kNcclGib : kContextGib;
  const double memory = gpu ? topology_.memory_gib - taken : topology_.host_memory_gib;
  DROVER_CHECK(memory > 0, ExitCode::kBadInput,
               "{}: {} is needed to plan: how much memory there is", topology_.file,
               gpu ? "gpu.memory_gib" : "host.memory_gib");
  DeviceFacts device = gpu_facts(static_cast<size_t>(memory * gib), 0, g.local_ranks);
  if (!gpu) {
    device.gpu = false;
    device.rows = {Dtype::kF32, [](int64_t rows) { return rows; }};
  }
  try {
    int32_t pages = INT32_MAX;
    for (int stage = 0; stage < grid.pp; ++stage) {
      device.rank = stage * grid.tp;
      const Shard shard = make_shard(model_.arch, grid.tp, 0, grid.pp, stage, model_.group);
      g.stages.push_back(size_shard(options_, model_.arch, shard, model_.group, grid, device));
      pages = std::min(pages, g.stages.back().limits.pages);
    }
    if (pages < 2) {
      g.problem = fmt::format("{}: no room for the KV cache of one sequence", grid.text());
      return g;
    }
    for (EngineSizes& s : g.stages) settle_pages(s, options_, gpu, pages);
  } catch (const Error& e) {
    if (e.code() != ExitCode::kEnvironment) throw;
    g.problem = e.what();
    return g;
  }
  g.limits = g.stages.front().limits;
  return g;
}

GridShape Planning::shape(const Grid& grid) const {
  return grid_shape(model_.arch, model_.group, grid, number_sizes(model_),
                    topology_.nodes > 1 ? topology_.ranks_per_node() : 0);
}

std::vector<Arrival> Planning::samples() const {
  const int most = static_cast<int>(options_.integer("max-new-tokens", 1, 1 << 24));
  const int prompt = static_cast<int>(options_.integer("prompt-tokens", 0, 1 << 24));
  const int output = static_cast<int>(options_.integer("output-tokens", 0, 1 << 24));
  const std::string name = options_.text("dataset");
  std::vector<Arrival> all;
  if (name.empty()) {
    DROVER_CHECK(prompt > 0 && output > 0, ExitCode::kUsage,
                 "say what is asked: --dataset, or --prompt-tokens and --output-tokens");
    all.push_back({0, prompt, std::max(most, output), output});
    return all;
  }
  DROVER_CHECK(prompt == 0, ExitCode::kUsage, "--prompt-tokens beside --dataset: one of the two");
  const auto source = open_weights(options_.text("model"), "");
  const auto dataset = open_dataset(name, *source);
  for (size_t i = 0; i < dataset->size(); ++i) {
    const Sample s = dataset->sample(i);
    const int length = output > 0 ? output : s.output_length > 0 ? s.output_length : most;
    all.push_back({0, static_cast<int32_t>(s.input.size()), std::max(most, output),
                   std::clamp(length, std::min(2, most), std::max(most, output))});
  }
  DROVER_CHECK(!all.empty(), ExitCode::kBadInput, "{}: no samples", name);
  return all;
}

namespace {

// Milliseconds that the sums of a step cost beyond those within a node; 0: no group crosses nodes.
double tensor_network_ms(const Topology& t, const Architecture& a, const Grid& grid, double rows,
                         const Rates& rates) {
  if (t.nodes <= 1) return 0;
  Placement place{.tp = grid.tp, .nodes_of_stage = nodes_of_tensor_group(grid, t.ranks_per_node())};
  if (place.nodes_of_stage == 1) return 0;
  const double bytes = rows * a.hidden * (t.gpu() ? 2 : 4);
  const double apart = sum_seconds(bytes, place, rates);
  place.nodes_of_stage = 1;
  const double sums = 2.0 * a.layers + 1;
  return 1e3 * sums * (apart - sum_seconds(bytes, place, rates));
}

}  // namespace

std::string tensor_warning(const Topology& t, const Architecture& a, const Grid& grid, double rows,
                           const Rates& rates) {
  const double ms = tensor_network_ms(t, a, grid, rows, rates);
  if (ms <= 0) return {};
  return fmt::format(
      "{}: tensor-parallel slots lie on {} nodes; sums over the network cost about {:.1f} ms more "
      "in a step of {:.0f} rows than within a node",
      grid.text(), nodes_of_tensor_group(grid, t.ranks_per_node()), ms, rows);
}

}  // namespace drover

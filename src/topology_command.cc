// drover topology: a topology file for the machine at hand, or what a file says.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <set>

#include "base/log.h"
#include "bench_limits.h"
#include "choose_backend.h"
#include "command_line.h"
#include "commands.h"
#include "doctor.h"
#include "job.h"
#include "machine/machine.h"
#include "plan/topology.h"

namespace drover {

namespace {

namespace fs = std::filesystem;

// Rounded to what is worth writing down.
double rounded(double value) { return std::stod(fmt::format("{:.3g}", value)); }

// What is alike on hosts that one file can describe.
struct HostShape {
  char host[64] = {};
  int64_t cores = 0, gpus = 0;
  double memory_gib = 0, gpu_memory_gib = 0;
  bool operator==(const HostShape& o) const {
    return cores == o.cores && gpus == o.gpus &&
           std::fabs(memory_gib - o.memory_gib) < 0.1 * memory_gib + 1 &&
           std::fabs(gpu_memory_gib - o.gpu_memory_gib) < 1;
  }
};

HostShape shape_of(const Machine& m, const std::string& host) {
  HostShape s;
  host.copy(s.host, sizeof(s.host) - 1);
  s.cores = static_cast<int64_t>(m.cores.size());
  s.gpus = static_cast<int64_t>(m.gpus().size());
  s.memory_gib = static_cast<double>(m.memory) / (1u << 30);
  if (s.gpus > 0) s.gpu_memory_gib = static_cast<double>(m.gpus()[0].memory) / (1u << 30);
  return s;
}

// Rates of data sheets come from the topology files that lie beside the program: of one whose GPU
// is of the same model ("H100" in both names).
std::string model_of(const std::string& gpu_name) {
  std::string word;
  for (const char c : gpu_name + " ") {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
      word += c;
      continue;
    }
    const bool digits =
        std::any_of(word.begin(), word.end(), [](unsigned char d) { return std::isdigit(d) != 0; });
    if (digits && word.size() > 2 && word.find("GB") == std::string::npos) return word;
    word.clear();
  }
  return "";
}

Topology like(const std::string& gpu_name, bool several) {
  const std::string model = model_of(gpu_name);
  const fs::path bin = fs::read_symlink("/proc/self/exe").parent_path();
  std::error_code error;
  std::set<fs::path> files;
  for (const auto& folder : {bin / "../share/drover/topology", bin / "../../topology"}) {
    for (const auto& entry : fs::directory_iterator(folder, error)) {
      if (entry.path().extension() == ".ini") files.insert(entry.path());
    }
  }
  for (const auto& file : files) {
    const Topology t = read_topology(file.string());
    if (!model.empty() && model_of(t.gpu_name) == model && (!several || t.gpus_per_node > 1)) {
      return t;
    }
  }
  return {};
}

void describe_gpus(const Machine& m, Topology& t, std::string& comment) {
  const auto& gpus = m.gpus();
  t.gpu_name = gpus[0].name;
  t.memory_gib = rounded(static_cast<double>(gpus[0].memory) / (1u << 30));
  t.compute_capability = gpus[0].capability / 10.0;
  t.measured.insert("gpu.memory_gib");
  const Topology known = like(t.gpu_name, gpus.size() > 1);
  if (!known.file.empty()) {
    t.copy_gb_per_s = known.copy_gb_per_s;
    t.bf16_tflops = known.bf16_tflops;
    t.fp8_tflops = known.fp8_tflops;
    comment +=
        fmt::format("# [gpu] rates: of {}, not measured here; drover bench linear measures.\n",
                    fs::path(known.file).filename().string());
  }
  if (gpus.size() < 2) return;
  const GpuLink& first = m.driver.links[0][1];
  if (known.link.gb_per_s > 0 && first.nvlinks > 0) {
    t.link = known.link;
    comment += fmt::format(
        "# [link]: of {}, not measured here; drover bench comm --backend cuda measures.\n",
        fs::path(known.file).filename().string());
    return;
  }
  // Three fifths of the links' own rate is what an all-reduce gave on two H100s.
  const double guess = first.nvlink_gbytes > 0 ? 0.6 * first.nvlink_gbytes : first.peer ? 20 : 8;
  t.link.latency_us = first.peer ? 10 : 25;
  t.link.gb_per_s = t.copy_gb_per_s > 0 ? std::min(guess, t.copy_gb_per_s) : guess;
  comment +=
      "# [link]: guesses from what joins the GPUs; drover bench comm --backend cuda measures.\n";
}

// All-reduces of two ranks, and messages between them.
Topology::Link measure_link(Comm& all, int a, int b) {
  const int color = all.rank() == a || all.rank() == b ? 0 : -1;
  const auto pair = all.split(color, all.rank(), "pair");
  double figures[2] = {};  // latency in us, GB/s
  if (pair != nullptr) {
    constexpr size_t kLarge = 4 << 20;
    std::vector<float> buffer(kLarge / sizeof(float));
    const auto best_us = [&](size_t bytes, int batches, int calls) {
      double best = 1e18;
      for (int i = 0; i < batches; ++i) {
        const auto begin = Clock::now();
        for (int c = 0; c < calls; ++c) {
          pair->all_reduce_sum(buffer.data(), bytes / sizeof(float), Dtype::kF32, nullptr);
        }
        best = std::min(best,
                        std::chrono::duration<double>(Clock::now() - begin).count() * 1e6 / calls);
      }
      return best;
    };
    best_us(kLarge, 1, 1);
    figures[0] = best_us(64, 10, 50);
    figures[1] = static_cast<double>(kLarge) / best_us(kLarge, 5, 2) / 1e3;
  }
  all.broadcast(figures, sizeof(figures), a, nullptr);
  Topology::Link link;
  link.latency_us = rounded(figures[0]);
  link.gb_per_s = rounded(figures[1]);
  return link;
}

void send_figures(const std::vector<PairFigure>& pairs, bool same_host, Topology::Link& link) {
  std::vector<double> latency, gbytes;
  for (const PairFigure& p : pairs) {
    if (p.same_host != same_host) continue;
    latency.push_back(p.latency_us);
    gbytes.push_back(p.gbytes);
  }
  if (latency.empty()) return;
  std::sort(latency.begin(), latency.end());
  std::sort(gbytes.begin(), gbytes.end());
  link.send_latency_us = rounded(latency[latency.size() / 2]);
  link.send_gb_per_s = rounded(gbytes[gbytes.size() / 2]);
}

void note_measured(Topology& t, const std::string& section) {
  for (const char* key : {"latency_us", "gb_per_s", "send_latency_us", "send_gb_per_s"}) {
    t.measured.insert(section + "." + key);
  }
}

class Detection {
 public:
  Detection(const Options& o, World& world, Interrupt& interrupt, Progress& progress)
      : options_(o), world_(world), interrupt_(interrupt), progress_(progress) {}

  // Collective; the file's text on rank 0.
  std::string run() {
    comm_ = world_.make_comm(interrupt_, &progress_, 60);
    const Machine& m = this_machine();
    hosts();
    t_.gpus_per_node = options_.text("backend") == "cpu" ? 0 : static_cast<double>(m.gpus().size());
    t_.cores = static_cast<double>(m.cores.size());
    t_.host_memory_gib = rounded(static_cast<double>(m.memory) / (1u << 30));
    t_.measured = {"host.cores", "host.memory_gib"};
    if (t_.gpu()) describe_gpus(m, t_, comment_);
    if (options_.flag("measure")) {
      measure_messages();
      if (m.this_host && !t_.gpu()) measure_cores();
    }
    DROVER_CHECK(t_.nodes == 1 || t_.network.gb_per_s > 0, ExitCode::kUsage,
                 "{} hosts need --measure: what is between them cannot be read off", t_.nodes);
    for (Topology::Link* l : {&t_.link, &t_.network}) {
      if (l->send_gb_per_s > 0) continue;
      l->send_latency_us = l->latency_us;
      l->send_gb_per_s = l->gb_per_s;
    }
    t_.tp = t_.pp = 1;
    t_.dp = 0;
    return fmt::format(
        "# Made by drover topology --detect on {} rank{}. What is named in `measured` was read or\n"
        "# measured here.\n{}{}",
        world_.size(), world_.size() == 1 ? "" : "s", comment_, topology_ini(t_));
  }

 private:
  // Hosts are to be alike.
  void hosts() {
    const HostShape mine =
        shape_of(this_machine(), world_.peers()[static_cast<size_t>(world_.rank())].host);
    std::vector<HostShape> all(static_cast<size_t>(world_.size()));
    comm_->all_gather(&mine, all.data(), sizeof(mine), nullptr);
    std::set<std::string> names;
    for (int r = 0; r < world_.size(); ++r) {
      const HostShape& s = all[static_cast<size_t>(r)];
      DROVER_CHECK(
          s == all[0], ExitCode::kEnvironment,
          "host {} has {} cores, {} GPUs, {:.0f} GiB; {} has {}, {} and {:.0f}: a topology "
          "file describes nodes that are alike; start this on such ones",
          s.host, s.cores, s.gpus, s.memory_gib, all[0].host, all[0].cores, all[0].gpus,
          all[0].memory_gib);
      if (names.insert(s.host).second && r > 0 && other_host_ < 0) other_host_ = r;
      if (r > 0 && second_ < 0 && std::string(s.host) == all[0].host) second_ = r;
    }
    t_.nodes = static_cast<double>(names.size());
  }

  void measure_messages() {
    std::vector<PairFigure> pairs;
    check_pairs(world_, *comm_, pairs);
    if (second_ > 0 && !t_.gpu()) {
      t_.link = measure_link(*comm_, 0, second_);
      send_figures(pairs, true, t_.link);
      note_measured(t_, "link");
    } else if (!t_.gpu()) {
      comment_ += "# [link]: start two ranks or more a host, and it is measured.\n";
    }
    if (other_host_ > 0) {
      t_.network = measure_link(*comm_, 0, other_host_);
      send_figures(pairs, false, t_.network);
      note_measured(t_, "network");
      if (t_.gpu())
        comment_ += "# [network]: MPI between two ranks' host memory; GPUs may do better.\n";
    }
  }

  void measure_cores() {
    auto choice = choose_backend(options_, choose_placement(options_, world_, interrupt_), world_);
    RankParts parts{world_, interrupt_, *choice.backend, *comm_, choice.threads, choice.gpu, 0};
    const Limits l = measure_limits(parts);
    if (l.threads < t_.cores * t_.nodes) {
      comment_ += fmt::format(
          "# [host] rates: left out, as {} threads of {} cores took part; start fewer or more "
          "ranks.\n",
          l.threads, t_.cores * t_.nodes);
      return;
    }
    t_.read_gb_per_s = rounded(l.read_bytes_per_s / 1e9 / t_.nodes);
    t_.bf16_gflops = rounded(l.linear_flops_per_s / 1e9 / t_.nodes);
    t_.measured.insert({"host.read_gb_per_s", "host.bf16_gflops"});
  }

  const Options& options_;
  World& world_;
  Interrupt& interrupt_;
  Progress& progress_;
  std::unique_ptr<Comm> comm_;
  Topology t_;
  std::string comment_;
  int second_ = -1, other_host_ = -1;  // a rank beside rank 0, and one of another host
};

// Written as a whole or not at all, and read back.
void write_topology(const std::string& file, const std::string& text) {
  const std::string temporary = file + ".tmp";
  std::ofstream(temporary) << text << std::flush;
  std::error_code error;
  DROVER_CHECK(fs::file_size(temporary, error) == text.size() && !error, ExitCode::kEnvironment,
               "cannot write {}: check the folder and free space", file);
  const Topology back = read_topology(temporary);
  fs::rename(temporary, file, error);
  DROVER_CHECK(!error, ExitCode::kEnvironment, "cannot write {}: {}", file, error.message());
  std::cout << fmt::format("{}: {} node{} of {} {}\n", file, back.nodes, back.nodes == 1 ? "" : "s",
                           back.ranks_per_node(), back.gpu() ? "GPUs" : "cores");
}

}  // namespace

int topology_command(const std::vector<std::string>& arguments) {
  const auto table = topology_options();
  const Options o = Options::parse(table, arguments, {"file"});
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  if (!o.flag("detect")) {
    DROVER_CHECK(!o.text("file").empty(), ExitCode::kUsage,
                 "say --detect, or name a file that is to be checked: drover topology FILE");
    std::cout << topology_ini(read_topology(o.text("file")));
    return 0;
  }
  const std::string out = o.text("file");
  DROVER_CHECK(out.empty() || o.flag("force") || !fs::exists(out), ExitCode::kUsage,
               "{} is there: name another file, or say --force", out);
  return run_ranks(
      [&](World& world, Interrupt& interrupt, Progress& progress) {
        log::init(world.rank(), "", false);
        progress.enter("detecting the machine", 300);
        const std::string text = Detection(o, world, interrupt, progress).run();
        if (world.rank() == 0) {
          if (out.empty()) {
            std::cout << text << std::flush;
          } else {
            write_topology(out, text);
          }
        }
        world.barrier(interrupt, 60, "end of all ranks");
        return ExitCode::kOk;
      },
      [](bool) {});
}

}  // namespace drover

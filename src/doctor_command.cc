// drover doctor: whether this place can run a job, on one screen.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <set>

#include "base/host.h"
#include "base/log.h"
#include "choose_placement.h"
#include "comm/singletons.h"
#include "command_line.h"
#include "commands.h"
#include "doctor.h"
#include "drover_version.h"
#include "job.h"

namespace drover {

namespace {

struct Line {
  Finding finding;
  std::vector<std::string> where;  // hosts that say so; empty: of the job
};

// Alike on several hosts: told once.
class Report {
 public:
  void add(const Finding& f, const std::string& host) {
    for (Line& l : lines_) {
      const Finding& g = l.finding;
      if (!l.where.empty() && g.verdict == f.verdict && g.check == f.check && g.text == f.text &&
          g.advice == f.advice) {
        if (std::find(l.where.begin(), l.where.end(), host) == l.where.end()) {
          l.where.push_back(host);
        }
        return;
      }
    }
    lines_.push_back({f, {host}});
  }
  void add(const std::vector<Finding>& findings) {
    for (const Finding& f : findings) lines_.push_back({f, {}});
  }

  void print_from(size_t& printed, size_t hosts) const {
    for (; printed < lines_.size(); ++printed) {
      const Line& l = lines_[printed];
      std::cout << fmt::format("{:<5} {:<15} {}{}\n", name_of(l.finding.verdict), l.finding.check,
                               of(l, hosts), l.finding.text);
      if (!l.finding.advice.empty()) {
        std::cout << fmt::format("{:<5} {:<15} -> {}\n", "", "", l.finding.advice);
      }
    }
    std::cout.flush();
  }

  Verdict worst() const {
    Verdict worst = Verdict::kOk;
    for (const Line& l : lines_) worst = std::max(worst, l.finding.verdict);
    return worst;
  }
  int count(Verdict v) const {
    return static_cast<int>(std::count_if(lines_.begin(), lines_.end(),
                                          [&](const Line& l) { return l.finding.verdict == v; }));
  }
  Json json() const {
    Json all = Json::array();
    for (const Line& l : lines_) {
      Json j = to_json(l.finding);
      j["hosts"] = l.where;
      all.push_back(j);
    }
    return all;
  }

 private:
  static std::string of(const Line& l, size_t hosts) {
    if (hosts < 2 || l.where.empty()) return "";
    if (l.where.size() == hosts) return "[all hosts] ";
    return l.where.size() == 1 ? fmt::format("[{}] ", l.where[0])
                               : fmt::format("[{} and {} more] ", l.where[0], l.where.size() - 1);
  }
  std::vector<Line> lines_;
};

// Text of every rank at rank 0.
std::vector<std::string> gather_texts(Comm& comm, const std::string& mine) {
  const auto length = static_cast<int64_t>(mine.size());
  std::vector<int64_t> lengths(static_cast<size_t>(comm.size()));
  comm.all_gather(&length, lengths.data(), sizeof(length), nullptr);
  std::vector<std::string> texts;
  if (comm.rank() != 0) {
    comm.send(mine.data(), mine.size(), 0, nullptr);
    return texts;
  }
  texts.push_back(mine);
  for (int r = 1; r < comm.size(); ++r) {
    std::string text(static_cast<size_t>(lengths[static_cast<size_t>(r)]), ' ');
    comm.recv(text.data(), text.size(), r, nullptr);
    texts.push_back(text);
  }
  return texts;
}

// Before MPI is up only the launcher knows: one rank of a host looks at the host.
bool looks_at_host() {
  for (const char* name : {"OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID"}) {
    if (const char* text = std::getenv(name)) return std::string(text) == "0";
  }
  return true;
}

Finding placement_finding(const Options& o, World& world, Interrupt& interrupt) {
  const PlacedRank p = choose_placement(o, world, interrupt);
  Finding f{Verdict::kOk, "placement", fmt::format("rank {}: {}", world.rank(), placement_text(p)),
            ""};
  if (p.gpu_shared) {
    f.verdict = Verdict::kBad;
    f.advice = "start as many ranks a host as it has GPUs";
  } else if (!p.gpu && p.mine.crowded) {
    f.verdict = Verdict::kWarn;
    f.advice = "more ranks than cores: right, but slow";
  }
  return f;
}

Json about_me(const std::vector<Finding>& host_findings, const World& world,
              const Finding& placement) {
  Json j;
  j["host"] = world.peers()[static_cast<size_t>(world.rank())].host;
  j["version"] = fmt::format("drover {} {}, {}", version::kDrover, version::kCommit, mpi_version());
  j["findings"] = Json::array();
  for (const Finding& f : host_findings) j["findings"].push_back(to_json(f));
  for (const Finding& f : check_libraries(world)) j["findings"].push_back(to_json(f));
  j["placement"] = to_json(placement);
  j["network"] = network_facts();
  return j;
}

// All ranks must run the same program.
Finding check_versions(const std::vector<Json>& ranks) {
  std::set<std::string> versions;
  for (const Json& r : ranks) versions.insert(r.at("version").get<std::string>());
  Finding f{Verdict::kOk, "drover", *versions.begin(), ""};
  if (versions.size() > 1) {
    f.verdict = Verdict::kBad;
    f.text.clear();
    for (const auto& v : versions) f.text += (f.text.empty() ? "" : " | ") + v;
    f.advice =
        "all hosts need the same drover and the same MPI: put them on a shared file system, or "
        "bring a bundle (launch/bundle.sh)";
  }
  return f;
}

class Doctor {
 public:
  Doctor(const Options& o, std::vector<Finding> host) : options_(o), host_(std::move(host)) {}

  ExitCode run(World& world, Interrupt& interrupt, Progress& progress) {
    log::init(world.rank(), "", false);
    progress.enter("looking at the ranks", 120);
    const auto comm = world.make_comm(interrupt, &progress, 30);
    const Finding placement = placement_finding(options_, world, interrupt);
    const auto texts = gather_texts(*comm, about_me(host_, world, placement).dump());
    if (world.rank() == 0) tell_hosts(world, texts);
    report_.add(check_clocks(world, *comm));
    std::vector<PairFigure> pairs;
    progress.enter("measuring pairs of ranks", 300);
    if (options_.flag("pairs")) report_.add(check_pairs(world, *comm, pairs));
    int64_t code = 0;
    if (world.rank() == 0) {
      report_.print_from(printed_, hosts_);
      code = finish(pairs);
    }
    return static_cast<ExitCode>(-world.agree_min(-code, interrupt, 60));
  }

  // MPI did not start, or these are many worlds of one.
  ExitCode without_mpi(const Finding& f) {
    for (const Finding& h : host_) report_.add(h, hostname());
    report_.add({f});
    report_.print_from(printed_, 1);
    return static_cast<ExitCode>(finish({}));
  }

 private:
  void tell_hosts(const World& world, const std::vector<std::string>& texts) {
    std::vector<Json> ranks;
    for (const auto& t : texts) ranks.push_back(Json::parse(t));
    std::vector<std::pair<std::string, Json>> networks;
    std::set<std::string> seen;
    for (const Json& r : ranks) {
      const auto host = r.at("host").get<std::string>();
      if (seen.insert(host).second) networks.emplace_back(host, r.at("network"));
    }
    hosts_ = seen.size();
    std::cout << fmt::format("drover doctor: {} rank{} on {} host{}\n\n", world.size(),
                             world.size() == 1 ? "" : "s", hosts_, hosts_ == 1 ? "" : "s");
    report_.add({check_versions(ranks)});
    for (const Json& r : ranks) {
      for (const Json& f : r.at("findings")) {
        report_.add(finding_from_json(f), r.at("host").get<std::string>());
      }
    }
    report_.add(check_networks(networks));
    add_placements(ranks);
    report_.print_from(printed_, hosts_);
  }

  // A screen has room for a few; what is not good is always told.
  void add_placements(const std::vector<Json>& ranks) {
    size_t told = 0;
    for (const Json& r : ranks) {
      const Finding f = finding_from_json(r.at("placement"));
      if (told < 8 || f.verdict != Verdict::kOk) report_.add(f, r.at("host").get<std::string>());
      ++told;
    }
    if (ranks.size() > 8) {
      report_.add(
          {{Verdict::kOk, "placement",
            fmt::format("of all {} ranks: drover run --print-placement", ranks.size()), ""}});
    }
  }

  int64_t finish(const std::vector<PairFigure>& pairs) {
    const bool bad = report_.worst() == Verdict::kBad;
    std::cout << fmt::format("\n{}: {} ok, {} warn, {} bad\n",
                             bad ? "a job will not run well here" : "a job can run here",
                             report_.count(Verdict::kOk), report_.count(Verdict::kWarn),
                             report_.count(Verdict::kBad))
              << std::flush;
    if (!options_.text("json").empty()) {
      Json j;
      j["verdict"] = name_of(report_.worst());
      j["hosts"] = hosts_;
      j["checks"] = report_.json();
      j["pairs"] = Json::array();
      for (const PairFigure& p : pairs) {
        j["pairs"].push_back({{"a", p.a},
                              {"b", p.b},
                              {"same_host", p.same_host},
                              {"latency_us", p.latency_us},
                              {"gb_per_s", p.gbytes}});
      }
      write_json(options_.text("json"), j);
    }
    return static_cast<int64_t>(bad ? ExitCode::kEnvironment : ExitCode::kOk);
  }

  const Options& options_;
  std::vector<Finding> host_;
  Report report_;
  size_t printed_ = 0, hosts_ = 1;
};

}  // namespace

int doctor_command(const std::vector<std::string>& arguments) {
  const auto table = doctor_options();
  const Options o = Options::parse(table, arguments);
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  Doctor doctor(o, looks_at_host() ? check_host(o.text("model")) : std::vector<Finding>{});
  int code = 0;
  try {
    code = run_ranks([&](World& world, Interrupt& interrupt,
                         Progress& progress) { return doctor.run(world, interrupt, progress); },
                     [](bool) {});
  } catch (const Error& e) {
    if (*e.what() == 0) return static_cast<int>(e.code());  // another process tells
    code = static_cast<int>(doctor.without_mpi({Verdict::kBad, "MPI", e.what(), "see above"}));
  }
  if (checks_are_stuck()) {
    // Their threads would be waited for.
    std::cout.flush();
    std::_Exit(code);
  }
  return code;
}

}  // namespace drover

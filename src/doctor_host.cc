// What doctor looks at on each host, without MPI.
#include <sys/resource.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <set>
#include <thread>

#include "base/host.h"
#include "base/subprocess.h"
#include "comm/singletons.h"
#include "doctor.h"
#include "machine/filesystem.h"
#include "machine/interfaces.h"

namespace drover {

namespace {

std::atomic<int> stuck{0};

using Findings = std::vector<Finding>;

std::string variable(const std::string& name) {
  const char* text = std::getenv(name.c_str());
  return text != nullptr ? text : "";
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

double gib(uint64_t bytes) { return static_cast<double>(bytes) / (1u << 30); }

// "4.1" of "Open MPI v4.1.4" and of "mpirun (Open MPI) 4.1.4": what must agree.
std::string release_of(const std::string& text) {
  const size_t digit = text.find_first_of("0123456789");
  if (digit == std::string::npos) return "";
  const size_t first = text.find('.', digit);
  if (first == std::string::npos) return "";
  return text.substr(digit, text.find_first_not_of("0123456789", first + 1) - digit);
}

Findings check_mpirun() {
  const std::string there = find_program("mpirun");
  const std::string ours = mpirun_of_library();
  const std::string linked = mpi_version();
  if (there.empty()) {
    return {{Verdict::kWarn, "mpirun", "not in PATH",
             ours.empty() ? "load the Open MPI module, or start drover with srun --mpi=pmix"
                          : fmt::format("it is {}", ours)}};
  }
  const Outcome o = run_program({there, "--version"}, 10);
  if (o.late || o.code != 0) {
    return {{Verdict::kBad, "mpirun",
             fmt::format("{} --version {}: {}", there, o.late ? "hangs" : "fails",
                         first_line(o.output)),
             "load the module of the MPI that drover was built with"}};
  }
  const std::string version = first_line(o.output);
  if (version.find("Open MPI") == std::string::npos || release_of(version) != release_of(linked)) {
    return {{Verdict::kBad, "mpirun",
             fmt::format("{} is {}, drover is linked with {}", there, version, linked),
             ours.empty() ? fmt::format("put the mpirun of {} first in PATH", linked)
                          : fmt::format("use {}", ours)}};
  }
  return {{Verdict::kOk, "mpirun", fmt::format("{}, {}", there, version), ""}};
}

Findings check_srun() {
  const bool job = !variable("SLURM_JOB_ID").empty();
  const std::string srun = find_program("srun");
  if (srun.empty()) {
    if (!job) return {{Verdict::kOk, "Slurm", "none here", ""}};
    return {{Verdict::kWarn, "Slurm", "in a job, but srun is not in PATH",
             "in a container: start it with srun from outside, or use mpirun"}};
  }
  const Outcome o = run_program({srun, "--mpi=list"}, 20);
  if (o.late) {
    return {{Verdict::kWarn, "Slurm", "srun --mpi=list does not answer in 20 s",
             "the controller may be away: sinfo"}};
  }
  if (o.code != 0) {
    return {{job ? Verdict::kWarn : Verdict::kOk, "Slurm",
             fmt::format("srun does not work here: {}", first_line(o.output)), ""}};
  }
  std::set<std::string> plugins;
  std::string word;
  for (const char c : o.output + " ") {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_') {
      word += c;
      continue;
    }
    if (word.starts_with("pmix")) plugins.insert(word);
    word.clear();
  }
  std::string names;
  for (const auto& p : plugins) names += " " + p;
  if (plugins.empty()) {
    return {{job ? Verdict::kWarn : Verdict::kOk, "Slurm",
             "srun has no PMIx plug-in, so it cannot start ranks of Open MPI",
             "launch/run.sh --launcher mpirun inside of the allocation"}};
  }
  return {{Verdict::kOk, "Slurm",
           fmt::format("srun has{}{}", names, job ? "; in a job" : "; not in a job"), ""}};
}

// Cores that a container's quota allows; 0: no quota.
double cpu_quota() {
  std::ifstream in("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  return in >> quota >> period && period > 0 ? quota / period : 0;
}

uint64_t memory_limit() {
  std::ifstream in("/sys/fs/cgroup/memory.max");
  uint64_t limit = 0;
  return in >> limit ? limit : 0;
}

Findings check_cores() {
  const Machine& m = this_machine();
  Finding f{
      Verdict::kOk, "CPU",
      fmt::format("{}, {} sockets, {} NUMA nodes, {} cores, of which this process has {}; hwloc {}",
                  cpu_model(), m.sockets, m.numa_nodes.size(), m.cores.size(), usable_cores(),
                  hwloc_version()),
      ""};
  if (!m.this_host) {
    f.verdict = Verdict::kWarn;
    f.text += "; hwloc was told of another machine";
    f.advice =
        "unset HWLOC_XMLFILE and HWLOC_SYNTHETIC for a run: nothing is bound while they are set";
  }
  if (const double quota = cpu_quota(); quota > 0 && quota < usable_cores()) {
    f.verdict = Verdict::kWarn;
    f.text += fmt::format("; the container's quota is {:.1f}", quota);
    f.advice = fmt::format("give it cores instead of a quota, or start at most {} CPU ranks",
                           std::max(1, static_cast<int>(quota)));
  }
  return {f};
}

Findings check_memory() {
  const uint64_t total = memory_total_bytes();
  const uint64_t limit = memory_limit();
  if (limit > 0 && limit < total) {
    return {{Verdict::kOk, "memory",
             fmt::format("{:.1f} GiB, of which this group may use {:.1f}", gib(total), gib(limit)),
             ""}};
  }
  return {{Verdict::kOk, "memory", fmt::format("{:.1f} GiB", gib(total)), ""}};
}

Findings check_gpus() {
  const Machine& m = this_machine();
  const DriverView& d = m.driver;
#ifdef DROVER_HAVE_CUDA
  const bool built = true;
#else
  const bool built = false;
#endif
  if (d.gpus.empty()) {
    if (m.pci_gpus == 0)
      return {{Verdict::kOk, "GPUs", fmt::format("none: {}; ranks run on the CPU", d.problem), ""}};
    return {{Verdict::kBad, "GPUs",
             fmt::format("{} of NVIDIA on the bus, but {}", m.pci_gpus, d.problem),
             "load the driver (nvidia-smi), or in a container start it with GPUs (apptainer --nv, "
             "docker --gpus all)"}};
  }
  std::map<std::string, int> kinds;
  for (const Gpu& g : d.gpus) {
    ++kinds[fmt::format("{} ({:.0f} GiB, {}.{})", g.name, gib(g.memory), g.capability / 10,
                        g.capability % 10)];
  }
  std::string text;
  for (const auto& [kind, count] : kinds) {
    text += fmt::format("{}{} x {}", text.empty() ? "" : ", ", count, kind);
  }
  Findings all{{Verdict::kOk, "GPUs", text, ""}};
  if (kinds.size() > 1) {
    all[0].verdict = Verdict::kWarn;
    all[0].advice = "a grid is as slow as its slowest GPU: choose like ones (CUDA_VISIBLE_DEVICES)";
  }
  if (!built) {
    all[0].verdict = Verdict::kWarn;
    all[0].text += "; this build of drover has no CUDA backend";
    all[0].advice = "build where CMake finds CUDA 12 or later, or take a bundle with CUDA";
  }
  const std::string visible = variable("CUDA_VISIBLE_DEVICES");
  if (!visible.empty() && d.gpus.size() > 1 && visible.find(',') == std::string::npos) {
    all.push_back({Verdict::kWarn, "GPUs seen",
                   fmt::format("CUDA_VISIBLE_DEVICES={}: one only", visible),
                   "let every rank see all GPUs of its host (srun --gpu-bind=none): ranks choose "
                   "by themselves, and reach each other's memory"});
  }
  all.push_back(
      {d.cuda >= 12000 ? Verdict::kOk : Verdict::kBad, "driver",
       fmt::format("{}, for CUDA up to {}.{}", d.driver, d.cuda / 1000, d.cuda % 1000 / 10),
       d.cuda >= 12000 ? "" : "drover needs a driver for CUDA 12 or later"});
  return all;
}

Findings check_peer_access() {
  const Machine& m = this_machine();
  const auto& gpus = m.gpus();
  if (gpus.size() < 2) return {};
  std::string without;
  int pairs = 0, linked = 0;
  for (size_t a = 0; a < gpus.size(); ++a) {
    for (size_t b = a + 1; b < gpus.size(); ++b) {
      const GpuLink& l = m.driver.links[a][b];
      linked += l.nvlinks > 0 ? 1 : 0;
      if (l.peer) continue;
      if (++pairs <= 4) without += fmt::format(" {}-{}", gpus[a].pci, gpus[b].pci);
    }
  }
  const size_t all = gpus.size() * (gpus.size() - 1) / 2;
  if (pairs == 0) {
    return {{Verdict::kOk, "peer access",
             fmt::format("between all GPUs, over NVLink in {} of {} pairs", linked, all), ""}};
  }
  return {
      {Verdict::kWarn, "peer access",
       fmt::format("none in {} of {} pairs:{}{}", pairs, all, without, pairs > 4 ? " ..." : ""),
       "their data goes through the host: prefer --pp or --dp between them; in virtual machines "
       "and with ACS on, ask the administrator"}};
}

Findings check_nics() {
  const Machine& m = this_machine();
  std::string text;
  bool fabric = false;
  for (const Nic& n : m.nics) {
    text += fmt::format("{}{}{}", text.empty() ? "" : ", ", n.name, n.up ? "" : " (down)");
    if (n.gbits > 0) text += fmt::format(" {:g} Gbit/s", n.gbits);
    fabric = fabric || (n.fabric && n.up);
  }
  if (text.empty())
    return {{Verdict::kOk, "NICs",
             "none of hardware: ranks of other hosts are reached, if at all, by software (veth, "
             "bridge)",
             ""}};
  return {{Verdict::kOk, "NICs", text + (fabric ? "" : "; no InfiniBand or RoCE that is up"), ""}};
}

Findings check_limits() {
  Findings all;
  rlimit limit{};
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  const bool fabric = std::any_of(this_machine().nics.begin(), this_machine().nics.end(),
                                  [](const Nic& n) { return n.fabric && n.up; });
  const bool matters = fabric || !this_machine().gpus().empty();
  const bool little = limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < (1u << 30);
  all.push_back({little && matters ? Verdict::kWarn : Verdict::kOk, "memlock",
                 limit.rlim_cur == RLIM_INFINITY
                     ? "unlimited"
                     : fmt::format("{} KiB{}", limit.rlim_cur >> 10,
                                   matters ? "" : " (no fabric or GPU here that would need more)"),
                 little && matters
                     ? "RDMA registers memory: raise it (ulimit -l unlimited; for Slurm's daemons "
                       "LimitMEMLOCK=infinity; docker --ulimit memlock=-1)"
                     : ""});
  ::getrlimit(RLIMIT_NOFILE, &limit);
  all.push_back({limit.rlim_cur < 1024 ? Verdict::kWarn : Verdict::kOk, "open files",
                 fmt::format("{}", limit.rlim_cur),
                 limit.rlim_cur < 1024 ? "raise it: ulimit -n 4096" : ""});
  struct statvfs shm {};
  if (::statvfs("/dev/shm", &shm) != 0) {
    all.push_back({Verdict::kBad, "shared memory", "/dev/shm is not there",
                   "mount a tmpfs on it: MPI and NCCL talk within a host through it"});
  } else {
    const uint64_t free = shm.f_bavail * shm.f_frsize;
    const bool tight = free < (uint64_t{256} << 20);
    all.push_back(
        {tight ? Verdict::kWarn : Verdict::kOk, "shared memory",
         fmt::format("{:.1f} GiB free in /dev/shm", gib(free)),
         tight ? "a container's default is 64 MiB: docker --shm-size=1g or --ipc=host" : ""});
  }
  return all;
}

Findings check_store(const std::string& model) {
  if (model.empty() || model.starts_with("synthetic:")) return {};
  std::error_code error;
  const auto size = std::filesystem::file_size(model, error);
  if (error || !std::ifstream(model).good()) {
    return {
        {Verdict::kBad, "model store",
         fmt::format("{} cannot be read: {}", model, error ? error.message() : "permission denied"),
         "it must be at the same path on every host, or copied there beforehand"}};
  }
  const FileSystem fs = file_system_of(model);
  Finding f{Verdict::kOk, "model store", fmt::format("{}: {} bytes on {}", model, size, fs.type),
            ""};
  if (fs.shared) f.advice = "--stage FOLDER copies it to a local disk first, once a host";
  return {f};
}

Findings check_container() {
  std::string name;
  for (const char* file : {"/.dockerenv", "/run/.containerenv"}) {
    if (std::filesystem::exists(file)) name = "docker or podman";
  }
  for (const char* set : {"APPTAINER_NAME", "SINGULARITY_NAME"}) {
    if (!variable(set).empty()) name = "Apptainer " + variable(set);
  }
  if (name.empty()) return {};
  return {{Verdict::kOk, "container", name, ""}};
}

}  // namespace

const char* name_of(Verdict v) {
  return v == Verdict::kOk ? "ok" : v == Verdict::kWarn ? "warn" : "bad";
}

Json to_json(const Finding& f) {
  return {
      {"verdict", name_of(f.verdict)}, {"check", f.check}, {"text", f.text}, {"advice", f.advice}};
}

Finding finding_from_json(const Json& j) {
  const auto verdict = j.at("verdict").get<std::string>();
  return {verdict == "ok"     ? Verdict::kOk
          : verdict == "warn" ? Verdict::kWarn
                              : Verdict::kBad,
          j.at("check").get<std::string>(), j.at("text").get<std::string>(),
          j.at("advice").get<std::string>()};
}

std::vector<Finding> with_deadline(const std::string& check, double seconds,
                                   std::function<std::vector<Finding>()> body) {
  // Shared with the thread, which may outlive this call.
  auto promise = std::make_shared<std::promise<Findings>>();
  auto future = promise->get_future();
  std::thread([promise, body = std::move(body)] {
    try {
      promise->set_value(body());
    } catch (...) {
      promise->set_exception(std::current_exception());
    }
  }).detach();
  if (future.wait_for(std::chrono::duration<double>(seconds)) != std::future_status::ready) {
    ++stuck;
    return {{Verdict::kBad, check, fmt::format("no answer in {:g} s", seconds),
             "something that it asks hangs: a file server, a driver or a daemon"}};
  }
  try {
    return future.get();
  } catch (const std::exception& e) {
    return {{Verdict::kBad, check, e.what(), "see above"}};
  }
}

bool checks_are_stuck() { return stuck > 0; }

std::vector<Finding> check_host(const std::string& model) {
  Findings all;
  const auto add = [&](const char* name, double seconds, std::function<Findings()> body) {
    for (auto& f : with_deadline(name, seconds, std::move(body))) all.push_back(std::move(f));
  };
  add("CPU", 30, check_cores);         // the first to load the machine's description
  if (checks_are_stuck()) return all;  // all that follows would wait for the same
  add("memory", 5, check_memory);
  add("container", 5, check_container);
  add("mpirun", 15, check_mpirun);
  add("Slurm", 25, check_srun);
  add("GPUs", 20, check_gpus);
  add("peer access", 20, check_peer_access);
  add("NICs", 10, check_nics);
  add("limits", 10, check_limits);
  add("model store", 10, [model] { return check_store(model); });
  return all;
}

}  // namespace drover

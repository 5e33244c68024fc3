// environment.json: what a reader needs to tell two results apart.
#include <unistd.h>

#include <chrono>
#include <ctime>
#include <string_view>

#include "base/host.h"
#include "machine/machine.h"
#include "serve/results.h"

extern char** environ;

namespace drover {
namespace {

bool is_recorded(std::string_view name) {
  bool ours = false;
  for (const std::string_view prefix : {"OMPI_", "OMP_", "DROVER_", "SLURM_"})
    ours = ours || name.substr(0, prefix.size()) == prefix;
  // Open MPI's talk with its daemons: addresses, keys and a copy of the command line.
  for (const std::string_view inner :
       {"OMPI_MCA_orte_", "OMPI_MCA_ess_", "OMPI_MCA_pmix", "OMPI_ARGV", "OMPI_COMMAND",
        "OMPI_FILE", "OMPI_APP_CTX", "OMPI_MCA_initial_wdir", "OMPI_MCA_shmem_RUNTIME"})
    ours = ours && !name.starts_with(inner);
  // Slurm passes credentials this way; result folders are shared.
  for (const std::string_view secret : {"JWT", "TOKEN", "SECRET", "PASSWORD", "KEY", "CRED"})
    if (name.find(secret) != std::string_view::npos) return false;
  return ours;
}

std::string utc_now() {
  const std::time_t t = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm tm{};
  gmtime_r(&t, &tm);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &tm);
  return text;
}

}  // namespace

Json environment_json(const RunFacts& facts) {
  Json j;
  j["time"] = utc_now();
  j["command_line"] = facts.command_line;
  j["host"] = hostname();
  j["cpu"] = cpu_model();
  j["usable_cores"] = usable_cores();
  j["memory_bytes"] = memory_total_bytes();
  j["versions"] = facts.versions.is_null() ? Json::object() : facts.versions;
  j["versions"]["loadgen"] = loadgen_version();
  Json variables = Json::object();
  for (char** e = environ; *e != nullptr; ++e) {
    const std::string_view entry(*e);
    const size_t eq = entry.find('=');
    if (eq == std::string_view::npos || !is_recorded(entry.substr(0, eq))) continue;
    variables[std::string(entry.substr(0, eq))] = std::string(entry.substr(eq + 1));
  }
  j["variables"] = variables;
  return j;
}

}  // namespace drover

// drover doctor's checks. Each has a deadline, says what it saw, and what to do where that is not
// good.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "comm/world.h"
#include "machine/odd_one.h"

namespace drover {

enum class Verdict { kOk, kWarn, kBad };
const char* name_of(Verdict v);  // "ok", "warn", "bad"

struct Finding {
  Verdict verdict = Verdict::kOk;
  std::string check;   // "GPUs"
  std::string text;    // what was seen
  std::string advice;  // what to do; empty where nothing is
};

Json to_json(const Finding& f);
Finding finding_from_json(const Json& j);

// Runs the check on a thread of its own; one that does not answer in time, or throws, is bad.
// Such a thread is left behind: end the process with std::_Exit then (checks_are_stuck).
std::vector<Finding> with_deadline(const std::string& check, double seconds,
                                   std::function<std::vector<Finding>()> body);
bool checks_are_stuck();

// Of this host, before MPI starts: launchers, cores and memory, GPUs, NICs, limits, the store's
// file system. `model` may be empty.
std::vector<Finding> check_host(const std::string& model);
// Of this process, once MPI is up: MPI, thread level, PMIx, UCX, NCCL.
std::vector<Finding> check_libraries(const World& world);

// Of this host for rank 0, which compares hosts: interfaces and what libraries would choose.
Json network_facts();
// `hosts` of one entry each, as network_facts() gave them.
std::vector<Finding> check_networks(const std::vector<std::pair<std::string, Json>>& hosts);

// Collective, and on rank 0 the findings. Every wait ends within some seconds.
std::vector<Finding> check_clocks(World& world, Comm& comm);
std::vector<Finding> check_pairs(World& world, Comm& comm, std::vector<PairFigure>& pairs);

}  // namespace drover

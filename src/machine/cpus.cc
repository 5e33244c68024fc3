// Sets of logical processors, and this process's own.
#include <sched.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "machine/machine.h"

namespace drover {

std::string cpu_list(const CpuSet& cpus) {
  std::string text;
  for (size_t i = 0; i < cpus.size(); ++i) {
    if (!cpus[i]) continue;
    size_t last = i;
    while (last + 1 < cpus.size() && cpus[last + 1]) ++last;
    text += fmt::format("{}{}", text.empty() ? "" : ",", i);
    if (last > i) text += fmt::format("-{}", last);
    i = last;
  }
  return text.empty() ? "none" : text;
}

CpuSet parse_cpu_list(const std::string& text) {
  CpuSet cpus;
  if (text == "none") return cpus;
  const auto fail = [&] {
    DROVER_FAIL(ExitCode::kBadInput, "'{}' is no list of processors such as 0-3,8 (below {})", text,
                kMostCpus);
  };
  size_t at = 0;
  const auto number = [&] {
    size_t value = 0;
    const size_t begin = at;
    while (at < text.size() && text[at] >= '0' && text[at] <= '9' && at - begin < 5) {
      value = value * 10 + static_cast<size_t>(text[at++] - '0');
    }
    if (at == begin || value >= kMostCpus) fail();
    return value;
  };
  while (true) {
    const size_t first = number();
    size_t last = first;
    if (at < text.size() && text[at] == '-') {
      ++at;
      last = number();
    }
    if (last < first) fail();
    for (size_t i = first; i <= last; ++i) cpus.set(i);
    if (at == text.size()) return cpus;
    if (text[at++] != ',') fail();
  }
}

CpuSet given_cpus() {
  std::array<cpu_set_t, kMostCpus / CPU_SETSIZE> mask{};
  CpuSet cpus;
  if (::sched_getaffinity(0, sizeof(mask), mask.data()) != 0) return cpus;
  for (size_t i = 0; i < kMostCpus; ++i) {
    if (CPU_ISSET_S(i, sizeof(mask), mask.data())) cpus.set(i);
  }
  return cpus;
}

bool bind_thread(const CpuSet& cpus) noexcept {
  if (cpus.none()) return false;
  std::array<cpu_set_t, kMostCpus / CPU_SETSIZE> mask{};
  for (size_t i = 0; i < kMostCpus; ++i) {
    if (cpus[i]) CPU_SET_S(i, sizeof(mask), mask.data());
  }
  return ::sched_setaffinity(0, sizeof(mask), mask.data()) == 0;
}

int Machine::cores_in(const CpuSet& cpus) const {
  return static_cast<int>(std::count_if(cores.begin(), cores.end(),
                                        [&](const Core& c) { return (c.cpus & cpus).any(); }));
}

std::vector<int> Machine::numa_of(const CpuSet& cpus) const {
  std::vector<int> nodes;
  for (const Core& c : cores) {
    if ((c.cpus & cpus).any() && std::find(nodes.begin(), nodes.end(), c.numa) == nodes.end()) {
      nodes.push_back(c.numa);
    }
  }
  std::sort(nodes.begin(), nodes.end());
  return nodes;
}

const Gpu* Machine::gpu(const std::string& uuid) const {
  for (const Gpu& g : gpus()) {
    if (g.uuid == uuid) return &g;
  }
  return nullptr;
}

int host_cores() { return std::max<int>(1, static_cast<int>(this_machine().cores.size())); }

int usable_cores() {
  // Hardware threads of one core share its vector units: one thread a core is what linears want.
  const CpuSet given = given_cpus();
  const int cores = this_machine().cores_in(given);
  return std::max(1, cores > 0 ? cores : static_cast<int>(given.count()));
}

}  // namespace drover

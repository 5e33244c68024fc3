// Which GPU, cores and NIC each rank of one host takes. Pure: from a machine and what each rank was
// given, the same answer on every rank.
//
// Promises:
//   - a rank's cores are among those it was given, and are all of them unless other ranks were
//     given the very same: then they share them, no core twice, GPU ranks those near their GPU;
//   - ranks that are more than the cores they were given are left where they are;
//   - a rank's GPU is one that it sees; ranks that see the same GPUs take different ones, and
//     neighbours by rank those with the best link between them.
#pragma once

#include <string>
#include <vector>

#include "machine/machine.h"

namespace drover {

struct RankGiven {                // a rank of this host, at its local rank's place
  CpuSet cpus;                    // the affinity it was started with
  std::vector<std::string> gpus;  // UUIDs that it sees, in CUDA's order; empty: a CPU rank
};

struct RankPlace {
  std::string gpu;  // UUID; empty: none
  CpuSet cpus;      // where its threads run
  int cores = 0;    // of these
  int threads = 1;  // that should compute: one a core, less where other ranks use the same cores
  bool shared_out = false;  // cpus are a share of what several ranks were given
  bool crowded = false;     // other ranks use these cores too: too few of them, or given in part
  std::vector<int> numa;    // nodes of cpus
  std::string nic;          // the nearest; empty: none
  Nearness nic_nearness = Nearness::kSystem;
};

// kUsage where a rank would be without a GPU of its own and `share_gpus` is not said.
std::vector<RankPlace> place_ranks(const Machine& machine, const std::vector<RankGiven>& ranks,
                                   bool share_gpus);

}  // namespace drover

// Which GPU, cores and NIC this rank takes, agreed with the other ranks of its host.
#pragma once

#include "base/options.h"
#include "comm/grid.h"
#include "comm/world.h"
#include "machine/placement.h"

namespace drover {

struct PlacedRank {
  RankPlace mine;
  CpuSet given;                // the affinity that this process was started with
  bool gpu = false;            // all ranks compute on GPUs
  bool gpu_shared = false;     // some rank's GPU is another's too
  int device = 0;              // mine.gpu as CUDA numbers it here
  bool counts_energy = false;  // of its GPU (CPU: of its host), as the first rank that uses it
};

// --backend and --share-gpu. Collective. Throws kUsage or kEnvironment where there is no such GPU,
// or two ranks would share one unasked.
PlacedRank choose_placement(const Options& options, World& world, Interrupt& interrupt);

// Binds the calling thread, and those it starts from now on, to this rank's share of the cores:
// only where it was given more than its share and --bind is not "no". Memory follows first touch.
void bind_to_share(const PlacedRank& placement, const Options& options);
// Gives the calling thread back what the process was started with.
void unbind(const PlacedRank& placement);

// A line for each rank on rank 0's standard output. Collective.
void print_placement(const PlacedRank& placement, const Grid& grid, World& world,
                     Interrupt& interrupt);
std::string placement_text(const PlacedRank& placement);  // of this rank, for its log

}  // namespace drover

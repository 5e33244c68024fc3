// rank <-> (replica, stage, tensor slot). TP neighbours are neighbouring ranks, then stages, then
// replicas: rank = (replica * pp + stage) * tp + slot.
#pragma once

#include <string>

namespace drover {

struct Grid {
  int tp = 1, pp = 1, dp = 1;
  int ranks() const { return tp * pp * dp; }
  int replica_ranks() const { return tp * pp; }
  int replica_of(int rank) const { return rank / (tp * pp); }
  int stage_of(int rank) const { return rank / tp % pp; }
  int slot_of(int rank) const { return rank % tp; }
  int first_rank(int replica) const { return replica * tp * pp; }
  std::string text() const;  // "tp 3 x pp 2 x dp 1"
};

// 0 for a size means "whatever is left" (at most one may be 0). Throws kUsage when the product is
// not world_size, naming the mpirun -np that would fit and grids that would fit world_size.
Grid make_grid(int tp, int pp, int dp, int world_size);

}  // namespace drover

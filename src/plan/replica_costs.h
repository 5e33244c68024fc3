// A model on a grid: what its stages cost by the cost model.
#pragma once

#include <vector>

#include "plan/cost_model.h"
#include "plan/virtual_replica.h"

namespace drover {

// Shapes of every stage's first (and widest) rank, and where they lie.
struct GridShape {
  Grid grid;
  std::vector<ShardShape> stages;
  Placement place;
};
// Throws kUsage when the model cannot have this grid. `ranks_per_node`: 0 when all are on one node.
GridShape grid_shape(const Architecture& a, int quantization_group, const Grid& grid,
                     const NumberSizes& sizes, int ranks_per_node);

// `shape` is copied.
ReplicaCosts replica_costs(const GridShape& shape, const Rates& rates);

}  // namespace drover

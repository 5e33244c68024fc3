#include "plan/replica_costs.h"

#include <memory>

namespace drover {

GridShape grid_shape(const Architecture& a, int quantization_group, const Grid& grid,
                     const NumberSizes& sizes, int ranks_per_node) {
  GridShape s{grid, {}, {.tp = grid.tp}};
  for (int stage = 0; stage < grid.pp; ++stage) {
    s.stages.push_back(
        shard_shape(a, make_shard(a, grid.tp, 0, grid.pp, stage, quantization_group), sizes));
  }
  if (ranks_per_node > 0) {
    s.place.nodes_of_stage = nodes_of_tensor_group(grid, ranks_per_node);
    s.place.stages_cross_nodes = stages_cross_nodes(grid, ranks_per_node);
  }
  return s;
}

ReplicaCosts replica_costs(const GridShape& shape, const Rates& rates) {
  const auto s = std::make_shared<const GridShape>(shape);
  ReplicaCosts c;
  c.stages = shape.grid.pp;
  c.stage = [s, rates](int stage, const StepWork& work) {
    return step_cost(s->stages[static_cast<size_t>(stage)], work, s->place, rates).total();
  };
  c.send = [s, rates](double rows) {
    return send_seconds(rows * s->stages[0].hidden_bytes, s->place.stages_cross_nodes, rates);
  };
  c.feedback = shape.grid.pp > 1 ? send_seconds(0, s->place.stages_cross_nodes, rates) : 0;
  return c;
}

}  // namespace drover

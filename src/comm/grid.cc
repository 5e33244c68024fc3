#include "comm/grid.h"

#include <fmt/format.h>

#include <cstdint>

#include "base/error.h"

namespace drover {

namespace {

// A few grids that a user with this many ranks could ask for.
std::string grids_for(int ranks) {
  std::string text;
  for (int tp : {1, 2, 3, 4, 8}) {
    for (int pp : {1, 2, 3, 4}) {
      if (ranks % (tp * pp) != 0) continue;
      if (text.size() > 120) return text;
      text += fmt::format("{}--tp {} --pp {} --dp {}", text.empty() ? "" : ", ", tp, pp,
                          ranks / (tp * pp));
    }
  }
  return text;
}

}  // namespace

std::string Grid::text() const { return fmt::format("tp {} x pp {} x dp {}", tp, pp, dp); }

Grid make_grid(int tp, int pp, int dp, int world_size) {
  DROVER_CHECK(tp >= 0 && pp >= 0 && dp >= 0, ExitCode::kUsage,
               "--tp {} --pp {} --dp {}: sizes of the grid are at least 1 (0: what is left)", tp,
               pp, dp);
  const int open = (tp == 0) + (pp == 0) + (dp == 0);
  DROVER_CHECK(open <= 1, ExitCode::kUsage,
               "only one of --tp, --pp and --dp may be 0 (what is left)");
  constexpr int kMost = 1 << 20;  // of each, so that their product fits
  DROVER_CHECK(tp <= kMost && pp <= kMost && dp <= kMost, ExitCode::kUsage,
               "--tp {} --pp {} --dp {}: sizes of the grid are at most {}", tp, pp, dp, kMost);
  const int64_t fixed = int64_t{tp ? tp : 1} * (pp ? pp : 1) * (dp ? dp : 1);
  Grid grid{tp, pp, dp};
  if (open == 1 && world_size % fixed == 0) {
    (tp == 0 ? grid.tp : pp == 0 ? grid.pp : grid.dp) = static_cast<int>(world_size / fixed);
  }
  DROVER_CHECK(int64_t{grid.tp} * grid.pp * grid.dp == world_size, ExitCode::kUsage,
               "--tp {} --pp {} --dp {} needs {} ranks, but MPI started {}: use mpirun -np {}, or "
               "one of {}",
               tp, pp, dp, fixed, world_size, fixed, grids_for(world_size));
  return grid;
}

}  // namespace drover

// What `drover plan` and `drover simulate` share: a model on a machine of a topology file, sized as
// a run would size it and costed by the calibrated model. No ranks, no device.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/options.h"
#include "bench_files.h"
#include "plan/estimate.h"
#include "plan/simulator.h"
#include "plan/topology.h"
#include "size_engine.h"

namespace drover {

std::vector<OptionRow> planning_options();

// A grid as a run would size it.
struct SizedGrid {
  Grid grid;
  std::string problem;              // why it cannot be; empty: it can
  std::vector<EngineSizes> stages;  // of each stage's first rank, the largest
  ReplicaLimits limits;
  int local_ranks = 1, threads = 1;
};

// The rates of one kind of rank. A CPU rank's depend on its threads in ways that are not guessed
// well: figures of each number of threads are fitted by themselves.
struct Fitted {
  int ranks = 1, threads = 1;  // of a node, when they were measured
  std::vector<Observation> observations;
  Calibration calibration;
};

class Planning {
 public:
  // Reads the topology, the model's description and the calibration. Throws Error.
  explicit Planning(const Options& options);

  const Topology& topology() const { return topology_; }
  const PlannedModel& model() const { return model_; }
  int ranks() const { return ranks_; }
  // At least one; without files that is the topology's guess.
  const std::vector<Fitted>& fits() const { return fits_; }
  bool calibrated() const { return !names_.empty(); }
  const std::vector<std::string>& calibrated_with() const { return names_; }

  // Of the calibration: files of another device than the topology's.
  const std::vector<std::string>& warnings() const { return warnings_; }

  // --grid: one grid, or every grid of so many ranks that the model can have.
  std::vector<Grid> grids() const;
  // --grid, or the topology's own.
  Grid one_grid() const;
  SizedGrid size(const Grid& grid) const;
  GridShape shape(const Grid& grid) const;
  // Of a rank of that grid: what was calibrated, on its share of a CPU.
  Rates rates(const SizedGrid& g) const;
  // Of one of the ranks of a bench file.
  Rates rates_of(const StepBenchFile& file) const;

  // --dataset, or --prompt-tokens and --output-tokens. Arrival times are 0.
  std::vector<Arrival> samples() const;

 private:
  Grid whole_grid(Grid g) const;
  void calibrate_with(const BenchFiles& files);
  const Fitted& fit_of(int threads) const;
  Rates scaled(const Fitted& fit, const Rates& fitted, int local_ranks, int threads) const;
  Rates guesses(int local_ranks, int threads) const;

  const Options& options_;
  Topology topology_;
  PlannedModel model_;
  int ranks_ = 0;
  std::vector<Fitted> fits_;
  std::vector<std::string> names_, warnings_;
};

// "tp 16 x ...: tensor-parallel slots lie on 2 nodes; sums over the network cost about 9.3 ms more
// in a step of 64 rows than within a node"; empty when no tensor-parallel group crosses nodes.
std::string tensor_warning(const Topology& t, const Architecture& a, const Grid& grid, double rows,
                           const Rates& rates);

}  // namespace drover

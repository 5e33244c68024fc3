// Rates from what was measured: a fit in logarithms that starts from guesses and leaves them as
// sure as they are where nothing was measured (maximum a posteriori, Gaussian).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "plan/replica_costs.h"
#include "sched/scheduler.h"

namespace drover {

struct Observation {
  std::string what;
  double value = 0;
  double sigma = 0.04;  // relative
  // Of an operation alone: what it tells of a rate is measured. Of whole steps: it is fitted.
  Origin origin = Origin::kFitted;
  std::function<double(const Rates&)> predict;
  int threads = 0;  // of a CPU rank, when it was measured; 0: whatever
};

struct Calibration {
  Rates rates;
  std::vector<double> predicted;  // of each observation
  double worst = 0;               // largest relative error of those that are of whole steps
};

// Gauss-Newton on sum(((log predicted - log value) / sigma)^2) + prior's share.
Calibration calibrate(const Rates& prior, const std::vector<Observation>& observations);

// What `drover bench step` would measure of one batch: it is run through the scheduler in virtual
// time. decode: rows/s of all replicas, and seconds of a replica's step.
double prompt_rate(const Grid& grid, const ReplicaLimits& limits, const ReplicaCosts& costs,
                   int batch, int prompt_tokens);  // tokens/s
struct DecodeFigures {
  double rate = 0, step_seconds = 0;
};
DecodeFigures decode_figures(const Grid& grid, const ReplicaLimits& limits,
                             const ReplicaCosts& costs, int batch, int prompt_tokens,
                             int new_tokens);

}  // namespace drover

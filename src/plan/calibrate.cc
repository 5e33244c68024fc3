#include "plan/calibrate.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "plan/simulator.h"

namespace drover {

namespace {

using Vector = std::array<double, kRates>;
using Matrix = std::array<Vector, kRates>;

// Gauss-Jordan; of a symmetric positive definite matrix.
Matrix inverse(Matrix a) {
  Matrix b{};
  for (size_t i = 0; i < kRates; ++i) b[i][i] = 1;
  for (size_t c = 0; c < kRates; ++c) {
    const double pivot = a[c][c];
    for (size_t j = 0; j < kRates; ++j) a[c][j] /= pivot, b[c][j] /= pivot;
    for (size_t r = 0; r < kRates; ++r) {
      if (r == c || a[r][c] == 0) continue;
      const double factor = a[r][c];
      for (size_t j = 0; j < kRates; ++j) {
        a[r][j] -= factor * a[c][j];
        b[r][j] -= factor * b[c][j];
      }
    }
  }
  return b;
}

class Fit {
 public:
  Fit(const Rates& prior, const std::vector<Observation>& observations)
      : prior_(prior), observations_(observations) {}

  Calibration run() {
    Rates at = prior_;
    double cost = cost_of(at);
    for (int i = 0; i < kIterations; ++i) {
      linearize(at);
      const Vector move = times(inverse(normal_), gradient_);
      // Half as far until it is better.
      double share = 1, next_cost = cost;
      Rates next = at;
      for (int half = 0; half < 12; ++half, share /= 2) {
        next = at;
        for (size_t j = 0; j < kRates; ++j) {
          next.value[j] *= std::exp(std::clamp(-share * move[j], -1.0, 1.0));
        }
        next_cost = cost_of(next);
        if (next_cost < cost) break;
      }
      if (next_cost >= cost) break;
      const bool done = cost - next_cost < 1e-4 * (1 + cost);
      at = next;
      cost = next_cost;
      if (done) break;
    }
    return finish(at);
  }

 private:
  static constexpr int kIterations = 30;

  double weight(size_t rate) const { return 1 / prior_.covariance[rate][rate]; }
  double moved(const Rates& r, size_t rate) const {
    return std::log(r.value[rate] / prior_.value[rate]);
  }

  double cost_of(const Rates& r) const {
    double sum = 0;
    for (const Observation& o : observations_) {
      const double d = std::log(o.predict(r) / o.value) / o.sigma;
      sum += d * d;
    }
    for (size_t j = 0; j < kRates; ++j) sum += moved(r, j) * moved(r, j) * weight(j);
    return sum;
  }

  void linearize(const Rates& r) {
    constexpr double kStep = 1e-3;
    normal_ = {};
    gradient_ = {};
    slopes_.assign(observations_.size(), {});
    for (size_t i = 0; i < observations_.size(); ++i) {
      const Observation& o = observations_[i];
      const double base = std::log(o.predict(r));
      for (size_t j = 0; j < kRates; ++j) {
        Rates step = r;
        step.value[j] *= std::exp(kStep);
        slopes_[i][j] = (std::log(o.predict(step)) - base) / kStep;
      }
      const double d = (base - std::log(o.value)) / (o.sigma * o.sigma);
      for (size_t j = 0; j < kRates; ++j) {
        gradient_[j] += slopes_[i][j] * d;
        for (size_t k = 0; k < kRates; ++k) {
          normal_[j][k] += slopes_[i][j] * slopes_[i][k] / (o.sigma * o.sigma);
        }
      }
    }
    for (size_t j = 0; j < kRates; ++j) {
      gradient_[j] += moved(r, j) * weight(j);
      normal_[j][j] += weight(j);
    }
  }

  static Vector times(const Matrix& m, const Vector& v) {
    Vector out{};
    for (size_t i = 0; i < kRates; ++i) {
      for (size_t j = 0; j < kRates; ++j) out[i] += m[i][j] * v[j];
    }
    return out;
  }

  Calibration finish(const Rates& at) {
    Calibration c;
    c.rates = at;
    linearize(at);
    c.rates.covariance = inverse(normal_);
    for (size_t j = 0; j < kRates; ++j) {
      const auto id = static_cast<RateId>(j);
      // Learnt: it is clearly surer than before.
      if (c.rates.sigma(id) > 0.75 * prior_.sigma(id)) continue;
      Origin best = Origin::kFitted;
      for (size_t i = 0; i < observations_.size(); ++i) {
        if (std::abs(slopes_[i][j]) > 0.3) best = std::min(best, observations_[i].origin);
      }
      c.rates.origin[j] = best;
    }
    // What the formulas miss of whole steps where they were fitted, and as much again where not.
    double squares = 0, steps = 0;
    for (const Observation& o : observations_) {
      c.predicted.push_back(o.predict(at));
      if (o.origin != Origin::kFitted) continue;
      const double error = std::log(c.predicted.back() / o.value);
      squares += error * error;
      ++steps;
      c.worst = std::max(c.worst, std::abs(error));
    }
    if (steps > 0) c.rates.misfit = std::max(0.05, 2 * std::sqrt(squares / steps));
    return c;
  }

  const Rates& prior_;
  const std::vector<Observation>& observations_;
  Matrix normal_{};
  Vector gradient_{};
  std::vector<Vector> slopes_;  // d log predicted / d log rate
};

// One batch, as bench_step.cc's Pass.
struct Pass {
  std::vector<double> at;  // of each step's result
  std::vector<double> rows;
  size_t all_started = 0, one_ended = 0;

  Pass(const Grid& grid, const ReplicaLimits& limits, const ReplicaCosts& costs, int batch,
       int prompt, int new_tokens) {
    SimulationInput in;
    in.grid = grid;
    in.limits = limits;
    in.costs = costs;
    const int most = std::min(2 * new_tokens, std::max(new_tokens, limits.max_positions - prompt));
    in.arrivals.assign(static_cast<size_t>(batch), {0, prompt, most, new_tokens});
    int started = 0, ended = 0;
    in.on_step = [&](int, const VirtualReplica::Step& step, double now) {
      at.push_back(now);
      rows.push_back(step.work.rows);
      started += static_cast<int>(step.result.first.size());
      if (!step.result.first.empty()) all_started = at.size() - 1;
      if (ended == 0 && !step.result.finished.empty()) one_ended = at.size() - 1;
      ended += static_cast<int>(step.result.finished.size());
    };
    simulate(in);
    DROVER_CHECK_EQ(started, batch);
  }
};

}  // namespace

Calibration calibrate(const Rates& prior, const std::vector<Observation>& observations) {
  return Fit(prior, observations).run();
}

double prompt_rate(const Grid& grid, const ReplicaLimits& limits, const ReplicaCosts& costs,
                   int batch, int prompt_tokens) {
  const Pass pass(grid, limits, costs, batch, prompt_tokens, 1);
  return static_cast<double>(batch) * prompt_tokens / pass.at[pass.all_started];
}

DecodeFigures decode_figures(const Grid& grid, const ReplicaLimits& limits,
                             const ReplicaCosts& costs, int batch, int prompt_tokens,
                             int new_tokens) {
  const Pass pass(grid, limits, costs, batch, prompt_tokens, new_tokens);
  double rows = 0, steps = 0;
  for (size_t i = pass.all_started + 1; i <= pass.one_ended; ++i) {
    rows += pass.rows[i];
    steps += pass.rows[i] > 0 ? 1 : 0;
  }
  DROVER_CHECK(steps > 0, ExitCode::kBadInput,
               "a bench of {} sequences has no step in which all of them decode", batch);
  const double seconds = pass.at[pass.one_ended] - pass.at[pass.all_started];
  return {rows / seconds, seconds * std::min(batch, grid.dp) / steps};
}

}  // namespace drover

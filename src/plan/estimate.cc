#include "plan/estimate.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace drover {

double sequences_that_fit(const ReplicaLimits& limits, const Workload& w) {
  // A sequence holds its prompt and on average half of its answer, and half of its last page is
  // empty; at admission a page for every four sequences is left free (replica_scheduler.h).
  const double tokens = w.prompt_tokens + w.output_tokens / 2 + limits.page_tokens / 2.0;
  const double pages = tokens / limits.page_tokens + 0.25;
  return std::floor(limits.pages / pages);
}

namespace {

// The step of a group with `decode` sequences that decode: each step so many end, and their
// successors' prompts are run.
StepWork steady_step(double decode, const Workload& w) {
  const double decode_steps = std::max(1.0, w.output_tokens - 1);
  const double begin = decode / decode_steps;
  StepWork s;
  s.rows = decode + begin * w.prompt_tokens;
  s.sampled = decode + begin;
  s.decode_context = decode * (w.prompt_tokens + w.output_tokens / 2);
  s.prompt_pairs = begin * w.prompt_pairs;
  return s;
}

}  // namespace

Estimate estimate(const GridShape& shape, const ReplicaLimits& limits, const Workload& w,
                  const Rates& rates) {
  Estimate e;
  e.sequences = std::min<double>(limits.slots, sequences_that_fit(limits, w));
  if (w.most_sequences > 0) {
    e.sequences = std::min(e.sequences, std::ceil(w.most_sequences / shape.grid.dp));
  }
  e.sequences = std::max(1.0, e.sequences);
  const double groups = std::min<double>(limits.groups, e.sequences);
  const double decode_steps = std::max(1.0, w.output_tokens - 1);
  // A sequence spends at least one step on its prompt.
  double decode = e.sequences / groups * decode_steps / (decode_steps + 1);
  // Prompts that find no room in the step wait, and so do fewer decode.
  decode = std::min(decode, limits.step_tokens / (1 + w.prompt_tokens / decode_steps));
  e.decode_rows = decode;
  e.step = steady_step(decode, w);
  double through = 0, slowest = 0, all = 0;
  for (size_t i = 0; i < shape.stages.size(); ++i) {
    e.stages.push_back(step_cost(shape.stages[i], e.step, shape.place, rates));
    const double seconds = e.stages.back().total();
    if (seconds > slowest) e.slowest = static_cast<int>(i);
    slowest = std::max(slowest, seconds);
    all += seconds;
  }
  through = all;
  if (shape.grid.pp > 1) {
    e.send_seconds = send_seconds(e.step.rows * shape.stages[0].hidden_bytes,
                                  shape.place.stages_cross_nodes, rates);
    through += (shape.grid.pp - 1) * e.send_seconds +
               send_seconds(0, shape.place.stages_cross_nodes, rates);
  }
  e.round_seconds = std::max(groups * slowest, through);
  e.step_seconds = e.round_seconds / groups;
  e.bubble = 1 - groups * all / (shape.grid.pp * e.round_seconds);
  const StepCost& worst = e.stages[static_cast<size_t>(e.slowest)];
  e.sums_share = worst.sums / worst.total();
  e.tokens_per_s = shape.grid.dp * e.step.sampled / e.step_seconds;
  return e;
}

Steady simulate_steady(const GridShape& shape, const ReplicaLimits& limits,
                       std::vector<Arrival> samples, double most_sequences, const Rates& rates) {
  SimulationInput in;
  in.grid = {shape.grid.tp, shape.grid.pp, 1};
  in.limits = limits;
  if (most_sequences > 0) {
    const double mine = std::ceil(most_sequences / shape.grid.dp);
    in.limits.slots = static_cast<int32_t>(std::clamp<double>(mine, 1, limits.slots));
  }
  in.costs = replica_costs(shape, rates);
  const auto count = static_cast<size_t>(std::clamp(4 * in.limits.slots, 64, 16384));
  std::mt19937_64 random(1);
  while (in.arrivals.size() < count) {
    std::shuffle(samples.begin(), samples.end(), random);
    for (size_t i = 0; i < samples.size() && in.arrivals.size() < count; ++i) {
      in.arrivals.push_back(samples[i]);
    }
  }
  const SimulationResult r = simulate(in);
  SimulationResult::Mark from = r.ramp_end, to = r.drain_begin;
  if (to.at <= from.at) {  // too few for a steady state: the whole
    from = {.at = 0};
    to = {r.seconds, static_cast<double>(r.output_tokens), r.plans,
          r.busy * r.seconds * in.costs.stages};
  }
  const double seconds = to.at - from.at;
  return {shape.grid.dp * (to.tokens - from.tokens) / seconds, seconds / (to.steps - from.steps),
          (to.busy - from.busy) / (seconds * in.costs.stages)};
}

}  // namespace drover

// result.json and environment.json.
#pragma once

#include <string>
#include <vector>

#include "serve/loadgen_logs.h"
#include "serve/loadgen_settings.h"
#include "serve/session.h"
#include "serve/sut.h"
#include "serve/timeline.h"

namespace drover {

struct PassOutcome {
  Mode mode = Mode::kPerformance;
  std::string ended_early;  // the first cause; empty: the pass came to its end
  Json resumed;             // of whom samples were taken over, and how many; null: of nobody
  LoadgenLogs logs;
  std::vector<SampleRecord> records;
  uint64_t issued = 0;
  double duration_s = 0;
  SchedulerCounters counters;
  Timeline timeline;
  std::vector<RankTimes> rank_times;  // by rank; empty: not known
  std::vector<std::string> reasons;   // why it is not valid; empty: it is
  bool valid() const { return reasons.empty(); }
};

// Value at a fraction of the sorted values, as LoadGen takes it: sorted[n * fraction].
double percentile(std::vector<double> values, double fraction);

// Fills outcome.reasons: LoadGen's own verdict and errors, then drover's checks: all issued samples
// came back; accuracy: LoadGen's log holds each sample once, with the tokens that were delivered;
// Server and Interactive: the limits in force were met and are mlperf.conf's.
void judge(PassOutcome& outcome, const ServeOptions& options, const LoadgenPlan& plan,
           size_t samples, const std::string& dir);

Json pass_json(const PassOutcome& outcome, const ServeOptions& options, const LoadgenPlan& plan,
               const RunFacts& facts);
// The whole run: the performance pass's figures (else accuracy's) on top, each pass under "passes".
Json run_json(const std::vector<PassOutcome>& passes, const ServeOptions& options,
              const LoadgenPlan& plan, const RunFacts& facts);
// Milliseconds a step, averaged over the ranks, and each rank's seconds (up to 64 of them). Null
// when no step was run.
Json step_time_json(const std::vector<RankTimes>& ranks);
// The sum over all devices, and for each of `output_tokens` (0: left out). Null where a device has
// no counter, or a rank ran no step.
Json energy_json(const std::vector<RankTimes>& ranks, uint64_t output_tokens);
Json pass_energy(const PassOutcome& outcome);
// "1234 J, 567 W, 0.89 J an output token", of what energy_json gave.
std::string energy_text(const Json& energy);
// After an early end: what is kept and which options go on with it. Empty when all passes ran.
std::string how_to_go_on(const std::vector<PassOutcome>& passes, const ServeOptions& options);
Json environment_json(const RunFacts& facts);

}  // namespace drover

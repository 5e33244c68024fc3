// Where each microsecond of a step goes, by operation, out of what a rank's trace recorded.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/trace.h"

namespace drover {

// The mean of all steps of one kind and size. The parts sum up to `us`.
struct StepBudget {
  struct Part {
    std::string operation;
    double us = 0, calls = 0;  // of a step
  };
  std::string kind;  // "decode step" or "mixed step"
  int64_t rows = 0;
  int64_t steps = 0;
  double us = 0;
  std::vector<Part> parts{};  // in the order of a forward; "idle" last
};

// From spans of the categories "step", "kernel" and "copy" (a GPU) or "operation" (a CPU rank).
// Whatever overlaps is counted once: kernels by their begin, then communication, as far as no
// other kernel runs, then copies; what is left of a step is idle. A linear is told by the
// operations around it. Kinds and sizes of fewer than `least_steps` steps, and those of less than a
// hundredth of the time, are left out. Empty where the trace has whole steps only.
std::vector<StepBudget> step_budgets(std::span<const trace::Span> spans, int64_t least_steps = 3);

// The operation of a GPU's kernel; "linear" for all linears.
std::string operation_of_kernel(const std::string& kernel);

Json to_json(const std::vector<StepBudget>& budgets);
// A table for each kind and size that rank 0 has; a column for each rank (up to 8), shares of all
// ranks' time. `ranks`: what to_json gave on each.
std::string budget_text(const std::vector<Json>& ranks);

}  // namespace drover

#include "engine/outputs.h"

#include <algorithm>

#include "base/error.h"

namespace drover {

Outputs::Outputs(int32_t slots, std::vector<int32_t> eos_ids)
    : answers_(static_cast<size_t>(slots)), eos_ids_(std::move(eos_ids)) {}

void Outputs::apply(const StepPlan& plan) {
  for (const auto& a : plan.admitted) {
    auto& answer = answers_[static_cast<size_t>(a.slot)];
    answer.tokens.clear();
    answer.ended = false;
  }
}

void Outputs::add(const Slot& s, int32_t index, int32_t position, int32_t token,
                  StepResult& result) {
  Answer& a = answers_[static_cast<size_t>(index)];
  if (a.ended) return;                        // sampled before the leader knew of the end
  const int32_t count = position - s.prompt;  // new tokens before this one
  DROVER_CHECK_EQ(count, static_cast<int32_t>(a.tokens.size()));
  a.tokens.push_back(token);
  if (count == 0) result.first.push_back({s.id, token});
  if (s.stream_tokens) result.streamed.push_back({s.id, token});

  const bool eos = !s.ignore_eos && count > 0 &&
                   std::find(eos_ids_.begin(), eos_ids_.end(), token) != eos_ids_.end();
  const bool full =
      count + 1 >= s.max_new_tokens || (s.forced_length > 0 && count + 1 >= s.forced_length);
  if (!eos && !full) return;
  a.ended = true;
  result.finished.push_back({s.id, eos, std::move(a.tokens)});
  a.tokens = {};
}

}  // namespace drover

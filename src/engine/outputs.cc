#include "engine/outputs.h"

#include <algorithm>

#include "base/error.h"

namespace drover {

Outputs::Outputs(int32_t slots, std::vector<int32_t> eos_ids)
    : answers_(static_cast<size_t>(slots)), eos_ids_(std::move(eos_ids)) {}

void Outputs::admit(std::vector<Admission>& admitted) {
  for (Admission& admission : admitted) {
    auto& answer = answers_[static_cast<size_t>(admission.slot)];
    answer.prompt = static_cast<int32_t>(admission.prompt.size());
    admission.prompt = {};
    answer.of = std::move(admission);
    answer.tokens.clear();
    answer.ended = false;
  }
  admitted.clear();
}

void Outputs::add(int32_t slot, int32_t position, int32_t token, StepResult& result) {
  Answer& a = answers_[static_cast<size_t>(slot)];
  if (a.ended) return;                        // sampled before the leader knew of the end
  const int32_t count = position - a.prompt;  // new tokens before this one
  DROVER_CHECK_EQ(count, static_cast<int32_t>(a.tokens.size()));
  DROVER_CHECK(token >= 0, ExitCode::kBadInput,
               "sequence {}, position {}: no logit is a number: the model's weights hold NaN or "
               "infinities, or overflow; import the model again",
               a.of.id, position);
  a.tokens.push_back(token);
  ++result.tokens;
  if (count == 0) result.first.push_back({a.of.id, token});
  if (a.of.stream_tokens) result.streamed.push_back({a.of.id, token});

  const bool ends = !a.of.ignore_eos && a.of.forced_length == 0 && count > 0;
  const bool eos = ends && std::find(eos_ids_.begin(), eos_ids_.end(), token) != eos_ids_.end();
  const bool full = count + 1 >= a.of.max_new_tokens ||
                    (a.of.forced_length > 0 && count + 1 >= a.of.forced_length);
  if (!eos && !full) return;
  a.ended = true;
  result.finished.push_back({a.of.id, eos, std::move(a.tokens)});
  a.tokens = {};
}

}  // namespace drover

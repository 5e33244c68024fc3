// What the last stage of a replica knows of its sequences' answers, and reports. It follows the
// steps as they end, while slots.h runs ahead with the plans: a slot may have a new owner there
// while the last tokens of the old one are still on their way here.
#pragma once

#include <cstdint>
#include <vector>

#include "sched/step.h"

namespace drover {

class Outputs {
 public:
  Outputs(int32_t slots, std::vector<int32_t> eos_ids);
  // The sequences that a plan admitted. Takes their prompts' memory away.
  void admit(std::vector<Admission>& admitted);
  // One sampled token, in step order. Drops what a sequence samples after its end.
  // Throws kBadInput when no logit was a number (token < 0).
  void add(int32_t slot, int32_t position, int32_t token, StepResult& result);

 private:
  struct Answer {
    Admission of;  // without the prompt
    int32_t prompt = 0;
    std::vector<int32_t> tokens;
    bool ended = false;
  };
  std::vector<Answer> answers_;
  std::vector<int32_t> eos_ids_;
};

}  // namespace drover

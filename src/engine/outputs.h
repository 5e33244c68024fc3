// What the last stage of a replica knows of its sequences' answers, and reports.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/slots.h"

namespace drover {

class Outputs {
 public:
  Outputs(int32_t slots, std::vector<int32_t> eos_ids);
  void apply(const StepPlan& plan);
  // One sampled token, in step order. Drops what a sequence samples after its end.
  void add(const Slot& slot, int32_t index, int32_t position, int32_t token, StepResult& result);

 private:
  struct Answer {
    std::vector<int32_t> tokens;
    bool ended = false;
  };
  std::vector<Answer> answers_;
  std::vector<int32_t> eos_ids_;
};

}  // namespace drover

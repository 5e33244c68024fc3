#include "plan/virtual_replica.h"

#include <algorithm>

#include "base/error.h"

namespace drover {

VirtualReplica::VirtualReplica(const ReplicaLimits& limits, const ReplicaCosts& costs,
                               std::vector<double> slowdown)
    : costs_(costs),
      slowdown_(std::move(slowdown)),
      busy_(static_cast<size_t>(costs.stages)),
      free_at_(static_cast<size_t>(costs.stages)),
      fed_back_(static_cast<size_t>(limits.groups)),
      slots_(static_cast<size_t>(limits.slots)),
      decoding_(static_cast<size_t>(limits.groups)) {
  DROVER_CHECK_EQ(slowdown_.size(), free_at_.size());
}

VirtualReplica::Slot& VirtualReplica::at(int32_t slot) {
  DROVER_CHECK(slot >= 0 && static_cast<size_t>(slot) < slots_.size(), ExitCode::kInternal,
               "a plan names slot {}, there are {}", slot, slots_.size());
  return slots_[static_cast<size_t>(slot)];
}

void VirtualReplica::release(int32_t slot, State state) {
  Slot& s = at(slot);
  DROVER_CHECK(s.state != State::kFree, ExitCode::kInternal, "slot {} is free already", slot);
  if (s.state == State::kDecoding) std::erase(decoding_[static_cast<size_t>(s.group)], slot);
  s.state = state;
  s.next = 0;
}

// The token after `position`. What an ended sequence samples is dropped.
void VirtualReplica::sample(Slot& s, int32_t position, StepResult& result) {
  s.sampled = position + 2 - s.prompt;
  if (s.ended) return;
  if (s.sampled == 1) result.first.push_back({s.id, 0});
  const bool forced = s.forced > 0 && s.sampled >= s.forced;
  if (!forced && s.sampled < s.max_new) return;
  s.ended = true;
  result.finished.push_back({s.id, forced, std::vector<int32_t>(static_cast<size_t>(s.sampled))});
}

void VirtualReplica::apply(const StepPlan& plan, Step& step) {
  auto& decoding = decoding_[static_cast<size_t>(plan.group)];
  StepWork& w = step.work;
  for (const int32_t slot : plan.retired) {
    DROVER_CHECK(at(slot).ended, ExitCode::kInternal, "sequence {} is retired before its end",
                 at(slot).id);
    release(slot, State::kFree);
    --live_;
  }
  for (const int32_t slot : plan.suspended) release(slot, State::kWaiting);
  for (const Admission& a : plan.admitted) {
    Slot& s = at(a.slot);
    DROVER_CHECK(s.state == State::kFree, ExitCode::kInternal, "slot {} has sequence {}", a.slot,
                 s.id);
    s = Slot{.state = State::kWaiting,
             .group = a.group,
             .prompt = static_cast<int32_t>(a.prompt.size()),
             .max_new = a.max_new_tokens,
             .forced = a.forced_length,
             .id = a.id};
    ++live_;
  }
  for (const Chunk& c : plan.chunks) {
    Slot& s = at(c.slot);
    DROVER_CHECK(s.state == State::kWaiting && c.start == s.next, ExitCode::kInternal,
                 "sequence {}: a chunk from {}, expected {}", s.id, c.start, s.next);
    s.next += c.count;
    w.rows += c.count;
    w.prompt_pairs += static_cast<double>(c.count) * (c.start + (c.count + 1) / 2.0);
    if (c.last) sample(s, s.next - 1, step.result);
    w.sampled += c.last ? 1 : 0;
  }
  for (const int32_t slot : decoding) {
    Slot& s = at(slot);
    w.decode_context += s.next + 1;
    sample(s, s.next++, step.result);
  }
  w.rows += static_cast<double>(decoding.size());
  w.sampled += static_cast<double>(decoding.size());
  for (const Chunk& c : plan.chunks) {
    if (!c.last) continue;
    at(c.slot).state = State::kDecoding;
    decoding.push_back(c.slot);
  }
}

void VirtualReplica::clock(int32_t group, double arrival, Step& step) {
  double ready = std::max(arrival, fed_back_[static_cast<size_t>(group)]);
  step.begin = std::max(ready, free_at_[0]);
  for (int stage = 0; stage < costs_.stages; ++stage) {
    const auto i = static_cast<size_t>(stage);
    const double seconds = step.work.rows > 0 ? costs_.stage(stage, step.work) * slowdown_[i] : 0;
    free_at_[i] = std::max(ready, free_at_[i]) + seconds;
    busy_[i] += seconds;
    step.busy += seconds;
    ready = free_at_[i] + (stage + 1 < costs_.stages ? costs_.send(step.work.rows) : 0);
  }
  step.end = ready;
  fed_back_[static_cast<size_t>(group)] = ready + costs_.feedback;
}

VirtualReplica::Step VirtualReplica::run(const StepPlan& plan, double arrival) {
  Step step;
  step.result.step = plan.step;
  apply(plan, step);
  clock(plan.group, arrival, step);
  step.result.rows = static_cast<int32_t>(step.work.rows);
  step.result.seconds = step.end - step.begin;
  rows_ += step.result.rows;
  return step;
}

}  // namespace drover

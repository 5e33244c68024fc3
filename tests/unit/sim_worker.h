// A simulated replica: applies plans exactly as sched/step.h says and throws at the first plan that
// breaks a rule. No test framework, no clock: the tests use it, and so can a simulator.
//
// Its "model" is a chain of hashes that is kept in the KV pages: the row at position p reads the
// entry of position p - 1 through the slot's page table, mixes in its token and writes its own
// entry. A page that was granted late, twice or to the wrong slot gives wrong tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/error.h"
#include "sched/scheduler.h"
#include "sched/step.h"

namespace drover::sim {

inline uint64_t mix(uint64_t h, uint64_t x) {
  h = (h ^ (x + 0x9E3779B97F4A7C15ull)) * 0xBF58476D1CE4E5B9ull;
  return h ^ (h >> 29);
}

struct Model {
  uint64_t seed = 1;
  int32_t vocab = 1000;
  double eos_rate = 0.0;  // chance of each token after the first to be the end of sequence, id 0

  static constexpr int32_t kEos = 0;
  uint64_t begin() const { return mix(seed, 77); }
  int32_t sample(uint64_t state, bool first) const {
    const uint64_t h = mix(state, 5);
    const bool eos = static_cast<double>(h >> 11) * 0x1.0p-53 < eos_rate;
    if (eos && !first) return kEos;
    return 1 + static_cast<int32_t>(mix(h, 9) % static_cast<uint64_t>(vocab - 1));
  }
};

// Whether a sequence of `count` new tokens, the last of which is `token`, has ended.
struct End {
  bool ended = false;
  bool by_eos = false;
};
inline End end_of(int32_t count, int32_t token, int32_t max_new, int32_t forced, bool ignore_eos) {
  const bool eos = forced > 0 ? count >= forced : (!ignore_eos && token == Model::kEos);
  return {eos || count >= max_new, eos};
}

// What a request must give, worked out without slots, pages or steps.
inline std::vector<int32_t> expected_tokens(const Model& model, const Request& r) {
  uint64_t h = model.begin();
  for (int32_t t : r.prompt) h = mix(h, static_cast<uint64_t>(t));
  std::vector<int32_t> out;
  while (true) {
    const int32_t token = model.sample(h, out.empty());
    out.push_back(token);
    const auto count = static_cast<int32_t>(out.size());
    if (end_of(count, token, r.max_new_tokens, r.forced_length, r.ignore_eos).ended) return out;
    h = mix(h, static_cast<uint64_t>(token));
  }
}

#define SIM_RULE(condition, ...) DROVER_CHECK(condition, ExitCode::kInternal, __VA_ARGS__)

class Worker {
 public:
  Worker(const ReplicaLimits& limits, const Model& model)
      : limits_(limits),
        model_(model),
        slots_(static_cast<size_t>(limits.slots)),
        owner_(static_cast<size_t>(limits.pages), -1),
        kv_(static_cast<size_t>(limits.pages) * static_cast<size_t>(limits.page_tokens)),
        coming_(static_cast<size_t>(limits.groups)),
        decoding_(static_cast<size_t>(limits.groups)) {}

  // Runs one step. The results are those the replica's last stage would send.
  StepResult apply(const StepPlan& plan) {
    SIM_RULE(plan.step == steps_, "plan {} came as number {}", plan.step, steps_);
    ++steps_;
    SIM_RULE(plan.group >= 0 && plan.group < limits_.groups, "no group {}", plan.group);
    // The tokens that the last step of this group sampled are back at the first stage.
    auto& back = coming_[static_cast<size_t>(plan.group)];
    for (const Sampled& t : back) put_token(slots_[index(t.slot)], t.position, t.token);
    back.clear();

    for (int32_t s : plan.retired) retire(s);
    for (int32_t s : plan.suspended) suspend(s);
    for (const Admission& a : plan.admitted) admit(plan, a);
    for (const PageGrant& g : plan.grants) take(g);
    StepResult result;
    result.step = plan.step;
    run(plan, result);
    return result;
  }

  int32_t live() const { return live_; }
  int32_t pages_in_use() const { return pages_in_use_; }
  int32_t last_decode_rows() const { return last_decode_rows_; }
  int64_t surplus_rows() const { return surplus_rows_; }

 private:
  enum class State : uint8_t { kFree, kWaiting, kDecoding };
  struct Slot {
    State state = State::kFree;
    Admission request;
    bool ended = false;
    int32_t next = 0;                 // position of its next row
    int32_t sampled = 0;              // new tokens, those on their way included
    std::vector<int32_t> tokens;      // at the first stage: as far as they have come back
    std::vector<int32_t> new_tokens;  // at the last stage
    std::vector<int32_t> pages;
  };
  struct Sampled {
    int32_t slot, position, token;
  };

  size_t index(int32_t slot) const {
    SIM_RULE(slot >= 0 && slot < limits_.slots, "no slot {}", slot);
    return static_cast<size_t>(slot);
  }
  static void put_token(Slot& s, int32_t position, int32_t token) {
    const auto at = static_cast<size_t>(position);
    if (s.tokens.size() <= at) s.tokens.resize(at + 1, -1);
    s.tokens[at] = token;
  }
  void free_pages(int32_t slot) {
    Slot& s = slots_[index(slot)];
    for (int32_t p : s.pages) owner_[static_cast<size_t>(p)] = -1;
    pages_in_use_ -= static_cast<int32_t>(s.pages.size());
    s.pages.clear();
  }
  void leave_decoding(int32_t slot) {
    Slot& s = slots_[index(slot)];
    if (s.state != State::kDecoding) return;
    auto& list = decoding_[static_cast<size_t>(s.request.group)];
    list.erase(std::lower_bound(list.begin(), list.end(), slot));
  }

  void retire(int32_t slot) {
    Slot& s = slots_[index(slot)];
    SIM_RULE(s.state != State::kFree, "slot {} is retired, but it is free", slot);
    SIM_RULE(s.ended, "sequence {} is retired before it has ended", s.request.id);
    leave_decoding(slot);
    free_pages(slot);
    s.state = State::kFree;
    --live_;
  }

  void suspend(int32_t slot) {
    Slot& s = slots_[index(slot)];
    SIM_RULE(s.state != State::kFree, "slot {} is suspended, but it is free", slot);
    SIM_RULE(!s.pages.empty(), "slot {} is suspended, but it holds no pages", slot);
    leave_decoding(slot);
    free_pages(slot);
    s.state = State::kWaiting;
    s.next = 0;
  }

  void admit(const StepPlan& plan, const Admission& a) {
    Slot& s = slots_[index(a.slot)];
    SIM_RULE(s.state == State::kFree, "slot {} is admitted to, but sequence {} has it", a.slot,
             s.request.id);
    SIM_RULE(a.group == plan.group, "sequence {} of group {} is admitted in a plan of group {}",
             a.id, a.group, plan.group);
    SIM_RULE(a.group == a.slot % limits_.groups, "slot {} is not of group {}", a.slot, a.group);
    SIM_RULE(!a.prompt.empty() && a.max_new_tokens > 0, "sequence {} has nothing to do", a.id);
    s = Slot{};
    s.state = State::kWaiting;
    s.request = a;
    s.tokens = a.prompt;
    ++live_;
  }

  void take(const PageGrant& g) {
    Slot& s = slots_[index(g.slot)];
    SIM_RULE(s.state != State::kFree, "pages for the free slot {}", g.slot);
    SIM_RULE(g.first_index == static_cast<int32_t>(s.pages.size()),
             "slot {}: pages from index {}, it has {}", g.slot, g.first_index, s.pages.size());
    SIM_RULE(!g.pages.empty(), "an empty grant for slot {}", g.slot);
    for (int32_t p : g.pages) {
      SIM_RULE(p >= 0 && p < limits_.pages, "no page {}", p);
      int32_t& owner = owner_[static_cast<size_t>(p)];
      SIM_RULE(owner == -1, "page {} goes to slot {}, but slot {} has it", p, g.slot, owner);
      owner = g.slot;
      s.pages.push_back(p);
      ++pages_in_use_;
    }
  }

  uint64_t& kv(int32_t slot, int32_t position) {
    const Slot& s = slots_[index(slot)];
    const auto at = static_cast<size_t>(position / limits_.page_tokens);
    SIM_RULE(at < s.pages.size(), "sequence {}: position {} has no page", s.request.id, position);
    const int32_t page = s.pages[at];
    SIM_RULE(owner_[static_cast<size_t>(page)] == slot, "page {} is not slot {}'s", page, slot);
    return kv_[static_cast<size_t>(page) * static_cast<size_t>(limits_.page_tokens) +
               static_cast<size_t>(position % limits_.page_tokens)];
  }

  uint64_t run_row(int32_t slot, int32_t position) {
    const Slot& s = slots_[index(slot)];
    SIM_RULE(position + 1 < limits_.max_positions, "position {} is beyond the model", position);
    SIM_RULE(static_cast<size_t>(position) < s.tokens.size(),
             "sequence {}: position {} has no token yet", s.request.id, position);
    const uint64_t before = position == 0 ? model_.begin() : kv(slot, position - 1);
    const int32_t token = s.tokens[static_cast<size_t>(position)];
    const uint64_t state = mix(before, static_cast<uint64_t>(token));
    kv(slot, position) = state;
    return state;
  }

  // At the last stage: the token after `position`.
  void sample(int32_t slot, int32_t position, uint64_t state, StepResult& result) {
    Slot& s = slots_[index(slot)];
    const Admission& a = s.request;
    const auto count = position + 2 - static_cast<int32_t>(a.prompt.size());
    const int32_t token = model_.sample(state, count == 1);
    coming_[static_cast<size_t>(a.group)].push_back({slot, position + 1, token});
    s.sampled = count;
    if (s.ended) {
      ++surplus_rows_;
      return;
    }
    SIM_RULE(count == static_cast<int32_t>(s.new_tokens.size()) + 1,
             "sequence {}: sampled its new token {} after {}", a.id, count, s.new_tokens.size());
    SIM_RULE(count <= a.max_new_tokens, "sequence {}: a row after its last", a.id);
    s.new_tokens.push_back(token);
    ++result.tokens;
    if (count == 1) result.first.push_back({a.id, token});
    if (a.stream_tokens) result.streamed.push_back({a.id, token});
    const End end = end_of(count, token, a.max_new_tokens, a.forced_length, a.ignore_eos);
    if (!end.ended) return;
    s.ended = true;
    result.finished.push_back({a.id, end.by_eos, s.new_tokens});
  }

  void run_chunk(const StepPlan& plan, const Chunk& c, StepResult& result) {
    Slot& s = slots_[index(c.slot)];
    SIM_RULE(s.state == State::kWaiting, "a chunk for slot {}, which is not waiting", c.slot);
    SIM_RULE(s.request.group == plan.group, "a chunk of group {} in a step of {}", s.request.group,
             plan.group);
    SIM_RULE(c.count > 0 && c.count <= limits_.chunk_tokens, "a chunk of {} rows", c.count);
    SIM_RULE(c.start == s.next, "sequence {}: a chunk from {}, expected {}", s.request.id, c.start,
             s.next);
    const int32_t known = static_cast<int32_t>(s.request.prompt.size()) + s.sampled;
    SIM_RULE(c.last == (c.start + c.count == known),
             "sequence {}: chunk to {} of {} tokens has last = {}", s.request.id, c.start + c.count,
             known, c.last);
    uint64_t state = 0;
    for (int32_t p = c.start; p < c.start + c.count; ++p) state = run_row(c.slot, p);
    s.next = c.start + c.count;
    if (c.last) sample(c.slot, s.next - 1, state, result);
  }

  void run(const StepPlan& plan, StepResult& result) {
    auto& decoding = decoding_[static_cast<size_t>(plan.group)];
    for (const Chunk& c : plan.chunks) {
      run_chunk(plan, c, result);
      result.rows += c.count;
    }
    last_decode_rows_ = static_cast<int32_t>(decoding.size());
    result.rows += last_decode_rows_;
    for (int32_t slot : decoding) {
      Slot& s = slots_[index(slot)];
      sample(slot, s.next, run_row(slot, s.next), result);
      ++s.next;
    }
    SIM_RULE(result.rows <= limits_.step_tokens, "step {}: {} rows, at most {}", plan.step,
             result.rows, limits_.step_tokens);
    for (const Chunk& c : plan.chunks) {
      if (!c.last) continue;
      slots_[index(c.slot)].state = State::kDecoding;
      decoding.insert(std::lower_bound(decoding.begin(), decoding.end(), c.slot), c.slot);
    }
  }

  ReplicaLimits limits_;
  Model model_;
  std::vector<Slot> slots_;
  std::vector<int32_t> owner_;                  // [pages] slot, or -1
  std::vector<uint64_t> kv_;                    // [pages, page_tokens]
  std::vector<std::vector<Sampled>> coming_;    // by group: on their way to the first stage
  std::vector<std::vector<int32_t>> decoding_;  // by group: slots, ascending
  uint64_t steps_ = 0;
  int32_t live_ = 0;
  int32_t pages_in_use_ = 0;
  int32_t last_decode_rows_ = 0;
  int64_t surplus_rows_ = 0;
};

#undef SIM_RULE

}  // namespace drover::sim

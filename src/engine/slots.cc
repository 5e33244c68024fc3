#include "engine/slots.h"

#include "base/error.h"

namespace drover {

Slots::Slots(int32_t slots, int32_t max_positions, int32_t page_tokens, int32_t pages)
    : slots_(static_cast<size_t>(slots)),
      max_positions_(max_positions),
      page_tokens_(page_tokens),
      pages_(pages) {}

Slot& Slots::live(int32_t slot, const char* what) {
  DROVER_CHECK(slot >= 0 && slot < size() && slots_[static_cast<size_t>(slot)].live,
               ExitCode::kInternal, "bad plan: {} of slot {}, which holds no sequence", what, slot);
  return slots_[static_cast<size_t>(slot)];
}

void Slots::apply(const StepPlan& plan) {
  for (int32_t i : plan.retired) live(i, "retirement") = Slot{};
  for (int32_t i : plan.suspended) {
    Slot& s = live(i, "suspension");
    s.decoding = false;
    s.pages = 0;
  }
  for (const auto& a : plan.admitted) {
    DROVER_CHECK(a.slot >= 0 && a.slot < size() && !slots_[static_cast<size_t>(a.slot)].live,
                 ExitCode::kInternal, "bad plan: admission to slot {}, which is taken", a.slot);
    DROVER_CHECK(a.group == plan.group, ExitCode::kInternal,
                 "bad plan: slot {} of group {} is admitted in a plan of group {}", a.slot, a.group,
                 plan.group);
    const auto prompt = static_cast<int32_t>(a.prompt.size());
    DROVER_CHECK(prompt > 0 && prompt + a.max_new_tokens <= max_positions_, ExitCode::kInternal,
                 "bad plan: {} + {} tokens in a slot of {}", prompt, a.max_new_tokens,
                 max_positions_);
    slots_[static_cast<size_t>(a.slot)] = {.live = true,
                                           .decoding = false,
                                           .id = a.id,
                                           .group = a.group,
                                           .prompt = prompt,
                                           .length = prompt,
                                           .pages = 0,
                                           .max_new_tokens = a.max_new_tokens,
                                           .forced_length = a.forced_length,
                                           .ignore_eos = a.ignore_eos || a.forced_length > 0,
                                           .stream_tokens = a.stream_tokens,
                                           .want_logits = a.want_logits};
  }
  for (const auto& g : plan.grants) {
    Slot& s = live(g.slot, "page grant");
    DROVER_CHECK(g.first_index == s.pages, ExitCode::kInternal,
                 "bad plan: pages of slot {} granted at {}, it has {}", g.slot, g.first_index,
                 s.pages);
    for (int32_t p : g.pages) {
      DROVER_CHECK(p >= 0 && p < pages_, ExitCode::kInternal, "bad plan: page {} of {}", p, pages_);
    }
    s.pages += static_cast<int32_t>(g.pages.size());
  }
}

void Slots::add_row(const Slot& s, int32_t slot, int32_t position, StepLayout& out) const {
  DROVER_CHECK(position / page_tokens_ < s.pages, ExitCode::kInternal,
               "bad plan: position {} of slot {} has no page (it has {} of {} tokens)", position,
               slot, s.pages, page_tokens_);
  out.row_slot.push_back(slot);
  out.row_position.push_back(position);
}

void Slots::lay_out(const StepPlan& plan, StepLayout& out) {
  out.row_slot.clear();
  out.row_position.clear();
  out.wanted.clear();
  out.looked_at.clear();
  out.decode_rows = 0;
  out.chunk_row.assign(1, 0);

  const auto sample = [&](Slot& s, int32_t slot) {
    DROVER_CHECK(s.length < s.prompt + s.max_new_tokens, ExitCode::kInternal,
                 "bad plan: slot {} samples more than its {} new tokens", slot, s.max_new_tokens);
    const WantedRow wanted{
        .row = out.rows() - 1, .slot = slot, .position = s.length, .first = s.length == s.prompt};
    out.wanted.push_back(wanted);
    if (s.want_logits) out.looked_at.push_back(wanted);
    ++s.length;
  };
  for (const auto& c : plan.chunks) {
    Slot& s = live(c.slot, "chunk");
    DROVER_CHECK(s.group == plan.group && !s.decoding && c.start >= 0 && c.count > 0 &&
                     c.start + c.count <= s.length && (!c.last || c.start + c.count == s.length),
                 ExitCode::kInternal, "bad plan: chunk [{}, +{}) of slot {} with {} tokens",
                 c.start, c.count, c.slot, s.length);
    for (int32_t p = c.start; p < c.start + c.count; ++p) {
      add_row(s, c.slot, p, out);
      const bool newest = c.last && p == s.length - 1;
      if (s.want_logits && !newest && p < s.prompt) {
        out.looked_at.push_back(
            {.row = out.rows() - 1, .slot = c.slot, .position = p + 1, .first = false});
      }
    }
    if (c.last) sample(s, c.slot);
    out.chunk_row.push_back(out.rows());
  }
  for (int32_t i = 0; i < size(); ++i) {
    Slot& s = slots_[static_cast<size_t>(i)];
    if (!s.decoding || s.group != plan.group) continue;
    add_row(s, i, s.length - 1, out);
    sample(s, i);
    ++out.decode_rows;
    out.chunk_row.push_back(out.rows());
  }
  // A chunk's slot decodes from the next step on.
  for (const auto& c : plan.chunks) {
    if (c.last) slots_[static_cast<size_t>(c.slot)].decoding = true;
  }
}

}  // namespace drover

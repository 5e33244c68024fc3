// A rank's picture of its replica's slots: applies plans and lays out the rows of a step.
// Host state only; every rank of a replica gets the same picture from the same plans.
#pragma once

#include <cstdint>
#include <vector>

#include "sched/step.h"

namespace drover {

// A row whose logits are wanted.
struct WantedRow {
  int32_t row = 0;  // in the step
  int32_t slot = 0;
  int32_t position = 0;  // of the token that follows (the row's position + 1)
  bool first = false;    // the first new token: never an end of sequence
};

// The rows of one step, on the host: chunks as listed in the plan, then the decoding slots.
struct StepLayout {
  std::vector<int32_t> row_slot, row_position;  // [rows]
  std::vector<int32_t> chunk_row;               // [chunks + 1]
  int32_t decode_rows = 0;                      // of these chunks, one row each, at the end
  std::vector<WantedRow> wanted;                // rows whose best token is sampled
  std::vector<WantedRow> looked_at;             // rows of sequences that want_logits
  int32_t rows() const { return static_cast<int32_t>(row_slot.size()); }
  int32_t chunks() const { return static_cast<int32_t>(chunk_row.size()) - 1; }
};

struct Slot {
  bool live = false;
  bool decoding = false;
  SequenceId id = 0;
  int32_t group = 0;
  int32_t prompt = 0;  // tokens
  int32_t length = 0;  // tokens known or being sampled; a decode row is at length - 1
  int32_t pages = 0;   // granted
  int32_t max_new_tokens = 0;
  int32_t forced_length = 0;
  bool ignore_eos = false;
  bool stream_tokens = false;
  bool want_logits = false;
};

class Slots {
 public:
  Slots(int32_t slots, int32_t max_positions, int32_t page_tokens, int32_t pages);

  // Retires, suspends, admits and grants; checks everything (kInternal: a bad plan is a bug).
  void apply(const StepPlan& plan);
  // The rows of the plan that was just applied; advances lengths. `out` is cleared and reused.
  void lay_out(const StepPlan& plan, StepLayout& out);

  const Slot& slot(int32_t i) const { return slots_[static_cast<size_t>(i)]; }
  int32_t size() const { return static_cast<int32_t>(slots_.size()); }

 private:
  Slot& live(int32_t slot, const char* what);
  void add_row(const Slot& s, int32_t slot, int32_t position, StepLayout& out) const;

  std::vector<Slot> slots_;
  int32_t max_positions_, page_tokens_, pages_;
};

}  // namespace drover

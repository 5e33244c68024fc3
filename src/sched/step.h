// The messages of the system. A StepPlan goes from the leader to the ranks of one replica, a
// StepResult comes back from the replica's last stage; between the passes of a run each rank tells
// its RankTimes when asked. Plain data; serialization in step_codec.
//
// A plan is a delta: what is not mentioned goes on. Every rank of the replica applies the same
// plans in the same order and so keeps the same picture of slots, pages and decoding sequences.
//
// A slot (a sequence's place on the ranks of a replica) is
//   free -> admit -> waiting --chunks--> decoding -> retired (free)
//                       ^------ suspend ----'
// A chunk whose `last` is set ends at the sequence's newest token: its last position's logits are
// sampled, and from the next step of its group on the slot decodes: one row a step, without being
// mentioned, until it is retired or suspended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace drover {

using SequenceId = uint64_t;

// A sequence takes a slot. Its tokens stay there until it is retired.
struct Admission {
  SequenceId id = 0;
  int32_t slot = 0;
  int32_t group = 0;           // its pipeline group: it runs in steps of this group only
  int32_t max_new_tokens = 0;  // ends after so many
  int32_t forced_length = 0;   // synthetic data: acts as the end of sequence; 0: none
  bool ignore_eos = false;     // forced_length > 0 implies it
  bool stream_tokens = false;  // report each token as it is sampled
  bool want_logits = false;    // tests: report the logits of every position of its prompt
  std::vector<int32_t> prompt;
};

struct Chunk {
  int32_t slot = 0;
  int32_t start = 0;  // first position
  int32_t count = 0;  // positions
  bool last = false;  // sample at its last position, then decode
};

// Pages appended to a slot's page table: page_table[slot][first_index + i] = pages[i].
struct PageGrant {
  int32_t slot = 0;
  int32_t first_index = 0;
  std::vector<int32_t> pages;
};

// A slot belongs to one group for good (slot % groups) and is admitted in a plan of that group, but
// may be retired or suspended in a plan of any group. So sampled tokens may be stored whenever the
// next step of their group begins, before its plan is applied.
//
// Order of application: retired, suspended, admitted, grants; then the rows run: first the chunks
// as listed, then one row for every decoding slot of the group, by ascending slot.
struct StepPlan {
  uint64_t step = 0;  // counts from 0 for each replica, all groups together
  int32_t group = 0;
  bool stop = false;               // no rows; the worker loop ends
  bool tell_times = false;         // no rows, no result: each rank posts its RankTimes instead;
                                   // `step` is then the asking's number
  std::vector<int32_t> retired;    // slots; their pages and the slot are free again
  std::vector<int32_t> suspended;  // slots; their pages are free, the tokens stay
  std::vector<Admission> admitted;
  std::vector<PageGrant> grants;
  std::vector<Chunk> chunks;
};

struct FirstToken {
  SequenceId id = 0;
  int32_t token = 0;
};
struct StreamedToken {
  SequenceId id = 0;
  int32_t token = 0;
};
// The sequence ended at this step. `tokens` are all the new ones; the last one is an
// end-of-sequence id if that is what ended it.
struct Finished {
  SequenceId id = 0;
  bool by_eos = false;
  std::vector<int32_t> tokens;
};
struct LogitsBlock {  // tests only
  SequenceId id = 0;
  int32_t start = 0;  // position of the first row
  int32_t vocab = 0;
  std::vector<float> logits;  // [rows, vocab]
};

// Sent for every step, empty or not: it is what the leader counts steps in flight by.
struct StepResult {
  uint64_t step = 0;
  int32_t rows = 0;
  double seconds = 0;  // worker's time in this step, waits for plans not counted
  int32_t tokens = 0;  // new tokens of answers; what ended sequences sample is not counted
  std::vector<FirstToken> first;
  std::vector<StreamedToken> streamed;
  std::vector<Finished> finished;
  std::vector<LogitsBlock> logits;
};

// Where the time of one rank's worker went since the last asking: from the plan of its first step
// to the end of its last one, on the host's clock. Seconds.
//
// A CPU rank (`split`) works on the thread that is timed, so that
//   seconds = compute + communication + stage_wait + plan_wait + host.
// A GPU works on its own: `device` is the time in which it had steps queued, `plan_wait` the time
// in which it had none, together `seconds`; `host` runs beside the two, and the rest is not known
// here.
struct RankTimes {
  uint64_t asking = 0;  // the number it answers
  int32_t rank = 0;
  bool split = false;
  uint64_t steps = 0;  // with rows
  double seconds = 0;
  double compute = 0;        // split: in the operations of steps
  double communication = 0;  // split: collectives, waits for their slowest rank included; sends
  double stage_wait = 0;     // split: waits for another stage's activations or sampled ids
  double plan_wait = 0;      // nothing queued, and no plan there
  double device = 0;         // not split
  double host = 0;           // plans applied, steps queued, results sent
  // Energy of what the rank computes on, by its own counter: a GPU, or all of a CPU rank's host.
  // kAnothers: a rank before this one counts the same device.
  enum class Meter : uint8_t { kAbsent, kCounted, kAnothers };
  Meter meter = Meter::kAbsent;
  double joules = 0;          // kCounted
  double joules_seconds = 0;  // kCounted: between its two readings, which lie around `seconds`
};

// Little-endian, length-prefixed. decode_* treat the bytes as untrusted and throw kInternal.
void encode(const StepPlan& plan, std::vector<std::byte>& out);      // clears out
void encode(const StepResult& result, std::vector<std::byte>& out);  // clears out
void encode(const RankTimes& times, std::vector<std::byte>& out);    // clears out
StepPlan decode_plan(std::span<const std::byte> bytes);
StepResult decode_result(std::span<const std::byte> bytes);
RankTimes decode_times(std::span<const std::byte> bytes);

}  // namespace drover

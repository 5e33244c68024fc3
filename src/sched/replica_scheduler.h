// The scheduler of one replica: its slots, groups and pages. Internal to the room; scheduler.h is
// the interface.
//
// Cost: plan() touches only what changes. A decoding sequence's position is not stored but follows
// from the steps of its group (base + group step); where it stands in its page is the same residue
// of the group step for as long as it decodes, so that the sequences that need a page at a step are
// exactly one bucket; where it reaches its limit is one entry in a heap.
#pragma once

#include <cstdint>
#include <queue>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sched/page_pool.h"
#include "sched/request_queue.h"
#include "sched/scheduler.h"
#include "sched/step.h"

namespace drover {

class ReplicaScheduler {
 public:
  explicit ReplicaScheduler(const ReplicaLimits& limits);

  void enqueue(QueuedRequest q);
  QueuedRequest give_away();  // a queued request that is not the next one
  const RequestQueue& queue() const { return queue_; }
  // How many more sequences could be taken up now, as far as slots go.
  int32_t room() const;

  bool plan(StepPlan& out);
  void complete(const StepResult& result);

  bool idle() const { return queue_.empty() && unfinished_.empty() && retired_.empty(); }
  int64_t outstanding_tokens() const { return outstanding_; }
  int32_t running() const { return static_cast<int32_t>(live_.size()); }
  int32_t free_pages() const { return pool_.free(); }
  const SchedulerCounters& counters() const { return counters_; }
  void reset_counters() { counters_ = {}; }

 private:
  // Sequences are senior by admission (kDeadline: by deadline first). The most senior one always
  // gets what it needs, from juniors if need be: that is why something always progresses.
  using Seniority = std::pair<double, uint64_t>;
  using Ranked = std::pair<Seniority, int32_t>;  // and the slot

  enum class State : uint8_t {
    kFree,
    kPrefill,    // has chunks to run: of its prompt, or of all its tokens when recomputing
    kSuspended,  // as kPrefill, but holds no pages and waits at the front of the queue for them
    kDecoding,   // one row in every step of its group
  };

  struct Slot {
    SequenceId id = 0;
    State state = State::kFree;
    int32_t group = 0;
    int32_t prompt = 0;
    int32_t max_new = 0;
    Seniority seniority;
    int32_t next = 0;       // prefill: the first position not planned yet
    int32_t target = 0;     // prefill: positions to run until it decodes
    int32_t high = 0;       // positions ever planned (kDecoding: position() counts)
    int32_t reserved = 0;   // prefill: pages counted in reserved_ but not taken yet
    int64_t base = 0;       // decoding: position of its row in group step k is base + k
    uint32_t epoch = 0;     // changes whenever it stops decoding: outdates heap entries
    int32_t bucket = 0;     // decoding: group steps (modulo page_tokens) that begin a page
    int32_t bucket_at = 0;  // its place there
    std::vector<int32_t> pages;

    int32_t last_position() const { return prompt + max_new - 2; }  // of the last useful row
  };

  struct LimitEvent {
    int64_t step;  // of the group: its last useful row runs there
    int32_t slot;
    uint32_t epoch;
    bool operator>(const LimitEvent& o) const { return step > o.step; }
  };

  struct Group {
    int64_t step = 0;  // index of the group step that is planned next
    int32_t cap = 0;   // sequences at most
    int32_t live = 0;
    int32_t decoding = 0;
    std::vector<int32_t> free_slots;
    std::vector<int32_t> prefill;               // kPrefill and kSuspended, senior first
    std::vector<std::vector<int32_t>> buckets;  // [page_tokens] of decoding slots
    std::priority_queue<LimitEvent, std::vector<LimitEvent>, std::greater<>> limits;
  };

  bool build(int32_t g, StepPlan& out);
  void make_room(int32_t g, StepPlan& out);
  int32_t senior_need(const Group& group, int32_t g) const;
  void grant_decoding(Group& group, StepPlan& out);
  bool add_chunk(Group& group, int32_t slot, int32_t& budget, StepPlan& out);
  bool may_run(int32_t slot);
  void admit_from_queue(int32_t g, int32_t& budget, StepPlan& out);
  bool can_admit(const Group& group) const;
  bool enough_pages() const;
  int32_t admit(int32_t g, StepPlan& out);
  void line_up(Group& group, int32_t slot);
  void start_decoding(Group& group, int32_t slot);
  void stop_decoding(Group& group, int32_t slot);
  void suspend_most_junior(StepPlan& out);
  void suspend(int32_t slot, StepPlan& out);
  void retire(int32_t slot);
  void finish_step(Group& group, int32_t decode_rows);
  void grant(int32_t slot, int32_t count, StepPlan& out);

  int32_t pages_for(int64_t positions) const {
    return static_cast<int32_t>((positions + limits_.page_tokens - 1) / limits_.page_tokens);
  }
  int32_t position(const Slot& s) const {  // of its next row
    return static_cast<int32_t>(s.base + groups_[static_cast<size_t>(s.group)].step);
  }
  int32_t most_senior() const { return live_.empty() ? -1 : live_.begin()->second; }
  // Pages left alone at admission, so that those who decode do not run dry at once.
  int32_t watermark() const { return (static_cast<int32_t>(live_.size()) + 3) / 4; }

  ReplicaLimits limits_;
  PagePool pool_;
  RequestQueue queue_;
  std::vector<Slot> slots_;
  std::vector<Group> groups_;
  std::set<Ranked> live_;                               // all admitted and not retired
  std::set<Ranked> suspended_;                          // of these, the kSuspended ones
  std::unordered_map<SequenceId, int32_t> unfinished_;  // slot, or -1: retired, result to come
  std::vector<int32_t> retired_;                        // to be told in the next plan
  std::vector<std::vector<int32_t>> spare_;  // of the grants of earlier plans: saves allocations
  int64_t reserved_ = 0;                     // pages that prefilling sequences still need
  int64_t outstanding_ = 0;
  int64_t chunk_rows_ = 0;  // of the plan being made
  int64_t new_rows_ = 0;    // of these, not recomputed
  int32_t batch_left_ = 0;  // kStatic: admissions left in this batch
  int32_t next_group_ = 0;
  uint64_t admissions_ = 0;
  uint64_t planned_ = 0;
  uint64_t answered_ = 0;
  SchedulerCounters counters_;
};

}  // namespace drover

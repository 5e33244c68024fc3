#include "sched/replica_scheduler.h"

#include <algorithm>

namespace drover {

ReplicaScheduler::ReplicaScheduler(const ReplicaLimits& limits)
    : limits_(limits),
      pool_(limits.pages),
      slots_(static_cast<size_t>(limits.slots)),
      groups_(static_cast<size_t>(limits.groups)) {
  // A slot belongs to one group for good. So a slot is only taken again in a plan of the group that
  // its last tokens come back to: workers need no bookkeeping of tokens still on their way.
  for (int32_t s = limits.slots; s-- > 0;) {
    slots_[static_cast<size_t>(s)].group = s % limits.groups;
    groups_[static_cast<size_t>(s % limits.groups)].free_slots.push_back(s);
  }
  for (Group& group : groups_) {
    group.cap = std::min(static_cast<int32_t>(group.free_slots.size()), limits.step_tokens);
    group.buckets.resize(static_cast<size_t>(limits.page_tokens));
  }
  unfinished_.reserve(2 * slots_.size());
}

void ReplicaScheduler::enqueue(QueuedRequest q) {
  outstanding_ += q.tokens();
  queue_.push(std::move(q));
}

QueuedRequest ReplicaScheduler::give_away() {
  QueuedRequest q = queue_.pop_leaf();
  outstanding_ -= q.tokens();
  return q;
}

int32_t ReplicaScheduler::room() const {
  const int32_t live = static_cast<int32_t>(live_.size());
  if (limits_.batching == Batching::kStatic && live > 0) return 0;
  int32_t cap = 0;
  for (const Group& group : groups_) cap += group.cap;
  return cap - live;
}

bool ReplicaScheduler::plan(StepPlan& out) {
  out.retired.clear();
  out.suspended.clear();
  out.admitted.clear();
  for (PageGrant& g : out.grants) {  // they may be another replica's: keep no more than are of use
    if (spare_.size() < slots_.size()) spare_.push_back(std::move(g.pages));
  }
  out.grants.clear();
  out.chunks.clear();
  out.stop = false;
  out.retired.swap(retired_);

  const int32_t groups = limits_.groups;
  bool rows = false;
  out.group = next_group_;
  for (int32_t i = 0; i < groups && !rows; ++i) {
    const int32_t g = (next_group_ + i) % groups;
    rows = build(g, out);
    if (rows) out.group = g;
  }
  DROVER_CHECK(rows || live_.empty(), ExitCode::kInternal,
               "{} sequences are running but none can go on: {} of {} pages free, {} suspended",
               live_.size(), pool_.free(), limits_.pages, suspended_.size());
  if (!rows && out.retired.empty() && out.suspended.empty()) return false;
  if (rows) next_group_ = (out.group + 1) % groups;
  out.step = planned_++;
  ++counters_.steps;
  return true;
}

// Fills in the rows of a step of group g. False: it has none (then `out` tells of suspensions at
// most, which are not the group's but the replica's).
bool ReplicaScheduler::build(int32_t g, StepPlan& out) {
  Group& group = groups_[static_cast<size_t>(g)];
  chunk_rows_ = new_rows_ = 0;
  make_room(g, out);  // all suspensions happen here, before anything is granted
  const int32_t decode_rows = group.decoding;
  grant_decoding(group, out);

  int32_t budget = limits_.step_tokens - decode_rows;
  size_t kept = 0;
  for (size_t i = 0; i < group.prefill.size(); ++i) {
    const int32_t slot = group.prefill[i];
    if (!add_chunk(group, slot, budget, out)) group.prefill[kept++] = slot;
  }
  group.prefill.resize(kept);
  admit_from_queue(g, budget, out);
  if (decode_rows + chunk_rows_ == 0) return false;
  finish_step(group, decode_rows);
  return true;
}

// The group's decoding sequences that begin a page in this step get one each, and the most senior
// sequence the pages of its chunk; whoever is most junior gives pages up for them.
void ReplicaScheduler::make_room(int32_t g, StepPlan& out) {
  Group& group = groups_[static_cast<size_t>(g)];
  const auto& bucket = group.buckets[static_cast<size_t>(group.step % limits_.page_tokens)];
  while (static_cast<int32_t>(bucket.size()) + senior_need(group, g) > pool_.free()) {
    suspend_most_junior(out);
  }
}

int32_t ReplicaScheduler::senior_need(const Group& group, int32_t g) const {
  const int32_t slot = most_senior();
  if (slot < 0) return 0;
  const Slot& s = slots_[static_cast<size_t>(slot)];
  if (s.group != g || s.state == State::kDecoding) return 0;
  const int32_t count =
      std::min({limits_.chunk_tokens, s.target - s.next, limits_.step_tokens - group.decoding});
  return pages_for(s.next + count) - static_cast<int32_t>(s.pages.size());
}

void ReplicaScheduler::grant_decoding(Group& group, StepPlan& out) {
  for (int32_t slot : group.buckets[static_cast<size_t>(group.step % limits_.page_tokens)]) {
    grant(slot, 1, out);
  }
}

void ReplicaScheduler::grant(int32_t slot, int32_t count, StepPlan& out) {
  Slot& s = slots_[static_cast<size_t>(slot)];
  PageGrant& grant = out.grants.emplace_back();
  grant.slot = slot;
  grant.first_index = static_cast<int32_t>(s.pages.size());
  if (!spare_.empty()) {
    grant.pages = std::move(spare_.back());
    spare_.pop_back();
  }
  grant.pages.resize(static_cast<size_t>(count));
  for (int32_t& page : grant.pages) {
    page = pool_.take();
    s.pages.push_back(page);
  }
}

// May this waiting sequence run a chunk? A suspended one comes back when all its pages are there
// (or at once when it is the most senior), one after the other.
bool ReplicaScheduler::may_run(int32_t slot) {
  Slot& s = slots_[static_cast<size_t>(slot)];
  if (s.state == State::kPrefill) return true;
  const int32_t need = pages_for(s.target);
  const bool first = suspended_.begin()->second == slot;
  const bool fits = pool_.free() - reserved_ >= need + watermark();
  if (slot != most_senior() && !(first && fits)) return false;
  suspended_.erase({s.seniority, slot});
  s.state = State::kPrefill;
  s.reserved = need;
  reserved_ += need;
  return true;
}

// True when the slot is done with its chunks and decodes from the group's next step on.
bool ReplicaScheduler::add_chunk(Group& group, int32_t slot, int32_t& budget, StepPlan& out) {
  if (budget <= 0 || !may_run(slot)) return false;
  Slot& s = slots_[static_cast<size_t>(slot)];
  const int32_t held = static_cast<int32_t>(s.pages.size());
  const int64_t covered = (int64_t{held} + pool_.free()) * limits_.page_tokens - s.next;
  const int32_t wanted = std::min({limits_.chunk_tokens, s.target - s.next, budget});
  const int32_t count = static_cast<int32_t>(std::min<int64_t>(wanted, covered));
  if (count <= 0) return false;

  const int32_t end = s.next + count;
  if (const int32_t need = pages_for(end) - held; need > 0) {
    grant(slot, need, out);
    s.reserved -= need;
    reserved_ -= need;
  }
  out.chunks.push_back({slot, s.next, count, end == s.target});
  budget -= count;
  chunk_rows_ += count;
  new_rows_ += std::max(0, end - std::max(s.high, s.next));
  s.next = end;
  s.high = std::max(s.high, end);
  if (end < s.target) return false;
  start_decoding(group, slot);
  return true;
}

void ReplicaScheduler::admit_from_queue(int32_t g, int32_t& budget, StepPlan& out) {
  Group& group = groups_[static_cast<size_t>(g)];
  const bool fixed = limits_.batching == Batching::kStatic;
  if (fixed && live_.empty()) {
    batch_left_ = std::min(room(), static_cast<int32_t>(queue_.size()));
  }
  // Continuous: nobody takes a slot before a row of it can run (it may still be given away).
  while (!queue_.empty() && (fixed ? batch_left_ > 0 : budget > 0)) {
    if (!enough_pages()) {
      batch_left_ = 0;  // kStatic: the batch is what fitted
      break;
    }
    if (!can_admit(group)) break;
    const int32_t slot = admit(g, out);
    if (fixed) --batch_left_;
    if (!add_chunk(group, slot, budget, out)) {
      line_up(group, slot);
    }
  }
}

// Takes its place among those of the group that have chunks to run.
void ReplicaScheduler::line_up(Group& group, int32_t slot) {
  const auto senior = [this](int32_t a, int32_t b) {
    return slots_[static_cast<size_t>(a)].seniority < slots_[static_cast<size_t>(b)].seniority;
  };
  auto& line = group.prefill;
  line.insert(std::upper_bound(line.begin(), line.end(), slot, senior), slot);
}

bool ReplicaScheduler::enough_pages() const {
  const int64_t need = pages_for(static_cast<int64_t>(queue_.next().request->prompt.size()));
  return pool_.free() - reserved_ >= need + watermark();
}

bool ReplicaScheduler::can_admit(const Group& group) const {
  if (!suspended_.empty() || group.live >= group.cap) return false;
  const int64_t need = pages_for(static_cast<int64_t>(queue_.next().request->prompt.size()));
  const int64_t free = pool_.free() - reserved_;
  // An equal share for every group, of what runs and of what the pages could still take up.
  const int64_t live = static_cast<int64_t>(live_.size());
  const int64_t more = std::min(static_cast<int64_t>(queue_.size()), free / need);
  return group.live < (live + more + limits_.groups - 1) / limits_.groups;
}

int32_t ReplicaScheduler::admit(int32_t g, StepPlan& out) {
  Group& group = groups_[static_cast<size_t>(g)];
  const int32_t slot = group.free_slots.back();
  group.free_slots.pop_back();
  QueuedRequest queued = queue_.pop();
  Request& r = *queued.request;
  Slot& s = slots_[static_cast<size_t>(slot)];
  s.id = r.id;
  s.state = State::kPrefill;
  s.prompt = s.target = static_cast<int32_t>(r.prompt.size());
  s.max_new = r.max_new_tokens;
  const bool by_deadline = limits_.order == QueueOrder::kDeadline;
  s.seniority = {by_deadline ? r.deadline : 0.0, admissions_++};
  s.next = s.high = 0;
  s.reserved = pages_for(s.prompt);
  reserved_ += s.reserved;
  live_.emplace_hint(live_.end(), s.seniority, slot);
  const bool fresh = unfinished_.emplace(s.id, slot).second;
  DROVER_CHECK(fresh, ExitCode::kInternal, "sequence id {} was submitted twice", s.id);
  ++group.live;
  ++counters_.admitted;
  out.admitted.push_back({r.id, slot, g, r.max_new_tokens, r.forced_length, r.ignore_eos,
                          r.stream_tokens, r.want_logits, std::move(r.prompt)});
  return slot;
}

// From the group's next step on.
void ReplicaScheduler::start_decoding(Group& group, int32_t slot) {
  Slot& s = slots_[static_cast<size_t>(slot)];
  s.state = State::kDecoding;
  s.base = s.target - (group.step + 1);
  const int64_t page = limits_.page_tokens;
  s.bucket = static_cast<int32_t>(((-s.base) % page + page) % page);
  auto& bucket = group.buckets[static_cast<size_t>(s.bucket)];
  s.bucket_at = static_cast<int32_t>(bucket.size());
  bucket.push_back(slot);
  ++group.decoding;
  group.limits.push({s.last_position() - s.base, slot, s.epoch});
}

void ReplicaScheduler::stop_decoding(Group& group, int32_t slot) {
  Slot& s = slots_[static_cast<size_t>(slot)];
  s.high = position(s);
  ++s.epoch;
  auto& bucket = group.buckets[static_cast<size_t>(s.bucket)];
  slots_[static_cast<size_t>(bucket.back())].bucket_at = s.bucket_at;
  bucket[static_cast<size_t>(s.bucket_at)] = bucket.back();
  bucket.pop_back();
  --group.decoding;
}

void ReplicaScheduler::suspend_most_junior(StepPlan& out) {
  for (auto it = live_.rbegin(); it != live_.rend(); ++it) {
    if (slots_[static_cast<size_t>(it->second)].pages.empty()) continue;
    DROVER_CHECK(it->second != most_senior(), ExitCode::kInternal,
                 "the most senior sequence {} does not fit into the pool of {} pages",
                 slots_[static_cast<size_t>(it->second)].id, limits_.pages);
    return suspend(it->second, out);
  }
  DROVER_FAIL(ExitCode::kInternal, "no pages left, and nobody has any (pool of {})", limits_.pages);
}

void ReplicaScheduler::suspend(int32_t slot, StepPlan& out) {
  Slot& s = slots_[static_cast<size_t>(slot)];
  Group& group = groups_[static_cast<size_t>(s.group)];
  if (s.state == State::kDecoding) {
    stop_decoding(group, slot);
    s.target = s.high + 1;  // its newest token was sampled by the row before
    line_up(group, slot);
  }
  reserved_ -= s.reserved;
  s.reserved = 0;
  s.next = 0;
  s.state = State::kSuspended;
  suspended_.emplace(s.seniority, slot);
  pool_.give_back(s.pages);
  out.suspended.push_back(slot);
  ++counters_.preemptions;
}

// Frees the slot and its pages: the next plan tells so before it uses them again.
void ReplicaScheduler::retire(int32_t slot) {
  Slot& s = slots_[static_cast<size_t>(slot)];
  Group& group = groups_[static_cast<size_t>(s.group)];
  if (s.state == State::kDecoding) {
    stop_decoding(group, slot);
  } else {
    group.prefill.erase(std::find(group.prefill.begin(), group.prefill.end(), slot));
    if (s.state == State::kSuspended) suspended_.erase({s.seniority, slot});
  }
  outstanding_ -= int64_t{s.prompt} + s.max_new - s.high;
  reserved_ -= s.reserved;
  s.reserved = 0;
  pool_.give_back(s.pages);
  live_.erase({s.seniority, slot});
  s.state = State::kFree;
  --group.live;
  group.free_slots.push_back(slot);
  retired_.push_back(slot);
}

void ReplicaScheduler::finish_step(Group& group, int32_t decode_rows) {
  counters_.peak_running = std::max(counters_.peak_running, static_cast<int32_t>(live_.size()));
  counters_.decode_rows += static_cast<uint64_t>(decode_rows);
  counters_.prefill_rows += static_cast<uint64_t>(chunk_rows_);
  counters_.plan_rows += static_cast<uint64_t>(decode_rows + chunk_rows_);
  counters_.recomputed_rows += static_cast<uint64_t>(chunk_rows_ - new_rows_);
  counters_.peak_pages = std::max(counters_.peak_pages, pool_.used());
  outstanding_ -= decode_rows + new_rows_;
  ++group.step;
  while (!group.limits.empty() && group.limits.top().step < group.step) {
    const LimitEvent event = group.limits.top();
    group.limits.pop();
    Slot& s = slots_[static_cast<size_t>(event.slot)];
    if (s.state != State::kDecoding || s.epoch != event.epoch) continue;
    unfinished_[s.id] = -1;
    retire(event.slot);
  }
}

void ReplicaScheduler::complete(const StepResult& result) {
  DROVER_CHECK(result.step == answered_ && answered_ < planned_, ExitCode::kInternal,
               "result of step {}, expected that of step {} ({} planned)", result.step, answered_,
               planned_);
  ++answered_;
  for (const Finished& f : result.finished) {
    const auto it = unfinished_.find(f.id);
    DROVER_CHECK(it != unfinished_.end(), ExitCode::kInternal,
                 "step {}: sequence {} finished, but it is not running", result.step, f.id);
    if (it->second >= 0) retire(it->second);
    unfinished_.erase(it);
    ++counters_.finished;
  }
}

}  // namespace drover

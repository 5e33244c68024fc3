#include "sched/scheduler.h"

#include <algorithm>
#include <utility>

#include "sched/replica_scheduler.h"

namespace drover {

struct Scheduler::Replica {
  explicit Replica(const ReplicaLimits& limits) : scheduler(limits) {}
  ReplicaScheduler scheduler;
};

Scheduler::Scheduler(int replicas, const ReplicaLimits& limits) : limits_(limits) {
  const auto positive = [](int64_t value, const char* name) {
    DROVER_CHECK(value >= 1, ExitCode::kUsage, "{} is {}, must be at least 1", name, value);
  };
  positive(replicas, "the number of replicas");
  positive(limits.slots, "the number of sequences at once");
  positive(limits.pages, "the number of KV pages");
  positive(limits.page_tokens, "the number of tokens a page");
  positive(limits.max_positions, "the number of positions");
  positive(limits.groups, "the number of groups");
  positive(limits.step_tokens, "the number of rows a step");
  positive(limits.chunk_tokens, "the number of rows a chunk");
  for (int r = 0; r < replicas; ++r) replicas_.push_back(std::make_unique<Replica>(limits));
  load_.resize(static_cast<size_t>(replicas));
}

Scheduler::~Scheduler() = default;

std::optional<std::string> Scheduler::refuse(const Request& r) const {
  if (r.prompt.empty()) return "the prompt is empty: it needs at least one token";
  if (r.max_new_tokens < 1) {
    return fmt::format("{} new tokens were asked for: ask for at least 1", r.max_new_tokens);
  }
  const int64_t prompt = static_cast<int64_t>(r.prompt.size());
  const int64_t total = prompt + r.max_new_tokens;
  if (total > limits_.max_positions) {
    return fmt::format(
        "prompt of {} tokens + {} new ones is {} positions, the model has {}: shorten the prompt "
        "or ask for at most {} new tokens",
        prompt, r.max_new_tokens, total, limits_.max_positions,
        std::max<int64_t>(0, limits_.max_positions - prompt));
  }
  // The last new token is never run.
  const int64_t pages = (total - 1 + limits_.page_tokens - 1) / limits_.page_tokens;
  if (pages > limits_.pages) {
    return fmt::format(
        "prompt of {} tokens + {} new ones needs {} pages, the pool has {}: raise --kv-memory",
        prompt, r.max_new_tokens, pages, limits_.pages);
  }
  return std::nullopt;
}

void Scheduler::submit(Request r) {
  if (const auto why = refuse(r)) DROVER_FAIL(ExitCode::kUsage, "request {}: {}", r.id, *why);
  size_t best = 0;
  for (size_t i = 1; i < load_.size(); ++i) {
    if (load_[i].outstanding > load_[best].outstanding) continue;
    if (load_[i].outstanding < load_[best].outstanding ||
        replicas_[i]->scheduler.free_pages() > replicas_[best]->scheduler.free_pages()) {
      best = i;
    }
  }
  replicas_[best]->scheduler.enqueue(make_queued(limits_.order, arrivals_++, std::move(r)));
  note(best);
}

// Keeps what placement and stealing look at side by side, so that they need not visit the replicas.
void Scheduler::note(size_t replica) {
  const ReplicaScheduler& s = replicas_[replica]->scheduler;
  Load& load = load_[replica];
  queued_ += static_cast<int64_t>(s.queue().size()) - load.queued;
  busy_ += static_cast<int>(!s.idle()) - static_cast<int>(load.busy);
  load = {s.outstanding_tokens(), static_cast<int64_t>(s.queue().size()), !s.idle()};
}

void Scheduler::steal(size_t thief) {
  ReplicaScheduler& to = replicas_[thief]->scheduler;
  int32_t room = to.room();
  if (room <= 0) return;
  size_t fullest = thief;
  for (size_t i = 0; i < load_.size(); ++i) {
    if (load_[i].queued == 0) continue;
    if (fullest == thief || load_[i].outstanding > load_[fullest].outstanding) fullest = i;
  }
  if (fullest == thief) return;
  ReplicaScheduler& from = replicas_[fullest]->scheduler;
  // Only while that makes the two more alike: else requests would wander to and fro.
  while (room-- > 0 && !from.queue().empty() &&
         from.outstanding_tokens() - to.outstanding_tokens() > from.queue().leaf().tokens()) {
    to.enqueue(from.give_away());
  }
  note(fullest);
}

bool Scheduler::plan(int replica, StepPlan& out) {
  const size_t r = static_cast<size_t>(replica);
  if (queued_ > 0 && load_[r].queued == 0) steal(r);
  const bool any = replicas_[r]->scheduler.plan(out);
  note(r);
  return any;
}

void Scheduler::complete(int replica, const StepResult& result) {
  const size_t r = static_cast<size_t>(replica);
  replicas_[r]->scheduler.complete(result);
  note(r);
}

size_t Scheduler::drop_queued() {
  size_t dropped = 0;
  for (size_t r = 0; r < replicas_.size(); ++r) {
    for (; !replicas_[r]->scheduler.queue().empty(); ++dropped) {
      replicas_[r]->scheduler.give_away();
    }
    note(r);
  }
  return dropped;
}

bool Scheduler::idle() const { return busy_ == 0; }
bool Scheduler::idle(int replica) const {
  return replicas_[static_cast<size_t>(replica)]->scheduler.idle();
}
int64_t Scheduler::outstanding_tokens(int replica) const {
  return replicas_[static_cast<size_t>(replica)]->scheduler.outstanding_tokens();
}
int32_t Scheduler::free_pages(int replica) const {
  return replicas_[static_cast<size_t>(replica)]->scheduler.free_pages();
}
int32_t Scheduler::running(int replica) const {
  return replicas_[static_cast<size_t>(replica)]->scheduler.running();
}
SchedulerCounters Scheduler::counters() const {
  SchedulerCounters sum;
  for (const auto& r : replicas_) {
    const SchedulerCounters& c = r->scheduler.counters();
    sum.steps += c.steps;
    sum.plan_rows += c.plan_rows;
    sum.prefill_rows += c.prefill_rows;
    sum.decode_rows += c.decode_rows;
    sum.recomputed_rows += c.recomputed_rows;
    sum.preemptions += c.preemptions;
    sum.admitted += c.admitted;
    sum.finished += c.finished;
    sum.peak_running = std::max(sum.peak_running, c.peak_running);
    sum.peak_pages = std::max(sum.peak_pages, c.peak_pages);
  }
  return sum;
}
void Scheduler::reset_counters() {
  for (auto& r : replicas_) r->scheduler.reset_counters();
}

const SchedulerCounters& Scheduler::counters(int replica) const {
  return replicas_[static_cast<size_t>(replica)]->scheduler.counters();
}

}  // namespace drover

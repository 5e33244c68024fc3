#include "serve/leader.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "base/log.h"
#include "base/trace.h"
#include "comm/world.h"

namespace drover {

namespace {

// Plans of a replica that may be unanswered: one for each group of sequences, and one ahead.
int32_t steps_in_flight(const ReplicaLimits& limits) { return limits.groups + 1; }

constexpr double kTimesSeconds = 10;  // that the ranks have to tell their times

double seconds_now() {
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

enum class Winding : uint8_t { kNo, kDropQueued, kDropAll };

struct InFlight {
  uint64_t step = 0;
  Deadline deadline;
};

}  // namespace

struct Leader::Impl {
  Impl(Mailbox& m, const Grid& g, const ReplicaLimits& l, Interrupt& i, double seconds)
      : mailbox(m),
        grid(g),
        limits(l),
        interrupt(i),
        step_seconds(seconds),
        scheduler(g.dp, l),
        in_flight(static_cast<size_t>(g.dp)),
        running(static_cast<size_t>(g.dp)) {
    thread = std::thread([this] { run(); });
  }

  void run() {
    trace::name_thread("leader");
    try {
      std::chrono::microseconds pause{20};
      while (!stopping) {
        int moved = take_arrivals();
        moved += send_plans();
        moved += take_results();
        if (moved > 0) {
          pause = std::chrono::microseconds{20};
          continue;
        }
        interrupt.check();
        check_deadlines();
        if (unanswered == 0) {
          wait_for_arrivals();
          if (asked) ask_for_times();
        } else {
          std::this_thread::sleep_for(pause);
          pause = std::min(pause * 2, std::chrono::microseconds{160});
        }
      }
      for (int r = 0; r < grid.dp; ++r) send_stop(r);
    } catch (const Error& e) {
      interrupt.raise(e.code(), e.what());
    } catch (const std::exception& e) {
      interrupt.raise(ExitCode::kInternal, fmt::format("leader: {}", e.what()));
    }
    const std::lock_guard lock(mutex);
    ended = true;
    changed.notify_all();
  }

  int take_arrivals() {
    std::vector<Request> taken;
    {
      const std::lock_guard lock(mutex);
      taken.swap(arrivals);
    }
    if (winding != Winding::kNo) {
      scheduler.drop_queued();
      return 0;
    }
    for (auto& r : taken) scheduler.submit(std::move(r));
    return static_cast<int>(taken.size());
  }

  int send_plans() {
    int sent = 0;
    if (winding == Winding::kDropAll) return 0;
    for (int r = 0; r < grid.dp; ++r) {
      auto& flight = in_flight[static_cast<size_t>(r)];
      while (static_cast<int32_t>(flight.size()) < steps_in_flight(limits) &&
             scheduler.plan(r, plan)) {
        const trace::Scope scope("send a plan", {"step", static_cast<int64_t>(plan.step)});
        encode(plan, bytes);
        mailbox.post(grid.first_rank(r), Mailbox::Channel::kPlan, bytes);
        flight.push_back({plan.step, deadline_in(step_seconds)});
        ++unanswered;
        ++sent;
        note_running(r, 0);
      }
    }
    return sent;
  }

  int take_results() {
    int taken = 0;
    int from = 0;
    while (mailbox.poll(Mailbox::Channel::kResult, bytes, &from)) {
      StepResult result = decode_result(bytes);
      const int r = grid.replica_of(from);
      auto& flight = in_flight[static_cast<size_t>(r)];
      DROVER_CHECK(!flight.empty() && flight.front().step == result.step, ExitCode::kInternal,
                   "replica {} answered step {}, which it was not asked for", r, result.step);
      flight.pop_front();
      // A pipeline answers one after the other: the next step's time starts now.
      if (!flight.empty()) flight.front().deadline = deadline_in(step_seconds);
      scheduler.complete(r, result);
      note_running(r, result.tokens);
      deliver(result);
      --unanswered;
      ++taken;
    }
    return taken;
  }

  void note_running(int replica, int32_t tokens) {
    const double now = seconds_now();
    timeline.tokens(now, tokens);
    int32_t& mine = running[static_cast<size_t>(replica)];
    running_in_all += scheduler.running(replica) - mine;
    mine = scheduler.running(replica);
    timeline.running(now, running_in_all);
  }

  // While idle: a plan that carries no step asks each rank, which answers to rank 0.
  void ask_for_times() {
    StepPlan ask;
    ask.tell_times = true;
    ask.step = ++askings;
    for (int r = 0; r < grid.dp; ++r) {
      encode(ask, bytes);
      mailbox.post(grid.first_rank(r), Mailbox::Channel::kPlan, bytes);
    }
    const auto deadline = deadline_in(kTimesSeconds);
    std::vector<RankTimes> all;
    while (static_cast<int>(all.size()) < grid.ranks() && Clock::now() < deadline) {
      interrupt.check();
      if (!mailbox.poll(Mailbox::Channel::kTimes, bytes, nullptr)) {
        std::this_thread::sleep_for(std::chrono::microseconds{50});
        continue;
      }
      const RankTimes t = decode_times(bytes);
      if (t.asking == askings) all.push_back(t);  // else it was late for an earlier one
    }
    if (static_cast<int>(all.size()) < grid.ranks()) {
      log::warn("{} of {} ranks told within {:.0f} s where their time went: left out", all.size(),
                grid.ranks(), kTimesSeconds);
      all.clear();
    }
    std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.rank < b.rank; });
    const std::lock_guard lock(mutex);
    times = std::move(all);
    asked = false;
    changed.notify_all();
  }

  void deliver(StepResult& result) {
    if (events.step) events.step(result);
    for (const auto& t : result.first) {
      if (events.first_token) events.first_token(t);
    }
    for (const auto& t : result.streamed) {
      if (events.streamed) events.streamed(t);
    }
    for (auto& block : result.logits) {
      if (events.logits) events.logits(std::move(block));
    }
    for (auto& f : result.finished) {
      if (events.finished) events.finished(std::move(f));
    }
  }

  void check_deadlines() {
    const auto now = Clock::now();
    for (size_t r = 0; r < in_flight.size(); ++r) {
      if (in_flight[r].empty() || now < in_flight[r].front().deadline) continue;
      DROVER_FAIL(ExitCode::kLostPeer,
                  "replica {} (ranks {} to {}) did not answer step {} within {:.0f} s: raise "
                  "--step-seconds if its steps are that slow",
                  r, grid.first_rank(static_cast<int>(r)),
                  grid.first_rank(static_cast<int>(r)) + grid.replica_ranks() - 1,
                  in_flight[r].front().step, step_seconds);
    }
  }

  void wait_for_arrivals() {
    std::unique_lock lock(mutex);
    DROVER_CHECK(scheduler.idle() || !arrivals.empty() || winding != Winding::kNo,
                 ExitCode::kInternal, "the scheduler has work and plans none of it");
    // Wound down in this very turn: its next one drops what is queued.
    idle = arrivals.empty() && (scheduler.idle() || winding == Winding::kDropAll);
    if (idle) changed.notify_all();
    changed.wait_for(lock, std::chrono::milliseconds(20),
                     [this] { return !arrivals.empty() || stopping || asked; });
    if (!arrivals.empty()) idle = false;
  }

  void send_stop(int replica) {
    StepPlan stop;
    stop.stop = true;
    encode(stop, bytes);
    mailbox.post(grid.first_rank(replica), Mailbox::Channel::kPlan, bytes);
  }

  Mailbox& mailbox;
  Grid grid;
  ReplicaLimits limits;
  Interrupt& interrupt;
  double step_seconds;

  // The leader thread's own.
  Scheduler scheduler;
  std::vector<std::deque<InFlight>> in_flight;
  std::vector<int32_t> running;  // sequences of each replica
  int32_t running_in_all = 0;
  Timeline timeline;
  uint64_t askings = 0;
  int unanswered = 0;
  StepPlan plan;
  std::vector<std::byte> bytes;
  LeaderEvents events;  // set while idle

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Request> arrivals;  // guarded by mutex
  bool idle = true;               // guarded by mutex: nothing submitted is unfinished
  bool ended = false;             // guarded by mutex: the thread is over
  std::vector<RankTimes> times;   // guarded by mutex: what the last asking brought
  std::atomic<bool> asked{false};
  std::atomic<Winding> winding{Winding::kNo};
  std::atomic<bool> stopping{false};
  std::thread thread;  // last: it uses all of the above
};

Leader::Leader(Mailbox& mailbox, const Grid& grid, const ReplicaLimits& limits,
               Interrupt& interrupt, double step_seconds)
    : impl_(std::make_unique<Impl>(mailbox, grid, limits, interrupt, step_seconds)) {}

Leader::~Leader() { stop(); }

void Leader::listen(LeaderEvents events) {
  const std::lock_guard lock(impl_->mutex);
  impl_->events = std::move(events);
}

std::optional<std::string> Leader::refuse(const Request& request) const {
  return impl_->scheduler.refuse(request);
}

void Leader::submit(std::vector<Request> requests) {
  for (const auto& r : requests) {
    if (const auto why = refuse(r)) DROVER_FAIL(ExitCode::kUsage, "{}", *why);
  }
  const std::lock_guard lock(impl_->mutex);
  impl_->idle = false;
  impl_->arrivals.insert(impl_->arrivals.end(), std::make_move_iterator(requests.begin()),
                         std::make_move_iterator(requests.end()));
  impl_->changed.notify_all();
}

void Leader::drain() {
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait(lock, [this] { return impl_->idle || impl_->ended; });
  impl_->interrupt.check();
}

void Leader::wind_down(bool drop_running) {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->winding != Winding::kDropAll) {
    impl_->winding = drop_running ? Winding::kDropAll : Winding::kDropQueued;
  }
  impl_->changed.notify_all();
}

bool Leader::idle() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->idle || impl_->ended;
}

void Leader::stop() {
  if (!impl_->thread.joinable()) return;
  impl_->stopping = true;
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->changed.notify_all();
  }
  impl_->thread.join();
}

SchedulerCounters Leader::counters() const { return impl_->scheduler.counters(); }

Timeline Leader::timeline() const { return impl_->timeline; }

void Leader::reset_counters() {
  impl_->scheduler.reset_counters();
  impl_->timeline.clear();
}

std::vector<RankTimes> Leader::rank_times() {
  std::unique_lock lock(impl_->mutex);
  impl_->asked = true;
  impl_->changed.notify_all();
  impl_->changed.wait(lock, [this] { return !impl_->asked || impl_->ended; });
  impl_->interrupt.check();
  return std::move(impl_->times);
}

}  // namespace drover

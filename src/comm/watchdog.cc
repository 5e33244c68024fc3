#include "comm/watchdog.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <list>
#include <mutex>
#include <optional>
#include <thread>

#include "base/log.h"
#include "comm/mpi_check.h"

namespace drover {

namespace {

constexpr double kBeatSeconds = 0.5;
// A silent or stalled rank ends the run within 10 s: this, a beat, and what the ends below take.
constexpr double kSilenceSeconds = 7;
// Threads that wait in vain, or hang, are not waited for: from an interrupt until the process ends
// from here. Rank 0 has results to write first.
constexpr double kLastResortSeconds = 1.5;
constexpr double kLastResortRank0Seconds = 6;
// Launchers hand USR1 to every rank, not at the same moment: within this it is the same request.
constexpr double kSameRequestSeconds = 2;
// Silent for so long when the job is terminated: more likely the cause than the order to end.
constexpr double kSuspectSeconds = 1.5;

volatile std::sig_atomic_t g_signal = 0;
void on_signal(int number) { g_signal = number; }
volatile std::sig_atomic_t g_stops = 0;
void on_stop(int) { g_stops = g_stops + 1; }

// Taken by a watchdog's thread alone, and blocked on every other: the kernel writes a signal's
// frame below the stack pointer, which oneDNN's AVX2 products keep in a workspace on the heap.
sigset_t handled_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int number : {SIGTERM, SIGINT, SIGUSR1}) sigaddset(&set, number);
  return set;
}

struct Message {
  enum class Kind : int32_t { kBeat, kFailure, kLeave, kLeaveAgreed, kStop };
  Kind kind;
  int32_t code;
  uint64_t ticks;
  int32_t waiting;
  int32_t patience;
  char text[512];  // the phase, or the first cause
};

struct Loss {
  int peer;
  std::string what;
  bool sure = true;  // of rank 0: its verdict is not waited for
};

struct PeerState {
  Clock::time_point heard;
  Clock::time_point advanced;
  uint64_t ticks = 0;
  bool waiting = false;
  double patience = kSilenceSeconds;
  std::string phase = "start-up";
  bool leaving = false;
};

class MpiWatchdog final : public Watchdog {
 public:
  MpiWatchdog(MPI_Comm comm, const std::vector<Peer>& peers, Interrupt& interrupt,
              Progress& progress)
      : comm_(comm), peers_(peers), interrupt_(interrupt), progress_(progress) {
    DROVER_MPI(MPI_Comm_rank(comm_, &rank_));
    DROVER_MPI(MPI_Comm_size(comm_, &size_));
    states_.resize(static_cast<size_t>(rank_ == 0 ? size_ : 1));
    for (auto& s : states_) s.heard = s.advanced = Clock::now();
    thread_ = std::thread([this] { run(); });
  }

  FirstCause first_cause(double seconds) override {
    const auto deadline = deadline_in(seconds);
    while (rank_ != 0 && !leader_lost_ && Clock::now() < deadline) {
      {
        const std::lock_guard lock(mutex_);
        if (verdict_) return *verdict_;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return {interrupt_.code(), interrupt_.cause(), rank_ == 0};
  }

  ~MpiWatchdog() override {
    stop_ = true;
    thread_.join();
  }

  bool leave(double seconds) override {
    leaving_ = true;
    const auto deadline = deadline_in(seconds);
    while (!agreed_ && Clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return agreed_;
  }

 private:
  void run() {
    const sigset_t handled = handled_signals();
    pthread_sigmask(SIG_UNBLOCK, &handled, nullptr);
    try {
      while (!stop_) {
        turn();
        std::this_thread::sleep_for(std::chrono::milliseconds(leaving_ ? 2 : 20));
      }
      // What was said last should get out; a peer that is gone does not matter any more.
      for (int i = 0; i < 50 && !sends_.empty(); ++i) {
        reap();
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    } catch (const std::exception& e) {
      interrupt_.raise(ExitCode::kLostPeer,
                       fmt::format("rank {}: keep-alive: {}", rank_, e.what()));
    }
  }

  void turn() {
    notice_own_pause();
    reap();
    receive();
    watch_signals();
    watch_stops();
    if (interrupt_.raised()) {
      if (!told_) tell_failure();
      end_if_stuck();
    }
    if (Clock::now() >= next_beat_) {
      next_beat_ = deadline_in(kBeatSeconds);
      beat();
      if (!leaving_ && !interrupt_.raised()) watch_peers();
      if (!leaving_ && !interrupt_.raised()) watch_nccl();
    }
    if (leaving_ && !left_) announce_leave();
    if (rank_ == 0 && leaving_ && !agreed_) try_agreement();
  }

  // A process that was stopped heard nobody, and that is not the others' fault. True if it was
  // since this was last asked. A stop may fall anywhere in a turn: evidence against a peer is
  // gathered first, then this asked, and only then is the peer named.
  bool notice_own_pause() {
    const bool stopped = since(last_look_) > kSuspectSeconds;
    if (stopped) {
      paused_ = true;
      for (auto& s : states_) s.heard = s.advanced = Clock::now();
      next_beat_ = deadline_in(1);  // what the others said meanwhile comes first
    }
    last_look_ = Clock::now();
    return stopped;
  }

  void post(int peer, const Message& m) {
    sends_.push_back({m, MPI_REQUEST_NULL});
    auto& s = sends_.back();
    DROVER_MPI(MPI_Isend(&s.message, sizeof(Message), MPI_BYTE, peer, 0, comm_, &s.request));
  }
  void post_all(const Message& m) {
    for (int p = 0; p < size_; ++p) {
      if (p != rank_) post(p, m);
    }
  }
  void reap() {
    for (auto s = sends_.begin(); s != sends_.end();) {
      int done = 0;
      DROVER_MPI(MPI_Test(&s->request, &done, MPI_STATUS_IGNORE));
      s = done != 0 ? sends_.erase(s) : std::next(s);
    }
  }

  static Message make(Message::Kind kind, ExitCode code, const std::string& text) {
    Message m{};
    m.kind = kind;
    m.code = static_cast<int32_t>(code);
    std::strncpy(m.text, text.c_str(), sizeof(m.text) - 1);
    return m;
  }

  void beat() {
    Message m = make(Message::Kind::kBeat, ExitCode::kOk, progress_.phase.load());
    m.ticks = progress_.ticks.load(std::memory_order_relaxed);
    m.waiting = progress_.waiting.load(std::memory_order_relaxed) ? 1 : 0;
    m.patience = progress_.patience_seconds.load(std::memory_order_relaxed);
    if (rank_ != 0) return post(0, m);
    note_beat(0, m);
    post_all(m);
  }

  void note_beat(int from, const Message& m) {
    auto& s = states_[rank_ == 0 ? static_cast<size_t>(from) : 0];
    const auto now = Clock::now();
    s.heard = now;
    if (m.ticks != s.ticks || m.waiting != 0 || s.phase != m.text) s.advanced = now;
    s.ticks = m.ticks;
    s.waiting = m.waiting != 0;
    s.patience = std::max<double>(m.patience, kSilenceSeconds);
    s.phase = m.text;
  }

  void receive() {
    for (;;) {
      int there = 0;
      MPI_Message handle = MPI_MESSAGE_NULL;
      MPI_Status status;
      DROVER_MPI(MPI_Improbe(MPI_ANY_SOURCE, 0, comm_, &there, &handle, &status));
      if (there == 0) return;
      Message m{};
      DROVER_MPI(MPI_Mrecv(&m, sizeof(m), MPI_BYTE, &handle, &status));
      m.text[sizeof(m.text) - 1] = 0;
      switch (m.kind) {
        case Message::Kind::kBeat:
          note_beat(status.MPI_SOURCE, m);
          break;
        case Message::Kind::kFailure:
          take_failure({static_cast<ExitCode>(m.code), m.text, true});
          break;
        case Message::Kind::kLeave:
          if (rank_ == 0) states_[static_cast<size_t>(status.MPI_SOURCE)].leaving = true;
          break;
        case Message::Kind::kLeaveAgreed:
          agreed_ = true;
          break;
        case Message::Kind::kStop:
          if (rank_ == 0) take_stop(status.MPI_SOURCE);
          break;
      }
    }
  }

  // Rank 0 hears of failures and keeps the first; the others hear that one from it.
  void take_failure(FirstCause cause) {
    // A rank that lost a connection knows less than who sees that its peer is dead.
    if (rank_ == 0 && cause.code == ExitCode::kLostPeer) {
      const auto dead = dead_peer();
      notice_own_pause();
      if (dead && !paused_) lost(*dead);
    }
    interrupt_.raise(cause.code, cause.text);
    const std::lock_guard lock(mutex_);
    verdict_ = std::move(cause);
  }

  // An interrupt raised here goes to rank 0 (and from rank 0 to everybody), once.
  void tell_failure() {
    told_ = true;
    give_up_at_ = deadline_in(rank_ == 0 ? kLastResortRank0Seconds : kLastResortSeconds);
    const auto m = make(Message::Kind::kFailure, interrupt_.code(), interrupt_.cause());
    if (rank_ == 0) return post_all(m);
    post(0, m);
  }

  // Nobody came to leave(): a thread hangs, or is in a call that does not look at the interrupt.
  void end_if_stuck() {
    if (leaving_ || Clock::now() < give_up_at_) return;
    const FirstCause cause = first_cause(0);
    log::error("{} (exit code {}); this process ends with threads that did not: phase {}",
               cause.text, static_cast<int>(cause.code), progress_.phase.load());
    log::flush();
    std::_Exit(static_cast<int>(cause.code));
  }

  static double since(Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  }

  std::optional<Loss> lost_leader() const {
    if (dead_on_this_host(0)) return Loss{0, "died"};
    if (since(states_[0].heard) > kSilenceSeconds) {
      return Loss{0, fmt::format("has not been heard of for {:.0f} s", kSilenceSeconds)};
    }
    return std::nullopt;
  }

  std::optional<Loss> lost_peer() const {
    for (int p = 0; p < size_; ++p) {
      const auto& s = states_[static_cast<size_t>(p)];
      if (s.leaving) continue;
      if (p != 0 && dead_on_this_host(p)) {
        return Loss{p, fmt::format("died (phase: {})", s.phase)};
      }
      if (since(s.heard) > kSilenceSeconds) {
        return Loss{p, fmt::format("has not been heard of for {:.0f} s (phase: {})",
                                   kSilenceSeconds, s.phase)};
      }
      if (!s.waiting && since(s.advanced) > s.patience) {
        return Loss{
            p, fmt::format("hangs: no progress for {:.0f} s (phase: {})", s.patience, s.phase)};
      }
    }
    return std::nullopt;
  }

  void watch_peers() {
    const auto loss = rank_ == 0 ? lost_peer() : lost_leader();
    if (loss && !notice_own_pause()) lost(*loss);
  }

  // What NCCL's own threads met is seen by nobody who waits for the GPU.
  void watch_nccl() {
    const std::string error = nccl_async_error();
    if (!error.empty()) {
      interrupt_.raise(ExitCode::kLostPeer, fmt::format("rank {}: {}", rank_, error));
    }
  }

  bool dead_on_this_host(int peer) const {
    const auto& p = peers_[static_cast<size_t>(peer)];
    const auto& own = peers_[static_cast<size_t>(rank_)];
    if (p.host != own.host || p.pid_namespace != own.pid_namespace || p.pid_namespace == 0) {
      return false;
    }
    if (kill(static_cast<pid_t>(p.pid), 0) != 0) return errno == ESRCH;
    // Dead, but not yet waited for by mpirun: state Z, behind the name in parentheses.
    std::ifstream in(fmt::format("/proc/{}/stat", p.pid));
    std::string line;
    std::getline(in, line);
    const size_t name_end = line.rfind(')');
    return name_end != std::string::npos && name_end + 2 < line.size() && line[name_end + 2] == 'Z';
  }

  std::optional<Loss> dead_peer() const {
    for (int p = 0; p < size_; ++p) {
      if (p != rank_ && dead_on_this_host(p)) return Loss{p, "died"};
    }
    return std::nullopt;
  }

  std::optional<Loss> silent_peer() const {
    for (size_t p = 0; p < states_.size(); ++p) {
      const double silent = since(states_[p].heard);
      if (static_cast<int>(p) == rank_ || silent < kSuspectSeconds || states_[p].leaving) continue;
      return Loss{
          static_cast<int>(p),
          fmt::format("died or hangs: silent for {:.0f} s when the job was terminated", silent),
          false};
    }
    return std::nullopt;
  }

  void lost(const Loss& loss) {
    if (loss.peer == 0 && loss.sure) leader_lost_ = true;
    interrupt_.raise(ExitCode::kLostPeer,
                     fmt::format("rank {} on {} {}", loss.peer,
                                 peers_[static_cast<size_t>(loss.peer)].host, loss.what));
  }

  void watch_signals() {
    if (g_signal == 0 || interrupt_.raised()) return;
    if (g_signal == SIGINT) {
      interrupt_.raise(ExitCode::kEnvironment, "interrupted (SIGINT)");
      return;
    }
    // mpirun terminates everybody when a rank dies: name the dead one if it was on this host.
    auto loss = paused_ ? std::nullopt : dead_peer();
    if (!loss) loss = silent_peer();
    if (notice_own_pause()) return;  // the next turn hears first what the others said meanwhile
    if (loss) return lost(*loss);
    interrupt_.raise(ExitCode::kLostPeer,
                     "terminated (SIGTERM): a rank was lost, or the job was cancelled");
  }

  // USR1, on whichever rank it comes: rank 0 decides, for it knows of a safe point.
  void watch_stops() {
    const std::sig_atomic_t seen = g_stops;
    if (seen == stops_seen_ || interrupt_.raised()) return;
    stops_seen_ = seen;
    if (rank_ == 0) return take_stop(0);
    post(0, make(Message::Kind::kStop, ExitCode::kOk, ""));
  }

  void take_stop(int from) {
    const std::string by = fmt::format("asked to stop (SIGUSR1 to rank {})", from);
    if (!stop_taken_) {
      stop_taken_ = Clock::now();
      if (interrupt_.ask_to_stop(by)) {
        log::warn("{}: ending at a safe point; a second SIGUSR1 ends at once", by);
        return;
      }
      interrupt_.raise(ExitCode::kInvalidResult,
                       by + " before anything ran; nothing is lost, start it again");
    } else if (since(*stop_taken_) > kSameRequestSeconds) {
      interrupt_.raise(ExitCode::kInvalidResult, by + " a second time: ended at once");
    }
  }

  void announce_leave() {
    left_ = true;
    if (rank_ == 0) {
      states_[0].leaving = true;
    } else {
      post(0, make(Message::Kind::kLeave, ExitCode::kOk, ""));
    }
  }
  void try_agreement() {
    if (!std::all_of(states_.begin(), states_.end(), [](const auto& s) { return s.leaving; })) {
      return;
    }
    post_all(make(Message::Kind::kLeaveAgreed, ExitCode::kOk, ""));
    agreed_ = true;
  }

  struct Send {
    Message message;
    MPI_Request request;
  };

  MPI_Comm comm_;
  std::vector<Peer> peers_;
  Interrupt& interrupt_;
  Progress& progress_;
  int rank_ = 0, size_ = 1;
  std::vector<PeerState> states_;  // rank 0: of every rank; others: [0] is rank 0's
  std::list<Send> sends_;
  Clock::time_point next_beat_ = Clock::now();
  Clock::time_point last_look_ = Clock::now();
  std::sig_atomic_t stops_seen_ = 0;
  std::optional<Clock::time_point> stop_taken_;  // rank 0
  bool paused_ = false;  // ever: the dead may then be dead because of this rank
  bool told_ = false;
  Deadline give_up_at_ = Deadline::max();
  std::mutex mutex_;
  std::optional<FirstCause> verdict_;  // guarded by mutex_
  std::atomic<bool> leader_lost_{false};
  bool left_ = false;
  std::atomic<bool> stop_{false}, leaving_{false}, agreed_{false};
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Watchdog> make_mpi_watchdog(MPI_Comm comm, const std::vector<Peer>& peers,
                                            Interrupt& interrupt, Progress& progress) {
  return std::make_unique<MpiWatchdog>(comm, peers, interrupt, progress);
}

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
  action.sa_handler = on_stop;
  sigaction(SIGUSR1, &action, nullptr);
  // Open MPI writes to the socket of a peer that is gone; the error it gets then is told, not
  // deadly.
  action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, nullptr);
  const sigset_t handled = handled_signals();
  pthread_sigmask(SIG_BLOCK, &handled, nullptr);
}

}  // namespace drover

#include "serve/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace drover {
namespace {

constexpr auto kPoll = std::chrono::milliseconds(50);
constexpr double kBarEvery = 0.25, kLineEvery = 10;
// At most so much of the journal is lost with the machine; with the process nothing is.
constexpr double kSyncEvery = 5;
constexpr auto kTold = std::chrono::milliseconds(300);
constexpr int kBarWidth = 24;

}  // namespace

std::string format_seconds(double seconds) {
  const auto s = static_cast<int64_t>(seconds + 0.5);
  if (s < 60) return fmt::format("{} s", s);
  if (s < 3600) return fmt::format("{} min {} s", s / 60, s % 60);
  return fmt::format("{} h {} min", s / 3600, s % 3600 / 60);
}

Monitor::Monitor(Sut& sut, RequestSink& sink, Interrupt& interrupt, Mode mode, size_t expected,
                 const ServeOptions& options, std::function<void()> stuck)
    : sut_(sut),
      sink_(sink),
      interrupt_(interrupt),
      mode_(mode),
      expected_(expected),
      show_(options.progress),
      terminal_(::isatty(STDERR_FILENO) == 1),
      stop_seconds_(options.stop_seconds),
      stuck_seconds_(options.stuck_seconds),
      stuck_(std::move(stuck)),
      start_(Clock::now()) {
  thread_ = std::thread([this] { loop(); });
}

Monitor::~Monitor() {
  stop_ = true;
  thread_.join();
  if (show_) show(true);
}

void Monitor::loop() {
  const double every = terminal_ ? kBarEvery : kLineEvery;
  double next = every, next_sync = kSyncEvery;
  while (!stop_) {
    std::this_thread::sleep_for(kPoll);
    if (interrupt_.raised() || interrupt_.asked_to_stop()) {
      if (!interrupt_.raised()) wind_down();
      end_early();
      return;
    }
    const double now = std::chrono::duration<double>(Clock::now() - start_).count();
    if (show_ && now >= next) {
      show(false);
      next = now + every;
    }
    if (now >= next_sync) {
      sync();
      next_sync = now + kSyncEvery;
    }
  }
}

// The safe point: nothing is admitted any more. What runs in an accuracy pass may end, since its
// answers count; a performance pass is lost anyway. Then nothing is on its way on any rank.
void Monitor::wind_down() {
  sut_.stop_issuing();
  sink_.wind_down(mode_ == Mode::kPerformance);
  const auto ends = [&](double seconds) {
    const auto deadline = deadline_in(seconds);
    while (!stop_ && !interrupt_.raised() && !sink_.idle() && Clock::now() < deadline)
      std::this_thread::sleep_for(kPoll);
    return stop_ || interrupt_.raised() || sink_.idle();
  };
  if (mode_ == Mode::kAccuracy && ends(stop_seconds_)) return;
  sink_.wind_down(true);
  // Steps have deadlines of their own, that raise the interrupt.
  while (!ends(1)) continue;
}

void Monitor::end_early() {
  sut_.abort(interrupt_.raised() ? interrupt_.cause() : interrupt_.why_stop());
  const auto deadline = deadline_in(stuck_seconds_);
  while (!stop_ && Clock::now() < deadline) std::this_thread::sleep_for(kPoll);
  if (stop_ || !stuck_) return;
  // LoadGen sleeps: the other ranks must not wait for it, and hear of the reason before this ends.
  if (interrupt_.raise(ExitCode::kInvalidResult, interrupt_.why_stop()))
    std::this_thread::sleep_for(kTold);
  stuck_();
}

void Monitor::sync() {
  try {
    sut_.sync_journal();
  } catch (const Error& e) {
    interrupt_.raise(e.code(), e.what());
  }
}

void Monitor::show(bool last) {
  const SutCounts& c = sut_.counts();
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  const size_t finished = c.finished, total = std::max<size_t>(expected_, c.issued);
  const double rate = static_cast<double>(c.tokens) / std::max(seconds, 1e-3);
  std::string tail = fmt::format("{}/{} samples, {:.1f} tokens/s", finished, total, rate);
  if (last)
    tail += fmt::format(", {}", format_seconds(seconds));
  else if (finished > 0 && finished < total)
    tail += fmt::format(", about {} left",
                        format_seconds(seconds * static_cast<double>(total - finished) /
                                       static_cast<double>(finished)));
  else
    tail += fmt::format(", {} started", c.started.load());
  std::string line;
  if (terminal_) {
    const int full = total == 0 ? 0 : static_cast<int>(finished * kBarWidth / total);
    line = fmt::format("\r{:<11} [{}{}] {}\x1b[K{}", to_string(mode_), std::string(full, '#'),
                       std::string(kBarWidth - full, '.'), tail, last ? "\n" : "");
  } else {
    line = fmt::format("{}: {}\n", to_string(mode_), tail);
  }
  std::fputs(line.c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace drover

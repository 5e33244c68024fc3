#include "base/interrupt.h"

#include <algorithm>
#include <thread>

namespace drover {

bool Interrupt::raise(ExitCode code, const std::string& cause) {
  std::lock_guard lock(mutex_);
  if (raised_.load(std::memory_order_relaxed)) return false;
  code_ = code;
  cause_ = cause;
  raised_.store(true, std::memory_order_release);
  return true;
}

void Interrupt::check() const {
  if (!raised()) return;
  std::lock_guard lock(mutex_);
  throw Error(code_, cause_);
}

ExitCode Interrupt::code() const {
  std::lock_guard lock(mutex_);
  return code_;
}

std::string Interrupt::cause() const {
  std::lock_guard lock(mutex_);
  return cause_;
}

bool Interrupt::ask_to_stop(const std::string& why) {
  std::lock_guard lock(mutex_);
  if (!heeded_) return false;
  if (!asked_.load(std::memory_order_relaxed)) why_stop_ = why;
  asked_.store(true, std::memory_order_release);
  return true;
}

std::string Interrupt::why_stop() const {
  std::lock_guard lock(mutex_);
  return why_stop_;
}

void Interrupt::heed_stops() {
  std::lock_guard lock(mutex_);
  heeded_ = true;
}

void wait_until(const std::function<bool()>& ready, Deadline deadline, const Interrupt& interrupt,
                const char* what) {
  using std::chrono::microseconds;
  constexpr int kHotPolls = 64;
  constexpr microseconds kYielding{300};
  const auto begin = Clock::now();
  microseconds pause{20};
  for (int polls = 0;; ++polls) {
    if (ready()) return;
    interrupt.check();
    if (polls < kHotPolls) continue;
    const auto now = Clock::now();
    if (now >= deadline) {
      DROVER_FAIL(ExitCode::kLostPeer, "{}: nothing came within {:.1f} s; a peer is lost or hangs",
                  what, std::chrono::duration<double>(now - begin).count());
    }
    if (now - begin < kYielding) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::min<Clock::duration>(pause, deadline - now));
      pause = std::min(pause * 2, microseconds{200});
    }
  }
}

}  // namespace drover

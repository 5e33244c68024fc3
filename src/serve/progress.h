// The monitor of a pass: shows how far it is, keeps its journal on the disk, and ends LoadGen's
// waits when the interrupt is up or the run was asked to stop.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <thread>

#include "base/interrupt.h"
#include "serve/sut.h"

namespace drover {

// A bar rewritten in place on a terminal, a plain line every ten seconds otherwise.
class Monitor {
 public:
  // `expected`: samples of the pass, about. `options`: progress, stop_seconds, stuck_seconds.
  // `stuck` is called when the monitor still lives `stuck_seconds` after an interrupt.
  Monitor(Sut& sut, RequestSink& sink, Interrupt& interrupt, Mode mode, size_t expected,
          const ServeOptions& options, std::function<void()> stuck);
  ~Monitor();  // joins; the last state has been shown

 private:
  void loop();
  void wind_down();
  void end_early();
  void sync();
  void show(bool last);

  Sut& sut_;
  RequestSink& sink_;
  Interrupt& interrupt_;
  const Mode mode_;
  const size_t expected_;
  const bool show_;
  const bool terminal_;
  const double stop_seconds_;
  const double stuck_seconds_;
  const std::function<void()> stuck_;
  const Clock::time_point start_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

// "3 min 20 s", "45 s".
std::string format_seconds(double seconds);

}  // namespace drover

#include "engine/fault.h"

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "base/error.h"

namespace drover {

void fault_point(const char* phase, int rank, uint64_t step) {
  static const char* const wanted = std::getenv("DROVER_FAULT");
  if (wanted == nullptr) return;
  const auto is = [&](const char* what) {
    return std::string(what) + ":" + std::to_string(rank) + ":" + std::to_string(step) == wanted;
  };
  if (is("throw")) {
    DROVER_FAIL(ExitCode::kInternal, "DROVER_FAULT: thrown in phase {} at step {}", phase, step);
  }
  if (is("hang")) {
    for (;;) std::this_thread::sleep_for(std::chrono::seconds(1));
  }
  if (is("kill")) std::raise(SIGKILL);
}

}  // namespace drover

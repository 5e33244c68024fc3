// drover bench: what a step costs, and what the communicator costs. Operations of a backend and the
// scheduler have Google Benchmark programs of their own (tests/bench/README.md).
#include <fmt/format.h>

#include <iostream>

#include "base/error.h"
#include "bench.h"
#include "commands.h"

namespace drover {

int bench_command(const std::vector<std::string>& arguments) {
  const std::string kind = arguments.empty() ? "" : arguments[0];
  const std::vector<std::string> rest(arguments.begin() + (arguments.empty() ? 0 : 1),
                                      arguments.end());
  if (kind == "step") return bench_step(rest);
  if (kind == "comm") return bench_comm(rest);
  if (kind == "--help" || kind == "-h") {
    std::cout << "drover bench step  prompt and decode rates of the engine (--help)\n"
                 "drover bench comm  sums, gathers and messages between ranks (--help)\n";
    return 0;
  }
  DROVER_FAIL(ExitCode::kUsage, "drover bench {}: expected step or comm", kind);
}

}  // namespace drover

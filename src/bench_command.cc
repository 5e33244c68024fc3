// drover bench: what a step, an operation and the communicator cost. The CPU's operations and the
// scheduler have Google Benchmark programs of their own too (tests/bench/README.md).
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
  if (kind == "linear") return bench_linear(rest);
  if (kind == "tune") return bench_tune(rest);
  if (kind == "attention") return bench_attention(rest);
  if (kind == "comm") return bench_comm(rest);
  if (kind == "--help" || kind == "-h") {
    std::cout << "drover bench step       prompt and decode rates of the engine (--help)\n"
                 "drover bench linear     the linears of a model's layers on one device\n"
                 "drover bench tune       their fastest ways into a file, for --tuning\n"
                 "drover bench attention  attention over cached contexts on one device\n"
                 "drover bench comm       sums, gathers and messages between ranks\n";
    return 0;
  }
  DROVER_FAIL(ExitCode::kUsage, "drover bench {}: expected step, linear, tune, attention or comm",
              kind);
}

}  // namespace drover

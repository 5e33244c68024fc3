// drover: the subcommands.
#include <fmt/format.h>

#include <cstdio>
#include <functional>
#include <iostream>
#include <map>

#include "base/log.h"
#include "command_line.h"
#include "commands.h"
#include "job.h"

namespace drover {
namespace {

struct Command {
  const char* help;
  std::function<int(const std::vector<std::string>&)> run;
};

const std::map<std::string, Command>& commands() {
  static const std::map<std::string, Command> all{
      {"run",
       {"the benchmark: a model under MLPerf's LoadGen (start it with mpirun)", run_command}},
      {"generate", {"answer a question, or a dataset's samples", generate_command}},
      {"bench",
       {"measure steps, operations or the communicator (step, linear, attention, comm)",
        bench_command}},
      {"plan",
       {"memory, step times and tokens/s of every grid of a machine (no GPU needed)",
        plan_command}},
      {"simulate",
       {"a run in virtual time: the real scheduler, up to thousands of ranks by a cost model",
        simulate_command}},
      {"doctor",
       {"whether this place can run a job: MPI, GPUs, networks, limits (best under mpirun)",
        doctor_command}},
      {"topology",
       {"write a topology file for the machine at hand (--detect), or check one",
        topology_command}},
      {"inspect", {"what a model store or dataset holds; verifies it", inspect_command}},
      {"logits", {"the logits of given tokens, into a file (for comparisons)", logits_command}},
  };
  return all;
}

void print_help() {
  std::cout
      << "drover runs an INT4 language model sharded over MPI ranks under MLPerf's LoadGen.\n\n"
         "  mpirun -np 2 drover run --model model.h5 --dataset data.h5 --pp 2 --out results/x\n"
         "\nsubcommands (each has --help):\n";
  for (const auto& [name, c] : commands()) std::cout << fmt::format("  {:<10} {}\n", name, c.help);
  std::cout << "  --version  of drover and the libraries in it\n";
}

int dispatch(const std::vector<std::string>& arguments) {
  if (arguments.empty() || arguments[0] == "--help" || arguments[0] == "-h" ||
      arguments[0] == "help") {
    print_help();
    return arguments.empty() ? static_cast<int>(ExitCode::kUsage) : 0;
  }
  if (arguments[0] == "--version") {
    const Json all = versions();
    for (const auto& [name, value] : all.items()) {
      std::cout << fmt::format("{:<10} {}\n", name, value.get<std::string>());
    }
    return 0;
  }
  const auto c = commands().find(arguments[0]);
  DROVER_CHECK(c != commands().end(), ExitCode::kUsage,
               "unknown subcommand {}: drover --help lists them", arguments[0]);
  return c->second.run({arguments.begin() + 1, arguments.end()});
}

}  // namespace
}  // namespace drover

int main(int argc, char** argv) {
  try {
    return drover::dispatch({argv + 1, argv + argc});
  } catch (const drover::Error& e) {
    // Without a text another process of the job tells it.
    if (*e.what() != 0) std::cerr << fmt::format("drover: {}\n", e.what());
    return static_cast<int>(e.code());
  } catch (const std::exception& e) {
    std::cerr << fmt::format("drover: {}\n", e.what());
    return static_cast<int>(drover::ExitCode::kInternal);
  }
}

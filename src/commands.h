// The subcommands. Each takes its arguments and returns the exit code; throws Error.
#pragma once

#include <string>
#include <vector>

namespace drover {

int run_command(const std::vector<std::string>& arguments);
int generate_command(const std::vector<std::string>& arguments);
int logits_command(const std::vector<std::string>& arguments);
int bench_command(const std::vector<std::string>& arguments);
int plan_command(const std::vector<std::string>& arguments);
int simulate_command(const std::vector<std::string>& arguments);
int doctor_command(const std::vector<std::string>& arguments);
int topology_command(const std::vector<std::string>& arguments);
int inspect_command(const std::vector<std::string>& arguments);

}  // namespace drover

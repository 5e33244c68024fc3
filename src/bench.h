// The benches behind `drover bench`. Each takes its arguments and returns the exit code.
#pragma once

#include <string>
#include <vector>

namespace drover {

int bench_step(const std::vector<std::string>& arguments);
int bench_linear(const std::vector<std::string>& arguments);
int bench_tune(const std::vector<std::string>& arguments);
int bench_attention(const std::vector<std::string>& arguments);
int bench_comm(const std::vector<std::string>& arguments);

}  // namespace drover

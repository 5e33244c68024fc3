// Another program, with a deadline.
#pragma once

#include <string>
#include <vector>

namespace drover {

struct Outcome {
  int code = -1;       // exit code; 127: it could not be started; -1: ended by a signal
  bool late = false;   // killed at the deadline
  std::string output;  // standard output and error together, at most 64 KiB
};

// Looked for in PATH. Without the launcher's variables (OMPI_, PMIX_, PMI_, PRTE_), so that an
// mpirun can be asked from within a rank. Never throws for what the program does.
Outcome run_program(const std::vector<std::string>& command, double seconds);
std::string find_program(const std::string& name);  // in PATH; empty: not there

}  // namespace drover

// N processes that a launcher started as one job, while MPI took each for a world of its own: what
// becomes of `srun` without PMIx, or of another MPI's mpirun.
#pragma once

#include <string>

namespace drover {

struct Singletons {
  int processes = 0;     // that the launcher started; 0: nothing is wrong
  int number = 0;        // this one's
  std::string launcher;  // "srun", "an mpirun of another MPI", ...
};
// From the launcher's variables. `world_size` is MPI's.
Singletons find_singletons(int world_size);

// The same before MPI starts, where it is certain: an Open MPI that knows PMIx only, started by
// srun without it, would end the process by itself.
Singletons singletons_before_mpi();

// What is wrong and the command lines that would do. `command`: the program and its arguments.
std::string singletons_text(const Singletons& s, const std::string& command);
// This process's own command line, quoted for a shell.
std::string own_command_line();
// The library that MPI comes from, and the mpirun beside it; empty where there is none.
std::string mpi_library();
std::string mpirun_of_library();

}  // namespace drover

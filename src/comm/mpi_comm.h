// Comm over MPI, on host memory. Only for src/comm.
#pragma once

#include <mpi.h>

#include <memory>

#include "base/interrupt.h"
#include "comm/comm.h"

namespace drover {

// Takes ownership of `comm`.
std::unique_ptr<Comm> make_mpi_comm(MPI_Comm comm, const std::string& name, Interrupt& interrupt,
                                    Progress* progress, double seconds);

}  // namespace drover

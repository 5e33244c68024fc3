// Makers of the mailbox and the watchdog over MPI. Only for src/comm.
#pragma once

#include <mpi.h>

#include <memory>
#include <vector>

#include "comm/world.h"

namespace drover {

// Take ownership of the communicators.
std::unique_ptr<Mailbox> make_mpi_mailbox(MPI_Comm plans, MPI_Comm results);
std::unique_ptr<Watchdog> make_mpi_watchdog(MPI_Comm comm, const std::vector<Peer>& peers,
                                            Interrupt& interrupt, Progress& progress);

}  // namespace drover

// MPI's errors as ours. Only for src/comm.
#pragma once

#include <mpi.h>

#include "base/error.h"

namespace drover {

inline std::string mpi_error_text(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) return "unknown MPI error";
  return {text, static_cast<size_t>(length)};
}

}  // namespace drover

#define DROVER_MPI(call)                                                 \
  do {                                                                   \
    const int drover_mpi_ = (call);                                      \
    if (drover_mpi_ != MPI_SUCCESS)                                      \
      DROVER_FAIL(::drover::ExitCode::kLostPeer, "{} failed: {}", #call, \
                  ::drover::mpi_error_text(drover_mpi_));                \
  } while (false)

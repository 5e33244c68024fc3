// The log. Every rank writes its own file; rank 0 also writes plain lines to standard error.
#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace drover::log {

// Before MPI is up, or in tests: warnings and errors to standard error.
// Afterwards: everything to `file` (when not empty); `to_stderr` adds info and above to stderr.
// Every line carries the host and the rank (rank < 0: none yet). A file that exists is replaced.
// Throws kEnvironment when the file cannot be opened.
void init(int rank, const std::string& file, bool to_stderr);
void flush() noexcept;
// From now on this process says nothing more on standard error through the log.
void leave_stderr();

using spdlog::debug;
using spdlog::error;
using spdlog::info;
using spdlog::warn;

namespace detail {
bool init_early();
// Whoever includes this header logs to standard error until init is called.
inline const bool kEarly = init_early();
}  // namespace detail

}  // namespace drover::log

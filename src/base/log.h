// The log. Every rank writes its own file; rank 0 also writes plain lines to standard error.
#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace drover::log {

// Before MPI is up, or in tests: warnings and errors to standard error.
// Afterwards: everything to `file` (when not empty); `to_stderr` adds info and above to stderr.
// Every line carries the host and the rank.
void init(int rank, const std::string& file, bool to_stderr);
void flush() noexcept;

using spdlog::debug;
using spdlog::error;
using spdlog::info;
using spdlog::warn;

}  // namespace drover::log

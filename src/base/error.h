// Errors. One exception type for the whole program; only main() ends the process.
#pragma once

#include <fmt/format.h>

#include <source_location>
#include <stdexcept>
#include <string>

namespace drover {

// The class of an error is the exit code of every rank. Documented in README.md; never renumber.
enum class ExitCode : int {
  kOk = 0,
  kInternal = 1,       // a bug in drover
  kUsage = 2,          // options, grid, sizes that cannot work together
  kBadInput = 3,       // a store, dataset or config file that is missing, damaged or hostile
  kEnvironment = 4,    // memory, MPI, permissions, disk
  kInvalidResult = 5,  // the run ended, but LoadGen calls the result INVALID
  kLostPeer = 6,       // a rank died, hung or could not be reached
};

// A message says what is wrong, what was expected, and what to do next.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message,
        std::source_location where = std::source_location::current())
      : std::runtime_error(message), code_(code), where_(where) {}
  ExitCode code() const noexcept { return code_; }
  const std::source_location& where() const noexcept { return where_; }

 private:
  ExitCode code_;
  std::source_location where_;
};

}  // namespace drover

// DROVER_FAIL(ExitCode::kBadInput, "{}: expected {} rows, found {}", file, want, got);
#define DROVER_FAIL(code, ...) throw ::drover::Error((code), ::fmt::format(__VA_ARGS__))

// The condition must have no side effects.
#define DROVER_CHECK(condition, code, ...)            \
  do {                                                \
    if (!(condition)) DROVER_FAIL(code, __VA_ARGS__); \
  } while (false)

// For invariants: prints both operands.
#define DROVER_CHECK_EQ(a, b)                                                                \
  do {                                                                                       \
    const auto& drover_a_ = (a);                                                             \
    const auto& drover_b_ = (b);                                                             \
    if (!(drover_a_ == drover_b_))                                                           \
      DROVER_FAIL(::drover::ExitCode::kInternal, "{}:{}: {} == {} does not hold: {} and {}", \
                  __FILE__, __LINE__, #a, #b, drover_a_, drover_b_);                         \
  } while (false)

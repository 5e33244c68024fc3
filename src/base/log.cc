#include "base/log.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <exception>
#include <memory>
#include <vector>

#include "base/error.h"
#include "base/host.h"

namespace drover::log {

void init(int rank, const std::string& file, bool to_stderr) {
  std::vector<spdlog::sink_ptr> sinks;
  auto err = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  err->set_level(to_stderr ? spdlog::level::info : spdlog::level::warn);
  // A rank with a file of its own leaves standard error to rank 0, or every warning would be
  // printed once a rank.
  if (file.empty() || to_stderr) sinks.push_back(err);
  if (!file.empty()) {
    try {
      auto out = std::make_shared<spdlog::sinks::basic_file_sink_mt>(file, /*truncate=*/true);
      out->set_level(spdlog::level::debug);
      sinks.push_back(out);
    } catch (const spdlog::spdlog_ex& e) {
      DROVER_FAIL(ExitCode::kEnvironment,
                  "cannot open the log file {}: {}; check that the folder exists and is writable",
                  file, e.what());
    }
  }
  auto logger = std::make_shared<spdlog::logger>("drover", sinks.begin(), sinks.end());
  logger->set_level(spdlog::level::debug);
  logger->flush_on(spdlog::level::warn);
  // The pattern is fixed at initialization: host and rank never change afterwards.
  std::string host;
  for (char c : hostname()) {
    if (c == '%') host += '%';
    host += c;
  }
  const std::string who = rank < 0 ? host : fmt::format("{} rank {}", host, rank);
  logger->set_pattern(fmt::format("%Y-%m-%d %H:%M:%S.%e {} %l: %v", who));
  spdlog::set_default_logger(logger);
}

void flush() noexcept {
  try {
    spdlog::default_logger_raw()->flush();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "drover: cannot flush the log: %s\n", e.what());
  }
}

void leave_stderr() {
  for (auto& sink : spdlog::default_logger_raw()->sinks()) {
    if (dynamic_cast<spdlog::sinks::stderr_sink_mt*>(sink.get()) != nullptr) {
      sink->set_level(spdlog::level::off);
    }
  }
}

namespace detail {
bool init_early() {
  init(-1, "", false);
  return true;
}
}  // namespace detail

}  // namespace drover::log

// The results' folder: never overwritten unasked, and known to be writable before a model loads.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "serve/resume.h"

namespace drover {
namespace {

namespace fs = std::filesystem;

// All that a run writes here but the ranks' logs; nothing else in the folder is ever touched.
constexpr const char* kResults[] = {"result.json", "environment.json", "user.conf", "performance",
                                    "accuracy"};

void check_options(const ServeOptions& o) {
  DROVER_CHECK(!o.out_dir.empty(), ExitCode::kUsage, "no folder for the results: set --out");
  DROVER_CHECK(!o.modes.empty(), ExitCode::kUsage,
               "no mode to run: set --mode performance, accuracy or both");
  DROVER_CHECK(o.max_new_tokens >= 1 && o.min_new_tokens == 1, ExitCode::kUsage,
               "--max-new-tokens {} and least new tokens {}: at least 1, and exactly 1",
               o.max_new_tokens, o.min_new_tokens);
  DROVER_CHECK(
      o.model_name.find_first_of(" .\t\n=#*") == std::string::npos && !o.model_name.empty(),
      ExitCode::kUsage,
      "benchmark name '{}': LoadGen's config keys allow no blank, '.', '=', '#' or '*'",
      o.model_name);
  DROVER_CHECK(o.stop_seconds >= 0, ExitCode::kUsage, "--stop-seconds {} is negative",
               o.stop_seconds);
  check_resume(o);
  DROVER_CHECK(o.target_qps >= 0, ExitCode::kUsage, "--target-qps {} is negative", o.target_qps);
  DROVER_CHECK(o.user_conf.empty() || fs::is_regular_file(o.user_conf), ExitCode::kBadInput,
               "{}: no such file; --user-conf names a LoadGen user.conf", o.user_conf);
  if (o.audit_conf.empty()) return;
  DROVER_CHECK(fs::is_regular_file(o.audit_conf), ExitCode::kBadInput,
               "{}: no such file; --audit-conf names a LoadGen audit.config", o.audit_conf);
  DROVER_CHECK(o.modes == std::vector<Mode>{Mode::kPerformance}, ExitCode::kUsage,
               "an audit.config sets LoadGen's mode itself: run it with --mode performance alone");
}

void check_writable(const std::string& dir) {
  const std::string probe = dir + "/.drover-write-test";
  const int fd = ::open(probe.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  const bool wrote = fd >= 0 && ::write(fd, "x", 1) == 1 && ::fsync(fd) == 0;
  const int why = errno;
  if (fd >= 0) ::close(fd);
  ::unlink(probe.c_str());
  DROVER_CHECK(wrote, ExitCode::kEnvironment,
               "{}: cannot be written to: {}; choose another --out folder", dir, strerror(why));
}

// A smaller grid would not replace those of its higher ranks.
void remove_rank_logs(const std::string& dir) {
  std::error_code ec;
  std::vector<fs::path> old;
  for (const auto& entry : fs::directory_iterator(dir, ec)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("rank-") && name.ends_with(".log")) old.push_back(entry.path());
  }
  for (const auto& file : old) {
    fs::remove(file, ec);
    DROVER_CHECK(!ec, ExitCode::kEnvironment, "{}: cannot be removed: {}", file.string(),
                 ec.message());
  }
}

}  // namespace

void prepare_out_dir(const ServeOptions& options) {
  check_options(options);
  std::error_code ec;
  fs::create_directories(options.out_dir, ec);
  DROVER_CHECK(fs::is_directory(options.out_dir), ExitCode::kEnvironment,
               "{}: cannot be created: {}; choose another --out folder", options.out_dir,
               ec ? ec.message() : "a file of that name is in the way");
  for (const char* name : kResults) {
    const fs::path path = fs::path(options.out_dir) / name;
    if (!fs::exists(fs::symlink_status(path, ec))) continue;
    DROVER_CHECK(options.force, ExitCode::kUsage,
                 "{}: there are results in {} already; choose another --out folder, or replace "
                 "them with --force",
                 path.string(), options.out_dir);
    fs::remove_all(path, ec);
    DROVER_CHECK(!ec, ExitCode::kEnvironment, "{}: cannot be removed: {}", path.string(),
                 ec.message());
  }
  if (options.force) remove_rank_logs(options.out_dir + "/logs");
  check_writable(options.out_dir);
}

}  // namespace drover

#include "base/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "base/interrupt.h"

extern char** environ;

namespace drover {

namespace {

std::vector<char*> environment_without_launcher() {
  std::vector<char*> kept;
  for (char** e = environ; *e != nullptr; ++e) {
    bool launcher = false;
    for (const char* prefix : {"OMPI_", "PMIX_", "PMI_", "PRTE_"}) {
      launcher = launcher || std::string_view(*e).starts_with(prefix);
    }
    // Root's permission to start mpirun is not the launcher's.
    if (!launcher || std::string_view(*e).starts_with("OMPI_ALLOW_RUN_AS_ROOT")) kept.push_back(*e);
  }
  kept.push_back(nullptr);
  return kept;
}

// Until the other end closes it, or the deadline. False: late.
bool read_all(int fd, Deadline deadline, std::string& output) {
  std::array<char, 4096> part{};
  while (true) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) return false;
    pollfd p{fd, POLLIN, 0};
    if (::poll(&p, 1, static_cast<int>(left)) <= 0) continue;
    const ssize_t n = ::read(fd, part.data(), part.size());
    if (n <= 0) return true;
    if (output.size() < (64u << 10)) output.append(part.data(), static_cast<size_t>(n));
  }
}

}  // namespace

Outcome run_program(const std::vector<std::string>& command, double seconds) {
  Outcome outcome;
  outcome.code = 127;
  int ends[2];
  if (command.empty() || ::pipe2(ends, O_CLOEXEC) != 0) return outcome;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
  posix_spawn_file_actions_adddup2(&actions, ends[1], 2);
  // A group of its own: what it starts ends with it.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  // Nor does it take over which signals this thread has blocked.
  sigset_t none;
  sigemptyset(&none);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK);
  std::vector<char*> arguments;
  for (const auto& a : command) arguments.push_back(const_cast<char*>(a.c_str()));
  arguments.push_back(nullptr);
  auto variables = environment_without_launcher();
  pid_t pid = 0;
  const int failed =
      ::posix_spawnp(&pid, arguments[0], &actions, &attributes, arguments.data(), variables.data());
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  ::close(ends[1]);
  if (failed == 0) {
    const Deadline deadline = deadline_in(seconds);
    outcome.late = !read_all(ends[0], deadline, outcome.output);
    int status = 0;
    // It may close its output and go on.
    while (!outcome.late && ::waitpid(pid, &status, WNOHANG) == 0) {
      outcome.late = Clock::now() > deadline;
      ::usleep(1000);
    }
    if (outcome.late) {
      ::kill(-pid, SIGKILL);
      ::waitpid(pid, &status, 0);
    }
    outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  ::close(ends[0]);
  return outcome;
}

std::string find_program(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path != nullptr ? path : "");
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string file = (folder.empty() ? "." : folder) + "/" + name;
    if (::access(file.c_str(), X_OK) == 0 && !std::filesystem::is_directory(file)) return file;
  }
  return "";
}

}  // namespace drover

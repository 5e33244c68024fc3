#include "comm/singletons.h"

#include <dlfcn.h>
#include <mpi.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "base/error.h"
#include "comm/world.h"

namespace drover {

namespace {

// A whole number in the environment, or -1.
int variable(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == 0) return -1;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  return *end == 0 && value >= 0 && value < (1 << 24) ? static_cast<int>(value) : -1;
}

std::string shell_word(const std::string& word) {
  const std::string plain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=./:,+@%";
  if (!word.empty() && word.find_first_not_of(plain) == std::string::npos) return word;
  std::string text = "'";
  for (const char c : word) {
    if (c == '\'') {
      text += "'\\''";
    } else {
      text += c;
    }
  }
  text += '\'';
  return text;
}

// Slurm's own PMI, older than PMIx: part of the library, or a component beside it.
bool open_mpi_knows_slurms_pmi() {
  for (const char* symbol : {"mca_pmix_s1_component", "mca_pmix_s2_component"}) {
    if (::dlsym(RTLD_DEFAULT, symbol) != nullptr) return true;
  }
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(
           std::filesystem::path(mpi_library()).parent_path(), error)) {
    if (!entry.path().filename().string().starts_with("openmpi")) continue;
    for (const auto& file : std::filesystem::recursive_directory_iterator(entry.path(), error)) {
      const auto name = file.path().filename();
      if (name == "mca_pmix_s1.so" || name == "mca_pmix_s2.so") return true;
    }
  }
  return false;
}

}  // namespace

Singletons singletons_before_mpi() {
  const Singletons s = find_singletons(1);
  const bool pmix = std::getenv("PMIX_RANK") != nullptr || std::getenv("PMIX_NAMESPACE") != nullptr;
  if (s.launcher != "srun" || pmix || !mpi_version().starts_with("Open MPI") ||
      open_mpi_knows_slurms_pmi()) {
    return {};
  }
  return s;
}

Singletons find_singletons(int world_size) {
  const auto found = [&](const char* size, const char* rank, const char* launcher) {
    const int processes = variable(size);
    if (world_size != 1 || processes <= 1) return Singletons{};
    return Singletons{processes, std::max(0, variable(rank)), launcher};
  };
  // Open MPI's own word goes first: inside of a Slurm step its mpirun may well start one process.
  if (variable("OMPI_COMM_WORLD_SIZE") >= 0) {
    return found("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "another Open MPI's mpirun");
  }
  // The number of a step's tasks; a batch script and salloc's shell have the job's only.
  if (variable("SLURM_STEP_NUM_TASKS") >= 0) {
    return found("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun");
  }
  if (variable("SLURM_STEP_ID") >= 0) return found("SLURM_NTASKS", "SLURM_PROCID", "srun");
  return found("PMI_SIZE", "PMI_RANK", "another MPI's mpirun (MPICH, Intel MPI)");
}

std::string mpi_library() {
  Dl_info info{};
  if (::dladdr(reinterpret_cast<void*>(&MPI_Init_thread), &info) == 0 ||
      info.dli_fname == nullptr) {
    return "";
  }
  std::error_code error;
  const auto real = std::filesystem::canonical(info.dli_fname, error);
  return error ? info.dli_fname : real.string();
}

std::string mpirun_of_library() {
  // lib/libmpi.so, lib/ARCHITECTURE/libmpi.so, lib/ARCHITECTURE/openmpi/lib/libmpi.so: bin is
  // above.
  std::filesystem::path folder = std::filesystem::path(mpi_library()).parent_path();
  for (int up = 0; up < 5 && folder.has_relative_path(); ++up, folder = folder.parent_path()) {
    const auto mpirun = folder / "bin" / "mpirun";
    if (::access(mpirun.c_str(), X_OK) == 0) return mpirun;
  }
  return "";
}

std::string own_command_line() {
  std::ifstream in("/proc/self/cmdline", std::ios::binary);
  const std::string all{std::istreambuf_iterator<char>(in), {}};
  std::string line, word;
  for (const char c : all) {
    if (c != 0) {
      word += c;
      continue;
    }
    if (!line.empty()) line += ' ';
    line += shell_word(word);
    word.clear();
  }
  return line;
}

std::string singletons_text(const Singletons& s, const std::string& command) {
  const std::string mpirun = mpirun_of_library();
  std::string text = fmt::format(
      "{} started {} processes, but MPI took each for a world of its own: the launcher and the MPI "
      "that drover is linked with ({}, {}) do not fit. Start it with\n",
      s.launcher, s.processes, mpi_version(), mpi_library());
  if (s.launcher == "srun") {
    text += fmt::format(
        "    srun --mpi=pmix -n {} {}\n  (where `srun --mpi=list` names pmix), or in the "
        "allocation, without srun, with\n",
        s.processes, command);
  }
  text += fmt::format("    {} -np {} {}", mpirun.empty() ? "mpirun" : mpirun, s.processes, command);
  if (mpirun.empty()) text += fmt::format("\n  where mpirun is that of {}", mpi_version());
  return text;
}

}  // namespace drover

#include "comm/world.h"

#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "comm/gpu_comm.h"
#include "comm/mpi_check.h"
#include "comm/mpi_comm.h"
#include "comm/watchdog.h"

namespace drover {

struct World::Impl {
  MPI_Comm local = MPI_COMM_NULL;
  MPI_Comm agreement = MPI_COMM_NULL;
  int rank = 0, size = 1, local_rank = 0, local_size = 1;
  bool finalize = true;
  std::vector<Peer> peers;
};

namespace {

MPI_Comm duplicate(MPI_Comm from) {
  MPI_Comm copy = MPI_COMM_NULL;
  DROVER_MPI(MPI_Comm_dup(from, &copy));
  // Without this no check of a return code ever fires: MPI would end the process by itself.
  DROVER_MPI(MPI_Comm_set_errhandler(copy, MPI_ERRORS_RETURN));
  return copy;
}

struct PeerRecord {
  char host[64];
  int64_t pid;
  uint64_t pid_namespace;
};

uint64_t pid_namespace() {
  struct stat info {};
  return stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

std::vector<Peer> exchange_peers(MPI_Comm comm, int size) {
  PeerRecord mine{};
  gethostname(mine.host, sizeof(mine.host) - 1);
  mine.pid = getpid();
  mine.pid_namespace = pid_namespace();
  std::vector<PeerRecord> all(static_cast<size_t>(size));
  DROVER_MPI(
      MPI_Allgather(&mine, sizeof(mine), MPI_BYTE, all.data(), sizeof(mine), MPI_BYTE, comm));
  std::vector<Peer> peers;
  for (const auto& p : all) peers.push_back({p.host, p.pid, p.pid_namespace});
  return peers;
}

// Open MPI 4 tells mpirun of a lost connection in a long text, and waits for the receipt with the
// connection locked. But mpirun, when a rank died, sleeps first: for as long as it grants the
// others to end. No thread could send meanwhile, the first cause reached nobody, and rank 0 was
// killed before its result was written. So once MPI has started (its troubles there are worth the
// text) this process tells nobody; whom it lost is the watchdog's to say. Open MPI 5 has no such
// variable.
void keep_lost_connections_to_ourselves() {
  auto* quiet = static_cast<bool*>(dlsym(RTLD_DEFAULT, "orte_execute_quiet"));
  if (quiet != nullptr) *quiet = true;
}

void await(MPI_Request& request, const Interrupt& interrupt, double seconds, const char* what) {
  wait_until(
      [&] {
        int done = 0;
        DROVER_MPI(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
        return done != 0;
      },
      deadline_in(seconds), interrupt, what);
}

}  // namespace

World::World() : impl_(std::make_unique<Impl>()) {
  prepare_nccl_environment();  // while there is no other thread that could read it
  int provided = 0;
  const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided);
  DROVER_CHECK(
      code == MPI_SUCCESS, ExitCode::kEnvironment,
      "MPI could not start (code {}): start drover with the mpirun of the MPI it was built "
      "with",
      code);
  DROVER_CHECK(provided == MPI_THREAD_MULTIPLE, ExitCode::kEnvironment,
               "this MPI gives thread level {}, drover needs MPI_THREAD_MULTIPLE ({}): rank 0 has "
               "threads that all communicate; use an MPI built with thread support",
               provided, MPI_THREAD_MULTIPLE);
  keep_lost_connections_to_ourselves();
  DROVER_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
  DROVER_MPI(MPI_Comm_rank(MPI_COMM_WORLD, &impl_->rank));
  DROVER_MPI(MPI_Comm_size(MPI_COMM_WORLD, &impl_->size));
  DROVER_MPI(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, impl_->rank, MPI_INFO_NULL,
                                 &impl_->local));
  DROVER_MPI(MPI_Comm_rank(impl_->local, &impl_->local_rank));
  DROVER_MPI(MPI_Comm_size(impl_->local, &impl_->local_size));
  impl_->agreement = duplicate(MPI_COMM_WORLD);
  impl_->peers = exchange_peers(impl_->agreement, impl_->size);
}

World::~World() {
  if (impl_->finalize) MPI_Finalize();
}

int World::rank() const { return impl_->rank; }
int World::size() const { return impl_->size; }
int World::local_rank() const { return impl_->local_rank; }
int World::local_size() const { return impl_->local_size; }
const std::vector<Peer>& World::peers() const { return impl_->peers; }
void World::set_finalize(bool yes) { impl_->finalize = yes; }

std::string mpi_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  std::string line(text, static_cast<size_t>(length));
  return line.substr(0, line.find(','));
}

std::unique_ptr<Comm> World::make_comm(Interrupt& interrupt, Progress* progress, double seconds) {
  return make_mpi_comm(duplicate(MPI_COMM_WORLD), "world", interrupt, progress, seconds);
}

std::unique_ptr<Comm> World::make_nccl_comm(Interrupt& interrupt, Progress* progress,
                                            double seconds, void* stream) {
  const NcclPlace place{.rank = impl_->rank,
                        .size = impl_->size,
                        .host = impl_->peers[static_cast<size_t>(impl_->rank)].host,
                        .seconds = seconds,
                        .stream = stream};
  const auto from_rank_0 = [&](void* bytes, size_t count) {
    MPI_Request request = MPI_REQUEST_NULL;
    DROVER_MPI(MPI_Ibcast(bytes, static_cast<int>(count), MPI_BYTE, 0, impl_->agreement, &request));
    await(request, interrupt, seconds, "NCCL's id from rank 0");
  };
  return drover::make_nccl_comm(place, interrupt, progress, from_rank_0);
}

std::unique_ptr<Comm> World::make_staged_comm(Interrupt& interrupt, Progress* progress,
                                              double seconds, void*) {
  const auto move_on = [comm = impl_->agreement] {
    int there = 0;
    DROVER_MPI(MPI_Iprobe(MPI_ANY_SOURCE, 0, comm, &there, MPI_STATUS_IGNORE));
  };
  return drover::make_staged_comm(make_comm(interrupt, progress, seconds), interrupt, seconds,
                                  move_on);
}

int64_t World::agree_min(int64_t value, const Interrupt& interrupt, double seconds) {
  int64_t least = 0;
  MPI_Request request = MPI_REQUEST_NULL;
  DROVER_MPI(MPI_Iallreduce(&value, &least, 1, MPI_INT64_T, MPI_MIN, impl_->agreement, &request));
  await(request, interrupt, seconds, "agreement of all ranks");
  return least;
}

void World::barrier(const Interrupt& interrupt, double seconds, const char* what) {
  MPI_Request request = MPI_REQUEST_NULL;
  DROVER_MPI(MPI_Ibarrier(impl_->agreement, &request));
  await(request, interrupt, seconds, what);
}

std::unique_ptr<Mailbox> World::make_mailbox() {
  return make_mpi_mailbox(duplicate(MPI_COMM_WORLD), duplicate(MPI_COMM_WORLD));
}

std::unique_ptr<Watchdog> World::make_watchdog(Interrupt& interrupt, Progress& progress) {
  return make_mpi_watchdog(duplicate(MPI_COMM_WORLD), impl_->peers, interrupt, progress);
}

}  // namespace drover

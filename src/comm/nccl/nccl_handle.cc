#include "comm/nccl/nccl_handle.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <thread>

#include "base/log.h"
#include "comm/nccl/peer_memory.h"
#include "comm/world.h"

namespace drover {

namespace {

using State = NcclHandle::State;

// Every communicator of this process, for abort_all_nccl and the watchdog.
struct Registry {
  std::mutex mutex;
  std::list<std::shared_ptr<State>> states;
};
// Never destroyed: threads that hang in NCCL may outlive main().
Registry& registry() {
  static auto* all = new Registry;
  return *all;
}

// Runs on a thread, for `seconds` at most; false: it still does.
bool within(double seconds, std::function<void()> work) {
  auto done = std::make_shared<std::atomic<bool>>(false);
  std::thread([done, work = std::move(work)] {
    work();
    done->store(true);
  }).detach();
  const auto deadline = deadline_in(seconds);
  while (!done->load()) {
    if (Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

ncclComm_t take(State& state, double seconds) {
  if (state.left) return nullptr;
  const std::unique_lock lock(state.mutex, std::chrono::duration<double>(seconds));
  return lock.owns_lock() ? std::exchange(state.comm, nullptr) : nullptr;
}

std::string interface_text() {
  const char* name = std::getenv("NCCL_SOCKET_IFNAME");
  return name == nullptr ? "unset" : name;
}

class Waiting {
 public:
  explicit Waiting(Progress* progress) : progress_(progress) {
    if (progress_ != nullptr) progress_->waiting.store(true, std::memory_order_relaxed);
  }
  ~Waiting() {
    if (progress_ == nullptr) return;
    progress_->waiting.store(false, std::memory_order_relaxed);
    progress_->tick();
  }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

 private:
  Progress* progress_;
};

ncclConfig_t config_of(NcclHandle::Kind kind) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = kind.blocking ? 1 : 0;
  config.splitShare = 0;  // a shared communicator could not be aborted alone
  if (kind.most_ctas > 0) config.minCTAs = 1, config.maxCTAs = kind.most_ctas;
  return config;
}

}  // namespace

NcclHandle::NcclHandle(const NcclContext& context, const std::string& name)
    : context_(context), name_(name), state_(std::make_shared<State>()) {}

std::unique_ptr<NcclHandle> NcclHandle::init(const NcclContext& context, const std::string& name,
                                             int size, int rank, const ncclUniqueId& id) {
  std::unique_ptr<NcclHandle> handle(new NcclHandle(context, name));
  handle->rank_ = rank;
  handle->size_ = size;
  ncclConfig_t config = config_of({});
  const ncclResult_t result =
      ncclCommInitRankConfig(&handle->state_->comm, size, id, rank, &config);
  if (result != ncclSuccess && result != ncclInProgress) handle->fail("making it", result);
  try {
    handle->await("making it");
    handle->adopt();
  } catch (...) {
    // NCCL is at it in the background: it must stop before it is let go.
    const ncclComm_t comm = take(*handle->state_, 0.1);
    within(1, [comm] { (void)ncclCommAbort(comm); });
    throw;
  }
  return handle;
}

std::unique_ptr<NcclHandle> NcclHandle::split(int color, int key, const std::string& name,
                                              Kind kind) {
  std::unique_ptr<NcclHandle> part(new NcclHandle(context_, name));
  const std::string what = fmt::format("splitting it into '{}'", name);
  try {
    // It should return at once, but NCCL does not promise that it waits for no peer.
    const ncclResult_t result =
        beside(what.c_str(), deadline_in(context_.seconds),
               [color, key, made = part->state_, config = config_of(kind)](ncclComm_t c) mutable {
                 return ncclCommSplit(c, color < 0 ? NCCL_SPLIT_NOCOLOR : color, key, &made->comm,
                                      &config);
               });
    if (result != ncclSuccess && result != ncclInProgress) fail(what.c_str(), result);
    await(what.c_str());
  } catch (...) {
    // Ends the part that is being made, too. Where NCCL writes it must stay.
    const ncclComm_t comm = take(*state_, 0.1);
    within(1, [comm, keep = part->state_] {
      if (comm != nullptr) (void)ncclCommAbort(comm);
    });
    part->state_->left = true;
    new std::shared_ptr<State>(part->state_);
    throw;
  }
  if (color < 0) return nullptr;
  part->adopt();
  return part;
}

void NcclHandle::adopt() {
  {
    const std::lock_guard lock(state_->mutex);
    DROVER_CHECK(state_->comm != nullptr, ExitCode::kInternal, "NCCL made no communicator '{}'",
                 name_);
    (void)ncclCommUserRank(state_->comm, &rank_);
    (void)ncclCommCount(state_->comm, &size_);
  }
  state_->text = fmt::format("'{}' (rank {} of {}: rank {} on {}, GPU {})", name_, rank_, size_,
                             context_.world_rank, context_.host, context_.device);
  const std::lock_guard lock(registry().mutex);
  registry().states.push_back(state_);
}

NcclHandle::~NcclHandle() {
  {
    const std::lock_guard lock(registry().mutex);
    registry().states.remove(state_);
  }
  const bool raised = context_.interrupt.raised();
  const ncclComm_t comm = take(*state_, raised ? 0.1 : 1);
  if (comm == nullptr) return;
  const auto end = [comm, raised, device = context_.device] {
    cudaSetDevice(device);
    (void)(raised ? ncclCommAbort(comm) : ncclCommDestroy(comm));
  };
  if (!within(raised ? 1 : 10, end) && !raised) {
    log::warn(
        "NCCL communicator {} is not freed: a peer has not freed it, or a CUDA graph holds it "
        "(graphs are to be destroyed first)",
        state_->text);
  }
}

std::string NcclHandle::waiting_text(const char* what) const {
  return fmt::format(
      "NCCL communicator '{}', rank {} of {} (rank {} on {}, GPU {}): {}. All its ranks must come "
      "here and reach each other: where hosts have several networks, NCCL_SOCKET_IFNAME ({}) "
      "names the right one; NCCL_DEBUG=INFO says more",
      name_, rank_, size_, context_.world_rank, context_.host, context_.device, what,
      interface_text());
}

// Until NCCL's work in the background is done.
void NcclHandle::await(const char* what) {
  const Waiting waiting(context_.progress);
  const auto ready = [&] {
    ncclResult_t state = ncclSuccess;
    ncclResult_t result;
    {
      const std::lock_guard lock(state_->mutex);
      if (state_->comm == nullptr) fail_aborted(what);
      result = ncclCommGetAsyncError(state_->comm, &state);
    }
    if (result != ncclSuccess) fail(what, result);
    if (state == ncclInProgress) return false;
    if (state != ncclSuccess) fail(what, state);
    return true;
  };
  wait_until(ready, deadline_in(context_.seconds), context_.interrupt, waiting_text(what).c_str());
}

ncclResult_t NcclHandle::beside(const char* what, Deadline deadline,
                                const std::function<ncclResult_t(ncclComm_t)>& call) {
  struct Outcome {
    std::atomic<bool> there{false};
    ncclResult_t result = ncclSuccess;
  };
  const Waiting waiting(context_.progress);
  auto outcome = std::make_shared<Outcome>();
  std::thread worker([outcome, call, state = state_, device = context_.device] {
    cudaSetDevice(device);
    const std::lock_guard lock(state->mutex);
    outcome->result = state->comm == nullptr ? ncclInvalidUsage : call(state->comm);
    outcome->there.store(true, std::memory_order_release);
  });
  try {
    wait_until([&] { return outcome->there.load(std::memory_order_acquire); }, deadline,
               context_.interrupt, waiting_text(what).c_str());
  } catch (...) {
    state_->left = true;
    worker.detach();
    throw;
  }
  worker.join();
  return outcome->result;
}

void NcclHandle::guarded(const char* what, cudaStream_t stream,
                         const std::function<ncclResult_t(ncclComm_t)>& call) {
  const auto deadline = deadline_in(context_.seconds);
  const ncclResult_t result = beside(what, deadline, call);
  if (result != ncclSuccess) fail(what, result);
  const CudaEvent done;
  done.record(stream);
  done.wait(deadline, context_.interrupt, waiting_text(what).c_str());
}

void NcclHandle::fail(const char* what, ncclResult_t result) const {
  // Where this rank was told to stop, that is the cause.
  context_.interrupt.check();
  const char* last = ncclGetLastError(nullptr);
  DROVER_FAIL(result == ncclRemoteError ? ExitCode::kLostPeer : ExitCode::kEnvironment,
              "{}: {}{}{}", waiting_text(what), ncclGetErrorString(result),
              last == nullptr || *last == 0 ? "" : ": ", last == nullptr ? "" : last);
}

void NcclHandle::fail_aborted(const char* what) const {
  context_.interrupt.check();
  DROVER_FAIL(ExitCode::kInternal, "NCCL communicator '{}': {}: it was aborted", name_, what);
}

bool has_nccl() { return true; }

std::string nccl_version() {
  int v = 0;
  if (ncclGetVersion(&v) != ncclSuccess) return "unknown";
  return fmt::format("{}.{}.{}", v / 10000, v / 100 % 100, v % 100);
}

// NVLink multicast stays off: a program that ends badly while it uses it can leave the GPUs of a
// host unusable for others until they are reset. And which communicators are blocking is said here.
void prepare_nccl_environment() {
  ::setenv("NCCL_NVLS_ENABLE", "0", 1);
  ::unsetenv("NCCL_COMM_BLOCKING");
  // Buffers in graphs need no registration, for which recording would wait for the peers: on two
  // H100 it changes no size up to 4 MiB.
  ::setenv("NCCL_GRAPH_REGISTER", "0", 0);
}

// Each on a thread of its own: freeing one may wait for a kernel of another.
void abort_all_nccl(double seconds) noexcept {
  try {
    stop_peer_waits();
    std::list<std::shared_ptr<State>> states;
    {
      const std::lock_guard lock(registry().mutex);
      states.swap(registry().states);
    }
    if (states.empty()) return;
    int device = 0;
    cudaGetDevice(&device);
    auto left = std::make_shared<std::atomic<size_t>>(states.size());
    for (auto& state : states) {
      std::thread([left, state, device, seconds] {
        cudaSetDevice(device);
        const ncclComm_t comm = take(*state, seconds);
        if (comm != nullptr) (void)ncclCommAbort(comm);
        --*left;
      }).detach();
    }
    const auto deadline = deadline_in(seconds);
    while (*left != 0 && Clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  } catch (const std::exception& e) {
    log::warn("aborting NCCL: {}", e.what());
  }
}

std::string nccl_async_error() noexcept {
  try {
    const std::lock_guard all(registry().mutex);
    for (const auto& state : registry().states) {
      // Whoever holds it is in a call and will see the error.
      const std::unique_lock lock(state->mutex, std::try_to_lock);
      if (!lock.owns_lock() || state->comm == nullptr) continue;
      ncclResult_t result = ncclSuccess;
      if (ncclCommGetAsyncError(state->comm, &result) != ncclSuccess) continue;
      if (result == ncclSuccess || result == ncclInProgress) continue;
      return fmt::format("NCCL communicator {}: {}", state->text, ncclGetErrorString(result));
    }
  } catch (const std::exception&) {
    return "NCCL could not be asked for errors";
  }
  return {};
}

}  // namespace drover

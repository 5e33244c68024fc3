#include "comm/nccl/peer_memory.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <set>
#include <vector>

#include "base/log.h"

namespace drover {

namespace {

constexpr size_t kPageBytes = size_t{2} << 20;  // an exported piece takes whole ones

// The words of all PeerMemory of this process.
struct Stops {
  std::mutex mutex;
  std::set<uint32_t*> words;
};
Stops& stops() {
  static auto* all = new Stops;  // never destroyed: as the registry of communicators
  return *all;
}

// What ranks tell each other.
struct Card {
  char boot[40];  // the host's: handles mean something only there. Containers may share a name
  int32_t good;
  cudaIpcMemHandle_t handle;
};

void read_boot_id(char (&to)[40]) {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  std::strncpy(to, id.c_str(), sizeof(to) - 1);
}

class IpcMemory final : public PeerMemory {
 public:
  IpcMemory(NcclHandle& handle, size_t bytes)
      : handle_(handle), bytes_((bytes + kPageBytes - 1) / kPageBytes * kPageBytes) {}
  ~IpcMemory() override { release(); }

  void* of(int rank) const override { return places_[static_cast<size_t>(rank)]; }
  size_t bytes() const override { return bytes_; }
  const uint32_t* stop() const override { return stop_; }

  // False on every rank where one of them could not.
  bool make() {
    const auto ranks = static_cast<size_t>(handle_.size());
    places_.assign(ranks, nullptr);
    Card mine{};
    mine.good = allocate(mine) ? 1 : 0;
    const auto cards = exchange(mine, "handles of shared memory");
    // All look at the same cards.
    shared_ = std::all_of(cards.begin(), cards.end(), [&](const Card& c) {
      return c.good != 0 && c.boot[0] != 0 && std::strcmp(c.boot, cards.front().boot) == 0;
    });
    if (!shared_) return false;
    int32_t good = 1;
    for (size_t r = 0; r < ranks; ++r) {
      if (r == rank()) continue;
      const cudaError_t e =
          cudaIpcOpenMemHandle(&places_[r], cards[r].handle, cudaIpcMemLazyEnablePeerAccess);
      if (e == cudaSuccess) continue;
      cudaGetLastError();
      places_[r] = nullptr;
      good = 0;
      log::info("memory of rank {} of {} cannot be opened: {}", r, ranks, cudaGetErrorString(e));
    }
    const auto all = exchange(good, "opening of shared memory");
    return std::all_of(all.begin(), all.end(), [](int32_t g) { return g != 0; });
  }

 private:
  size_t rank() const { return static_cast<size_t>(handle_.rank()); }

  bool allocate(Card& card) {
    void* word = nullptr;
    bool good = cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocPortable) == cudaSuccess;
    if (good) {
      stop_ = static_cast<uint32_t*>(word);
      *stop_ = 0;
      const std::lock_guard lock(stops().mutex);
      stops().words.insert(stop_);
    }
    void*& own = places_[rank()];
    good = good && cudaMalloc(&own, bytes_) == cudaSuccess &&
           cudaMemsetAsync(own, 0xff, bytes_, handle_.context().stream) == cudaSuccess &&
           cudaIpcGetMemHandle(&card.handle, own) == cudaSuccess;
    cudaGetLastError();  // forgotten: then there is no shared memory
    read_boot_id(card.boot);
    return good;
  }

  // Everybody's, once what is queued on everybody's stream of start-up work has run.
  template <class T>
  std::vector<T> exchange(const T& mine, const char* what) {
    const cudaStream_t stream = handle_.context().stream;
    std::vector<T> all(static_cast<size_t>(handle_.size()));
    const size_t bytes = all.size() * sizeof(T);
    lost_ = true;  // until they are here
    std::byte* scratch = nullptr;
    DROVER_CUDA(cudaMalloc(reinterpret_cast<void**>(&scratch), bytes));
    std::byte* own = scratch + rank() * sizeof(T);  // in place
    DROVER_CUDA(cudaMemcpyAsync(own, &mine, sizeof(T), cudaMemcpyHostToDevice, stream));
    handle_.guarded(what, stream, [=](ncclComm_t c) {
      return ncclAllGather(own, scratch, sizeof(T), ncclUint8, c, stream);
    });
    DROVER_CUDA(cudaMemcpyAsync(all.data(), scratch, bytes, cudaMemcpyDeviceToHost, stream));
    DROVER_CUDA(cudaStreamSynchronize(stream));  // it was empty
    DROVER_CUDA(cudaFree(scratch));
    lost_ = false;
    return all;
  }

  // A piece is freed when nobody has it open, and closed when nobody writes into it any more.
  void release() noexcept {
    // Peers may be gone, kernels may wait.
    if (lost_ || handle_.context().interrupt.raised()) return;
    try {
      if (shared_) {
        exchange(int32_t{0}, "the end of shared memory");
        for (size_t r = 0; r < places_.size(); ++r)
          if (r != rank() && places_[r] != nullptr) cudaIpcCloseMemHandle(places_[r]);
        exchange(int32_t{0}, "closing of shared memory");
      }
    } catch (const std::exception& e) {
      log::warn("{}", e.what());
      return;
    }
    cudaFree(places_[rank()]);
    if (stop_ == nullptr) return;
    {
      const std::lock_guard lock(stops().mutex);
      stops().words.erase(stop_);
    }
    cudaFreeHost(stop_);
  }

  NcclHandle& handle_;
  size_t bytes_;
  bool shared_ = false;  // others may have this rank's piece open
  bool lost_ = false;    // an exchange has failed
  std::vector<void*> places_;
  uint32_t* stop_ = nullptr;  // pinned
};

}  // namespace

std::unique_ptr<PeerMemory> share_memory(NcclHandle& handle, size_t bytes) {
  auto memory = std::make_unique<IpcMemory>(handle, bytes);
  if (!memory->make()) return nullptr;
  return memory;
}

void stop_peer_waits() noexcept {
  const std::lock_guard lock(stops().mutex);
  for (uint32_t* word : stops().words) std::atomic_ref(*word).store(1);
}

}  // namespace drover

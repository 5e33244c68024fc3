// Comm over NCCL.
#include <algorithm>
#include <cstring>
#include <map>

#include "comm/gpu_comm.h"
#include "comm/nccl/nccl_link.h"
#include "comm/nccl/peer_memory.h"

namespace drover {

namespace {

// Of a link's kernels: enough for NVLink and a network, few enough not to be missed while they
// wait.
constexpr int kLinkCtas = 4;
constexpr size_t kReserved = 1 << 20;  // where the first call comes before reserve()

cudaStream_t as_stream(void* s) { return static_cast<cudaStream_t>(s); }

class NcclComm final : public Comm {
 public:
  NcclComm(std::unique_ptr<NcclHandle> control, std::string name)
      : control_(std::move(control)), name_(std::move(name)) {}

  int rank() const override { return control_->rank(); }
  int size() const override { return control_->size(); }

  std::unique_ptr<Comm> split(int color, int key, const std::string& name) override {
    auto part = control_->split(color, key, name, {.blocking = false});
    if (part == nullptr) return nullptr;
    if (part->size() == 1) return make_solo_comm();
    return std::make_unique<NcclComm>(std::move(part), name);
  }

  void all_reduce_sum(void* buffer, size_t count, Dtype type, void* stream) override {
    DROVER_CHECK(type == Dtype::kF32 || type == Dtype::kBf16, ExitCode::kInternal,
                 "communicators sum f32 and bf16, asked for {}", to_string(type));
    if (count == 0) return;
    data(stream).launch("all-reduce", [&](ncclComm_t c) {
      return ncclAllReduce(buffer, buffer, count, type == Dtype::kF32 ? ncclFloat32 : ncclBfloat16,
                           ncclSum, c, as_stream(stream));
    });
  }

  void all_gather(const void* in, void* out, size_t bytes, void* stream) override {
    if (bytes == 0) return;
    data(stream).launch("all-gather", [&](ncclComm_t c) {
      return ncclAllGather(in, out, bytes, ncclUint8, c, as_stream(stream));
    });
  }

  void broadcast(void* buffer, size_t bytes, int root, void* stream) override {
    if (bytes == 0) return;
    data(stream).launch("broadcast", [&](ncclComm_t c) {
      return ncclBroadcast(buffer, buffer, bytes, ncclUint8, root, c, as_stream(stream));
    });
  }

  void send(const void* buffer, size_t bytes, int peer, void* stream) override {
    link(rank(), peer).send(buffer, bytes, as_stream(stream));
  }
  void recv(void* buffer, size_t bytes, int peer, void* stream) override {
    link(peer, rank()).recv(buffer, bytes, as_stream(stream));
  }

  // A collective connects what its algorithm needs when it first runs, and which algorithm NCCL
  // takes depends on the size: so every size up to `bytes` is run once.
  void reserve(size_t bytes) override {
    DROVER_CUDA(cudaSetDevice(control_->context().device));  // of this thread, for what is made
    if (!data_) data_ = control_->split(0, rank(), name_ + " data", {.blocking = true});
    if (bytes <= reserved_) return;
    const cudaStream_t stream = control_->context().stream;
    const size_t n = static_cast<size_t>(size());
    constexpr size_t kGathered = 256;
    void* scratch = nullptr;
    const size_t room = std::max(bytes, kGathered * (n + 1));
    DROVER_CUDA(cudaMalloc(&scratch, room));
    DROVER_CUDA(cudaMemsetAsync(scratch, 0, room, stream));
    data_->guarded("the first sums", stream, [=](ncclComm_t c) {
      ncclResult_t r = ncclSuccess;
      for (size_t size = 16;; size = std::min(size * 8, bytes)) {
        for (const auto& [type, element] : {std::pair{ncclFloat32, 4u}, {ncclBfloat16, 2u}}) {
          if (r != ncclSuccess) return r;
          r = ncclAllReduce(scratch, scratch, std::max<size_t>(size / element, 1), type, ncclSum, c,
                            stream);
        }
        if (size >= bytes) break;
      }
      auto* place = static_cast<std::byte*>(scratch);
      if (r == ncclSuccess)
        r = ncclAllGather(place, place + kGathered, kGathered, ncclUint8, c, stream);
      if (r == ncclSuccess) r = ncclBroadcast(place, place, kGathered, ncclUint8, 0, c, stream);
      return r;
    });
    DROVER_CUDA(cudaFree(scratch));
    reserved_ = bytes;
  }

  std::unique_ptr<PeerMemory> share(size_t bytes) override {
    if (!data_) reserve(kReserved);
    return share_memory(*data_, bytes);
  }

  void connect(int from, int to, size_t bytes, int messages) override {
    DROVER_CHECK(from != to && from >= 0 && to >= 0 && from < size() && to < size(),
                 ExitCode::kInternal, "'{}' of {} ranks: no way from {} to {}", name_, size(), from,
                 to);
    DROVER_CUDA(cudaSetDevice(control_->context().device));
    const auto [place, is_new] = links_.try_emplace({from, to});
    const bool mine = rank() == from || rank() == to;
    if (is_new) {
      auto pair = control_->split(mine ? 0 : -1, rank() == from ? 0 : 1,
                                  fmt::format("{} {} to {}", name_, from, to),
                                  {.blocking = true, .most_ctas = kLinkCtas});
      if (mine) place->second = std::make_unique<NcclLink>(std::move(pair));
    }
    if (mine) place->second->make_room(bytes, messages);
  }

 private:
  NcclHandle& data(void* stream) {
    if (!data_) {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      DROVER_CUDA(cudaStreamIsCapturing(as_stream(stream), &status));
      DROVER_CHECK(status == cudaStreamCaptureStatusNone, ExitCode::kInternal,
                   "'{}': call reserve() before calls are recorded in a CUDA graph", name_);
      reserve(kReserved);
    }
    return *data_;
  }

  NcclLink& link(int from, int to) const {
    const auto l = links_.find({from, to});
    DROVER_CHECK(l != links_.end() && l->second != nullptr, ExitCode::kInternal,
                 "'{}': a message from {} to {} before all ranks called connect({}, {}, ...)",
                 name_, from, to, from, to);
    return *l->second;
  }

  std::unique_ptr<NcclHandle> control_;  // not blocking: the others are split from it
  std::string name_;
  std::unique_ptr<NcclHandle> data_;  // blocking: of the collectives
  size_t reserved_ = 0;
  std::map<std::pair<int, int>, std::unique_ptr<NcclLink>> links_;  // null: of other ranks
};

}  // namespace

std::unique_ptr<Comm> make_nccl_comm(const NcclPlace& place, Interrupt& interrupt,
                                     Progress* progress,
                                     const std::function<void(void*, size_t)>& from_rank_0) {
  if (place.size == 1) return make_solo_comm();
  struct {
    ncclUniqueId id;
    int result = ncclSuccess;
    char cause[256] = "";
  } root{};
  if (place.rank == 0) {
    root.result = ncclGetUniqueId(&root.id);
    std::strncpy(root.cause, ncclGetLastError(nullptr), sizeof(root.cause) - 1);
  }
  from_rank_0(&root, sizeof(root));
  DROVER_CHECK(root.result == ncclSuccess, ExitCode::kEnvironment,
               "NCCL cannot start on rank 0: {}: {}. Does NCCL_SOCKET_IFNAME, where it is set, "
               "name an interface of that host? NCCL_DEBUG=INFO says more",
               ncclGetErrorString(static_cast<ncclResult_t>(root.result)), root.cause);
  NcclContext context{.interrupt = interrupt,
                      .progress = progress,
                      .seconds = place.seconds,
                      .world_rank = place.rank,
                      .host = place.host,
                      .device = 0,
                      .stream = as_stream(place.stream)};
  DROVER_CUDA(cudaGetDevice(&context.device));
  return std::make_unique<NcclComm>(
      NcclHandle::init(context, "world", place.size, place.rank, root.id), "world");
}

}  // namespace drover

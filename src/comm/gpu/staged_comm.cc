#include <algorithm>

#include "comm/gpu/cuda_error.h"
#include "comm/gpu_comm.h"

namespace drover {

namespace {

// Every call: the stream's work and a copy to pinned memory are waited for, MPI moves the bytes,
// and a copy back is queued. The memory is used again once that copy has run.
class StagedComm final : public Comm {
 public:
  StagedComm(std::unique_ptr<Comm> host, Interrupt& interrupt, double seconds,
             const std::function<void()>& progress)
      : host_(std::move(host)), interrupt_(interrupt), seconds_(seconds), progress_(progress) {}
  ~StagedComm() override {
    // After a failure a receive may still be posted on it.
    if (!interrupt_.raised()) cudaFreeHost(memory_);
  }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  bool capturable() const override { return false; }

  std::unique_ptr<Comm> split(int color, int key, const std::string& name) override {
    auto part = host_->split(color, key, name);
    if (part == nullptr) return nullptr;
    return make_staged_comm(std::move(part), interrupt_, seconds_, progress_);
  }

  void all_reduce_sum(void* buffer, size_t count, Dtype type, void* stream) override {
    const size_t bytes = count * dtype_bytes(type);
    if (bytes == 0) return;
    fetch(buffer, bytes, bytes, stream);
    host_->all_reduce_sum(memory_, count, type, nullptr);
    put(buffer, 0, bytes, stream);
  }

  void all_gather(const void* in, void* out, size_t bytes, void* stream) override {
    if (bytes == 0) return;
    const size_t all = bytes * static_cast<size_t>(size());
    fetch(in, bytes, bytes + all, stream);
    host_->all_gather(memory_, memory_ + bytes, bytes, nullptr);
    put(out, bytes, all, stream);
  }

  void broadcast(void* buffer, size_t bytes, int root, void* stream) override {
    if (bytes == 0) return;
    if (rank() == root) {
      fetch(buffer, bytes, bytes, stream);
      host_->broadcast(memory_, bytes, root, nullptr);
    } else {
      take(bytes);
      host_->broadcast(memory_, bytes, root, nullptr);
      put(buffer, 0, bytes, stream);
    }
  }

  void send(const void* buffer, size_t bytes, int peer, void* stream) override {
    fetch(buffer, bytes, bytes, stream);
    host_->send(memory_, bytes, peer, nullptr);  // copies
  }

  void recv(void* buffer, size_t bytes, int peer, void* stream) override {
    take(bytes);
    host_->recv(memory_, bytes, peer, nullptr);
    put(buffer, 0, bytes, stream);
  }

  void reserve(size_t bytes) override { take(bytes * (1 + static_cast<size_t>(size()))); }
  void connect(int, int, size_t bytes, int) override { take(bytes); }

 private:
  // Room for `bytes`, once what was put before has left.
  void take(size_t bytes) {
    wait("a copy to the GPU");
    if (bytes <= room_) return;
    std::byte* larger = nullptr;
    DROVER_CUDA(cudaMallocHost(reinterpret_cast<void**>(&larger), bytes));
    cudaFreeHost(memory_);
    memory_ = larger;
    room_ = bytes;
  }
  void fetch(const void* device, size_t bytes, size_t room, void* stream) {
    take(room);
    auto s = static_cast<cudaStream_t>(stream);
    DROVER_CUDA(cudaMemcpyAsync(memory_, device, bytes, cudaMemcpyDeviceToHost, s));
    used_.record(s);
    wait("the GPU's work before a message");
  }
  void put(void* device, size_t from, size_t bytes, void* stream) {
    auto s = static_cast<cudaStream_t>(stream);
    DROVER_CUDA(cudaMemcpyAsync(device, memory_ + from, bytes, cudaMemcpyHostToDevice, s));
    used_.record(s);
  }
  void wait(const char* what) { used_.wait(deadline_in(seconds_), interrupt_, what, progress_); }

  std::unique_ptr<Comm> host_;
  Interrupt& interrupt_;
  double seconds_;
  std::function<void()> progress_;
  std::byte* memory_ = nullptr;  // pinned
  size_t room_ = 0;
  CudaEvent used_;  // after the last copy from or to it; ready when there was none
};

}  // namespace

std::unique_ptr<Comm> make_staged_comm(std::unique_ptr<Comm> host, Interrupt& interrupt,
                                       double seconds, const std::function<void()>& progress) {
  if (host->size() == 1) return make_solo_comm();
  return std::make_unique<StagedComm>(std::move(host), interrupt, seconds, progress);
}

}  // namespace drover

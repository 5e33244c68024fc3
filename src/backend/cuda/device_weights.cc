#include "backend/cuda/device_weights.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "backend/cuda/cuda_check.h"

namespace drover::cuda {
namespace {

constexpr size_t kSlice = size_t{2} << 20;  // what a thread copies at a time

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

int bits_of(WeightFormat f) {
  switch (f) {
    case WeightFormat::kInt4:
      return 4;
    case WeightFormat::kInt8:
      return 8;
    case WeightFormat::kF32:
      return 32;
    default:
      return 16;
  }
}

void make_from_recipe(const WeightTensor& w, const DeviceTensor& to, cudaStream_t s) {
  const WeightRecipe& from = *w.recipe;
  if (from.awaited) return;
  RandomMatrix m{.seed = from.seed,
                 .rows = w.rows,
                 .cols = w.cols,
                 .row_begin = from.row_begin,
                 .col_begin = from.col_begin,
                 .all_cols = from.all_cols,
                 .bits = bits_of(w.format)};
  std::copy(from.elements.begin(), from.elements.end(), m.table);
  make_random(m, const_cast<uint8_t*>(to.codes), s);
  if (w.group > 0) {
    m.seed = ~from.seed;
    m.cols = w.cols / w.group;
    m.col_begin = from.col_begin / w.group;
    m.all_cols = from.all_cols / w.group;
    m.bits = 16;
    std::copy(from.scales.begin(), from.scales.end(), m.table);
    make_random(m, const_cast<uint16_t*>(to.scales), s);
  }
  DROVER_CUDA_LAUNCHED("making synthetic weights");
}

}  // namespace

// Threads that copy slices of one tensor, each through two pinned slices of its own: while one is
// on the bus the other is filled. The caller is the first of them, and alone for what fits a slice.
class WeightUploader::Pinned {
 public:
  Pinned(int threads, cudaStream_t stream) : stream_(stream), lanes_(static_cast<size_t>(threads)) {
    DROVER_CUDA(cudaGetDevice(&device_));
    DROVER_CUDA(cudaMallocHost(reinterpret_cast<void**>(&memory_), lanes_.size() * 2 * kSlice));
    for (size_t i = 0; i < lanes_.size(); ++i) {
      for (size_t k = 0; k < 2; ++k) {
        lanes_[i].slice[k] = memory_ + (2 * i + k) * kSlice;
        DROVER_CUDA(cudaEventCreateWithFlags(&lanes_[i].done[k], cudaEventDisableTiming));
      }
    }
    for (size_t i = 1; i < lanes_.size(); ++i)
      threads_.emplace_back([this, i] { serve(lanes_[i]); });
  }
  ~Pinned() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    begin_.notify_all();
    for (auto& t : threads_) t.join();
    for (const Lane& lane : lanes_) {
      for (cudaEvent_t e : lane.done) cudaEventDestroy(e);
    }
    cudaFreeHost(memory_);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  // Returns with everything on the stream; `host` may go.
  void copy(void* device, const void* host, size_t bytes) {
    const bool alone = bytes <= kSlice;
    {
      const std::lock_guard lock(mutex_);
      to_ = static_cast<std::byte*>(device);
      from_ = static_cast<const std::byte*>(host);
      bytes_ = bytes;
      next_ = 0;
      if (!alone) {
        ++turn_;
        busy_ = threads_.size();
      }
    }
    if (!alone) begin_.notify_all();
    work(lanes_.front());
    std::unique_lock lock(mutex_);
    end_.wait(lock, [this] { return busy_ == 0; });
    if (failed_ != cudaSuccess) {
      const cudaError_t e = std::exchange(failed_, cudaSuccess);
      DROVER_FAIL(ExitCode::kEnvironment, "CUDA: copying weights to the GPU failed: {}",
                  cudaGetErrorString(e));
    }
  }

 private:
  struct Lane {
    std::byte* slice[2] = {};
    cudaEvent_t done[2] = {};
    size_t current = 0;
  };

  cudaError_t copy_slice(Lane& lane, size_t at) {
    const size_t k = lane.current, n = std::min(kSlice, bytes_ - at);
    lane.current ^= 1;
    cudaError_t e = cudaEventSynchronize(lane.done[k]);
    if (e != cudaSuccess) return e;
    std::memcpy(lane.slice[k], from_ + at, n);
    e = cudaMemcpyAsync(to_ + at, lane.slice[k], n, cudaMemcpyHostToDevice, stream_);
    return e == cudaSuccess ? cudaEventRecord(lane.done[k], stream_) : e;
  }
  void work(Lane& lane) {
    for (size_t at; (at = next_.fetch_add(kSlice)) < bytes_;) {
      const cudaError_t e = copy_slice(lane, at);
      if (e == cudaSuccess) continue;
      const std::lock_guard lock(mutex_);
      failed_ = e;
    }
  }
  void serve(Lane& lane) {
    cudaSetDevice(device_);
    for (uint64_t seen = 0;;) {
      {
        std::unique_lock lock(mutex_);
        begin_.wait(lock, [&] { return ended_ || turn_ != seen; });
        if (ended_) return;
        seen = turn_;
      }
      work(lane);
      const std::lock_guard lock(mutex_);
      if (--busy_ == 0) end_.notify_one();
    }
  }

  cudaStream_t stream_;
  int device_ = 0;
  std::byte* memory_ = nullptr;
  std::vector<Lane> lanes_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable begin_, end_;
  std::byte* to_ = nullptr;  // of the tensor being copied
  const std::byte* from_ = nullptr;
  size_t bytes_ = 0;
  std::atomic<size_t> next_{0};
  uint64_t turn_ = 0;
  size_t busy_ = 0;  // threads that are not through with it
  cudaError_t failed_ = cudaSuccess;
  bool ended_ = false;
};

size_t device_tensor_bytes(const WeightTensor& w) {
  return aligned(w.code_bytes()) + aligned(w.groups() * 2) + aligned(w.zeros.size()) +
         aligned(w.minimums.size() * 2);
}

WeightUploader::WeightUploader(cudaStream_t stream, int threads)
    : stream_(stream), threads_(std::max(threads, 1)) {}

WeightUploader::~WeightUploader() {
  cudaStreamSynchronize(stream_);
  cudaFree(scratch_);
}

DeviceTensor WeightUploader::upload(const WeightTensor& w) {
  const size_t bytes = device_tensor_bytes(w);
  if (bytes > scratch_bytes_) {
    DROVER_CUDA(cudaStreamSynchronize(stream_));
    cudaFree(scratch_);
    scratch_ = nullptr, scratch_bytes_ = 0;
    const cudaError_t e = cudaMalloc(&scratch_, bytes);
    if (e != cudaSuccess) {
      cudaGetLastError();  // forgotten, so that the next launch is not blamed
      DROVER_FAIL(
          ExitCode::kEnvironment,
          "no GPU memory for weights on their way ({:.1f} MiB): {}; use more GPUs, fewer KV "
          "pages or a smaller model",
          static_cast<double>(bytes) / (1 << 20), cudaGetErrorString(e));
    }
    scratch_bytes_ = bytes;
  }
  return upload_to(w, scratch_);
}

DeviceTensor WeightUploader::upload_to(const WeightTensor& w, void* device) {
  auto* at = static_cast<uint8_t*>(device);
  const auto take = [&at](size_t bytes) {
    uint8_t* p = bytes == 0 ? nullptr : at;
    at += aligned(bytes);
    return p;
  };
  DeviceTensor out;
  out.codes = take(w.code_bytes());
  out.scales = reinterpret_cast<const uint16_t*>(take(w.groups() * 2));
  out.zeros = take(w.zeros.size());
  out.minimums = reinterpret_cast<const uint16_t*>(take(w.minimums.size() * 2));
  if (w.recipe) {
    make_from_recipe(w, out, stream_);
    return out;
  }
  DROVER_CHECK(w.codes.size() == w.code_bytes() && w.scales.size() == w.groups(),
               ExitCode::kInternal, "{} x {} weights {} with {} code bytes and {} scales", w.rows,
               w.cols, to_string(w.format), w.codes.size(), w.scales.size());
  if (!pinned_) pinned_ = std::make_unique<Pinned>(threads_, stream_);
  const auto copy = [this](const void* to, const auto& host) {
    pinned_->copy(const_cast<void*>(to), host.data(), host.size() * sizeof(host[0]));
  };
  copy(out.codes, w.codes);
  copy(out.scales, w.scales);
  copy(out.zeros, w.zeros);
  copy(out.minimums, w.minimums);
  return out;
}

void WeightUploader::release() {
  DROVER_CUDA(cudaStreamSynchronize(stream_));
  cudaFree(scratch_);
  scratch_ = nullptr, scratch_bytes_ = 0;
  pinned_.reset();
}

}  // namespace drover::cuda

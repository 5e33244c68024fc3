#include "backend/cuda/device_weights.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "backend/cuda/cuda_check.h"

namespace drover::cuda {
namespace {

constexpr size_t kSlice = size_t{16} << 20;
constexpr size_t kSlices = 4;
constexpr size_t kPiece = size_t{1} << 20;  // of a slice, what a thread copies at a time

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Copies with several threads, the caller's among them.
class ParallelCopy {
 public:
  explicit ParallelCopy(int threads) {
    for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~ParallelCopy() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    begin_.notify_all();
    for (auto& t : threads_) t.join();
  }

  void copy(void* to, const void* from, size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      to_ = static_cast<std::byte*>(to);
      from_ = static_cast<const std::byte*>(from);
      bytes_ = bytes;
      next_ = 0;
      ++turn_;
      busy_ = threads_.size();
    }
    begin_.notify_all();
    work();
    std::unique_lock lock(mutex_);
    end_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work() {
    for (size_t at; (at = next_.fetch_add(kPiece)) < bytes_;)
      std::memcpy(to_ + at, from_ + at, std::min(kPiece, bytes_ - at));
  }
  void serve() {
    for (uint64_t seen = 0;;) {
      {
        std::unique_lock lock(mutex_);
        begin_.wait(lock, [&] { return ended_ || turn_ != seen; });
        if (ended_) return;
        seen = turn_;
      }
      work();
      const std::lock_guard lock(mutex_);
      if (--busy_ == 0) end_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable begin_, end_;
  std::byte* to_ = nullptr;
  const std::byte* from_ = nullptr;
  size_t bytes_ = 0;
  std::atomic<size_t> next_{0};
  uint64_t turn_ = 0;
  size_t busy_ = 0;
  bool ended_ = false;
  std::vector<std::thread> threads_;
};

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

// A ring of pinned slices.
class WeightUploader::Pinned {
 public:
  explicit Pinned(int threads) : pool_(threads) {
    DROVER_CUDA(cudaMallocHost(reinterpret_cast<void**>(&memory_), kSlice * kSlices));
    for (auto& e : done_) DROVER_CUDA(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
  }
  ~Pinned() {
    for (auto e : done_) {
      if (e != nullptr) cudaEventDestroy(e);
    }
    cudaFreeHost(memory_);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  void copy(void* device, const void* host, size_t bytes, cudaStream_t s) {
    for (size_t at = 0; at < bytes;) {
      const size_t n = std::min(kSlice, bytes - at);
      std::byte* slice = memory_ + current_ * kSlice;
      DROVER_CUDA(cudaEventSynchronize(done_[current_]));
      pool_.copy(slice, static_cast<const std::byte*>(host) + at, n);
      DROVER_CUDA(cudaMemcpyAsync(static_cast<std::byte*>(device) + at, slice, n,
                                  cudaMemcpyHostToDevice, s));
      DROVER_CUDA(cudaEventRecord(done_[current_], s));
      current_ = (current_ + 1) % kSlices;
      at += n;
    }
  }

 private:
  ParallelCopy pool_;
  std::byte* memory_ = nullptr;
  cudaEvent_t done_[kSlices] = {};
  size_t current_ = 0;
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
  if (!pinned_) pinned_ = std::make_unique<Pinned>(threads_);
  const auto copy = [this](const void* to, const auto& host) {
    pinned_->copy(const_cast<void*>(to), host.data(), host.size() * sizeof(host[0]), stream_);
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

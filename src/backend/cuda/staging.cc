#include "backend/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/cuda_check.h"

namespace drover::cuda {

Staging::Staging(size_t half_bytes) : half_bytes_(half_bytes) {
  for (Half& h : in_) {
    DROVER_CUDA(cudaMallocHost(reinterpret_cast<void**>(&h.memory), half_bytes));
    DROVER_CUDA(cudaEventCreateWithFlags(&h.done, cudaEventDisableTiming));
  }
  DROVER_CUDA(cudaMallocHost(reinterpret_cast<void**>(&out_), half_bytes));
}

Staging::~Staging() {
  for (Half& h : in_) {
    if (h.done != nullptr) cudaEventDestroy(h.done);
    cudaFreeHost(h.memory);
  }
  cudaFreeHost(out_);
  for (Mark* m : marks_) {
    cudaEventDestroy(m->event);
    delete m;
  }
}

// Room in the current half, or in the other one once its copies are done.
std::byte* Staging::take_in(size_t bytes, cudaStream_t s) {
  if (in_[current_].used + bytes > half_bytes_) {
    DROVER_CUDA(cudaEventRecord(in_[current_].done, s));
    current_ ^= 1;
    DROVER_CUDA(cudaEventSynchronize(in_[current_].done));
    in_[current_].used = 0;
  }
  Half& h = in_[current_];
  std::byte* p = h.memory + h.used;
  h.used += std::min((bytes + 255) / 256 * 256, half_bytes_ - h.used);
  return p;
}

void Staging::copy_in(void* device, const void* host, size_t bytes, cudaStream_t s) {
  for (size_t at = 0; at < bytes;) {
    const size_t n = std::min(bytes - at, half_bytes_);
    std::byte* staged = take_in(n, s);
    std::memcpy(staged, static_cast<const std::byte*>(host) + at, n);
    DROVER_CUDA(cudaMemcpyAsync(static_cast<std::byte*>(device) + at, staged, n,
                                cudaMemcpyHostToDevice, s));
    at += n;
  }
}

// Room behind what is on its way, null when there is none.
std::byte* Staging::take_out(size_t bytes) {
  if (outs_.empty()) out_next_ = 0;
  const auto oldest =
      outs_.empty() ? half_bytes_ : static_cast<size_t>(outs_.front().staged - out_);
  const bool wrapped = !outs_.empty() && out_next_ <= oldest;
  if (!wrapped && out_next_ + bytes > half_bytes_ && bytes < oldest) out_next_ = 0;
  const size_t end = !outs_.empty() && out_next_ <= oldest ? oldest : half_bytes_;
  if (out_next_ + bytes > end) return nullptr;
  std::byte* p = out_ + out_next_;
  out_next_ += bytes;
  return p;
}

void Staging::copy_out(void* host, const void* device, size_t bytes, cudaStream_t s) {
  for (size_t at = 0; at < bytes;) {
    const size_t n = std::min(bytes - at, half_bytes_ / 2);
    std::byte* staged = take_out(n);
    if (staged == nullptr) {
      DROVER_CUDA(cudaStreamSynchronize(s));
      deliver(ordered_);
      staged = take_out(n);
    }
    DROVER_CUDA(cudaMemcpyAsync(staged, static_cast<const std::byte*>(device) + at, n,
                                cudaMemcpyDeviceToHost, s));
    outs_.push_back({static_cast<std::byte*>(host) + at, staged, n});
    ++ordered_;
    at += n;
  }
}

void Staging::deliver(size_t until) {
  for (; delivered_ < until; ++delivered_) {
    const Out& o = outs_.front();
    std::memcpy(o.host, o.staged, o.bytes);
    outs_.pop_front();
  }
}

void* Staging::record(cudaStream_t s) {
  if (free_.empty()) {
    auto* m = new Mark;
    marks_.push_back(m);
    DROVER_CUDA(cudaEventCreateWithFlags(&m->event, cudaEventDisableTiming));
    free_.push_back(m);
  }
  Mark* m = free_.back();
  free_.pop_back();
  DROVER_CUDA(cudaEventRecord(m->event, s));
  m->outs = ordered_;
  return m;
}

bool Staging::done(void* event) {
  auto* m = static_cast<Mark*>(event);
  const cudaError_t e = cudaEventQuery(m->event);
  if (e == cudaErrorNotReady) return false;
  DROVER_CUDA(e);
  deliver(m->outs);
  free_.push_back(m);
  return true;
}

void Staging::wait(void* event, Deadline deadline, const Interrupt& interrupt) {
  wait_until([&] { return done(event); }, deadline, interrupt, "waiting for the GPU");
}

}  // namespace drover::cuda

#include "comm/nccl/nccl_link.h"

#include <algorithm>

#include "base/log.h"

namespace drover {

namespace {

void outside_graphs(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  DROVER_CUDA(cudaStreamIsCapturing(stream, &status));
  DROVER_CHECK(status == cudaStreamCaptureStatusNone, ExitCode::kInternal,
               "messages cannot be recorded in a CUDA graph: send and receive outside of it");
}

}  // namespace

NcclLink::NcclLink(std::unique_ptr<NcclHandle> handle) : handle_(std::move(handle)) {
  if (sends()) {
    // Of the highest priority: streams of different priorities never share a hardware queue, where
    // a send that waits would hold up the other's work.
    int least = 0, greatest = 0;
    DROVER_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    DROVER_CUDA(cudaStreamCreateWithPriority(&side_, cudaStreamNonBlocking, greatest));
  }
  const cudaStream_t stream = sends() ? side_ : handle_->context().stream;
  constexpr size_t kBytes = 1 << 20;
  void* scratch = nullptr;
  DROVER_CUDA(cudaMalloc(&scratch, kBytes));
  DROVER_CUDA(cudaMemsetAsync(scratch, 0, kBytes, stream));
  handle_->guarded("the first message", stream, [scratch, stream, first = sends()](ncclComm_t c) {
    return first ? ncclSend(scratch, kBytes, ncclUint8, 1, c, stream)
                 : ncclRecv(scratch, kBytes, ncclUint8, 0, c, stream);
  });
  DROVER_CUDA(cudaFree(scratch));
}

NcclLink::~NcclLink() {
  const auto& c = handle_->context();
  if (c.interrupt.raised()) return;  // messages may still be under way
  if (!sends()) return;
  try {
    // What was sent is received before the link ends.
    const CudaEvent done;
    done.record(side_);
    done.wait(deadline_in(c.seconds), c.interrupt, "the last messages of a link");
  } catch (const std::exception& e) {
    log::warn("{}", e.what());
    return;
  }
  free_slots();
  cudaStreamDestroy(side_);
}

void NcclLink::free_slots() noexcept {
  for (Slot& s : slots_) cudaFree(s.memory);
  slots_.clear();
}

void NcclLink::make_room(size_t bytes, int messages) {
  if (!sends()) return;
  const auto count = static_cast<size_t>(std::max(messages, 1));
  if (bytes <= room_ && count <= slots_.size()) return;
  const auto& c = handle_->context();
  const CudaEvent done;
  done.record(side_);
  done.wait(deadline_in(c.seconds), c.interrupt, "earlier messages of a link");
  const size_t slots = std::max(count, slots_.size());
  room_ = std::max({bytes, room_, size_t{16}});
  free_slots();
  slots_.reserve(slots);
  for (size_t i = 0; i < slots; ++i) {
    slots_.emplace_back();
    const cudaError_t e = cudaMalloc(&slots_.back().memory, room_);
    DROVER_CHECK(e == cudaSuccess, ExitCode::kEnvironment,
                 "{} messages of {} bytes have no room on GPU {}: {}", slots, room_, c.device,
                 cudaGetErrorString(e));
  }
  next_ = 0;
}

void NcclLink::send(const void* buffer, size_t bytes, cudaStream_t stream) {
  DROVER_CHECK(bytes <= room_, ExitCode::kInternal,
               "a message of {} bytes, connect() made room for {}", bytes, room_);
  outside_graphs(stream);
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % slots_.size();
  DROVER_CUDA(cudaStreamWaitEvent(stream, slot.sent.get(), 0));
  DROVER_CUDA(cudaMemcpyAsync(slot.memory, buffer, bytes, cudaMemcpyDeviceToDevice, stream));
  slot.filled.record(stream);
  DROVER_CUDA(cudaStreamWaitEvent(side_, slot.filled.get(), 0));
  handle_->launch(
      "send", [&](ncclComm_t c) { return ncclSend(slot.memory, bytes, ncclUint8, 1, c, side_); });
  slot.sent.record(side_);
}

void NcclLink::recv(void* buffer, size_t bytes, cudaStream_t stream) {
  outside_graphs(stream);
  handle_->launch("receive",
                  [&](ncclComm_t c) { return ncclRecv(buffer, bytes, ncclUint8, 0, c, stream); });
}

}  // namespace drover

#include <algorithm>

#include "comm/device.h"
#include "comm/gpu/cuda_error.h"

namespace drover {

namespace {

// Chosen before anything else is made on it.
struct CurrentGpu {
  explicit CurrentGpu(int device) {
    DROVER_CHECK(device >= 0 && device < comm_gpu_count(), ExitCode::kEnvironment,
                 "GPU {} is not there: CUDA sees {}", device, comm_gpu_count());
    DROVER_CUDA(cudaSetDevice(device));
  }
};

class GpuDevice final : public CommDevice {
 public:
  GpuDevice(int device, const Interrupt& interrupt, double seconds)
      : current_(device),
        begin_(cudaEventDefault),
        end_(cudaEventDefault),
        interrupt_(interrupt),
        seconds_(seconds) {
    cudaDeviceProp properties{};
    DROVER_CUDA(cudaGetDeviceProperties(&properties, device));
    name_ = properties.name;
    DROVER_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  // After a failure the stream may never come to rest.
  ~GpuDevice() override {
    if (!interrupt_.raised()) cudaStreamDestroy(stream_);
  }

  std::string name() const override { return name_; }
  void* stream() override { return stream_; }
  void* alloc(size_t bytes) override {
    void* p = nullptr;
    DROVER_CUDA(cudaMalloc(&p, std::max<size_t>(bytes, 16)));
    DROVER_CUDA(cudaMemsetAsync(p, 0, std::max<size_t>(bytes, 16), stream_));
    return p;
  }
  void free(void* p) noexcept override {
    if (!interrupt_.raised()) cudaFree(p);
  }
  void copy_in(void* device, const void* host, size_t bytes) override {
    DROVER_CUDA(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_));
    wait();
  }
  void copy_out(void* host, const void* device, size_t bytes) override {
    wait();  // a copy to pageable memory waits in CUDA, without a deadline
    DROVER_CUDA(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_));
    wait();
  }
  double time(const std::function<void()>& calls) override {
    begin_.record(stream_);
    calls();
    wait();
    float milliseconds = 0;
    DROVER_CUDA(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()));
    return 1e3 * static_cast<double>(milliseconds);
  }
  std::function<void()> record(const std::function<void()>& calls) override {
    cudaGraph_t graph = nullptr;
    DROVER_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    try {
      calls();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    DROVER_CUDA(cudaStreamEndCapture(stream_, &graph));
    cudaGraphExec_t runnable = nullptr;
    const cudaError_t e = cudaGraphInstantiate(&runnable, graph, 0);
    cudaGraphDestroy(graph);
    DROVER_CUDA(e);
    const std::shared_ptr<CUgraphExec_st> held(runnable, cudaGraphExecDestroy);
    return [held, s = stream_] { DROVER_CUDA(cudaGraphLaunch(held.get(), s)); };
  }

 private:
  void wait() {
    end_.record(stream_);
    end_.wait(deadline_in(seconds_), interrupt_, "waiting for the GPU");
  }

  CurrentGpu current_;
  CudaEvent begin_, end_;
  const Interrupt& interrupt_;
  double seconds_;
  std::string name_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

int comm_gpu_count() noexcept {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  cudaGetLastError();
  return 0;
}

std::unique_ptr<CommDevice> make_gpu_device(int device, const Interrupt& interrupt,
                                            double seconds) {
  return std::make_unique<GpuDevice>(device, interrupt, seconds);
}

}  // namespace drover

#include "backend/cuda/graphs.h"

#include "backend/cuda/cuda_check.h"

namespace drover::cuda {
namespace {

cudaGraphExec_t record(cudaStream_t s, const std::function<void()>& operations) {
  // Thread local: other threads may allocate meanwhile.
  DROVER_CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    operations();
  } catch (...) {
    cudaStreamEndCapture(s, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  DROVER_CUDA(cudaStreamEndCapture(s, &graph));
  cudaGraphExec_t exec = nullptr;
  const cudaError_t e = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  DROVER_CUDA(e);
  return exec;
}

}  // namespace

void Graphs::clear() noexcept {
  for (const auto& [key, graph] : graphs_) cudaGraphExecDestroy(graph);
  graphs_.clear();
}

void Graphs::replay(uint64_t key, cudaStream_t s, const std::function<void()>& operations) {
  auto [at, fresh] = graphs_.try_emplace(key, nullptr);
  if (fresh) {
    try {
      at->second = record(s, operations);
    } catch (...) {
      graphs_.erase(at);
      throw;
    }
  }
  DROVER_CUDA(cudaGraphLaunch(at->second, s));
}

}  // namespace drover::cuda

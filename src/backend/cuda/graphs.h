// Recorded operations as CUDA graphs: one launch instead of one for each kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>

namespace drover::cuda {

class Graphs {
 public:
  Graphs() = default;
  ~Graphs() { clear(); }
  Graphs(const Graphs&) = delete;
  Graphs& operator=(const Graphs&) = delete;

  // Launches the graph of this key on s, recording it first when the key is new. What the
  // operations throw leaves nothing behind.
  void replay(uint64_t key, cudaStream_t s, const std::function<void()>& operations);
  void clear() noexcept;

 private:
  std::map<uint64_t, cudaGraphExec_t> graphs_;
};

}  // namespace drover::cuda

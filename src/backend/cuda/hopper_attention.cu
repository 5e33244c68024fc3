// Launches prefill on Hopper (hopper_attention.cuh).
#include "backend/cuda/hopper_attention.cuh"

#include <algorithm>

namespace drover::cuda {

void hopper_prefill(const attention_detail::AttentionArgs& arguments, const Workspace& work,
                    cudaStream_t s) {
  using namespace hopper_attention;
  [[maybe_unused]] static const cudaError_t raised = cudaFuncSetAttribute(
      wgmma_prefill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  attention_detail::AttentionArgs a = arguments;
  a.rows_a_block = kVectors / a.group, a.counters = work.counters;
  const int rows = a.end_row - a.first_row;
  const int items = (rows + a.rows_a_block - 1) / a.rows_a_block * a.cache.kv_heads;
  launch_dependent(wgmma_prefill_kernel,
                   static_cast<unsigned>(std::min(items, work.multiprocessors)), kThreads, kBytes,
                   s, 1, a, (65535 + a.group) / a.group);
}

}  // namespace drover::cuda

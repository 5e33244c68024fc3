// Attention of heads of 32 features (attention_kernel.cuh); a file of its own so that builds run in
// parallel.
#include "backend/cuda/attention_kernel.cuh"

namespace drover::cuda {

void attention_d32(const attention_detail::AttentionArgs& a, const Workspace& work,
                   cudaStream_t s) {
  attention_detail::launch_head_size<32>(a, work, s);
}

}  // namespace drover::cuda

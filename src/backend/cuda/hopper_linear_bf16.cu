// W4A16 (hopper_kernel.cuh).
#include "backend/cuda/hopper_kernel.cuh"

namespace drover::cuda::hopper {

Entry find_bf16(const HopperVariant& v) { return find<false>(v); }

}  // namespace drover::cuda::hopper

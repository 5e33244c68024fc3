// W4A8 (hopper_kernel.cuh).
#include "backend/cuda/hopper_kernel.cuh"

namespace drover::cuda::hopper {

Entry find_fp8(const HopperVariant& v) { return find<true>(v); }

}  // namespace drover::cuda::hopper

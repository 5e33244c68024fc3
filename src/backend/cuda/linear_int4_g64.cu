// INT4 linears with groups of 64 (linear_kernel.cuh); a file of its own so that builds run in
// parallel.
#include "backend/cuda/linear_kernel.cuh"

namespace drover::cuda {

void linear_int4_g64(int zero, const LinearArgs& a, const LinearConfig& c, int64_t tiles,
                     cudaStream_t s) {
  zero == 1 ? launch_tiles<4, 64, 1>(a, c, tiles, s) : launch_tiles<4, 64, 2>(a, c, tiles, s);
}

}  // namespace drover::cuda

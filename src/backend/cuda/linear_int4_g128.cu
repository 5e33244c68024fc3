// INT4 linears with groups of 128 (linear_kernel.cuh); a file of its own so that builds run in
// parallel.
#include "backend/cuda/linear_kernel.cuh"

namespace drover::cuda {

void linear_int4_g128(int zero, const LinearArgs& a, const LinearConfig& c, int64_t tiles,
                      cudaStream_t s) {
  if (zero == 0) return launch_tiles<4, 128, 0>(a, c, tiles, s);
  zero == 1 ? launch_tiles<4, 128, 1>(a, c, tiles, s) : launch_tiles<4, 128, 2>(a, c, tiles, s);
}

}  // namespace drover::cuda

// INT8 linears (linear_kernel.cuh): two tile sizes are enough for what is rare.
#include "backend/cuda/linear_kernel.cuh"

namespace drover::cuda {
namespace {

template <int GROUP, int ZERO>
void launch(const LinearArgs& a, LinearConfig c, int64_t tiles, cudaStream_t s) {
  if (c.tokens_tile <= 16)
    launch_linear<LinearKernel<8, GROUP, ZERO, 8, 1, 1, 2, 2, 3, 2>>(a, c, tiles, s);
  else
    launch_linear<LinearKernel<8, GROUP, ZERO, 4, 2, 2, 4, 1, 4, 1>>(a, c, tiles, s);
}

template <int GROUP>
void launch_zero(int zero, const LinearArgs& a, const LinearConfig& c, int64_t tiles,
                 cudaStream_t s) {
  zero == 1 ? launch<GROUP, 1>(a, c, tiles, s) : launch<GROUP, 2>(a, c, tiles, s);
}

}  // namespace

void linear_int8(int group, int zero, const LinearArgs& a, const LinearConfig& c, int64_t tiles,
                 cudaStream_t s) {
  if (group == 32) return launch_zero<32>(zero, a, c, tiles, s);
  if (group == 64) return launch_zero<64>(zero, a, c, tiles, s);
  launch_zero<128>(zero, a, c, tiles, s);
}

}  // namespace drover::cuda

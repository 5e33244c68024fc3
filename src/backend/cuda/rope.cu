// Rotary embedding of q and k in place, and k, v into the paged cache. Moves
// rows * (heads + 2 kv_heads) * head_size * 2 bytes in, q and k out again, k and v into the cache.
// Versions: one warp a head, angles once a block in shared memory.
//
// Angles are reduced in double: a float's rounding of position * frequency would be 1e-3 at
// position 8192. FP8: scale = amax / 448 of the rounded (bf16) head, as backend/cpu does it; a head
// with a NaN or an infinity has the scale NaN.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "backend/cuda/dependent_launch.cuh"
#include "backend/cuda/kernels.h"

namespace drover::cuda {
namespace {

using Bf16 = __nv_bfloat16;
constexpr int kWarps = 8;

struct RopeArgs {
  Bf16* qkv;
  int heads;
  const float* frequencies;
  int rope_dims;
  bool half_pairing;
  Cache cache;
  Rows rows;
};

__device__ void fill_angles(const RopeArgs& a, int position, float* cos_sin) {
  const int half = a.rope_dims / 2;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    const double angle = static_cast<double>(position) * static_cast<double>(a.frequencies[i]);
    const double turns = rint(angle * 0.15915494309189535);
    const auto reduced = static_cast<float>(fma(turns, -6.283185307179586, angle));
    sincosf(reduced, &cos_sin[half + i], &cos_sin[i]);
  }
}

// e4m3, round to nearest even, saturating (base/formats.h); the hardware's conversion from sm_89
// on, the header's own arithmetic before.
__device__ uint8_t fp8(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

template <int N>
__device__ void append(const float (&x)[N], int lane, int d, const Cache& c, bool key,
                       int64_t token) {
  void* values = key ? c.k : c.v;
  if (c.type == kKvFp8) {
    float amax = 0, finite = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) amax = fmaxf(amax, fabsf(x[i])), finite += x[i] - x[i];
    for (int i = 16; i > 0; i /= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, i));
      finite += __shfl_xor_sync(~0u, finite, i);
    }
    float scale = finite == 0.0f ? __fdiv_rn(amax, 448.0f) : finite;
    const bool normal = scale >= 1.17549435e-38f;
    if (!normal && scale == scale) scale = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (lane + 32 * i < d)
        static_cast<uint8_t*>(values)[token * d + lane + 32 * i] =
            normal ? fp8(__fdiv_rn(x[i], scale)) : uint8_t{0};
    if (lane == 0) (key ? c.k_scale : c.v_scale)[token] = scale;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int j = lane + 32 * i;
    if (j >= d) continue;
    if (c.type == kKvBf16)
      static_cast<Bf16*>(values)[token * d + j] = __float2bfloat16_rn(x[i]);
    else
      static_cast<float*>(values)[token * d + j] = x[i];
  }
}

// Block (row, part of the heads). N: elements a lane, head_size / 32 rounded up.
template <int N>
__global__ void __launch_bounds__(32 * kWarps) rope_kernel(const __grid_constant__ RopeArgs a) {
  __shared__ float cos_sin[N * 32];
  __shared__ float staged[kWarps][N * 32];
  const Cache& c = a.cache;
  const int r = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = c.head_size;
  dependency_launch();
  const bool padding = a.rows.slot[r] < 0;  // what a step is made of is there before its layers
  const int position = padding ? 0 : a.rows.position[r];
  if (!padding) fill_angles(a, position, cos_sin);
  dependency_wait();
  if (padding) return;
  __syncthreads();
  const int64_t page =
      a.rows.page_table[int64_t{a.rows.slot[r]} * a.rows.max_pages + position / c.page_tokens];
  const int all = a.heads + 2 * c.kv_heads, half = a.rope_dims / 2;
  for (int h = blockIdx.y * kWarps + warp; h < all; h += gridDim.y * kWarps) {
    Bf16* head = a.qkv + (int64_t{r} * all + h) * d;
    const bool rotates = h < a.heads + c.kv_heads;
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int j = lane + 32 * i;
      x[i] = j < d ? __bfloat162float(head[j]) : 0.0f;
      staged[warp][j] = x[i];
    }
    __syncwarp();
    if (rotates) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int j = lane + 32 * i;
        if (j >= a.rope_dims) continue;
        const int angle = a.half_pairing ? (j < half ? j : j - half) : j / 2;
        const bool first = a.half_pairing ? j < half : j % 2 == 0;
        const int partner = a.half_pairing ? (first ? j + half : j - half) : j ^ 1;
        const float y = staged[warp][partner], cosine = cos_sin[angle];
        const float sine = first ? -cos_sin[half + angle] : cos_sin[half + angle];
        const Bf16 rotated = __float2bfloat16_rn(x[i] * cosine + y * sine);
        head[j] = rotated;
        x[i] = __bfloat162float(rotated);
      }
    }
    if (h >= a.heads) {
      const int kv = (h - a.heads) % c.kv_heads;
      const int64_t token = (page * c.kv_heads + kv) * c.page_tokens + position % c.page_tokens;
      append(x, lane, d, c, rotates, token);
    }
    __syncwarp();
  }
}

}  // namespace

void rope_append(void* qkv, int32_t heads, const float* inverse_frequencies, int32_t rope_dims,
                 bool half_pairing, const Cache& cache, const Rows& rows, cudaStream_t s) {
  if (rows.rows == 0) return;
  const RopeArgs a{
      static_cast<Bf16*>(qkv), heads, inverse_frequencies, rope_dims, half_pairing, cache, rows};
  const int all = heads + 2 * cache.kv_heads;
  // Few rows: a head a warp. Many: enough blocks anyway, so let them share a row's angles.
  const int heads_a_block = rows.rows < 64 ? kWarps : 4 * kWarps;
  const dim3 grid(static_cast<unsigned>(rows.rows),
                  static_cast<unsigned>((all + heads_a_block - 1) / heads_a_block));
  if (cache.head_size <= 64)
    launch_dependent(rope_kernel<2>, grid, 32 * kWarps, 0, s, 1, a);
  else if (cache.head_size <= 128)
    launch_dependent(rope_kernel<4>, grid, 32 * kWarps, 0, s, 1, a);
  else
    launch_dependent(rope_kernel<8>, grid, 32 * kWarps, 0, s, 1, a);
}

}  // namespace drover::cuda

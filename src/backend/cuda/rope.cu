// Rotary embedding of q and k in place, and k, v into the paged cache. Moves
// rows * (heads + 2 kv_heads) * head_size * 2 bytes in, q and k out again, k and v into the cache.
// A warp takes a head after the other, angles once a block in shared memory. Heads that are rotated
// whole, in halves (Llama's), have a kernel of their own: a lane holds both numbers of its pairs,
// and the next head is on its way while this one is turned.
//
// Angles are reduced in double: a float's rounding of position * frequency would be 1e-3 at
// position 8192. FP8: scale = amax / 448 of the rounded (bf16) head, as backend/cpu does it; a head
// with a NaN or an infinity has the scale NaN.
//
// Measured on an H200 (copies 4,276 GB/s), Llama-2-70B's heads, FP8: 1, 64, 1,024 and 2,048
// rows 3.5, 3.6, 16.4 and 36.0 us (54 % of copies); the kernel for any head 3.7, 4.8, 22.3
// and 49.2.
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

// A warp's head of d elements; x[i] of a lane is element at(i).
template <int N, typename At>
__device__ void append(const float (&x)[N], int lane, const At& at, int d, const Cache& c, bool key,
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
      if (at(i) < d)
        static_cast<uint8_t*>(values)[token * d + at(i)] =
            normal ? fp8(__fdiv_rn(x[i], scale)) : uint8_t{0};
    if (lane == 0) (key ? c.k_scale : c.v_scale)[token] = scale;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int j = at(i);
    if (j >= d) continue;
    if (c.type == kKvBf16)
      static_cast<Bf16*>(values)[token * d + j] = __float2bfloat16_rn(x[i]);
    else
      static_cast<float*>(values)[token * d + j] = x[i];
  }
}

// A block's row, and where its keys and values go.
struct RowOfBlock {
  bool padding;
  int position;
  int64_t page = 0;

  // Fills the angles, of all threads, and waits for the launch before. What a step is made of is
  // there before its layers.
  __device__ RowOfBlock(const RopeArgs& a, float* cos_sin) {
    const int r = static_cast<int>(blockIdx.x);
    dependency_launch();
    const int slot = a.rows.slot[r];
    padding = slot < 0, position = padding ? 0 : a.rows.position[r];
    if (!padding) {
      page = a.rows.page_table[int64_t{slot} * a.rows.max_pages + position / a.cache.page_tokens];
      fill_angles(a, position, cos_sin);
    }
    dependency_wait();
    __syncthreads();
  }
  // Of head h, a key's or a value's.
  __device__ int64_t token(const RopeArgs& a, int h) const {
    const Cache& c = a.cache;
    return (page * c.kv_heads + (h - a.heads) % c.kv_heads) * c.page_tokens +
           position % c.page_tokens;
  }
};

// Block (row, part of the heads). N: elements a lane, head_size / 32 rounded up.
template <int N>
__global__ void __launch_bounds__(32 * kWarps) rope_kernel(const __grid_constant__ RopeArgs a) {
  __shared__ float cos_sin[N * 32];
  __shared__ float staged[kWarps][N * 32];
  const Cache& c = a.cache;
  const int r = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = c.head_size;
  const RowOfBlock row(a, cos_sin);
  if (row.padding) return;
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
    if (h >= a.heads)
      append(
          x, lane, [&](int i) { return lane + 32 * i; }, d, c, rotates, row.token(a, h));
    __syncwarp();
  }
}

// Block (row, part of the heads), heads of 64 V elements, rotated whole and in halves.
template <int V>
__global__ void __launch_bounds__(32 * kWarps)
    rope_halves_kernel(const __grid_constant__ RopeArgs a) {
  constexpr int kHalf = 32 * V;
  struct alignas(2 * V) Piece {
    Bf16 x[V];
  };
  __shared__ float cos_sin[2 * kHalf];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, step = gridDim.y * kWarps;
  const int all = a.heads + 2 * a.cache.kv_heads, first = V * lane;
  const RowOfBlock row(a, cos_sin);
  if (row.padding) return;
  float cosine[V], sine[V];
#pragma unroll
  for (int i = 0; i < V; ++i) cosine[i] = cos_sin[first + i], sine[i] = cos_sin[kHalf + first + i];
  const auto at = [&](int h) {
    return reinterpret_cast<Piece*>(a.qkv + (int64_t{blockIdx.x} * all + h) * 2 * kHalf) + lane;
  };
  int h = blockIdx.y * kWarps + warp;
  Piece low{}, high{}, next_low{}, next_high{};
  if (h < all) low = at(h)[0], high = at(h)[32];
  for (; h < all; h += step, low = next_low, high = next_high) {
    if (h + step < all) next_low = at(h + step)[0], next_high = at(h + step)[32];
    float x[2 * V];
#pragma unroll
    for (int i = 0; i < V; ++i)
      x[i] = __bfloat162float(low.x[i]), x[V + i] = __bfloat162float(high.x[i]);
    const bool rotates = h < a.heads + a.cache.kv_heads;
    if (rotates) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        low.x[i] = __float2bfloat16_rn(x[i] * cosine[i] - x[V + i] * sine[i]);
        high.x[i] = __float2bfloat16_rn(x[V + i] * cosine[i] + x[i] * sine[i]);
        x[i] = __bfloat162float(low.x[i]), x[V + i] = __bfloat162float(high.x[i]);
      }
      at(h)[0] = low, at(h)[32] = high;
    }
    if (h >= a.heads)
      append(
          x, lane, [&](int i) { return first + (i < V ? i : kHalf + i - V); }, 2 * kHalf, a.cache,
          rotates, row.token(a, h));
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
  const int d = cache.head_size;
  const bool halves = half_pairing && rope_dims == d && (d == 64 || d == 128);
  const auto kernel = halves     ? (d == 64 ? rope_halves_kernel<1> : rope_halves_kernel<2>)
                      : d <= 64  ? rope_kernel<2>
                      : d <= 128 ? rope_kernel<4>
                                 : rope_kernel<8>;
  launch_dependent(kernel, grid, 32 * kWarps, 0, s, 1, a);
}

}  // namespace drover::cuda

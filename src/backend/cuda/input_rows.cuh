// Rows on their way to a linear: how blocks and threads share them, and how they are written, in
// bf16 or as e4m3 codes with a scale a row. Used by inputs.cu and peer_norm.cu.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cstdint>

namespace drover::cuda::input_rows {

using Bf16 = __nv_bfloat16;
constexpr int kThreads = 512;
// Of launch bounds for two blocks. 2 packs: 56 registers a thread, with which a block of 512 has
// room beside one of a linear of few rows (hopper_tile.cuh). 8 packs: 72, as much as two blocks of
// 28,672 features may have; with 64 they spill more.
constexpr int threads_bound(int packs) { return packs == 2 ? 576 : packs == 8 ? 448 : kThreads; }

template <int VEC>
struct alignas(2 * VEC) Pack {
  Bf16 x[VEC];
};

struct Sums {
  float sum, top;
};

// Over the block. TAG: each call has its own shared memory, so that none waits for another's end.
template <int TAG>
__device__ Sums block_reduce(float sum, float top) {
  __shared__ Sums warps[kThreads / 32];
  for (int i = 16; i > 0; i /= 2) {
    sum += __shfl_xor_sync(~0u, sum, i);
    top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = {sum, top};
  __syncthreads();
  Sums all{0, 0};
  for (int i = 0; i < static_cast<int>(blockDim.x / 32); ++i)
    all.sum += warps[i].sum, all.top = fmaxf(all.top, warps[i].top);
  return all;
}

struct Output {
  void* data;
  float* scale;
  int64_t features;
  int parts = 1;  // blocks of a row, which form a cluster
};
__device__ inline int64_t row_of_block(const Output& out) { return blockIdx.x / out.parts; }

// f(k, p) for the packs p of this thread, the k-th in registers.
template <int VEC, int PACKS, typename F>
__device__ void each(const Output& out, const F& f) {
  const int all = static_cast<int>(out.features / VEC);
  if constexpr (PACKS > 0) {
    const int of_part = (all + out.parts - 1) / out.parts;
    const int first = static_cast<int>(blockIdx.x) % out.parts * of_part;
    const int packs = min(all, first + of_part);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int p = first + k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      if (p < packs) f(k, p);
    }
  } else {
    for (int p = static_cast<int>(threadIdx.x); p < all; p += static_cast<int>(blockDim.x)) f(0, p);
  }
}

// The largest magnitude of a pack, NaN if there is one.
template <int VEC>
__device__ float largest_of(const Pack<VEC>& y) {
  if constexpr (VEC == 8) {
    const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(y.x);
    const __nv_bfloat162 top = __hmax2_nan(__hmax2_nan(__habs2(pairs[0]), __habs2(pairs[1])),
                                           __hmax2_nan(__habs2(pairs[2]), __habs2(pairs[3])));
    return __bfloat162float(__hmax_nan(top.x, top.y));
  } else {
    return fabsf(__bfloat162float(y.x[0]));
  }
}

// Over the blocks of a row.
__device__ inline Sums cluster_reduce(const Sums& mine) {
#if __CUDA_ARCH__ >= 900
  __shared__ Sums told;
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) told = mine;
  cluster.sync();
  Sums all{0, 0};
  for (unsigned i = 0; i < cluster.num_blocks(); ++i) {
    const Sums other = *cluster.map_shared_rank(&told, i);
    all.sum += other.sum, all.top = fmaxf(all.top, other.top);
  }
  cluster.sync();  // no block ends while another reads of it
  return all;
#else
  return mine;
#endif
}

template <int VEC>
__device__ void put_codes(const Pack<VEC>& y, float inverse, uint8_t* to) {
  if constexpr (VEC == 8) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = make_float2(__bfloat162float(y.x[2 * j]) * inverse,
                                   __bfloat162float(y.x[2 * j + 1]) * inverse);
      const uint32_t pair = __nv_cvt_float2_to_fp8x2(x, __NV_SATFINITE, __NV_E4M3);
      words[j / 2] |= pair << (16 * (j % 2));
    }
    *reinterpret_cast<uint2*>(to) =
        inverse == 0.0f ? make_uint2(0, 0) : make_uint2(words[0], words[1]);
  } else {
    *to = inverse == 0.0f ? uint8_t{0}
                          : __nv_cvt_float_to_fp8(__bfloat162float(y.x[0]) * inverse,
                                                  __NV_SATFINITE, __NV_E4M3);
  }
}

// Writes row i, whose packs get(k, p) tells.
template <int VEC, int PACKS, bool FP8, typename Get>
__device__ void write_row(const Output& out, int64_t i, const Get& get) {
  if constexpr (!FP8) {
    auto* to = reinterpret_cast<Pack<VEC>*>(static_cast<Bf16*>(out.data) + i * out.features);
    each<VEC, PACKS>(out, [&](int k, int p) { to[p] = get(k, p); });
  } else {
    Pack<VEC> held[PACKS > 0 ? PACKS : 1];
    float top = 0, finite = 0;
    each<VEC, PACKS>(out, [&](int k, int p) {
      held[k] = get(k, p);
      const float y = largest_of<VEC>(held[k]);
      top = fmaxf(top, y), finite += y - y;  // NaN for NaN and infinities
    });
    Sums row = block_reduce<1>(finite, top);
    if (out.parts > 1) row = cluster_reduce(row);
    float scale = row.sum == 0.0f ? __fdiv_rn(row.top, 448.0f) : row.sum;
    const bool normal = scale >= 1.17549435e-38f;
    if (!normal && scale == scale) scale = 0.0f;
    const float inverse = normal ? __fdiv_rn(1.0f, scale) : 0.0f;
    uint8_t* to = static_cast<uint8_t*>(out.data) + i * out.features;
    each<VEC, PACKS>(out, [&](int k, int p) {
      put_codes<VEC>(PACKS > 0 ? held[k] : get(k, p), inverse, to + p * VEC);
    });
    if (threadIdx.x == 0 && blockIdx.x % out.parts == 0) out.scale[i] = scale;
  }
}

// A norm's weights of a pack.
template <int VEC>
struct Weights {
  float x[VEC];
  __device__ void load(const float* weights, int p) {
    if constexpr (VEC == 8) {
      const float4 low = __ldg(reinterpret_cast<const float4*>(weights) + 2 * p),
                   high = __ldg(reinterpret_cast<const float4*>(weights) + 2 * p + 1);
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
      x[0] = __ldg(weights + p);
    }
  }
};

template <int VEC>
__device__ Pack<VEC> rounded(const float (&y)[VEC]) {
  Pack<VEC> v;
  if constexpr (VEC == 8) {  // two at a time: conversions of one are slow
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(v.x);
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = __floats2bfloat162_rn(y[2 * j], y[2 * j + 1]);
  } else {
    v.x[0] = __float2bfloat16_rn(y[0]);
  }
  return v;
}
template <int VEC>
__device__ Pack<VEC> added(const Pack<VEC>& x, const Pack<VEC>& d) {
  float y[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) y[j] = __bfloat162float(x.x[j]) + __bfloat162float(d.x[j]);
  return rounded(y);
}
template <int VEC>
__device__ void add_squares(const Pack<VEC>& x, float& sum) {
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    const float f = __bfloat162float(x.x[j]);
    sum += f * f;
  }
}
// The root of the mean square's inverse, from the threads' sums of squares.
__device__ inline float norm_scale(float squares, int64_t features, float epsilon) {
  return rsqrtf(block_reduce<0>(squares, 0).sum / static_cast<float>(features) + epsilon);
}
template <int VEC>
__device__ Pack<VEC> scaled(const Pack<VEC>& x, float scale, const Weights<VEC>& w) {
  float y[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) y[j] = __bfloat162float(x.x[j]) * scale * w.x[j];
  return rounded(y);
}

inline unsigned row_threads(int64_t packs, int packs_a_thread) {
  const int64_t threads = ((packs + packs_a_thread - 1) / packs_a_thread + 31) / 32 * 32;
  return static_cast<unsigned>(std::clamp<int64_t>(threads, 32, kThreads));
}

}  // namespace drover::cuda::input_rows

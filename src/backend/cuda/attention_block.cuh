// A block of decode attention: its memory, and how its warps' tiles are joined
// (attention_kernel.cuh, attention_many.cuh).
#pragma once

#include "backend/cuda/attention_ring.cuh"
#include "backend/cuda/dependent_launch.cuh"

namespace drover::cuda {
namespace attention_detail {

// Sizes of decode's block: warps, and slots of each.
template <int D, int TYPE, int H>
struct DecodeShape {
  static constexpr int kSlot = Slot<D, TYPE>::kBytes;
  static constexpr int kBudget = (TYPE == kKvFp8 && H == 1 && D <= 128 ? 64 : 32) * 1024;
  static constexpr int kFit = kBudget / (2 * kSlot);
  static constexpr int kWarps = kFit >= 4 ? 4 : kFit >= 2 ? 2 : H;
  static constexpr int kSlots = kWarps * 4 * kSlot <= kBudget ? 4 : 2;
  static constexpr int kRowsOfResult = 2 * H * (D / 8);  // of 32 lanes each
  // Outputs lie in the slot that was read last where they fit.
  static constexpr bool kInSlot = kRowsOfResult * 128 <= kSlot;
  static constexpr int kOutputs = kInSlot ? 0 : kRowsOfResult * 32;  // floats
  static constexpr int kVectors = 8 * H;
  template <bool RUNS>
  using DecodeRing = Ring<D, TYPE, kSlots, 32, RUNS>;
  static constexpr int kRing = DecodeRing<false>::kBytes;
  static constexpr int kOfWarp = kRing + (kOutputs + 3 * kVectors) * 4;
  static constexpr int kBytes = kWarps * kOfWarp;
  static_assert(kBytes <= 99 * 1024, "more than sm_86 has");
  // A warp's memory: its ring, top, sum and unit of its vectors, outputs.
  __device__ static float* of_vectors(uint8_t* memory, int warp) {
    return reinterpret_cast<float*>(memory + warp * kOfWarp + kRing);
  }
  __device__ static float* outputs(uint8_t* memory, int warp) {
    return kInSlot ? reinterpret_cast<float*>(memory + warp * kOfWarp + 3 % kSlots * kSlot)
                   : of_vectors(memory, warp) + 3 * kVectors;
  }
};

// A tile's result in shared memory: rows of 32 lanes, row (2 h + e) * D/8 + f of vector 8 h + 2 t +
// e and feature g * D/8 + f, so that a thread of Merged has consecutive features of a vector.
template <int D, int TYPE, int H>
__device__ void put(const Tile<D, TYPE, H>& tile, float* outputs, float* of_vectors) {
  constexpr int kOut = D / 8, kVectors = 8 * H;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < H; ++h)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int f = 0; f < kOut; ++f)
        outputs[((2 * h + e) * kOut + f) * 32 + lane] = tile.o[f / 2][h][f % 2 * 2 + e];
      if (lane >= 4) continue;
      float* of_vector = of_vectors + 8 * h + 2 * lane + e;
      of_vector[0] = tile.top[h][e];
      of_vector[kVectors] = tile.sum[h][e];
      of_vector[2 * kVectors] = tile.unit[h][e];
    }
}

// What a block has joined so far, each thread its rows of the results.
template <int D, int TYPE, int H>
struct Merged {
  using Shape = DecodeShape<D, TYPE, H>;
  static constexpr int kOut = D / 8, kVectors = 8 * H;
  static constexpr int kThreads = 32 * Shape::kWarps;
  static constexpr int kOwn = Shape::kRowsOfResult / Shape::kWarps;
  static constexpr int kGroups = kOwn > kOut ? kOwn / kOut : 1, kOfGroup = kOwn / kGroups;
  static constexpr int kPartial = kThreads * (kOwn + 2 * kGroups);

  float o[kGroups][kOfGroup], top[kGroups], sum[kGroups];

  __device__ static int row(int group) {
    return static_cast<int>(threadIdx.x) / 32 * kOwn + group * kOfGroup;
  }
  __device__ static int vector(int group) {
    const int pair = row(group) / kOut;
    return pair / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + pair % 2;
  }
  __device__ static int feature(int group) {
    return static_cast<int>(threadIdx.x) % 32 / 4 * kOut + row(group) % kOut;
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      top[i] = -INFINITY, sum[i] = 0;
#pragma unroll
      for (float& x : o[i]) x = 0;
    }
  }
  __device__ void add(const float* outputs, const float* of_vectors) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float* of_vector = of_vectors + vector(i);
      const Join both =
          join(top[i], sum[i], of_vector[0], of_vector[kVectors], of_vector[2 * kVectors]);
      const float* from = outputs + row(i) * 32 + static_cast<int>(threadIdx.x) % 32;
#pragma unroll
      for (int n = 0; n < kOfGroup; ++n) o[i][n] = both(o[i][n], from[n * 32]);
    }
  }
  __device__ void add(const Merged& part) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const Join both = join(top[i], sum[i], part.top[i], part.sum[i], 1.0f);
#pragma unroll
      for (int n = 0; n < kOfGroup; ++n) o[i][n] = both(o[i][n], part.o[i][n]);
    }
  }
  // Every float of this thread's, in an order of its own.
  template <typename F>
  __device__ void each(const F& f) {
    int at = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (float& x : o[i]) f(x, at), at += kThreads;
      f(top[i], at), at += kThreads;
      f(sum[i], at), at += kThreads;
    }
  }
};

// N consecutive features, N a power of two.
template <int N>
__device__ inline void put_features(const float (&o)[N], float inverse, Bf16* to) {
  constexpr int kWide = N < 8 ? N : 8;
#pragma unroll
  for (int n = 0; n < N; n += kWide) {
    struct alignas(2 * kWide) {
      Bf16 x[kWide];
    } pack_of;
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      pack_of.x[i] = __float2bfloat16_rn(__fmul_rn(o[n + i], inverse));
    *reinterpret_cast<decltype(pack_of)*>(to + n) = pack_of;
  }
}

}  // namespace attention_detail
}  // namespace drover::cuda

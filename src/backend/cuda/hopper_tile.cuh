// What the parts of a Hopper linear share: the sizes of a block's tile, its shared memory, and
// codes on their way to A registers (hopper_kernel.cuh tells how all of it works).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backend/cuda/hopper_linear.h"
#include "backend/cuda/hopper_ptx.cuh"
#include "backend/cuda/hopper_walk.cuh"

namespace drover::cuda::hopper {

// Of 128 weight rows, half for either warpgroup, and TOKENS tokens.
template <bool FP8, int TOKENS, int CLUSTER, int PER_SM>
struct Tile {
  static constexpr bool kFp8 = FP8;
  static constexpr int kTokens = TOKENS, kCluster = CLUSTER, kPerSm = PER_SM;
  // Few tokens of e4m3: hopper_pairs.cuh.
  static constexpr bool kPairs = FP8 && TOKENS <= 16;
  // Tokens by three warps of the producer, not by the copy engine (hopper_kernel.cuh).
  static constexpr bool kCopied = kPairs && TOKENS == 8;
  static constexpr int kThreads = 384;
  static constexpr int kSums = TOKENS / 2;  // of a thread
  // Of the 3 x 168 (96, 80) that a launch has for a thread of each warpgroup. 96, as of a block of
  // 640 threads, leave room for a norm's block (512 threads of 56) beside it. A producer of 24
  // spilled, where nothing hides it.
  static constexpr bool kBeside = FP8 && TOKENS <= 32;
  static constexpr int kBound = kBeside ? 640 : kThreads;
  static constexpr int kProducerRegisters = kCopied ? 48 : kBeside ? 32 : PER_SM == 1 ? 40 : 48;
  static constexpr int kConsumerRegisters = kCopied ? 120 : kBeside ? 128 : PER_SM == 1 ? 232 : 96;
  static constexpr int kHalves = FP8 ? 1 : 2;  // chunks of 16 A registers in a block of columns
  static constexpr int kXBytes = TOKENS * 128 * kHalves;
  static constexpr int kWBytes = 2 * kHopperRecord;
  static constexpr int kBlocks = kPairs ? 2 : 1;  // of columns in a slot
  static constexpr int kXSlot = kBlocks * kXBytes, kWSlot = kBlocks * kWBytes;
  static constexpr int kOutTokens = TOKENS % 64 == 0 ? 64 : TOKENS;  // of a turn: as there is room
  static constexpr int kOutPitch = 144;                              // bytes: 64 rows and padding
  static constexpr int kOutBytes = kOutTokens * kOutPitch;
  static constexpr int kScaleBytes = FP8 ? TOKENS * 4 : 0;  // of the tile's tokens
  // Slots of the ring where they are unrolled (hopper_rounds.cuh, hopper_parts.cuh), else 0: as
  // many as there is room for. An even number, since the registers of A go by turns.
  static constexpr bool kUnrolled = FP8 && !kPairs;
  static constexpr int kSlots = !kUnrolled     ? 0
                                : TOKENS > 160 ? 4
                                : TOKENS > 128 ? 6
                                : TOKENS > 32  ? 8
                                               : 10;

  // Shared memory: x slots, w slots; an output tile, the tokens' scales and a flag for either
  // warpgroup; full and empty barriers.
  static constexpr int slot_bytes() { return kXSlot + kWSlot + 16; }
  static constexpr int fixed_bytes() { return 1024 + 2 * (kOutBytes + kScaleBytes) + 16; }
  struct Shared {
    uint32_t x, w, out, scales, flags, full, empty;
    __device__ Shared(uint32_t base, int stages) {
      x = (base + 1023) & ~1023u;
      w = x + stages * kXSlot;
      out = w + stages * kWSlot;
      scales = out + 2 * kOutBytes;
      flags = scales + 2 * kScaleBytes;
      full = flags + 16;
      empty = full + stages * 8;
    }
  };

  // The same addresses as numbers, where the ring is unrolled: shared memory of a block that has a
  // multiprocessor to itself begins behind the system's own kilobyte, which run() makes sure of.
  struct Fixed {
    static constexpr uint32_t kX = 1024, kW = kX + kSlots * kXBytes,
                              kFull = kW + kSlots * kWBytes + 2 * (kOutBytes + kScaleBytes) + 16,
                              kEmpty = kFull + kSlots * 8;
    // What is to be added: addresses in a cluster have the block's number in their high bits, and
    // beside another kernel's block they begin elsewhere.
    static constexpr bool kThere = kCluster == 1 && !kBeside;
    __device__ static uint32_t base(const Shared& sh) { return kThere ? 0 : sh.x - kX; }
    __device__ static uint64_t descriptor(uint32_t base, uint32_t offset) {
      const uint64_t fixed = swizzled_descriptor(kX + offset);
      return kThere ? fixed : fixed + ((base & 0x3ffff) >> 4);
    }
  };

  struct Slot {
    int index = 0;
    uint32_t phase = 0;
    __device__ void next(int stages) {
      if (++index == stages) index = 0, phase ^= 1;
    }
  };

  // A thread of a consumer warpgroup.
  struct Consumer {
    int group, thread, warp, lane;  // warpgroup 0 or 1, thread of it
    uint32_t codes, scales;         // offsets in a slot's weights
    __device__ Consumer() {
      group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
      warp = thread / 32, lane = threadIdx.x % 32;
      codes = group * kHopperRecord + thread * 16;
      scales = group * kHopperRecord + 4096 + (warp * 8 + lane / 4) * 4;
    }
  };

  // A warp is done with a slot, in all blocks whose producers wait for it.
  __device__ static __forceinline__ void release(uint32_t empty, const Consumer& me) {
    __syncwarp();
    if constexpr (kCluster == 1) {
      if (me.lane == 0) barrier_arrive(empty);
    } else {
      if (me.lane < kCluster) barrier_arrive_at(empty, me.lane);
    }
  }

  // Four codes, nibbles in the low halves of the bytes, to e4m3.
  __device__ static uint32_t to_e4m3(uint32_t w) {
    return (w & 0x01010101u) * 0x81u + (w & 0x0f0f0f0fu);
  }
  __device__ static uint32_t to_bf16(uint32_t w) {
    uint32_t magic;  // w & 0x000f000f | 0x43004300
    asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(magic) : "r"(w));
    const uint32_t bias = 0x43084308u;
    const __nv_bfloat162 r = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&magic),
                                     *reinterpret_cast<const __nv_bfloat162*>(&bias));
    return *reinterpret_cast<const uint32_t*>(&r);
  }

  // A thread's codes of a chunk of columns, and the 16 A registers made of them.
  static constexpr int kPacks = FP8 ? 2 : 1;
  __device__ static __forceinline__ void unpack(const uint4 (&codes)[kPacks], uint32_t (&a)[16]) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const uint32_t words[4] = {codes[p].x, codes[p].y, codes[p].z, codes[p].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (FP8) {
          a[p * 8 + i * 2] = to_e4m3(words[i]);
          a[p * 8 + i * 2 + 1] = to_e4m3(words[i] >> 4);
        } else {
#pragma unroll
          for (int r = 0; r < 4; ++r) a[i * 4 + r] = to_bf16(words[i] >> (4 * r));
        }
      }
    }
    pin(a);
  }

  // Of the two rows of a thread, as 16-bit numbers.
  __device__ static __forceinline__ float2 scales(const Args& a, uint32_t pair) {
    if (a.bf16_scales) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }

  // A group's sums to the totals.
  __device__ static __forceinline__ void add(float (&part)[kSums], float2 scale,
                                             float (&total)[kSums]) {
    pin(part);
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      total[i] = __fmaf_rn(part[i], i % 4 < 2 ? scale.x : scale.y, total[i]);
    pin(total);
  }
};

// The slots of an unrolled ring once around, from SLOT on: sums.step<SLOT, CHECK>(a, me, left,
// state, total) for each of the `left` blocks that there are; all slots have one where not CHECK.
// False when the segment has ended.
template <bool CHECK, int SLOT = 0, typename Sums, typename Consumer, int COUNT>
__device__ __forceinline__ bool round(Sums& sums, const Args& a, const Consumer& me, int left,
                                      typename Sums::State& state, float (&total)[COUNT]) {
  sums.template step<SLOT, CHECK>(a, me, left - SLOT, state, total);
  if (CHECK && left == SLOT + 1) return false;
  if constexpr (SLOT + 1 < Sums::kSlots)
    return round<CHECK, SLOT + 1>(sums, a, me, left, state, total);
  else
    return true;
}

}  // namespace drover::cuda::hopper

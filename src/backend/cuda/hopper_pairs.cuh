// The sums of a segment for few tokens of e4m3, where a launch waits for memory: two blocks of
// columns a slot of the ring, their wgmmas one chain each, and the next slot's codes unpacked under
// them. One wait, one arrival and one set of addresses for both, and a block's latencies (a chain
// of four wgmmas, codes from shared memory) under the other's.
#pragma once

#include "backend/cuda/hopper_tile.cuh"

namespace drover::cuda::hopper {

template <typename T>
struct Pairs {
  using Shared = typename T::Shared;
  using Slot = typename T::Slot;
  using Consumer = typename T::Consumer;
  using Registers = uint32_t[2][16];  // of A, of both blocks

  // Of both blocks, also where a segment ends with one: nothing reads what is made of the other.
  __device__ static __forceinline__ void unpack(uint32_t w, Registers& to) {
    uint4 codes[2][T::kPacks];
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int p = 0; p < T::kPacks; ++p) codes[b][p] = load_shared(w + b * T::kWBytes + p * 2048);
#pragma unroll
    for (int b = 0; b < 2; ++b) T::unpack(codes[b], to[b]);
  }

  // The first BLOCKS of a slot, whose A registers are in `now`; MORE: the next slot's go to `next`.
  template <int BLOCKS, bool MORE>
  __device__ static __forceinline__ void step(const Args& a, const Shared& sh, const Consumer& me,
                                              Slot& slot, const Registers& now, Registers& next,
                                              float (&total)[T::kSums]) {
    const uint32_t x = sh.x + slot.index * T::kXSlot, empty = sh.empty + slot.index * 8;
    const uint32_t scales = sh.w + slot.index * T::kWSlot + me.scales;
    float part[BLOCKS][T::kSums];
    wgmma_fence();
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const uint64_t tokens = swizzled_descriptor(x + b * T::kXBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma_e4m3(part[b], now[b] + i * 4, tokens + i * 2, i > 0);
      wgmma_commit();
    }
    uint32_t scale[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) scale[b] = load_shared_word(scales + b * T::kWBytes);
    slot.next(a.stages);
    if constexpr (MORE) {
      barrier_wait(sh.full + slot.index * 8, slot.phase);
      // Always so: without a condition ptxas unpacks after the wait for the sums.
      if (a.workers > 0) unpack(sh.w + slot.index * T::kWSlot + me.codes, next);
    }
    if constexpr (BLOCKS == 2) {
      wgmma_wait<1>();
      T::add(part[0], T::scales(a, scale[0]), total);
    }
    wgmma_wait<0>();
    T::add(part[BLOCKS - 1], T::scales(a, scale[BLOCKS - 1]), total);
    T::release(empty, me);
  }
  __device__ static __forceinline__ void last(const Args& a, const Shared& sh, const Consumer& me,
                                              Slot& slot, int left, Registers& now,
                                              float (&total)[T::kSums]) {
    if (left == 2)
      step<2, false>(a, sh, me, slot, now, now, total);
    else
      step<1, false>(a, sh, me, slot, now, now, total);
  }

  // Of a whole thread block's life.
  Slot slot;
  __device__ Pairs(const Consumer&, const Shared&) {}
  __device__ void sum(const Args& a, const Shared& sh, const Consumer& me, const Segment& s,
                      float (&total)[T::kSums]) {
    Registers even, odd;
    barrier_wait(sh.full + slot.index * 8, slot.phase);
    unpack(sh.w + slot.index * T::kWSlot + me.codes, even);
    for (int left = s.end - s.begin;; left -= 4) {
      if (left <= 2) return last(a, sh, me, slot, left, even, total);
      step<2, true>(a, sh, me, slot, even, odd, total);
      if (left <= 4) return last(a, sh, me, slot, left - 2, odd, total);
      step<2, true>(a, sh, me, slot, odd, even, total);
    }
  }
};

}  // namespace drover::cuda::hopper

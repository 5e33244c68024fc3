// The sums of a segment of bf16, one slot of the ring after the other, addresses made as they come.
// A block of columns is two chunks of 64, with 16 registers of A each.
#pragma once

#include "backend/cuda/hopper_tile.cuh"

namespace drover::cuda::hopper {

template <typename T>
struct Steps {
  using Shared = typename T::Shared;
  using Slot = typename T::Slot;
  using Consumer = typename T::Consumer;
  using Registers = uint32_t[16];  // of A, of a chunk

  __device__ static __forceinline__ void unpack(uint32_t codes, Registers& to) {
    const uint4 held[T::kPacks] = {load_shared(codes)};
    T::unpack(held, to);
  }
  __device__ static __forceinline__ void multiply(float (&part)[T::kSums], const Registers& w,
                                                  uint32_t x, int half) {
    const uint64_t b = swizzled_descriptor(x + half * T::kTokens * 128);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma_bf16(part, w + i * 4, b + i * 2, half > 0 || i > 0);
    wgmma_commit();
  }

  // A block of columns, whose first chunk's registers are in `first`, where the next block's are
  // left. `last`: there is no next one.
  __device__ static __forceinline__ void step(const Args& a, const Shared& sh, const Consumer& me,
                                              Slot& slot, bool last, Registers& first,
                                              Registers& second, float (&part)[T::kSums],
                                              float (&total)[T::kSums]) {
    const uint32_t x = sh.x + slot.index * T::kXBytes, w = sh.w + slot.index * T::kWBytes;
    const uint32_t empty = sh.empty + slot.index * 8;
    slot.next(a.stages);
    multiply(part, first, x, 0);
    unpack(w + me.codes + 2048, second);
    multiply(part, second, x, 1);
    const float2 scale = T::scales(a, load_shared_word(w + me.scales));
    if (!last) {
      barrier_wait(sh.full + slot.index * 8, slot.phase);
      wgmma_wait<1>();  // the first chunk's products are still read from `first`
      unpack(sh.w + slot.index * T::kWBytes + me.codes, first);
    }
    wgmma_wait<0>();
    T::add(part, scale, total);
    T::release(empty, me);
  }

  // Of a whole block's life.
  Slot slot;
  __device__ Steps(const Consumer&, const Shared&) {}
  __device__ void sum(const Args& a, const Shared& sh, const Consumer& me, const Segment& s,
                      float (&total)[T::kSums]) {
    float part[T::kSums];
    Registers first, second;
    barrier_wait(sh.full + slot.index * 8, slot.phase);
    unpack(sh.w + slot.index * T::kWBytes + me.codes, first);
    for (int k = s.begin; k < s.end; ++k)
      step(a, sh, me, slot, k + 1 == s.end, first, second, part, total);
  }
};

}  // namespace drover::cuda::hopper

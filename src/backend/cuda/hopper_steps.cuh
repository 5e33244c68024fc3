// The sums of a segment, one slot of the ring after the other, addresses made as they come: few
// tokens, where memory is what is waited for, and bf16.
#pragma once

#include "backend/cuda/hopper_tile.cuh"

namespace drover::cuda::hopper {

template <typename T>
struct Steps {
  using Shared = typename T::Shared;
  using Slot = typename T::Slot;
  using Consumer = typename T::Consumer;
  static constexpr int H = T::kHalves;

  __device__ static __forceinline__ void load_codes(uint32_t w, int chunk,
                                                    uint4 (&codes)[T::kPacks]) {
#pragma unroll
    for (int p = 0; p < T::kPacks; ++p) codes[p] = load_shared(w + (T::kFp8 ? p : chunk) * 2048);
  }

  __device__ static __forceinline__ void multiply(float (&part)[T::kSums], const uint32_t (&w)[16],
                                                  uint32_t x, int half) {
    const uint64_t b = swizzled_descriptor(x + half * T::kTokens * 128);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (T::kFp8)
        wgmma_e4m3(part, w + i * 4, b + i * 2, i > 0);
      else
        wgmma_bf16(part, w + i * 4, b + i * 2, half > 0 || i > 0);
    }
    wgmma_commit();
  }

  // A block of columns, whose first A registers are in `now`. With an odd number of chunks the next
  // block's are left in `other`, else in `now`. `last`: there is no next one.
  __device__ static __forceinline__ void step(const Args& a, const Shared& sh, const Consumer& me,
                                              Slot& slot, bool last, uint32_t (&now)[16],
                                              uint32_t (&other)[16], float (&part)[T::kSums],
                                              float (&total)[T::kSums]) {
    const uint32_t x = sh.x + slot.index * T::kXBytes, w = sh.w + slot.index * T::kWBytes;
    const uint32_t empty = sh.empty + slot.index * 8;
    slot.next(a.stages);
#pragma unroll
    for (int c = 0; c < H; ++c) {
      uint32_t(&next)[16] = c % 2 == 0 ? other : now;
      multiply(part, c % 2 == 0 ? now : other, x, c);
      const float2 scale = T::scales(a, load_shared_word(w + me.scales));
      if (c + 1 == H && !last) barrier_wait(sh.full + slot.index * 8, slot.phase);
      // The chunk before may still read `next`, when its sums were not waited for.
      if (c > 0) wgmma_wait<1>();
      if (c + 1 < H || !last) {
        uint4 codes[T::kPacks];
        load_codes((c + 1 < H ? w : sh.w + slot.index * T::kWBytes) + me.codes, (c + 1) % H, codes);
        T::unpack(codes, next);
      }
      if (c == H - 1) {
        wgmma_wait<0>();
        T::add(part, scale, total);
        T::release(empty, me);
      }
    }
  }

  // Of a whole block's life.
  Slot slot;
  __device__ Steps(const Consumer&, const Shared&) {}
  __device__ void sum(const Args& a, const Shared& sh, const Consumer& me, const Segment& s,
                      float (&total)[T::kSums]) {
    float part[T::kSums];
    uint32_t even[16], odd[16];
    barrier_wait(sh.full + slot.index * 8, slot.phase);
    uint4 codes[T::kPacks];
    load_codes(sh.w + slot.index * T::kWBytes + me.codes, 0, codes);
    T::unpack(codes, even);
    for (int k = s.begin;;) {
      step(a, sh, me, slot, k + 1 == s.end, even, odd, part, total);
      if (++k == s.end) break;
      if constexpr (H % 2 == 1) {
        step(a, sh, me, slot, k + 1 == s.end, odd, even, part, total);
        if (++k == s.end) break;
      }
    }
  }
};

}  // namespace drover::cuda::hopper

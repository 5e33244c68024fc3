// The sums of a segment for 256 tokens of e4m3, in four parts one after the other: only a part's
// sums of a block need registers beside the totals, and codes are unpacked once for all 256, when
// no wgmma reads the A registers. A warpgroup's own wgmmas wait meanwhile; the other's run.
// Unrolled as hopper_rounds.cuh is, to which it loses cycles; but under the chip's power limit it
// is what is done for a result that counts: here a weight is unpacked, and fetched from L2, for 256
// tokens.
//
// 264 instructions for a block of columns (Rounds: 157 for 128 tokens, 175 for 160).
#pragma once

#include "backend/cuda/hopper_tile.cuh"

namespace drover::cuda::hopper {

template <typename T>
struct Parts {
  using Consumer = typename T::Consumer;
  using Fixed = typename T::Fixed;
  static constexpr int kSlots = T::kSlots, kSums = T::kSums;
  static constexpr int kParts = 4, kOfPart = kSums / kParts;

  uint32_t base, codes, scales, phases = 0;  // as in Rounds
  __device__ Parts(const Consumer& me, const typename T::Shared& sh)
      : base(Fixed::base(sh)),
        codes(base + Fixed::kW + me.codes),
        scales(base + Fixed::kW + me.scales) {}

  struct State {
    uint32_t w[16];  // A registers of this block
    float sums[kOfPart];
    // False, which ptxas does not know: a part's first wgmma would get registers of its own, parts
    // would be added late, and totals spill.
    bool never;
  };

  template <int SLOT>
  __device__ __forceinline__ void unpack(State& s) {
    uint4 held[2];
#pragma unroll
    for (int p = 0; p < 2; ++p) held[p] = load_shared(codes + SLOT * T::kWBytes + p * 2048);
    T::unpack(held, s.w);
    phases ^= 1u << SLOT;
  }

  template <int SLOT, int PART>
  __device__ __forceinline__ void multiply(State& s) const {
    const uint64_t b = Fixed::descriptor(base, SLOT * T::kXBytes + PART * (T::kXBytes / kParts));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma_e4m3(s.sums, s.w + i * 4, b + i * 2, i > 0 || s.never);
    wgmma_commit();
  }
  template <int PART>
  __device__ static __forceinline__ void add(State& s, float2 scale, float (&total)[kSums]) {
    wgmma_wait<0>();
    pin(s.sums);
#pragma unroll
    for (int i = 0; i < kOfPart; ++i) {
      float& t = total[PART * kOfPart + i];
      t = __fmaf_rn(s.sums[i], i % 4 < 2 ? scale.x : scale.y, t);
    }
    pin(total);
  }

  // `left` blocks from this one on.
  template <int SLOT, bool CHECK>
  __device__ __forceinline__ void step(const Args& a, const Consumer& me, int left, State& s,
                                       float (&total)[kSums]) {
    constexpr int kNext = (SLOT + 1) % kSlots;
    multiply<SLOT, 0>(s);
    const float2 scale = T::scales(a, load_shared_word(scales + SLOT * T::kWBytes));
    add<0>(s, scale, total);
    multiply<SLOT, 1>(s);
    add<1>(s, scale, total);
    multiply<SLOT, 2>(s);
    add<2>(s, scale, total);
    multiply<SLOT, 3>(s);
    const bool more = !CHECK || left > 1;
    const bool there = more && barrier_try(base + Fixed::kFull + kNext * 8, phases >> kNext);
    add<3>(s, scale, total);
    T::release(base + Fixed::kEmpty + SLOT * 8, me);
    if (more) {
      if (!there) barrier_wait(base + Fixed::kFull + kNext * 8, phases >> kNext);
      unpack<kNext>(s);
    }
  }

  __device__ void sum(const Args& a, const typename T::Shared&, const Consumer& me,
                      const Segment& segment, float (&total)[kSums]) {
    State s;
    s.never = a.workers < 0;
#pragma unroll
    for (int i = 0; i < kOfPart; ++i) s.sums[i] = 0;
    int left = segment.end - segment.begin;
    barrier_wait(base + Fixed::kFull, phases);
    unpack<0>(s);
    for (; left > kSlots; left -= kSlots) round<false>(*this, a, me, left, s, total);
    round<true>(*this, a, me, left, s, total);
  }
};

}  // namespace drover::cuda::hopper

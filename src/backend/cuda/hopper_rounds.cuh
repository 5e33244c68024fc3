// The sums of a segment for 32 tokens of e4m3 or more, where all that is not a wgmma takes longer
// than the wgmmas do: every instruction and every wait counts. So the ring's slots are unrolled and
// addresses are immediates, and a block's codes and scales are in registers a block before they are
// unpacked, which happens under the wgmmas of the block before.
//
// 153 instructions for a block of columns and 128 tokens (one slot after the other, as
// hopper_steps.cuh goes: 205): 64 additions, 56 to unpack.
#pragma once

#include "backend/cuda/hopper_tile.cuh"

namespace drover::cuda::hopper {

template <typename T>
struct Rounds {
  using Consumer = typename T::Consumer;
  static constexpr int kSlots = T::kSlots, kSums = T::kSums;
  static constexpr uint32_t kW = T::Fixed::kW, kFull = T::Fixed::kFull, kEmpty = T::Fixed::kEmpty;

  // A segment begins at slot 0; bit i is the parity that slot i is waited for with.
  uint32_t base, codes, scales, phases = 0;  // this thread's addresses in slot 0
  __device__ Rounds(const Consumer& me, const typename T::Shared& sh)
      : base(T::Fixed::base(sh)), codes(base + kW + me.codes), scales(base + kW + me.scales) {}

  // What a thread holds of a block between.
  struct Held {
    uint4 codes[2];
    uint32_t scales;
  };
  struct State {
    uint32_t w[2][16];  // A registers of this block and the next, by turns
    Held held;          // the one after
    uint32_t scales;    // of this block
    float part[kSums];
  };

  template <int SLOT>
  __device__ __forceinline__ void fetch(Held& held) {
#pragma unroll
    for (int p = 0; p < 2; ++p) held.codes[p] = load_shared(codes + SLOT * T::kWBytes + p * 2048);
    held.scales = load_shared_word(scales + SLOT * T::kWBytes);
    phases ^= 1u << SLOT;
  }

  template <int SLOT>
  __device__ __forceinline__ void multiply(State& s) const {
    const uint64_t b = T::Fixed::descriptor(base, SLOT * T::kXBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma_e4m3(s.part, s.w[SLOT % 2] + i * 4, b + i * 2, i > 0);
    wgmma_commit();
  }

  // `left` blocks from this one on; more than two where not CHECK.
  template <int SLOT, bool CHECK>
  __device__ __forceinline__ void step(const Args& a, const Consumer& me, int left, State& s,
                                       float (&total)[kSums]) {
    constexpr int kAhead = (SLOT + 2) % kSlots;
    const bool more = !CHECK || left > 2;
    const bool there = more && barrier_try(base + kFull + kAhead * 8, phases >> kAhead);
    multiply<SLOT>(s);
    uint32_t scales_next = 0;
    // Always so where not CHECK: without a condition ptxas unpacks after the wait for the sums.
    if (CHECK ? left > 1 : a.workers > 0) {
      T::unpack(s.held.codes, s.w[1 - SLOT % 2]);
      scales_next = s.held.scales;
    }
    if (more) {
      if (!there) barrier_wait(base + kFull + kAhead * 8, phases >> kAhead);
      fetch<kAhead>(s.held);
    }
    wgmma_wait<0>();
    asm volatile("" : "+r"(s.scales)::"memory");  // converted here, not before the wait
    T::add(s.part, T::scales(a, s.scales), total);
    T::release(base + kEmpty + SLOT * 8, me);
    s.scales = scales_next;
  }

  __device__ void sum(const Args& a, const typename T::Shared&, const Consumer& me,
                      const Segment& segment, float (&total)[kSums]) {
    State s;
    int left = segment.end - segment.begin;
    barrier_wait(base + kFull, phases);
    fetch<0>(s.held);
    T::unpack(s.held.codes, s.w[0]);
    s.scales = s.held.scales;
    if (left > 1) {
      barrier_wait(base + kFull + 8, phases >> 1);
      fetch<1>(s.held);
    }
    for (; left >= kSlots + 2; left -= kSlots) round<false>(*this, a, me, left, s, total);
    while (round<true>(*this, a, me, left, s, total)) left -= kSlots;
  }
};

}  // namespace drover::cuda::hopper

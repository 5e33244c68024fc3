// out [M tokens, N] = x [M, K] * W^T on Hopper, for INT4 codes in symmetric groups of 128 columns.
//
// Operands are swapped: weight rows are wgmma's M, tokens its N, so that weights are the operand
// that comes from registers and codes become e4m3 or bf16 numbers on their way there, exactly:
//   e4m3: the byte n in 0..16 is the number n * 2^-9. A nibble is 2 m + s; with s it stands for
//     -(m + 1), else for m; (nibble + s * 0x81) is the byte of that times 2^-8. Three instructions
//     for four codes, one more for every other four. 2^8 goes into the tokens' scale.
//   bf16: 0x4300 | q is the number 128 + q; minus 136. Two or three instructions for two codes.
// (Swapping for the register operand: CUTLASS's mixed-input GEMM, example 55.)
//
// The sum of a group of 128 columns is made by the tensor cores, and added to the total in f32
// after a multiplication by the group's scale, as DeepGEMM does for FP8: tensor cores keep about 14
// bits of an FP8 sum, so they are never left with more than one group.
//
// A block is a producer warp and two consumer warpgroups, each with 64 (or 2 x 64) weight rows and
// all of the block's tokens: while one adds a group to its totals, the other's wgmma runs. The ring
// in shared memory has a block of 128 columns a slot: records of weights as 1D bulk copies, tokens
// through a tensor map with the 128-byte swizzle; rows past M are zeros. A consumer unpacks its
// next 16 registers of A while wgmma works on the last ones. In a cluster of two each block fetches
// half of the tokens for both.
//
// A worker (block or cluster) does whole tiles in waves, the token tile running fastest, so that
// weights come from memory once and tokens stay in L2; the tiles left over are cut by columns into
// equal shares for all workers (stream-K, Osama et al. arXiv 2301.03598). A shared tile's partial
// sums go to the workspace, and the warpgroup that comes last adds them in the order of columns:
// nobody waits, and the result does not depend on who came last.
//
// Bytes: codes and scales once from memory (0.516 byte a weight), x once for each 128 (256) weight
// rows from L2, out once.
//
// Measured on an H100 (copy 2,440 GB/s; the four linears of a Llama-2-70B layer in a graph, each
// launched under the one before, bursts; ms, in brackets cuBLASLt with FP8 weights in the same
// run):
//   M                     1      16            64            128           256          1024
//   W4A8 (share of copy)  0.170  0.170 (0.40)  0.192 (0.36)  0.277 (0.34)  0.48 (0.41)  2.0 (1.4)
//                         107 %  107 %         94 %          65 %
//   W4A16                 0.182  0.183         0.255         0.380         0.70         3.0
// Errors of W4A8 over |y|: 4.9e-5 before rounding to bf16, mean 7e-7 and largest 5e-6 of the sum of
// |terms| at K = 8192; with bf16 inputs 1e-7.
//
// What limits large M (W4A8, M = 1024, 128 x 128): not memory nor L2 (no loads at all: 1.66 of 1.82
// ms) but what the two warps of each quarter of a multiprocessor issue. A block of columns takes
// 956 cycles, in 512 of which the tensor cores work; without unpacking 1.65 ms, without adding
// groups 1.58, with neither 1.43. Did not pay: 256 rows a block (2.1), clusters (2.0), issuing by
// turns (2.0), codes loaded one block further ahead (2.1). Lost much: 128 x 256 tiles, whose totals
// spill (2.5); an arrival with .release.cluster, which fences memory (3.7); divisions in the
// producer; registers of A made between two wgmmas, which then wait for each other (pin).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backend/cuda/hopper_linear.h"
#include "backend/cuda/hopper_ptx.cuh"
#include "backend/cuda/hopper_walk.cuh"

namespace drover::cuda::hopper {

template <bool FP8, int MT, int TOKENS, int CLUSTER, int PER_SM>
struct Kernel {
  static constexpr int kThreads = 384;
  static constexpr int kPerSm = PER_SM;
  static constexpr int kSums = TOKENS / 2;  // of a thread, for 64 rows
  // Of the 3 x 168 (80) that a launch has for a thread of each warpgroup.
  static constexpr int kProducerRegisters = PER_SM == 1 ? 40 : 48;
  static constexpr int kConsumerRegisters = PER_SM == 1 ? 232 : 96;
  static constexpr int kHalves = FP8 ? 1 : 2;   // chunks of 16 A registers in a block
  static constexpr int kChunks = MT * kHalves;  // in a block of columns
  static constexpr int kXBytes = TOKENS * 128 * kHalves;
  static constexpr int kWBytes = MT * 2 * kHopperRecord;
  static constexpr int kOutTokens = TOKENS % 64 == 0 ? 64 : TOKENS % 32 == 0 ? 32 : TOKENS;
  static constexpr int kOutPitch = 144;  // bytes: 64 rows and padding
  static constexpr int kOutBytes = kOutTokens * kOutPitch;
  // Shared memory: x slots, w slots, two output tiles, two flags, full and empty barriers.
  static constexpr int slot_bytes() { return kXBytes + kWBytes + 16; }
  static constexpr int fixed_bytes() { return 1024 + 2 * kOutBytes + 16; }

  struct Shared {
    uint32_t x, w, out, flags, full, empty;
    __device__ Shared(uint32_t base, int stages) {
      x = (base + 1023) & ~1023u;
      w = x + stages * kXBytes;
      out = w + stages * kWBytes;
      flags = out + 2 * kOutBytes;
      full = flags + 16;
      empty = full + stages * 8;
    }
  };

  struct Slot {
    int index = 0;
    uint32_t phase = 0;
    __device__ void next(int stages) {
      if (++index == stages) index = 0, phase ^= 1;
    }
  };

  // One thread. Its time for a slot is latency that nothing hides, so that divisions are a
  // segment's, not a slot's.
  struct Producer {
    const Args& a;
    const CUtensorMap* map;
    const Shared& sh;
    uint32_t rank;

    // Where a segment's weights begin.
    __device__ const char* records(const Segment& s) const {
      const int tile = (s.tile / a.token_tiles * CLUSTER + static_cast<int>(rank)) * MT;
      return a.records + (int64_t{tile} * a.blocks + s.begin) * (2 * kHopperRecord);
    }
    __device__ void weights(int slot, const char* from) const {
      const uint32_t full = sh.full + slot * 8, to = sh.w + slot * kWBytes;
      barrier_expect(full, kXBytes + kWBytes);
#pragma unroll
      for (int m = 0; m < MT; ++m)
        bulk_copy(to + m * 2 * kHopperRecord,
                  from + static_cast<int64_t>(m * a.blocks) * (2 * kHopperRecord),
                  2 * kHopperRecord, full, a.policy);
    }
    __device__ void tokens(int slot, int token, int block) const {
      const uint32_t full = sh.full + slot * 8;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const uint32_t to = sh.x + slot * kXBytes + h * TOKENS * 128;
        const int column = block * 128 + h * 64;
        if constexpr (CLUSTER == 1)
          tensor_copy(to, map, column, token, full);
        else
          tensor_multicast(to + rank * (TOKENS / CLUSTER * 128), map, column,
                           token + static_cast<int>(rank) * (TOKENS / CLUSTER), full,
                           (1 << CLUSTER) - 1);
      }
    }
  };

  // The first weights are on their way before the launch before has ended.
  __device__ static void produce(const Producer& p, int worker) {
    const Args& a = p.a;
    prefetch_map(p.map);
    int ahead = 0;
    Segment s;
    for (Walk walk(a, worker); ahead < a.stages && walk.next(a, s);) {
      const char* from = p.records(s);
      for (int k = s.begin; k < s.end && ahead < a.stages; ++k, from += 2 * kHopperRecord)
        p.weights(ahead++, from);
    }
    dependency_wait();
    Slot slot;
    for (Walk walk(a, worker); walk.next(a, s);) {
      const char* from = p.records(s);
      const int token = s.tile % a.token_tiles * TOKENS;
      for (int k = s.begin; k < s.end; ++k, from += 2 * kHopperRecord) {
        if (ahead > 0) {
          --ahead;
        } else {
          barrier_wait(p.sh.empty + slot.index * 8, slot.phase ^ 1);
          p.weights(slot.index, from);
        }
        p.tokens(slot.index, token, k);
        slot.next(a.stages);
      }
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

  struct Consumer {
    int group, thread, warp, lane;  // warpgroup 0 or 1, thread of it
    uint32_t codes, scales;         // offsets in a slot's weights
  };

  // What a thread needs of chunk c of the slot whose weights are at `w`, and the 16 A registers
  // made of that.
  static constexpr int kPacks = FP8 ? 2 : 1;
  __device__ static __forceinline__ void load_codes(uint32_t w, int c, uint4 (&codes)[kPacks]) {
    const uint32_t at = w + c / kHalves * 2 * kHopperRecord;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) codes[p] = load_shared(at + (FP8 ? p : c % kHalves) * 2048);
  }
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
  }

  // By turns, when asked: the other warpgroup's wgmmas queue up behind this one's.
  __device__ static __forceinline__ void multiply(const Args& a, const Consumer& me,
                                                  float (&part)[kSums], const uint32_t (&w)[16],
                                                  uint32_t x, int half) {
    const uint64_t b = swizzled_descriptor(x + half * TOKENS * 128);
    if (a.turns) named_sync(3 + me.group, 256);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (FP8)
        wgmma_e4m3(part, w + i * 4, b + i * 2, i > 0);
      else
        wgmma_bf16(part, w + i * 4, b + i * 2, half > 0 || i > 0);
    }
    wgmma_commit();
    if (a.turns) named_arrive(4 - me.group, 256);
  }

  __device__ static __forceinline__ void release(uint32_t empty, const Consumer& me) {
    __syncwarp();
    if constexpr (CLUSTER == 1) {
      if (me.lane == 0) barrier_arrive(empty);
    } else {
      if (me.lane < CLUSTER) barrier_arrive_at(empty, me.lane);
    }
  }

  // A block of columns, whose first A registers are in `now`. With an odd number of chunks the next
  // block's are left in `other`, else in `now`. `last`: there is no next one.
  __device__ static __forceinline__ void step(const Args& a, const Shared& sh, const Consumer& me,
                                              Slot& slot, bool last, uint32_t (&now)[16],
                                              uint32_t (&other)[16], float (&part)[kSums],
                                              float (&total)[MT][kSums]) {
    const uint32_t x = sh.x + slot.index * kXBytes, w = sh.w + slot.index * kWBytes;
    const uint32_t empty = sh.empty + slot.index * 8;
    slot.next(a.stages);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      constexpr int H = kHalves;
      const int m = c / H;
      uint32_t(&next)[16] = c % 2 == 0 ? other : now;
      multiply(a, me, part, c % 2 == 0 ? now : other, x, c % H);
      const uint32_t pair = load_shared_word(w + me.scales + m * 2 * kHopperRecord);
      float2 scale;
      if (a.bf16_scales)
        scale = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
      else
        scale = __half22float2(*reinterpret_cast<const __half2*>(&pair));
      if (c + 1 == kChunks && !last) barrier_wait(sh.full + slot.index * 8, slot.phase);
      // The chunk before may still read `next`, when its sums were not waited for.
      if (c % H > 0) wgmma_wait<1>();
      if (c + 1 < kChunks || !last) {
        uint4 codes[kPacks];
        if (c + 1 < kChunks)
          load_codes(w + me.codes, c + 1, codes);
        else
          load_codes(sh.w + slot.index * kWBytes + me.codes, 0, codes);
        unpack(codes, next);
        pin(next);
      }
      if (c % H == H - 1) {
        wgmma_wait<0>();
        pin(part);
#pragma unroll
        for (int i = 0; i < kSums; ++i)
          total[m][i] = __fmaf_rn(part[i], i % 4 < 2 ? scale.x : scale.y, total[m][i]);
        pin(total[m]);
      }
      if (c + 1 == kChunks) release(empty, me);
    }
  }

  __device__ static void consume(const Args& a, const Shared& sh, int worker, uint32_t rank) {
    Consumer me;
    me.group = threadIdx.x / 128 - 1, me.thread = threadIdx.x % 128;
    me.warp = me.thread / 32, me.lane = threadIdx.x % 32;
    me.codes = me.group * kHopperRecord + me.thread * 16;
    me.scales = me.group * kHopperRecord + 4096 + (me.warp * 8 + me.lane / 4) * 4;
    dependency_wait();
    if (a.turns && me.group == 1) named_arrive(3, 256);
    Slot slot;
    Segment s;
    for (Walk walk(a, worker); walk.next(a, s);) {
      float total[MT][kSums];
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int i = 0; i < kSums; ++i) total[m][i] = 0;
      {
        float part[kSums];
        uint32_t even[16], odd[16];
        barrier_wait(sh.full + slot.index * 8, slot.phase);
        uint4 codes[kPacks];
        load_codes(sh.w + slot.index * kWBytes + me.codes, 0, codes);
        unpack(codes, even);
        pin(even);
        for (int k = s.begin;;) {
          step(a, sh, me, slot, k + 1 == s.end, even, odd, part, total);
          if (++k == s.end) break;
          if constexpr (kChunks % 2 == 1) {
            step(a, sh, me, slot, k + 1 == s.end, odd, even, part, total);
            if (++k == s.end) break;
          }
        }
      }
      const bool whole = s.begin == 0 && s.end == a.blocks;
      if (whole || add_partials(a, sh, me, worker, rank, s, total))
        finish(a, sh, me, rank, s.tile, total);
    }
    if (a.turns && me.group == 0) named_sync(3, 256);  // the arrival that is left
  }

  // Floats of a worker's partial tile: [workers, 2, blocks of the cluster, warpgroup, MT, sums / 4,
  // thread] float4.
  static constexpr int kPartials = CLUSTER * 2 * MT * kSums * 128;

  // Leaves the sums of a shared tile in the workspace; true for the last to come, which then has
  // the sums of all.
  __device__ static bool add_partials(const Args& a, const Shared& sh, const Consumer& me,
                                      int worker, uint32_t rank, const Segment& s,
                                      float (&total)[MT][kSums]) {
    const int tile = s.tile - a.whole_tiles, units = a.split_tiles * a.blocks;
    const int first = tile * a.blocks;
    const auto place = [&](int w, int begin) {
      // A worker's share begins in one tile and ends in another or the same one.
      const int64_t slot = int64_t{w} * 2 + (begin >= first ? 0 : 1);
      return reinterpret_cast<float4*>(a.partials + slot * kPartials +
                                       (static_cast<int>(rank) * 2 + me.group) * MT * kSums * 128) +
             me.thread;
    };
    float4* to = place(worker, Walk::share(a, worker, units));
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < kSums / 4; ++i)
        __stcg(to + (m * (kSums / 4) + i) * 128,
               make_float4(total[m][4 * i], total[m][4 * i + 1], total[m][4 * i + 2],
                           total[m][4 * i + 3]));
    __threadfence();
    named_sync(1 + me.group, 128);
    // The first worker with a part of this tile: the last whose share begins at or before it.
    int from = first * a.workers / units;
    while (Walk::share(a, from + 1, units) <= first) ++from;
    while (Walk::share(a, from, units) > first) --from;
    int to_worker = from;
    while (Walk::share(a, to_worker + 1, units) < first + a.blocks) ++to_worker;
    const uint32_t flag = sh.flags + me.group * 4;
    if (me.thread == 0) {
      uint32_t* counter = a.counters + (tile * CLUSTER + static_cast<int>(rank)) * 2 + me.group;
      const auto parts = static_cast<uint32_t>(to_worker - from + 1);
      const bool last = atomicAdd(counter, 1) + 1 == parts;
      if (last) *counter = 0;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(flag), "r"(static_cast<int>(last)) : "memory");
    }
    named_sync(1 + me.group, 128);
    const bool last = load_shared_word(flag) != 0;
    named_sync(1 + me.group, 128);  // the flag may be written again
    if (!last) return false;
    __threadfence();
    for (int w = from; w <= to_worker; ++w) {
      const float4* at = place(w, Walk::share(a, w, units));
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) {
          const float4 v = __ldcg(at + (m * (kSums / 4) + i) * 128);
          const float add[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int j = 0; j < 4; ++j)
            total[m][4 * i + j] = w == from ? add[j] : total[m][4 * i + j] + add[j];
        }
    }
    return true;
  }

  __device__ static uint32_t pack(float a, float b) {
    const __nv_bfloat162 r = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&r);
  }

  __device__ static void finish(const Args& a, const Shared& sh, const Consumer& me, uint32_t rank,
                                int tile, float (&total)[MT][kSums]) {
    const int token = tile % a.token_tiles * TOKENS;
    const int64_t row =
        int64_t{tile / a.token_tiles * CLUSTER + static_cast<int>(rank)} * MT * 128 + me.group * 64;
    if constexpr (FP8) {
#pragma unroll
      for (int j = 0; j < TOKENS / 8; ++j) {
        const int t = token + j * 8 + me.lane % 4 * 2;
        const float s0 = t < a.rows ? __ldg(a.in_scale + t) * 256.0f : 0.0f;
        const float s1 = t + 1 < a.rows ? __ldg(a.in_scale + t + 1) * 256.0f : 0.0f;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) total[m][4 * j + i] *= i % 2 == 0 ? s0 : s1;
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      if (a.f32_out || a.n % 8 != 0)
        store_each(a, me, token, row + m * 128, total[m]);
      else
        store_rows(a, sh, me, token, row + m * 128, total[m]);
    }
  }

  // From the registers: logits, and widths that 16 bytes do not divide.
  __device__ static void store_each(const Args& a, const Consumer& me, int token, int64_t row,
                                    const float (&sums)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int t = token + i / 4 * 8 + me.lane % 4 * 2 + i % 2;
      const int64_t r = row + me.warp * 16 + me.lane / 4 + i % 4 / 2 * 8;
      if (t >= a.rows || r >= a.n) continue;
      if (a.f32_out)
        static_cast<float*>(a.out)[t * a.n + r] = sums[i];
      else
        static_cast<__nv_bfloat16*>(a.out)[t * a.n + r] = __float2bfloat16_rn(sums[i]);
    }
  }

  // Through shared memory: 64 features of a token are 128 bytes.
  __device__ static void store_rows(const Args& a, const Shared& sh, const Consumer& me, int token,
                                    int64_t row, const float (&sums)[kSums]) {
    const uint32_t buffer = sh.out + me.group * kOutBytes;
#pragma unroll
    for (int first = 0; first < TOKENS; first += kOutTokens) {
      named_sync(1 + me.group, 128);
      const uint32_t to = buffer + me.warp * 32 + me.lane / 8 % 2 * 16;
#pragma unroll
      for (int j = 0; j < kOutTokens / 8; j += 2) {
        const float* d = sums + (first / 8 + j) * 4;
        if constexpr (kOutTokens == 8)
          store_transposed(to + me.lane % 8 * kOutPitch, pack(d[0], d[1]), pack(d[2], d[3]));
        else
          store_transposed(to + (j * 8 + me.lane / 16 * 8 + me.lane % 8) * kOutPitch,
                           pack(d[0], d[1]), pack(d[2], d[3]), pack(d[4], d[5]), pack(d[6], d[7]));
      }
      named_sync(1 + me.group, 128);
#pragma unroll
      for (int i = me.thread; i < kOutTokens * 8; i += 128) {
        const int t = token + first + i / 8;
        const int64_t r = row + i % 8 * 8;
        if (t < a.rows && r < a.n)
          *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(a.out) + t * a.n + r) =
              load_shared(buffer + i / 8 * kOutPitch + i % 8 * 16);
      }
    }
  }

  __device__ static void run(const Args& a, const CUtensorMap* map, char* shared) {
    const Shared sh(shared_address(shared), a.stages);
    const uint32_t rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int worker = static_cast<int>(blockIdx.x) / CLUSTER;
    if (threadIdx.x == 0) {
      for (int i = 0; i < a.stages; ++i) {
        barrier_init(sh.full + i * 8, 1);
        barrier_init(sh.empty + i * 8, 8 * CLUSTER);  // a warp of either warpgroup, either block
      }
      barrier_init_fence();
    }
    if constexpr (CLUSTER > 1)
      cluster_sync();
    else
      __syncthreads();
    dependency_launch();
    if (threadIdx.x < 128) {
      fewer_registers<kProducerRegisters>();
      if (threadIdx.x == 0) produce({a, map, sh, rank}, worker);
    } else {
      more_registers<kConsumerRegisters>();
      consume(a, sh, worker, rank);
    }
    // The other block's arrivals come to this one's barriers.
    if constexpr (CLUSTER > 1) {
      __syncwarp();
      cluster_sync();
    }
  }
};

template <typename K>
__global__ void __launch_bounds__(K::kThreads, K::kPerSm)
    linear_kernel(const __grid_constant__ Args a, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  K::run(a, &map, shared);
#endif
}

template <typename K, int CLUSTER>
cudaError_t launch(const Args& a, const CUtensorMap& map, const HopperConfig& c, cudaStream_t s) {
  // Raised once to what the device has; the attribute is the function's, not the call's.
  static const cudaError_t raised = cudaFuncSetAttribute(
      linear_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024);
  if (raised != cudaSuccess) return raised;
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (CLUSTER > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = CLUSTER;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (c.variant.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(c.workers * CLUSTER));
  launch.blockDim = dim3(K::kThreads);
  launch.dynamicSmemBytes = static_cast<size_t>(c.shared_bytes);
  launch.stream = s;
  launch.attrs = attributes;
  launch.numAttrs = count;
  return cudaLaunchKernelEx(&launch, linear_kernel<K>, a, map);
}

// What a launch needs to know of a kernel.
struct Entry {
  cudaError_t (*launch)(const Args&, const CUtensorMap&, const HopperConfig&,
                        cudaStream_t) = nullptr;
  int slot_bytes = 0, fixed_bytes = 0, partials = 0;
};
template <bool FP8, int MT, int TOKENS, int CLUSTER, int PER_SM>
Entry entry() {
  using K = Kernel<FP8, MT, TOKENS, CLUSTER, PER_SM>;
  return {&launch<K, CLUSTER>, K::slot_bytes(), K::fixed_bytes(), K::kPartials};
}

// The kernel of a variant; its launch is null when there is none. One file each (build time).
Entry find_fp8(const HopperVariant& v);
Entry find_bf16(const HopperVariant& v);

template <bool FP8>
Entry find(const HopperVariant& v) {
  const int what = v.tokens * 100 + v.row_tiles * 10 + v.cluster;
  if (what == 811) return entry<FP8, 1, 8, 1, 2>();
  if (what == 1611) return entry<FP8, 1, 16, 1, 2>();
  if (what == 3211) return entry<FP8, 1, 32, 1, 2>();
  if (what == 6411) return entry<FP8, 1, 64, 1, 1>();
  if (what == 9621) return entry<FP8, 2, 96, 1, 1>();
  if (what == 12811) return entry<FP8, 1, 128, 1, 1>();
  if (what == 12812) return entry<FP8, 1, 128, 2, 1>();
  return {};
}

}  // namespace drover::cuda::hopper

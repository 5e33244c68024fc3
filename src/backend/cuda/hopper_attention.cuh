// Prefill on Hopper: attention of a step's chunks over the FP8 cache, heads of 128 features, on
// wgmma.
//
// A block has three warpgroups and goes through items: 128 query vectors (rows times heads of a
// group) of one KV head. One warpgroup, the converter, fetches 128 tokens at a time by cp.async,
// ahead over the ends of items, and turns codes into f16, exactly, in the swizzled layout that
// wgmma reads. The two others, consumers, have 64 query vectors each, in registers: scores of the
// next block of tokens are summed while this block's values are, and one consumer's softmax runs
// under the other's products: they take turns (FlashAttention-3, Shah et al. arXiv 2407.08608).
//
// Numbers: as in attention_tile.cuh queries become f16 after a power of two brings a vector's
// largest element to 2^14; a key's scale multiplies its column of scores, a value's its column of
// probabilities, in f32. Probabilities times scales become f16 in a unit, a power of two that
// brings the largest scale that the row has seen to 2^14. It is put into the softmax's exponent, so
// into both the outputs and the sum that they are divided by, and needs nothing else.
//
// Order of sums: blocks of 128 tokens one after the other, from position 0, rescaled by the largest
// score so far. So a row's bits depend on its position and the cache only, and cutting a prompt
// into chunks changes none; those of decode (attention_kernel.cuh) differ by rounding.
//
// Off by default (CudaOptions::wgmma_prefill): it was compiled, and its source was run in an
// emulation of a block on the CPU, but it has not met a GPU, so nothing here is measured.
//
// A block of 128 tokens is 2,048 cycles of a multiprocessor's tensor cores (8.4 MFLOP at 4,096 a
// cycle). Beside them, for a quarter of the multiprocessor: 2 x 680 instructions of consumers
// (SASS, no spills; 1,132 where rows are masked, with 20 spills) and about 450 of the converter.
// Shared memory, at 128 bytes a cycle: wgmma's operands 1,024 cycles, f16 512, codes in and out
// 512, scales 256 to 512. So shared memory is the limit that is expected, at some 2,450 cycles.
#pragma once

#include "backend/cuda/attention_ring.cuh"
#include "backend/cuda/hopper_ptx.cuh"

namespace drover::cuda {
namespace hopper_attention {

using attention_detail::AttentionArgs;
using attention_detail::Bf16;
using attention_detail::Context;
using attention_detail::power_of_two;
using namespace hopper;

constexpr int kFeatures = 128, kVectors = 128, kBlock = 128;  // kBlock: tokens
constexpr int kThreads = 384, kConverterRegisters = 40, kConsumerRegisters = 232;
// What a block has at its start: setmaxnreg would wait for more for good.
static_assert(kConverterRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8));

// Shared memory. Tiles: [2 halves of 64 features][128 tokens][128 bytes], swizzled.
constexpr int kTile = kBlock * kFeatures * 2, kHalf = kTile / 2, kRaw = kBlock * kFeatures;
constexpr int kSlots = 2, kRawSlots = 4, kScaleSlots = 8;
constexpr int kKeys = 0, kValues = kKeys + kSlots * kTile, kCodes = kValues + kSlots * kTile;
constexpr int kScales = kCodes + kRawSlots * kRaw;             // [8][keys', values'][128] f32
constexpr int kTops = kScales + kScaleSlots * 2 * kBlock * 4;  // [8][4] largest of values'
constexpr int kBarriers = kTops + kScaleSlots * 16;
constexpr int kOrder = kBarriers + 4 * kSlots * 8;    // [384] words that nobody reads
constexpr int kBytes = kOrder + kThreads * 4 + 1024;  // and what aligns it
static_assert(kBytes <= 227 * 1024);
enum Barrier : int { kKeyFull, kKeyEmpty, kValueFull, kValueEmpty };
__device__ inline uint32_t barrier(uint32_t memory, Barrier b, int slot) {
  return memory + kBarriers + (b * kSlots + slot) * 8;
}

// The items of a block, and in them the runs of rows of one sequence. Heaviest first where
// positions ascend over the step. All lanes of a warp together.
struct Runs {
  int turn = 0, tile_first = 0, past = 0;
  int begin = 0, end = 0;  // rows of the run
  int slot = 0, kv_head = 0;

  __device__ bool next(const AttentionArgs& a) {
    if (end == past) {
      const int rows = a.end_row - a.first_row,
                tiles = (rows + a.rows_a_block - 1) / a.rows_a_block;
      const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
      const int item = turn * grid + (turn % 2 == 0 ? block : grid - 1 - block);
      if (item >= tiles * a.cache.kv_heads) return false;
      ++turn;
      kv_head = item % a.cache.kv_heads;
      tile_first = a.first_row + (tiles - 1 - item / a.cache.kv_heads) * a.rows_a_block;
      past = min(tile_first + a.rows_a_block, a.end_row);
      end = tile_first;
    }
    begin = end;
    slot = __ldg(a.rows.slot + begin);
    const int lane = threadIdx.x % 32;
    for (uint32_t same = ~0u; same == ~0u && end < past; end += __popc(same)) {
      const bool mine = end + lane < past && __ldg(a.rows.slot + end + lane) == slot;
      // Ones up to the first that is another's.
      const uint32_t other = ~__ballot_sync(~0u, mine);
      same = other == 0 ? ~0u : (other & (0u - other)) - 1u;
    }
    return true;
  }
};

__device__ __forceinline__ void arrive_if(uint32_t at, bool yes) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(at),
      "r"(static_cast<int>(yes))
      : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_shared_float(uint32_t at, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
// 16 bytes to shared memory, or zeros.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until only so many groups of this thread's copies are on their way.
template <int PENDING>
__device__ __forceinline__ void copies_wait_for() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Between this thread's writes and wgmma's reads of shared memory.
__device__ __forceinline__ void wgmma_reads_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Fetches codes and scales, three tiles (keys, values, keys, ...) ahead of what it converts.
struct Converter {
  const AttentionArgs& a;
  uint32_t memory;
  Runs runs;
  Context context;
  int block = 0, blocks = 0, issued = 0;
  bool more = true;
  int vectors[8], scale_vector = 0;
  static constexpr int kAhead = kRawSlots - 1;

  // A thread's pieces of 16 codes: chunk() of rows row() + 16 i. Lanes of a quarter warp store to
  // different banks.
  __device__ static int chunk() { return threadIdx.x % 8; }
  __device__ static int row() { return static_cast<int>(threadIdx.x) / 8 ^ chunk() >> 2; }

  __device__ bool next_block() {
    if (++block < blocks) return true;
    do {
      if (!runs.next(a)) return false;
    } while (runs.slot < 0);
    const int last = __ldg(a.rows.position + runs.end - 1);
    context = {a.rows.page_table + int64_t{runs.slot} * a.rows.max_pages,
               a.cache.page_tokens,
               a.page_shift,
               a.cache.kv_heads,
               runs.kv_head,
               last + 1};
    block = 0, blocks = last / kBlock + 1;
    return true;
  }
  // Tokens past the end become zeros.
  __device__ void issue() {
    const bool key = issued % 2 == 0;
    if (key && more) {
      more = next_block();
      if (more) {
#pragma unroll
        for (int i = 0; i < 8; ++i) vectors[i] = context.vector(block * kBlock + row() + 16 * i);
        scale_vector = context.vector(block * kBlock + static_cast<int>(threadIdx.x));
      }
    }
    if (more) {
      const auto* pool = static_cast<const uint8_t*>(key ? a.cache.k : a.cache.v) + chunk() * 16;
      const uint32_t to =
          memory + kCodes + issued % kRawSlots * kRaw + static_cast<int>(threadIdx.x) * 16;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        copy_16(to + i * 2048, pool + int64_t{vectors[i]} * kFeatures,
                block * kBlock + row() + 16 * i < context.length);
      // Both scales with the keys: their barrier tells of both.
      if (key) {
        const bool there = block * kBlock + static_cast<int>(threadIdx.x) < context.length;
        copy_float(scale_at(issued, true), a.cache.k_scale + scale_vector, there);
        copy_float(scale_at(issued, false), a.cache.v_scale + scale_vector, there);
      }
      ++issued;
    }
    copies_commit();
  }
  __device__ uint32_t scale_at(int tile, bool key) const {
    return memory + kScales + (tile / 2 % kScaleSlots * 2 + (key ? 0 : 1)) * kBlock * 4 +
           static_cast<int>(threadIdx.x) * 4;
  }

  __device__ void run() {
    const uint32_t place =
        (chunk() >> 2) * kHalf + row() * 128 + (((chunk() & 3) * 2 ^ (row() & 7)) << 4);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = 0; i < kAhead; ++i) issue();
    for (int tile = 0; tile < issued; ++tile) {
      issue();
      copies_wait_for<kAhead>();
      const bool key = tile % 2 == 0;
      const int slot = tile / 2 % kSlots;
      if (key) values_top(tile, lane, warp);
      barrier_wait(barrier(memory, key ? kKeyEmpty : kValueEmpty, slot), tile / 4 % 2 ^ 1);
      const uint32_t from =
          memory + kCodes + tile % kRawSlots * kRaw + static_cast<int>(threadIdx.x) * 16;
      const uint32_t to = memory + (key ? kKeys : kValues) + slot * kTile + place;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint4 codes = load_shared(from + i * 2048);
        uint32_t x[8];
        attention_detail::fp8_pairs(codes.x, x[0], x[1]);
        attention_detail::fp8_pairs(codes.y, x[2], x[3]);
        attention_detail::fp8_pairs(codes.z, x[4], x[5]);
        attention_detail::fp8_pairs(codes.w, x[6], x[7]);
        store_shared(to + i * 2048, x[0], x[1], x[2], x[3]);
        store_shared((to ^ 16) + i * 2048, x[4], x[5], x[6], x[7]);
      }
      wgmma_reads_fence();
      __syncwarp();
      arrive_if(barrier(memory, key ? kKeyFull : kValueFull, slot), lane == 0);
    }
  }
  __device__ void values_top(int tile, int lane, int warp) const {
    float top = __uint_as_float(load_shared_word(scale_at(tile, false)));
    for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    if (lane == 0) store_shared_float(memory + kTops + tile / 2 % kScaleSlots * 16 + warp * 4, top);
  }
};

// d [64, 128] += a [64, 16] b, both f16: b is [128, 16] rows of k, or, transposed, [16, 128].
template <int TRANSPOSED>
__device__ __forceinline__ void wgmma_f16(float (&d)[64], const uint32_t* a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" DROVER_REGS64
      "}, {%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}"
      : DROVER_D64(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(TRANSPOSED));
}
// Descriptors of 128-byte swizzle whose groups of 8 rows are 1,024 bytes apart. Only the lower word
// depends on the address: with halves of 64 features kHalf apart where tokens are k.
__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
  return uint64_t{low} | uint64_t{64u | 1u << 30} << 32;
}
__device__ __forceinline__ uint32_t values_low(uint32_t address) {
  return address >> 4 | uint32_t{kHalf >> 4} << 16;
}

// A consumer warpgroup. A thread has vectors v[0] and v[1] = v[0] + 8, of which scores and outputs
// 4 j + 2 i + e are token or feature 8 j + 2 t + e of v[i].
struct Consumer {
  const AttentionArgs& a;
  uint32_t memory;
  int which;        // 0 or 1
  int done = 0;     // blocks whose scores were summed
  int position[2];  // of the vectors; -1: none
  float o[64], s[64];
  uint32_t q[32], p[32];
  float top[2], sum[2];  // largest score, and this thread's part of the sum
  float base[2];         // what is subtracted from scores: top less the unit's exponent
  float value_top[2];    // largest scale of values seen
  float unit[2];         // of scores
  float rescale[2];

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int t() { return threadIdx.x % 4; }
  __device__ void take_turn() const { named_sync(1 + which, 256); }
  __device__ void pass_turn() const { named_arrive(2 - which, 256); }

  __device__ void scores() {
    const uint32_t keys = (memory + kKeys + done % kSlots * kTile) >> 4 | 1u << 16;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      wgmma_f16<0>(s, q + 4 * k, descriptor(keys + k / 4 * (kHalf >> 4) + k % 4 * 2), k > 0);
    wgmma_commit();
  }
  __device__ void values(int slot) {
    const uint32_t values = values_low(memory + kValues + slot * kTile);
#pragma unroll
    for (int k = 0; k < 8; ++k) wgmma_f16<1>(o, p + 4 * k, descriptor(values + k * 128), true);
    wgmma_commit();
  }
  __device__ void wait_keys() const {
    barrier_wait(barrier(memory, kKeyFull, done % kSlots), done / kSlots % 2);
  }
  __device__ void wait_values(int of) const {
    barrier_wait(barrier(memory, kValueFull, of % kSlots), of / kSlots % 2);
  }

  // What makes x is done before what follows: ptxas would wait for wgmma at once and begin a
  // softmax's exponentials after, or load all of its scales before the first is needed. It moves
  // neither across a store.
  __device__ void keep_order(float x) const {
    store_shared_float(memory + kOrder + static_cast<int>(threadIdx.x) * 4, x);
  }

  // Of s, the scores of `block`: probabilities times the values' scales.
  template <bool MASK>
  __device__ __forceinline__ void softmax(int block) {
    const uint32_t scales = memory + kScales + done % kScaleSlots * 2 * kBlock * 4 + t() * 8;
    int limit[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) limit[i] = position[i] - block * kBlock - 2 * t();
    float largest[2] = {top[0], top[1]}, seen[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 scale = load_shared_pair(scales + j * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * j + i];
        x = __fmul_rn(x, i % 2 == 0 ? scale.x : scale.y);
        if (MASK && 8 * j + i % 2 > limit[i / 2]) x = -INFINITY;
        largest[i / 2] = fmaxf(largest[i / 2], x);
      }
    }
    if constexpr (MASK) {
      keep_order(largest[0] + largest[1]);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 scale = load_shared_pair(scales + kBlock * 4 + j * 32);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * j <= limit[i]) seen[i] = fmaxf(seen[i], scale.x);
          if (8 * j + 1 <= limit[i]) seen[i] = fmaxf(seen[i], scale.y);
        }
      }
    } else {
      const uint4 tops = load_shared(memory + kTops + done % kScaleSlots * 16);
      seen[0] = seen[1] = fmaxf(fmaxf(__uint_as_float(tops.x), __uint_as_float(tops.y)),
                                fmaxf(__uint_as_float(tops.z), __uint_as_float(tops.w)));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 1; n < 4; n *= 2) {
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], n));
        if (MASK) seen[i] = fmaxf(seen[i], __shfl_xor_sync(~0u, seen[i], n));
      }
      top[i] = largest[i], value_top[i] = fmaxf(value_top[i], seen[i]);
      // Tiny scales stay below, so that sums stay finite.
      const int exponent = max(static_cast<int>(__float_as_uint(value_top[i]) >> 23), 41);
      const float now = __fsub_rn(__fmul_rn(top[i], unit[i]), static_cast<float>(141 - exponent));
      rescale[i] = power_of_two(__fsub_rn(base[i], now));
      base[i] = now;
      sum[i] = __fmul_rn(sum[i], rescale[i]);
    }
    if (MASK) keep_order(base[0] + base[1]);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 scale = load_shared_pair(scales + kBlock * 4 + j * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * j + i];
        x = power_of_two(__fmaf_rn(x, unit[i / 2], -base[i / 2]));
        sum[i / 2] = __fadd_rn(sum[i / 2], x);
        x = __fmul_rn(x, i % 2 == 0 ? scale.x : scale.y);
        // A probability of 0 stays 0 under a scale of NaN.
        if (MASK && 8 * j + i % 2 > limit[i / 2]) x = 0;
      }
    }
  }
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = attention_detail::pack<kKvFp8>(s[2 * i], s[2 * i + 1]);
  }

  template <bool MASK>
  __device__ __forceinline__ void first() {
    wait_keys();
    wgmma_fence();
    scores();
    wgmma_wait<0>();
    pin(s);
    arrive_if(barrier(memory, kKeyEmpty, done % kSlots), lane() == 0);
    softmax<MASK>(0);
    pack();
    ++done;
  }
  // Scores and softmax of `block`, values of the one before.
  template <bool MASK>
  __device__ __forceinline__ void step(int block) {
    wait_keys();
    wait_values(done - 1);
    take_turn();
    pin(o), pin(p);
    wgmma_fence();
    scores();
    values((done - 1) % kSlots);
    pass_turn();
    wgmma_wait<1>();
    pin(s);
    arrive_if(barrier(memory, kKeyEmpty, done % kSlots), lane() == 0);
    softmax<MASK>(block);
    keep_order(sum[0] + sum[1]);
    wgmma_wait<0>();
    pin(o);
    arrive_if(barrier(memory, kValueEmpty, (done - 1) % kSlots), lane() == 0);
#pragma unroll
    for (int j = 0; j < 64; ++j) o[j] = __fmul_rn(o[j], rescale[j / 2 % 2]);
    pack();
    ++done;
  }
  __device__ __forceinline__ void last() {
    wait_values(done - 1);
    pin(o), pin(p);
    wgmma_fence();
    values((done - 1) % kSlots);
    wgmma_wait<0>();
    pin(o);
    arrive_if(barrier(memory, kValueEmpty, (done - 1) % kSlots), lane() == 0);
  }

  __device__ void load_query(int i, const Bf16* vector) {
    float largest = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t& w = q[4 * k + 2 * h + i];
        w = vector == nullptr
                ? 0u
                : *reinterpret_cast<const uint32_t*>(vector + 16 * k + 8 * h + 2 * t());
        largest = fmaxf(largest, fmaxf(fabsf(__uint_as_float(w << 16)),
                                       fabsf(__uint_as_float(w & 0xffff0000u))));
      }
    for (int n = 1; n < 4; n *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, n));
    const attention_detail::Unit found = attention_detail::unit_for(largest);
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      uint32_t& w = q[2 * k + i];
      w = attention_detail::pack<kKvFp8>(__uint_as_float(w << 16) * found.up,
                                         __uint_as_float(w & 0xffff0000u) * found.up);
    }
    unit[i] = __fmul_rn(found.down, a.scale);
  }

  __device__ void run() {
    if (which == 1) pass_turn();
    Runs runs;
    const int64_t width = int64_t{a.heads + 2 * a.cache.kv_heads} * kFeatures;
    while (runs.next(a)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Place at = place(runs, i);
        position[i] = at.row >= 0 && runs.slot >= 0 ? __ldg(a.rows.position + at.row) : -1;
        load_query(i, position[i] >= 0 ? a.qkv + at.row * width + at.feature : nullptr);
        top[i] = base[i] = -INFINITY, sum[i] = value_top[i] = 0;
      }
#pragma unroll
      for (float& x : o) x = 0;
      if (runs.slot >= 0) {
        const int first_position = __ldg(a.rows.position + runs.begin);
        const int blocks = __ldg(a.rows.position + runs.end - 1) / kBlock + 1;
        const int whole = (first_position + 1) / kBlock;  // blocks that all rows see all of
        if (whole > 0)
          first<false>();
        else
          first<true>();
        int block = 1;
        for (; block < whole; ++block) step<false>(block);
        for (; block < blocks; ++block) step<true>(block);
        last();
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int n = 1; n < 4; n *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], n);
        const Place at = place(runs, i);
        if (at.row < 0) continue;
        const float inverse = runs.slot < 0 ? 0.0f : __fdiv_rn(1.0f, sum[i]);
        Bf16* to = a.out + at.row * a.out_stride + at.feature + 2 * t();
#pragma unroll
        for (int j = 0; j < 16; ++j)
          *reinterpret_cast<__nv_bfloat162*>(to + 8 * j) = __floats2bfloat162_rn(
              __fmul_rn(o[4 * j + 2 * i], inverse), __fmul_rn(o[4 * j + 2 * i + 1], inverse));
      }
    }
  }
  struct Place {
    int row;  // -1: no vector of the run
    int64_t feature;
  };
  __device__ Place place(const Runs& runs, int i) const {
    const int v = which * 64 + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane() / 4 + 8 * i;
    const int r = a.group_shift >= 0 ? v >> a.group_shift : v / a.group, row = runs.tile_first + r;
    const bool there = r < a.rows_a_block && row >= runs.begin && row < runs.end;
    return {there ? row : -1, (int64_t{runs.kv_head} * a.group + v - r * a.group) * kFeatures};
  }
};

__global__ void __launch_bounds__(kThreads, 1)
    wgmma_prefill_kernel(const __grid_constant__ AttentionArgs a) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const uint32_t memory = (shared_address(dynamic) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      barrier_init(barrier(memory, kKeyFull, slot), 4);
      barrier_init(barrier(memory, kKeyEmpty, slot), 8);
      barrier_init(barrier(memory, kValueFull, slot), 4);
      barrier_init(barrier(memory, kValueEmpty, slot), 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  dependency_launch();
  dependency_wait();
  if (threadIdx.x < 128) {
    fewer_registers<kConverterRegisters>();
    Converter c{a, memory};
    c.run();
  } else {
    more_registers<kConsumerRegisters>();
    Consumer c{a, memory, static_cast<int>(threadIdx.x) / 128 - 1};
    c.run();
  }
}

}  // namespace hopper_attention
}  // namespace drover::cuda

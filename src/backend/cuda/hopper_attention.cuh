// Prefill on Hopper: attention of a step's chunks over the FP8 cache, heads of 128 features, on
// wgmma.
//
// A block has three warpgroups and goes through items (hopper_prefill.cuh): 128 query vectors (rows
// times heads of a group) of one KV head. One warpgroup, the converter (hopper_converter.cuh), puts
// keys and values of 128 tokens at a time into shared memory, ahead over the ends of items. The two
// others, consumers, have 64 query vectors each: scores of the next block of tokens are summed
// while this block's values are, and one consumer's softmax runs under the other's products: they
// take turns (FlashAttention-3, Shah et al. arXiv 2407.08608).
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
// A block of 128 tokens is 2,048 cycles of a multiprocessor's tensor cores (8.4 MFLOP at 4,096 a
// cycle), and about as many of shared memory at 128 bytes a cycle: wgmma's operands 1,280, f16 in
// 512, scales 256. It takes 3,850 (H200): a consumer's own chain is the longest.
#pragma once

#include "backend/cuda/hopper_converter.cuh"

namespace drover::cuda {
namespace hopper_attention {

// d [64, 128] += a [64, 16] b [16, 128], both f16: a in registers, b's rows of n.
__device__ __forceinline__ void wgmma_f16_transposed(float (&d)[64], const uint32_t* a,
                                                     uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" DROVER_REGS64
               "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : DROVER_D64(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// The same with a in shared memory, [64, 16] rows of k, and b's rows of k.
__device__ __forceinline__ void wgmma_f16(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" DROVER_REGS64
      "}, %64, %65, p, 1, 1, 0, 0;\n}"
      : DROVER_D64(0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
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
  int which;             // 0 or 1
  int group_inverse;     // 65536 / group, rounded up
  int thread;            // of the warpgroup
  uint32_t queries = 0;  // low word of their descriptor
  uint32_t done = 0;     // blocks whose softmax is done
  bool ahead = false;    // the scores of the next are there
  int position[2];       // of the vectors; -1: none
  float o[64], s[64];
  uint32_t p[32];
  float2 scale[8];       // of the tokens 8 j + 2 t and the next, of half the block at a time
  float top[2], sum[2];  // largest score, and this thread's part of the sum
  float base[2];         // what is subtracted from scores: top less the unit's exponent
  float value_top[2];    // largest scale of values seen
  float unit[2];         // of scores
  float rescale[2];

  __device__ Consumer(const AttentionArgs& arguments, uint32_t shared, int inverse)
      : a(arguments), memory(shared), group_inverse(inverse) {
    // Hidden from the compiler, which would rather ask for it again, slowly, than keep it.
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    which = __shfl_sync(~0u, thread / 128, 0) - 1, thread %= 128;
  }
  // The same, and what is made of it is not kept over the sums: it would be spilled.
  __device__ int thread_now() const {
    int now;
    asm volatile("mov.u32 %0, %1;" : "=r"(now) : "r"(thread));
    return now;
  }
  __device__ bool leads() const { return thread % 32 == 0; }
  __device__ int t() const { return thread % 4; }
  __device__ void take_turn() const { named_sync(kTurns + which, 256); }
  __device__ void pass_turn() const { named_arrive(kTurns + 1 - which, 256); }

  __device__ void scores() {
    const uint32_t keys = (memory + kKeys + done % kSlots * kTile) >> 4 | 1u << 16;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      wgmma_f16(s, descriptor(queries + k / 4 * (kQueryHalf >> 4) + k % 4 * 2),
                descriptor(keys + k / 4 * (kHalf >> 4) + k % 4 * 2), k > 0);
    wgmma_commit();
  }
  __device__ void values() {  // of the block before
    const uint32_t values = values_low(memory + kValues + (done - 1) % kSlots * kTile);
#pragma unroll
    for (int k = 0; k < 8; ++k) wgmma_f16_transposed(o, p + 4 * k, descriptor(values + k * 128));
    wgmma_commit();
  }
  __device__ __forceinline__ void load_scales(int of_values, int half) {
    const uint32_t from = memory + kScales + done % kScaleSlots * 3 * kScaleBytes +
                          of_values * kScaleBytes + half * kScaleBytes / 2 + t() * 8;
#pragma unroll
    for (int j = 0; j < 8; ++j) scale[j] = load_shared_pair(from + j * 32);
  }
  __device__ void wait_keys() const {
    barrier_wait(barrier(memory, kKeyFull, done % kSlots), done / kSlots % 2);
  }
  __device__ void keys_read() const {
    arrive_if(barrier(memory, kKeyEmpty, done % kSlots), leads());
  }
  __device__ void wait_values() const {
    barrier_wait(barrier(memory, kValueFull, (done - 1) % kSlots), (done - 1) / kSlots % 2);
  }
  __device__ void values_read() const {
    arrive_if(barrier(memory, kValueEmpty, (done - 1) % kSlots), leads());
  }

  // What makes x is done before what follows: ptxas would wait for wgmma at once and begin a
  // softmax's exponentials after, or load all of its scales before the first is needed. It moves
  // neither across a store.
  __device__ void keep_order(float x) const {
    store_shared_float(memory + kOrder + (128 * which + thread) * 4, x);
  }

  // The largest scale of values in the block's tokens up to `limit`, NaN if there is one.
  template <bool MASK>
  __device__ __forceinline__ float largest_scale(int limit) const {
    const uint4 tops = load_shared(memory + kTops + done % kScaleSlots * 16);
    const float x = __uint_as_float(tops.x), y = __uint_as_float(tops.y),
                z = __uint_as_float(tops.z), w = __uint_as_float(tops.w);
    if (!MASK) return larger_or_nan(larger_or_nan(x, y), larger_or_nan(z, w));
    const int last = min(max(limit, 0), kBlock - 1);
    float seen = __uint_as_float(load_shared_word(
        memory + kScales + done % kScaleSlots * 3 * kScaleBytes + 2 * kScaleBytes + last * 4));
    if (last >= 32) seen = larger_or_nan(seen, x);
    if (last >= 64) seen = larger_or_nan(seen, y);
    if (last >= 96) seen = larger_or_nan(seen, z);
    return limit < 0 ? 0.0f : seen;
  }

  // Of s, the scores of `block`, with the keys' scales: probabilities times the values' scales.
  template <bool MASK>
  __device__ __forceinline__ void softmax(int block) {
    int limit[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) limit[i] = position[i] - block * kBlock - 2 * t();
    float largest[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (j == 8) load_scales(0, 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * j + i];
        x = __fmul_rn(x, i % 2 == 0 ? scale[j % 8].x : scale[j % 8].y);
        if (MASK && 8 * j + i % 2 > limit[i / 2]) x = -INFINITY;
        largest[i / 2] = fmaxf(largest[i / 2], x);
      }
    }
    load_scales(1, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float seen = largest_scale<MASK>(position[i] - block * kBlock);
#pragma unroll
      for (int n = 1; n < 4; n *= 2)
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], n));
      top[i] = largest[i], value_top[i] = fmaxf(value_top[i], seen);
      // Tiny scales stay below, so that sums stay finite.
      const int exponent = max(static_cast<int>(__float_as_uint(value_top[i]) >> 23), 41);
      const float now = __fsub_rn(__fmul_rn(top[i], unit[i]), static_cast<float>(141 - exponent));
      rescale[i] = power_of_two(__fsub_rn(base[i], now));
      base[i] = now;
      // A NaN among the scales that the row sees makes it NaN, here where products do not.
      sum[i] = MASK ? __fadd_rn(__fmul_rn(sum[i], rescale[i]), __fsub_rn(seen, seen))
                    : __fmul_rn(sum[i], rescale[i]);
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (j == 8) load_scales(1, 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * j + i];
        x = power_of_two(__fmaf_rn(x, unit[i / 2], -base[i / 2]));
        sum[i / 2] = __fadd_rn(sum[i / 2], x);
        x = __fmul_rn(x, i % 2 == 0 ? scale[j % 8].x : scale[j % 8].y);
        // A probability of 0 stays 0 under a scale of NaN.
        if (MASK) x = fmaxf(x, 0.0f);
      }
    }
  }
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = attention_detail::pack<kKvFp8>(s[2 * i], s[2 * i + 1]);
  }

  // A run's first block. With MASK, which every run's last block has: `fetch` is the item whose
  // queries are sent for, or 0.
  template <bool MASK>
  __device__ __forceinline__ void first(uint32_t fetch = 0) {
    if (!ahead) {
      wait_keys();
      wgmma_fence();
      scores();
      wgmma_wait<0>();
      pin(s);
      keys_read();
    }
    if (MASK && fetch > 0) fetch_queries(fetch);
    load_scales(0, 0);
    softmax<MASK>(0);
    pack();
    ++done;
  }
  // Scores and softmax of `block`, values of the one before.
  template <bool MASK>
  __device__ __forceinline__ void step(int block, uint32_t fetch = 0) {
    wait_keys();
    wait_values();
    if (MASK && fetch > 0) fetch_queries(fetch);
    take_turn();
    pin(o), pin(p);
    wgmma_fence();
    scores();
    values();
    pass_turn();
    load_scales(0, 0);
    wgmma_wait<1>();
    pin(s);
    keys_read();
    softmax<MASK>(block);
    keep_order(sum[0] + sum[1]);
    wgmma_wait<0>();
    pin(o);
    values_read();
    // Only where a larger score was met: rarer from block to block.
    if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f))
#pragma unroll
      for (int j = 0; j < 64; ++j) o[j] = __fmul_rn(o[j], rescale[j / 2 % 2]);
    pack();
    ++done;
  }
  // The values of a run's last block, and the scores of the next run's first.
  __device__ __forceinline__ void last(bool empty) {
    if (ahead) wait_keys();
    if (!empty) wait_values();
    if (ahead && !empty) {
      pin(o), pin(p);
      wgmma_fence();
      scores();
      values();
      wgmma_wait<0>();
      pin(o), pin(s);
    } else if (ahead) {
      wgmma_fence();
      scores();
      wgmma_wait<0>();
      pin(s);
    } else if (!empty) {
      pin(o), pin(p);
      wgmma_fence();
      values();
      wgmma_wait<0>();
      pin(o);
    }
    if (ahead) keys_read();
    if (!empty) values_read();
  }

  // Of two items by turns.
  __device__ uint32_t query_tile(uint32_t turn) const {
    return memory + kQueries + (turn % 2 * 2 + which) * kQueryTile;
  }
  // Where 16 bytes of a query vector lie in it: `chunk` of 16, of the consumer's vector 0 to 63.
  __device__ static uint32_t query_at(int vector, int chunk) {
    return chunk / 8 * kQueryHalf + vector * 128 + ((chunk % 8 ^ (vector & 7)) << 4);
  }
  // Sends for the vectors of an item, as they are: of its last row where there is none. The item is
  // there when the keys of the last block before it are: the converter waits for nothing between.
  __device__ __forceinline__ void fetch_queries(uint32_t turn) const {
    if (wait_item(turn) == 0) return;
    named_sync(kConsumerBarriers + which, 128);  // all have written the outputs that were there
    const Item item = ItemMemory(memory, turn).item();
    const int64_t width = int64_t{a.heads + 2 * a.cache.kv_heads} * kFeatures;
    const int me = thread_now(), chunk = me % 16;
    const Bf16* const from =
        a.qkv + item.first * width + int64_t{item.kv_head} * a.group * kFeatures + chunk * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int vector = me / 16 + 8 * i;
      const Place at = place(vector);
      copy_bytes(query_tile(turn) + query_at(vector, chunk),
                 from + min(at.row, item.rows - 1) * width + at.head * kFeatures);
    }
  }
  // Makes f16 of them, each thread of its own words.
  __device__ __forceinline__ void convert_queries(uint32_t turn) {
    const uint32_t tile = query_tile(turn);
    const int me = thread_now();
    copies_wait();
    named_sync(kConsumerBarriers + which, 128);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int vector = first_vector(me) + 8 * i;
      uint32_t q[16];
      float largest = 0;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        q[k] = load_shared_word(tile + query_at(vector, k) + me % 4 * 4);
        largest = fmaxf(largest, fmaxf(fabsf(__uint_as_float(q[k] << 16)),
                                       fabsf(__uint_as_float(q[k] & 0xffff0000u))));
      }
      for (int n = 1; n < 4; n *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, n));
      const attention_detail::Unit found = attention_detail::unit_for(largest);
#pragma unroll
      for (int k = 0; k < 16; ++k)
        store_shared_word(
            tile + query_at(vector, k) + me % 4 * 4,
            attention_detail::pack<kKvFp8>(__uint_as_float(q[k] << 16) * found.up,
                                           __uint_as_float(q[k] & 0xffff0000u) * found.up));
      unit[i] = __fmul_rn(found.down, a.scale);
    }
    written_for_wgmma();
    named_sync(kConsumerBarriers + which, 128);
    // A shuffle, so that it is known to be the warp's.
    queries = __shfl_sync(~0u, tile >> 4 | 1u << 16, 0);
  }

  // Rows of padding become zeros here, a warp a row; nothing else touches them.
  __device__ void write_padding() const {
    const int warp = which * 4 + thread / 32, lane = thread % 32;
    for (int row = a.first_row + static_cast<int>(blockIdx.x) * 8 + warp; row < a.end_row;
         row += static_cast<int>(gridDim.x) * 8) {
      if (__ldg(a.rows.slot + row) >= 0) continue;
      auto* const to = reinterpret_cast<uint4*>(a.out + row * a.out_stride);
      for (int i = lane; i < a.heads * kFeatures / 8; i += 32) to[i] = uint4{0, 0, 0, 0};
    }
  }

  __device__ void run() {
    write_padding();
    if (which == 1) pass_turn();
    fetch_queries(0);
    if (wait_item(0) > 0) convert_queries(0);
    for (uint32_t turn = 0; ItemMemory(memory, turn).rows() > 0; ++turn) {
      const ItemMemory item(memory, turn);
      bool more = true;
      for (int end = 0; more;) {
        const int begin = end;
        end = item.run_end(begin), more = end < item.rows();
        const bool empty = item.slot(begin) < 0;
        start(item, begin, end, more ? 0 : turn + 1);
        if (more) {
          ahead = item.slot(end) >= 0;
        } else {
          ahead = wait_item(turn + 1) > 0;
          if (ahead)
            convert_queries(turn + 1), ahead = ItemMemory(memory, turn + 1).slot(0) >= 0;
          else
            named_sync(kConsumerBarriers + which, 128);
        }
        last(empty);
        if (empty) continue;
        // Through the tile that no one needs now: the item's own after its last run (all have come
        // past a barrier since they read it), and before that the next one's.
        write(query_tile(more ? turn + 1 : turn), item.item(), begin, end);
      }
      __syncwarp();
      arrive_if(item_empty(memory, turn % kItemSlots), leads());
    }
  }
  // All of a run but the values of its last block.
  __device__ __forceinline__ void start(const ItemMemory& item, int begin, int end,
                                        uint32_t fetch) {
    const bool empty = item.slot(begin) < 0;
    const int me = thread_now();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = place(first_vector(me) + 8 * i).row;
      position[i] = !empty && row >= begin && row < end ? item.position(row) : -1;
      top[i] = base[i] = -INFINITY, sum[i] = value_top[i] = 0;
    }
#pragma unroll
    for (float& x : o) x = 0;
    if (empty) {
      if (fetch > 0) fetch_queries(fetch);
      return;
    }
    const int last = item.position(end - 1) / kBlock;  // block
    // Before it, blocks that all rows see all of.
    const int whole = min((item.position(begin) + 1) / kBlock, last);
    if (whole > 0)
      first<false>();
    else
      first<true>(last == 0 ? fetch : 0);
    int block = 1;
    for (; block < whole; ++block) step<false>(block);
    for (; block <= last; ++block) step<true>(block, block == last ? fetch : 0);
  }
  // Its rows; 0: past the last.
  __device__ int wait_item(uint32_t turn) const {
    barrier_wait(item_full(memory, turn % kItemSlots), turn / kItemSlots % 2);
    return ItemMemory(memory, turn).rows();
  }
  // Rows [begin, end) of the item. A warp has 16 vectors in `tile`, [16][256 bytes], so that 16
  // lanes write one of them at once.
  __device__ __forceinline__ void write(uint32_t tile, const Item& item, int begin, int end) {
    const int me = thread_now(), lane = me % 32;
    tile += me / 32 * 16 * 256;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int n = 1; n < 4; n *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], n);
      inverse[i] = __fdiv_rn(1.0f, sum[i]);
    }
    __syncwarp();  // a run before this one may have been read
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      uint32_t x[4];  // of v[0] and v[1], features 8 j on and 8 j + 8 on
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float* const from = o + 4 * (j + n / 2) + 2 * (n % 2);
        const __nv_bfloat162 pair = __floats2bfloat162_rn(__fmul_rn(from[0], inverse[n % 2]),
                                                          __fmul_rn(from[1], inverse[n % 2]));
        x[n] = *reinterpret_cast<const uint32_t*>(&pair);
      }
      const int row = lane % 16, chunk = j + lane / 16;
      store_matrices(tile + row * 256 + ((chunk ^ (row & 7)) << 4), x[0], x[1], x[2], x[3]);
    }
    __syncwarp();
    const int chunk = lane % 16;
    Bf16* const to =
        a.out + item.first * a.out_stride + int64_t{item.kv_head} * a.group * kFeatures + chunk * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 16 + 2 * i;
      const Place at = place(me / 32 * 16 + row);
      if (at.row >= begin && at.row < end)
        *reinterpret_cast<uint4*>(to + at.row * a.out_stride + at.head * kFeatures) =
            load_shared(tile + row * 256 + ((chunk ^ (row & 7)) << 4));
    }
  }
  // Of the consumer's vectors, which is v[0].
  __device__ static int first_vector(int me) { return me / 32 * 16 + me % 32 / 4; }
  // A vector's row in the item, which may be past its end, and its query head in the group.
  struct Place {
    int row, head;
  };
  __device__ Place place(int vector) const {
    const int v = which * 64 + vector, row = v * group_inverse >> 16;  // exact below 128
    return {row, v - row * a.group};
  }
};

__global__ void __launch_bounds__(kThreads, 1)
    wgmma_prefill_kernel(const __grid_constant__ AttentionArgs a, int group_inverse) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const uint32_t memory = (shared_address(dynamic) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      barrier_init(barrier(memory, kKeyFull, slot), 4);
      barrier_init(barrier(memory, kKeyEmpty, slot), 8);
      barrier_init(barrier(memory, kValueFull, slot), 4);
      barrier_init(barrier(memory, kValueEmpty, slot), 8);
    }
    for (int slot = 0; slot < kItemSlots; ++slot) {
      barrier_init(item_full(memory, slot), 1);
      barrier_init(item_empty(memory, slot), 8);
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
    Consumer c(a, memory, group_inverse);
    c.run();
  }
}

}  // namespace hopper_attention
}  // namespace drover::cuda

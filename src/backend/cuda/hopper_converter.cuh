// The warpgroup of prefill on Hopper (hopper_attention.cuh) that fetches what the others multiply:
// it finds a block's runs, and turns codes of 128 tokens at a time into f16, exactly, in the layout
// that wgmma reads. Codes wait in registers: those of a tile are fetched while the tile before is
// stored (keys, values, keys, ...), so shared memory is written once and read by wgmma only.
#pragma once

#include "backend/cuda/hopper_prefill.cuh"

namespace drover::cuda {
namespace hopper_attention {

__device__ __forceinline__ uint4 load_codes(const uint8_t* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

struct Converter {
  const AttentionArgs& a;
  uint32_t memory;

  // The block of tokens that was found last.
  uint32_t turn = 0;          // items begun
  int number = 0, after = 0;  // of the item to begin, and (thread 0) of the one after
  int rows = 0, end = 0;      // of the item, and of its run
  int kv_head = 0;
  int block = 0, blocks = 0, length = 0;
  const int32_t* pages = nullptr;
  int page = 0;                        // of this thread's token of it
  int row_slot = 0, row_position = 0;  // of this thread's row of the next item

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int thread() { return threadIdx.x; }
  // A thread's pieces of 16 codes of a tile: chunk() of the tokens first() + 4 i of its warp's 32.
  // Lanes of a quarter warp store to different banks.
  __device__ static int chunk() { return threadIdx.x % 8; }
  __device__ static int first() { return lane() / 8 ^ chunk() >> 2; }

  // A block's first item has its own number. Each draws until there is none, so that the last
  // ticket is known, and with it when the counter is to be 0 again.
  __device__ void begin() {
    number = static_cast<int>(blockIdx.x);
    draw();
    fetch_rows();
  }
  __device__ void draw() {
    if (thread() != 0) return;
    const int grid = static_cast<int>(gridDim.x),
              ticket = static_cast<int>(atomicAdd(a.counters, 1));
    const int tiles = (a.end_row - a.first_row + a.rows_a_block - 1) / a.rows_a_block;
    if (ticket == tiles * a.cache.kv_heads - 1) *a.counters = 0;
    after = grid + ticket;
  }
  __device__ void fetch_rows() {
    const Item next = item_of(a, number);
    const bool mine = thread() < next.rows;
    row_slot = mine ? __ldg(a.rows.slot + next.first + thread()) : -1;
    row_position = mine ? __ldg(a.rows.position + next.first + thread()) : 0;
  }
  // Tells the consumers of the next item, or that there is none. They are not told of items of
  // padding alone: each has blocks of tokens, so this warpgroup is never more items than blocks
  // ahead, and finds a slot empty without waiting for what it has not given them yet.
  __device__ __forceinline__ bool next_item() {
    const ItemMemory to(memory, turn);
    barrier_wait(item_empty(memory, turn % kItemSlots), turn / kItemSlots % 2 ^ 1);
    Item item;
    do {
      item = item_of(a, number);
      named_sync(kConverterBarrier, 128);  // all have read what was here
      if (thread() == 0) {
        store_shared(to.at, static_cast<uint32_t>(item.first), static_cast<uint32_t>(item.rows),
                     static_cast<uint32_t>(item.kv_head), 0);
        store_shared_word(memory + kTicket, static_cast<uint32_t>(after));
      }
      store_shared_word(to.at + 16 + thread() * 4, static_cast<uint32_t>(row_slot));
      store_shared_word(to.at + 16 + (kVectors + thread()) * 4,
                        static_cast<uint32_t>(row_position));
      named_sync(kConverterBarrier, 128);
      if (item.rows == 0) break;
      number = static_cast<int>(load_shared_word(memory + kTicket));
      if (item_of(a, number).rows > 0) draw();
      fetch_rows();
    } while (to.slot(0) < 0 && to.run_end(0) == item.rows);
    arrive_if(item_full(memory, turn % kItemSlots), thread() == 0);
    rows = item.rows, kv_head = item.kv_head, end = 0;
    ++turn;
    return rows > 0;
  }
  __device__ bool next_block() {
    if (++block >= blocks) {
      int slot = -1;
      while (slot < 0) {
        if (end == rows && !next_item()) return false;
        const ItemMemory item(memory, turn - 1);
        slot = item.slot(end), end = item.run_end(end);
        length = item.position(end - 1) + 1;
      }
      pages = a.rows.page_table + int64_t{slot} * a.rows.max_pages;
      block = 0, blocks = (length + kBlock - 1) / kBlock;
    }
    page = __ldg(pages + page_of(token()));
    return true;
  }
  // Past the end it is the last token that is fetched, whose probabilities there are 0.
  __device__ int token() const { return min(block * kBlock + thread(), length - 1); }
  __device__ int page_of(int t) const {
    return a.page_shift >= 0 ? t >> a.page_shift : t / a.cache.page_tokens;
  }
  // Index in the pools of this thread's token.
  __device__ int vector() const {
    const int t = token(), tokens = a.cache.page_tokens;
    return (page * a.cache.kv_heads + kv_head) * tokens + t - page_of(t) * tokens;
  }

  uint4 codes[8];
  float key_scale = 0, value_scale = 0;

  __device__ __forceinline__ void load(int i, const uint8_t* pool, int vectors) {
    codes[i] = load_codes(pool + int64_t{__shfl_sync(~0u, vectors, 4 * i + first())} * kFeatures);
  }
  __device__ void load_scales(int vector) {
    key_scale = __ldg(a.cache.k_scale + vector), value_scale = __ldg(a.cache.v_scale + vector);
  }
  __device__ void store_scales(uint32_t slot) const {
    const uint32_t to = memory + kScales + slot * 3 * kScaleBytes + thread() * 4;
    store_shared_float(to, key_scale);
    store_shared_float(to + kScaleBytes, value_scale);
    float top = value_scale;  // NaN if one before it is
    for (int n = 1; n < 32; n *= 2) {
      const float before = __shfl_up_sync(~0u, top, n);
      if (lane() >= n) top = larger_or_nan(top, before);
    }
    store_shared_float(to + 2 * kScaleBytes, top);
    if (lane() == 31) store_shared_float(memory + kTops + slot * 16 + warp() * 4, top);
  }
  // Of the tile in `codes`, and fetches the next one's.
  __device__ __forceinline__ void convert(uint32_t to, const uint8_t* pool, int vectors) {
    const uint32_t places[4] = {to, to ^ 16, to ^ 64, to ^ 80};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t x[8];
      attention_detail::fp8_pairs(codes[i].x, x[0], x[1]);
      attention_detail::fp8_pairs(codes[i].y, x[2], x[3]);
      attention_detail::fp8_pairs(codes[i].z, x[4], x[5]);
      attention_detail::fp8_pairs(codes[i].w, x[6], x[7]);
      load(i, pool, vectors);
      store_shared(places[i % 2 * 2] + i * 512, x[0], x[1], x[2], x[3]);
      store_shared(places[i % 2 * 2 + 1] + i * 512, x[4], x[5], x[6], x[7]);
    }
  }
  __device__ void hand_over(Barrier full, uint32_t slot) const {
    written_for_wgmma();
    __syncwarp();
    arrive_if(barrier(memory, full, slot), lane() == 0);
  }

  __device__ void run() {
    const int row = warp() * 32 + first();
    const uint32_t place =
        memory + (chunk() >> 2) * kHalf + row * 128 + (((chunk() & 3) * 2 ^ (row & 7)) << 4);
    const uint8_t* const keys = static_cast<const uint8_t*>(a.cache.k) + chunk() * 16;
    const uint8_t* const values = static_cast<const uint8_t*>(a.cache.v) + chunk() * 16;
    begin();
    // Two blocks ahead: what a block's vectors are read from (row, page) and its scales are asked
    // for a whole block before they are needed.
    bool more = next_block(), second = false;
    int vectors = 0, next_vectors = 0;
    if (more) {
      vectors = vector(), load_scales(vectors);
      second = next_block();
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) load(i, keys, vectors);
    for (uint32_t n = 0; more; ++n) {
      const uint32_t slot = n % kSlots, parity = n / kSlots % 2;
      // What is fetched past the last block is not used.
      if (second) next_vectors = vector();
      barrier_wait(barrier(memory, kKeyEmpty, slot), parity ^ 1);
      store_scales(n % kScaleSlots);
      load_scales(next_vectors);
      convert(place + kKeys + slot * kTile, values, vectors);
      hand_over(kKeyFull, slot);
      more = second, second = second && next_block();
      barrier_wait(barrier(memory, kValueEmpty, slot), parity ^ 1);
      vectors = next_vectors;
      convert(place + kValues + slot * kTile, keys, vectors);
      hand_over(kValueFull, slot);
    }
  }
};

}  // namespace hopper_attention
}  // namespace drover::cuda

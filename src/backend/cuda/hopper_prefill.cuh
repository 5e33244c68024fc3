// What prefill's warpgroups on Hopper (hopper_attention.cuh) share: a block's memory, and its work.
#pragma once

#include "backend/cuda/attention_ring.cuh"
#include "backend/cuda/hopper_ptx.cuh"

namespace drover::cuda {
namespace hopper_attention {

using attention_detail::AttentionArgs;
using attention_detail::Bf16;
using attention_detail::power_of_two;
using namespace hopper;

constexpr int kFeatures = 128, kVectors = 128, kBlock = 128;  // kBlock: tokens
constexpr int kThreads = 384, kConverterRegisters = 72, kConsumerRegisters = 216;
// What a block has at its start: setmaxnreg would wait for more for good.
static_assert(kConverterRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8));

// Shared memory. Tiles: [2 halves of 64 features][128 tokens][128 bytes], swizzled by 128 bytes;
// queries likewise with 64 vectors, a tile for each consumer and of two items by turns.
constexpr int kTile = kBlock * kFeatures * 2, kHalf = kTile / 2;
constexpr int kQueryTile = kTile / 2, kQueryHalf = kQueryTile / 2;
// Scales of a block are written with its keys, when the scores of the block two before have been
// read, and with them all scales of the block before that: so three would do.
constexpr int kSlots = 2, kScaleSlots = 4, kItemSlots = 8;
constexpr int kKeys = 0, kValues = kKeys + kSlots * kTile, kQueries = kValues + kSlots * kTile;
// [4][keys', values', largest of values' so far in 32][128] f32, and [4][4] the 32s' largest.
constexpr int kScales = kQueries + 4 * kQueryTile, kScaleBytes = kBlock * 4;
constexpr int kTops = kScales + kScaleSlots * 3 * kScaleBytes;
constexpr int kItems = kTops + kScaleSlots * 16;   // [8] of an Item and its rows
constexpr int kItemBytes = 16 + 2 * kVectors * 4;  // [slot, position][128] int
constexpr int kTicket = kItems + kItemSlots * kItemBytes;
constexpr int kBarriers = kTicket + 8;
constexpr int kOrder = kBarriers + 4 * kSlots * 8 + 2 * kItemSlots * 8;  // [384] read by nobody
constexpr int kBytes = kOrder + kThreads * 4 + 1024;                     // and what aligns it
static_assert(kBytes <= 227 * 1024 && kItems % 16 == 0 && kBarriers % 8 == 0);

enum Barrier : int { kKeyFull, kKeyEmpty, kValueFull, kValueEmpty };
__device__ inline uint32_t barrier(uint32_t memory, Barrier b, uint32_t slot) {
  return memory + kBarriers + (b * kSlots + slot) * 8;
}
__device__ inline uint32_t item_full(uint32_t memory, uint32_t slot) {
  return memory + kBarriers + (4 * kSlots + slot) * 8;
}
__device__ inline uint32_t item_empty(uint32_t memory, uint32_t slot) {
  return item_full(memory, kItemSlots + slot);
}
// Named barriers; 1 and 2 are the consumers' turns.
constexpr int kTurns = 1, kConverterBarrier = 3, kConsumerBarriers = 4;

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
__device__ __forceinline__ void store_shared_word(uint32_t at, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared_float(uint32_t at, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ float larger_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// 128 query vectors of one KV head: whole rows, of one sequence or of several.
struct Item {
  int first, rows;  // of the step; no rows: past the last item
  int kv_head;
};
// By number, heaviest first where positions ascend over the step.
__device__ inline Item item_of(const AttentionArgs& a, int number) {
  const int tiles = (a.end_row - a.first_row + a.rows_a_block - 1) / a.rows_a_block;
  const int back = number / a.cache.kv_heads;
  if (back >= tiles) return {a.first_row, 0, 0};
  const int first = a.first_row + (tiles - 1 - back) * a.rows_a_block;
  return {first, min(a.rows_a_block, a.end_row - first), number - back * a.cache.kv_heads};
}

// An item as the converter has left it. It is read again wherever it is needed: what a consumer
// keeps over the sums would be spilled, and comes back from there later than from here.
struct ItemMemory {
  uint32_t at;

  __device__ ItemMemory(uint32_t memory, uint32_t turn)
      : at(memory + kItems + turn % kItemSlots * kItemBytes) {}
  __device__ Item item() const {
    const uint4 w = load_shared(at);
    return {static_cast<int>(w.x), static_cast<int>(w.y), static_cast<int>(w.z)};
  }
  __device__ int rows() const { return static_cast<int>(load_shared_word(at + 4)); }
  __device__ int slot(int row) const {
    return static_cast<int>(load_shared_word(at + 16 + row * 4));
  }
  __device__ int position(int row) const {
    return static_cast<int>(load_shared_word(at + 16 + (kVectors + row) * 4));
  }
  // Where the run of rows of one sequence ends that begins with row `begin`. All lanes of a warp.
  __device__ int run_end(int begin) const {
    const int rows = this->rows(), sequence = slot(begin), lane = threadIdx.x % 32;
    int end = begin;
    for (uint32_t same = ~0u; same == ~0u && end < rows; end += __popc(same)) {
      const bool mine = end + lane < rows && slot(end + lane) == sequence;
      // Ones up to the first that is another's.
      const uint32_t other = ~__ballot_sync(~0u, mine);
      same = other == 0 ? ~0u : (other & (0u - other)) - 1u;
    }
    return end;
  }
};

}  // namespace hopper_attention
}  // namespace drover::cuda

// What attention's kernels share: their arguments, a sequence's tokens, and the ring of shared
// memory that cp.async fills ahead of the tiles (attention_tile.cuh).
#pragma once

#include "backend/cuda/attention_tile.cuh"

namespace drover::cuda {
namespace attention_detail {

constexpr int kSpanTiles = 8, kPrefillWarps = 4;
constexpr float kLog2e = 1.4426950408889634f;

struct AttentionArgs {
  const Bf16* qkv;
  Bf16* out;           // may lie over the queries: a vector is written after its last reading
  int64_t out_stride;  // elements between rows
  int heads, group;
  int first_row, end_row;  // of the step
  int rows_a_block;
  int head_blocks;  // blocks that a group takes when it has more vectors than a block
  float scale;      // log2(e) / sqrt(head_size)
  Cache cache;
  Rows rows;
  float* partials;  // [blocks, spans, kPartial]
  uint32_t* counters;
  int spans;                    // room in partials
  int page_shift, group_shift;  // of page_tokens and group, -1 when that is no power of two
};

// The tokens of one sequence, seen by one KV head.
struct Context {
  const int32_t* pages;
  int page_tokens, page_shift, kv_heads, kv_head, length;
  // Index of a token's vector in the pools. Past the end: the last one, so that loads stay inside.
  __device__ int vector(int token) const {
    const int t = min(token, length - 1);
    const int page = page_shift >= 0 ? t >> page_shift : t / page_tokens;
    return (__ldg(pages + page) * kv_heads + kv_head) * page_tokens + (t - page * page_tokens);
  }
  // The same in two steps where page_shift is there: a token's page, then its vector there.
  __device__ int page(int token) const {
    return __ldg(pages + (min(token, length - 1) >> page_shift));
  }
  __device__ int vector_of(int page, int token) const {
    const int t = min(token, length - 1);
    return ((page * kv_heads + kv_head) << page_shift) + (t & ((1 << page_shift) - 1));
  }
  __device__ int tiles() const { return (length + kTileTokens - 1) / kTileTokens; }
};
__device__ inline Context context_of(const AttentionArgs& a, int slot, int last) {
  return {a.rows.page_table + int64_t{slot} * a.rows.max_pages,
          a.cache.page_tokens,
          a.page_shift,
          a.cache.kv_heads,
          static_cast<int>(blockIdx.y),
          last + 1};
}

// SLOTS slots that a team of THREADS (a warp, or the block) fills with the parts of its tiles in
// order: keys of tokens 0 to 31, of 32 to 63, then their values. Scales come with a tile's first
// part, for this tile and the next.
// RUNS: pages are of 16 tokens or a larger power of two, so that 16 tokens lie together, and
// queries are of one position. That and what follows from it saves an eighth of a tile's
// instructions.
template <int D, int TYPE, int SLOTS, int THREADS, bool RUNS = false>
struct Ring {
  static_assert(!RUNS || (THREADS == 32 && TYPE == kKvFp8 && D >= 64 && D <= 128));
  using S = Slot<D, TYPE>;
  static constexpr int kScales = 4 * kSlotRows;  // of a tile, by part
  static constexpr int kBytes = SLOTS * S::kBytes + (TYPE == kKvFp8 ? 2 * kScales * 4 : 0);

  uint8_t* memory;  // [SLOTS, 32, D], then scales [2, 4, 32]
  int turn = 0;     // which scales are the present tile's
  int vector[2];    // of the present tile's tokens that are this lane's: lane and lane + 32

  __device__ uint8_t* slot(int part) const { return memory + part % SLOTS * S::kBytes; }
  __device__ float* scales(int of_turn, int part) const {
    return reinterpret_cast<float*>(memory + SLOTS * S::kBytes) + of_turn * kScales +
           part * kSlotRows;
  }
  __device__ static uint32_t shared(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }
  __device__ static void find(const Context& c, int tile, int (&vector)[2]) {
    const int token = tile * kTileTokens + static_cast<int>(threadIdx.x) % 32;
    if constexpr (RUNS)
      vector[0] = c.vector_of(c.page(token), token),
      vector[1] = c.vector_of(c.page(token + kSlotRows), token + kSlotRows);
    else
      vector[0] = c.vector(token), vector[1] = c.vector(token + kSlotRows);
  }
  // Tokens past the end become zeros.
  __device__ void fill(const AttentionArgs& a, const Context& c, int tile, int of_turn, int part,
                       const int (&vectors)[2]) const {
    if constexpr (RUNS) return fill_runs(a, c, tile, of_turn, part, vectors);
    constexpr int kPieces = kSlotRows * S::kChunks;
    const int lane = threadIdx.x % 32, begin = tile * kTileTokens;
    const int thread = THREADS == 32 ? lane : static_cast<int>(threadIdx.x);
    const bool key = part < 2;
    const auto* pool = static_cast<const uint8_t*>(key ? a.cache.k : a.cache.v);
    const uint32_t to = shared(slot(part));
#pragma unroll
    for (int i = 0; i < (kPieces + THREADS - 1) / THREADS; ++i) {
      const int piece = i * THREADS + thread, row = piece / S::kChunks % kSlotRows,
                chunk = piece % S::kChunks;
      const int64_t from = __shfl_sync(~0u, vectors[part % 2], row);
      if (kPieces % THREADS != 0 && piece >= kPieces) continue;
      const int at = key ? S::key_chunk(row, chunk) : S::value_chunk(row, chunk);
      asm volatile(
          "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + row * S::kRowBytes + at * 16),
          "l"(pool + from * S::kRowBytes + chunk * 16),
          "r"(begin + part % 2 * kSlotRows + row < c.length ? 16 : 0)
          : "memory");
    }
    if constexpr (TYPE == kKvFp8) {
      if (part != 0) return;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (THREADS == 32 || static_cast<int>(threadIdx.x) / 32 == i)
          asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                           shared(scales(of_turn, i) + lane)),
                       "l"((i < 2 ? a.cache.k_scale : a.cache.v_scale) + vectors[i % 2]),
                       "r"(begin + i % 2 * kSlotRows + lane < c.length ? 4 : 0)
                       : "memory");
    }
  }
  __device__ static void copy(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  }
  __device__ void fill_runs(const AttentionArgs& a, const Context& c, int tile, int of_turn,
                            int part, const int (&vectors)[2]) const {
    constexpr int kRows = 32 / S::kChunks;  // that the warp copies at a time
    const int lane = threadIdx.x % 32, begin = tile * kTileTokens;
    const int first = lane / S::kChunks, chunk = lane % S::kChunks;
    const int left = c.length - begin - part % 2 * kSlotRows - first;
    const auto* pool = static_cast<const uint8_t*>(part < 2 ? a.cache.k : a.cache.v) + chunk * 16;
    const uint32_t to = shared(slot(part)) + first * S::kRowBytes;
#pragma unroll
    for (int run = 0; run < kSlotRows; run += 16) {
      const int64_t vector = __shfl_sync(~0u, vectors[part % 2], run + first);
      const uint8_t* from = pool + vector * S::kRowBytes;
#pragma unroll
      for (int row = run; row < run + 16; row += kRows) {
        const int at =
            part < 2 ? S::key_chunk(first, chunk) : S::value_chunk(row % 8 + first, chunk);
        copy(to + row * S::kRowBytes + at * 16, from + (row - run) * S::kRowBytes,
             row < left ? 16 : 0);
      }
    }
    if (part != 0) return;
    // Scales of four tokens a lane, of the keys and then of the values; past the end they may be
    // any.
    const int token = lane % 16 * 4;
    const int low = __shfl_sync(~0u, vectors[0], token % 32),
              high = __shfl_sync(~0u, vectors[1], token % 32);
    copy(shared(scales(of_turn, 0)) + lane * 16,
         (lane < 16 ? a.cache.k_scale : a.cache.v_scale) + (token < 32 ? low : high),
         begin + token < c.length ? 16 : 0);
  }
  __device__ static void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  __device__ static void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory");
  }
  __device__ static void wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
  __device__ static void sync() {
    if constexpr (THREADS == 32)
      __syncwarp();
    else
      __syncthreads();
  }

  // Sends for the first parts of a first tile.
  __device__ void start(const AttentionArgs& a, const Context& c, int tile) {
    find(c, tile, vector);
    sync();
#pragma unroll
    for (int part = 0; part < SLOTS - 1; ++part) fill(a, c, tile, turn, part, vector), commit();
  }

  template <int PART, int H>
  __device__ void step(const AttentionArgs& a, const Context& c, int tile, const Context& of_next,
                       int next, const int (&after)[2], const Queries<H>& queries, bool work,
                       Tile<D, TYPE, H>& t, float (&up)[H][2], Unit& seen) const {
    constexpr int kAhead = PART + SLOTS - 1;
    const int begin = tile * kTileTokens, half_begin = begin + PART % 2 * kSlotRows;
    sync();  // all have read the slot that is filled now
    if constexpr (kAhead < 4)
      fill(a, c, tile, turn, kAhead, vector);
    else if (next >= 0)
      fill(a, of_next, next, turn ^ 1, kAhead - 4, after);
    commit();
    wait();
    sync();
    if (!work) return;
    if constexpr (RUNS && PART == 0)
      seen = t.unit_of(scales(turn, 2), scales(turn, 3), begin, queries.last);
    if constexpr (RUNS && PART == 2) t.add_up();
    // A half past all positions gives nothing.
    const bool dark = RUNS && PART % 2 == 1 && half_begin > queries.last;
    if constexpr (PART < 2) {
      if (!dark) {
        t.template scores<PART>(slot(PART), scales(turn, PART), half_begin, queries);
      } else {
#pragma unroll
        for (int n = 2; n < 4; ++n)
#pragma unroll
          for (int h = 0; h < H; ++h)
#pragma unroll
            for (float& x : t.s[n][h]) x = -INFINITY;
      }
    }
    if constexpr (PART == 1) {
      t.softmax();
      if constexpr (!RUNS) t.add_up();
      if constexpr (TYPE == kKvFp8 && !RUNS)
        t.choose_units(scales(turn, 2), scales(turn, 3), begin, queries, up);
      if constexpr (RUNS)
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e) up[h][e] = seen.up, t.unit[h][e] = seen.down;
    }
    if constexpr (PART >= 2)
      if (!dark)
        t.template values<PART - 2>(slot(PART), scales(turn, PART), half_begin, queries, up);
  }
  // A tile, and the first parts of `next` (-1: none), which may be of another context. work: does
  // this warp's part need the tile. middle() is called under way.
  template <int H, typename F>
  __device__ void pass(const AttentionArgs& a, const Context& c, int tile, const Context& of_next,
                       int next, const Queries<H>& queries, bool work, Tile<D, TYPE, H>& t,
                       const F& middle) {
    int after[2] = {0, 0}, pages[2] = {0, 0};
    // Their pages are asked for here, and waited for when the first half has its scores.
    if constexpr (RUNS) {
      const int token = next * kTileTokens + static_cast<int>(threadIdx.x) % 32;
      if (next >= 0) pages[0] = of_next.page(token), pages[1] = of_next.page(token + kSlotRows);
    } else if (next >= 0) {
      find(of_next, next, after);
    }
    float up[H][2] = {};
    Unit seen{};  // RUNS: of all vectors
    step<0>(a, c, tile, of_next, next, after, queries, work, t, up, seen);
    if constexpr (RUNS) {
      const int token = next * kTileTokens + static_cast<int>(threadIdx.x) % 32;
      after[0] = of_next.vector_of(pages[0], token);
      after[1] = of_next.vector_of(pages[1], token + kSlotRows);
    }
    step<1>(a, c, tile, of_next, next, after, queries, work, t, up, seen);
    middle();
    step<2>(a, c, tile, of_next, next, after, queries, work, t, up, seen);
    step<3>(a, c, tile, of_next, next, after, queries, work, t, up, seen);
    vector[0] = after[0], vector[1] = after[1];
    turn ^= 1;
  }
};

}  // namespace attention_detail
}  // namespace drover::cuda

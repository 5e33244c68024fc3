// Causal attention over the paged cache: decode (the step's last rows, one row a sequence) and
// prefill (chunks), two launches.
//
// Order of sums, the same in both and of positions only, so that cutting a prompt into chunks
// changes no bit: tiles of 64 tokens (attention_tile.cuh), four of them joined one after the other
// into a span of 256, spans joined one after the other.
//
// Decode: a block has the query heads of one row and KV head (8 or 16 of them). Its warps take
// tiles in turn, each with a ring of slots of its own that cp.async fills a tile ahead; results
// meet in shared memory. When blocks are few, spans go to blocks of their own (grid.z), results to
// the workspace, and the last block joins them in the same order. Prefill: a block has 64 query
// vectors (rows times heads of a group), 16 a warp, and all warps read the same ring.
//
// Bytes: keys and values of the context once for each row (decode) or 64 query vectors, scales too:
// with FP8 pages 2 * (D + 4) a token and KV head.
#pragma once

#include <algorithm>

#include "backend/cuda/attention_tile.cuh"

namespace drover::cuda {
namespace attention_detail {

constexpr int kSpanTiles = 4, kPrefillWarps = 4;
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
  int spans;       // room in partials
  int page_shift;  // of page_tokens, -1 when that is no power of two
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
template <int D, int TYPE, int SLOTS, int THREADS>
struct Ring {
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
    vector[0] = c.vector(token), vector[1] = c.vector(token + kSlotRows);
  }
  // Tokens past the end become zeros.
  __device__ void fill(const AttentionArgs& a, const Context& c, int tile, int of_turn, int part,
                       const int (&vectors)[2]) const {
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
  __device__ static void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  __device__ static void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory");
  }
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
  __device__ void step(const AttentionArgs& a, const Context& c, int tile, int next,
                       const int (&after)[2], const Queries<H>& queries, bool work,
                       Tile<D, TYPE, H>& t, float (&up)[H][2]) const {
    constexpr int kAhead = PART + SLOTS - 1;
    const int begin = tile * kTileTokens, half_begin = begin + PART % 2 * kSlotRows;
    sync();  // all have read the slot that is filled now
    if constexpr (kAhead < 4)
      fill(a, c, tile, turn, kAhead, vector);
    else if (next >= 0)
      fill(a, c, next, turn ^ 1, kAhead - 4, after);
    commit();
    wait();
    sync();
    if (!work) return;
    if constexpr (PART < 2)
      t.template scores<PART>(slot(PART), scales(turn, PART), half_begin, queries);
    if constexpr (PART == 1) {
      t.softmax();
      if constexpr (TYPE == kKvFp8)
        t.choose_units(scales(turn, 2), scales(turn, 3), begin, queries, up);
    }
    if constexpr (PART >= 2)
      t.template values<PART - 2>(slot(PART), scales(turn, PART), half_begin, queries, up);
  }
  // A tile, and the first parts of `next` (-1: none). work: does this warp's part need the tile.
  template <int H>
  __device__ void pass(const AttentionArgs& a, const Context& c, int tile, int next,
                       const Queries<H>& queries, bool work, Tile<D, TYPE, H>& t) {
    int after[2] = {0, 0};
    if (next >= 0) find(c, next, after);
    float up[H][2];
    step<0>(a, c, tile, next, after, queries, work, t, up);
    step<1>(a, c, tile, next, after, queries, work, t, up);
    step<2>(a, c, tile, next, after, queries, work, t, up);
    step<3>(a, c, tile, next, after, queries, work, t, up);
    vector[0] = after[0], vector[1] = after[1];
    turn ^= 1;
  }
};

// Sizes of decode's block: warps, and slots of each.
template <int D, int TYPE, int H>
struct DecodeShape {
  static constexpr int kSlot = Slot<D, TYPE>::kBytes;
  static constexpr int kBudget = (TYPE == kKvFp8 && H == 1 && D <= 128 ? 64 : 32) * 1024;
  static constexpr int kFit = kBudget / (2 * kSlot);
  static constexpr int kWarps = kFit >= 4 ? 4 : kFit >= 2 ? 2 : H;
  static constexpr int kSlots = kWarps * 4 * kSlot <= kBudget ? 4 : 2;
  static constexpr int kRowsOfResult = 2 * H * (D / 8);        // of 32 lanes each
  static constexpr int kResult = kRowsOfResult * 32 + 24 * H;  // outputs, top, sum, unit
  using DecodeRing = Ring<D, TYPE, kSlots, 32>;
  static constexpr int kBytes = kWarps * (DecodeRing::kBytes + kResult * 4);
};

// A tile's result in shared memory: rows of 32 lanes, row (2 h + e) * D/8 + f of vector 8 h + 2 t +
// e and feature g * D/8 + f, so that a thread of Merged has consecutive features of a vector.
template <int D, int TYPE, int H>
__device__ void put(const Tile<D, TYPE, H>& tile, float* result) {
  constexpr int kOut = D / 8, kOutputs = 64 * H * kOut, kVectors = 8 * H;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < H; ++h)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int f = 0; f < kOut; ++f)
        result[((2 * h + e) * kOut + f) * 32 + lane] = tile.o[f / 2][h][f % 2 * 2 + e];
      if (lane >= 4) continue;
      float* of_vector = result + kOutputs + 8 * h + 2 * lane + e;
      of_vector[0] = tile.top[h][e];
      of_vector[kVectors] = tile.sum[h][e];
      of_vector[2 * kVectors] = tile.unit[h][e];
    }
}

// What a block has joined so far, each thread its rows of the results.
template <int D, int TYPE, int H>
struct Merged {
  using Shape = DecodeShape<D, TYPE, H>;
  static constexpr int kOut = D / 8, kOutputs = 64 * H * kOut, kVectors = 8 * H;
  static constexpr int kThreads = 32 * Shape::kWarps;
  static constexpr int kOwn = Shape::kRowsOfResult / Shape::kWarps;
  static constexpr int kGroups = kOwn > kOut ? kOwn / kOut : 1, kOfGroup = kOwn / kGroups;
  static constexpr int kPartial = kThreads * (kOwn + 2 * kGroups);

  float o[kGroups][kOfGroup], top[kGroups], sum[kGroups];

  __device__ static int row(int group) {
    return static_cast<int>(threadIdx.x) / 32 * kOwn + group * kOfGroup;
  }
  __device__ static int vector(int group) {
    const int pair = row(group) / kOut;
    return pair / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + pair % 2;
  }
  __device__ static int feature(int group) {
    return static_cast<int>(threadIdx.x) % 32 / 4 * kOut + row(group) % kOut;
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      top[i] = -INFINITY, sum[i] = 0;
#pragma unroll
      for (float& x : o[i]) x = 0;
    }
  }
  __device__ void add(const float* result) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float* of_vector = result + kOutputs + vector(i);
      const Join both =
          join(top[i], sum[i], of_vector[0], of_vector[kVectors], of_vector[2 * kVectors]);
      const float* from = result + row(i) * 32 + static_cast<int>(threadIdx.x) % 32;
#pragma unroll
      for (int n = 0; n < kOfGroup; ++n) o[i][n] = both(o[i][n], from[n * 32]);
    }
  }
  __device__ void add(const Merged& part) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const Join both = join(top[i], sum[i], part.top[i], part.sum[i], 1.0f);
#pragma unroll
      for (int n = 0; n < kOfGroup; ++n) o[i][n] = both(o[i][n], part.o[i][n]);
    }
  }
  // Every float of this thread's, in an order of its own.
  template <typename F>
  __device__ void each(const F& f) {
    int at = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (float& x : o[i]) f(x, at), at += kThreads;
      f(top[i], at), at += kThreads;
      f(sum[i], at), at += kThreads;
    }
  }
};

// N consecutive features, N a power of two.
template <int N>
__device__ inline void put_features(const float (&o)[N], float sum, Bf16* to) {
  constexpr int kWide = N < 8 ? N : 8;
#pragma unroll
  for (int n = 0; n < N; n += kWide) {
    struct alignas(2 * kWide) {
      Bf16 x[kWide];
    } pack_of;
#pragma unroll
    for (int i = 0; i < kWide; ++i) pack_of.x[i] = __float2bfloat16_rn(__fdiv_rn(o[n + i], sum));
    *reinterpret_cast<decltype(pack_of)*>(to + n) = pack_of;
  }
}

// Block (row and part of the group's heads, KV head, part of the spans).
template <int D, int TYPE, int H>
__global__ void __launch_bounds__(DecodeShape<D, TYPE, H>::kWarps * 32, 2)
    decode_kernel(const __grid_constant__ AttentionArgs a) {
  using Shape = DecodeShape<D, TYPE, H>;
  using Result = Merged<D, TYPE, H>;
  constexpr int kWarps = Shape::kWarps, kVectors = 8 * H;
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ bool last_block;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = a.first_row + static_cast<int>(blockIdx.x) / a.head_blocks;
  const int first_head = static_cast<int>(blockIdx.x) % a.head_blocks * kVectors;
  const int heads = min(kVectors, a.group - first_head);
  const int64_t head = int64_t{blockIdx.y} * a.group + first_head;
  const auto write = [&](const Result& r) {
#pragma unroll
    for (int i = 0; i < Result::kGroups; ++i)
      if (r.vector(i) < heads)
        put_features(r.o[i], r.sum[i],
                     a.out + row * a.out_stride + (head + r.vector(i)) * D + r.feature(i));
  };
  Result total, span_result;
  total.clear();
  const int slot = a.rows.slot[row];
  if (slot < 0) {  // padding
#pragma unroll
    for (float& x : total.sum) x = 1;
    if (blockIdx.z == 0) write(total);
    return;
  }
  const int position = a.rows.position[row];
  const Context context = context_of(a, slot, position);
  const int tiles = context.tiles(), parts = static_cast<int>(gridDim.z);
  typename Shape::DecodeRing ring{memory + warp * Shape::DecodeRing::kBytes};
  auto* results = reinterpret_cast<float*>(memory + kWarps * Shape::DecodeRing::kBytes);
  int span = blockIdx.z;
  if (span * kSpanTiles + warp < tiles) ring.start(a, context, span * kSpanTiles + warp);

  Queries<H> queries;
  queries.first = queries.last = position;
  const Bf16* vectors[H];
  const int64_t width = int64_t{a.heads + 2 * a.cache.kv_heads} * D;
#pragma unroll
  for (int h = 0; h < H; ++h) {
    vectors[h] = 8 * h + g < heads ? a.qkv + row * width + (head + 8 * h + g) * D : nullptr;
#pragma unroll
    for (int e = 0; e < 2; ++e) queries.position[h][e] = 8 * h + 2 * t + e < heads ? position : -1;
  }
  Tile<D, TYPE, H> work;
  work.load_queries(vectors, a.scale);

  const int64_t block = blockIdx.x + int64_t{gridDim.x} * blockIdx.y;
  float* partials = a.partials + block * a.spans * Result::kPartial;
  for (; span * kSpanTiles < tiles; span += parts) {
    span_result.clear();
#pragma unroll 1
    for (int first = span * kSpanTiles; first < min(tiles, (span + 1) * kSpanTiles);
         first += kWarps) {
      const int tile = first + warp;
      if (tile < tiles) {
        int next = tile + kWarps;
        if (next >= (span + 1) * kSpanTiles) next += (parts - 1) * kSpanTiles;
        ring.pass(a, context, tile, next < tiles ? next : -1, queries, true, work);
        put<D, TYPE, H>(work, results + warp * Shape::kResult);
      }
      __syncthreads();
      for (int w = 0; w < kWarps && first + w < tiles; ++w)
        span_result.add(results + w * Shape::kResult);
      __syncthreads();
    }
    if (parts == 1)
      total.add(span_result);
    else
      span_result.each(
          [&](float& x, int at) { partials[int64_t{span} * Result::kPartial + at] = x; });
  }
  if (parts > 1) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last_block = atomicAdd(a.counters + block, 1) + 1 == gridDim.z;
      if (last_block) a.counters[block] = 0;
    }
    __syncthreads();
    if (!last_block) return;
    __threadfence();
    const int spans = (tiles + kSpanTiles - 1) / kSpanTiles;
#pragma unroll 4
    for (int s = 0; s < spans; ++s) {
      span_result.each(
          [&](float& x, int at) { x = __ldcg(partials + int64_t{s} * Result::kPartial + at); });
      total.add(span_result);
    }
  }
  write(total);
}

template <int D, int TYPE, int H>
struct PrefillShape {
  static constexpr int kVectors = kPrefillWarps * 8 * H;
  static constexpr int kSlots = 4 * Slot<D, TYPE>::kBytes <= 32 * 1024 ? 4 : 2;
  using PrefillRing = Ring<D, TYPE, kSlots, 32 * kPrefillWarps>;
  static constexpr int kTotal = 2 * H * (D / 8) * 32;  // floats of a warp's results
  static constexpr int kBytes = PrefillRing::kBytes + kPrefillWarps * kTotal * 4;
};

// Block (rows and heads, KV head): vector i is row i / group, head i % group.
template <int D, int TYPE, int H>
__global__ void __launch_bounds__(kPrefillWarps * 32, 2)
    prefill_kernel(const __grid_constant__ AttentionArgs a) {
  using Shape = PrefillShape<D, TYPE, H>;
  using Work = Tile<D, TYPE, H>;
  constexpr int kOut = D / 8;
  extern __shared__ __align__(128) uint8_t memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  typename Shape::PrefillRing ring{memory};
  float* total = reinterpret_cast<float*>(memory + Shape::PrefillRing::kBytes) +
                 warp * Shape::kTotal + lane;  // [kOut / 2, H, 4, 32]
  const int head_block = static_cast<int>(blockIdx.x) % a.head_blocks;
  const int first_row = a.first_row + static_cast<int>(blockIdx.x) / a.head_blocks * a.rows_a_block;
  const int past = min(first_row + a.rows_a_block, a.end_row);
  const int64_t width = int64_t{a.heads + 2 * a.cache.kv_heads} * D;
  const auto row_of = [&](int i) { return first_row + (a.head_blocks > 1 ? 0 : i / a.group); };
  const auto head_of = [&](int i) {
    return a.head_blocks > 1 ? head_block * Shape::kVectors + i : i % a.group;
  };

  // Rows that belong to one sequence go together; there may be several such runs.
  for (int run = first_row, end; run < past; run = end) {
    const int slot = a.rows.slot[run];
    for (end = run + 1; end < past && a.rows.slot[end] == slot;) ++end;
    // Its row, or -1 for a vector that is not of this run.
    const auto row_here = [&](int v) {
      const int i = warp * 8 * H + v, row = row_of(i);
      return row >= run && row < end && head_of(i) < a.group ? row : -1;
    };
    const auto offset = [&](int v) {
      return (blockIdx.y * a.group + head_of(warp * 8 * H + v)) * D;
    };
    Queries<H> queries;
    const Bf16* vectors[H];
    int first = 0x7fffffff, last = -1;
#pragma unroll
    for (int h = 0; h < H; ++h) {
      const int mine = row_here(8 * h + g);
      vectors[h] = mine >= 0 && slot >= 0 ? a.qkv + mine * width + offset(8 * h + g) : nullptr;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = row_here(8 * h + 2 * t + e);
        const int position = row >= 0 && slot >= 0 ? a.rows.position[row] : -1;
        queries.position[h][e] = position;
        if (position >= 0) first = min(first, position), last = max(last, position);
      }
    }
    for (int i = 1; i < 4; i *= 2) {
      first = min(first, __shfl_xor_sync(~0u, first, i));
      last = max(last, __shfl_xor_sync(~0u, last, i));
    }
    queries.first = first, queries.last = last;
    float top[H][2], sum[H][2], span_top[H][2], span_sum[H][2], span[kOut / 2][H][4];
#pragma unroll
    for (int h = 0; h < H; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        top[h][e] = -INFINITY, sum[h][e] = slot < 0 ? 1.0f : 0.0f;  // padding: zeros
#pragma unroll
    for (int i = 0; i < kOut * H * 2; ++i) total[i * 32] = 0;

    if (slot >= 0) {
      const Context context = context_of(a, slot, a.rows.position[end - 1]);
      const int tiles = context.tiles();
      ring.start(a, context, 0);
      Work work;
      work.load_queries(vectors, a.scale);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        if (tile % kSpanTiles == 0) {
#pragma unroll
          for (int j = 0; j < kOut / 2; ++j)
#pragma unroll
            for (int h = 0; h < H; ++h)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                span[j][h][i] = 0, span_top[h][i % 2] = -INFINITY, span_sum[h][i % 2] = 0;
        }
        const bool needed = tile * kTileTokens <= queries.last;
        ring.pass(a, context, tile, tile + 1 < tiles ? tile + 1 : -1, queries, needed, work);
        if (!needed) continue;
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Join both = join(span_top[h][e], span_sum[h][e], work.top[h][e], work.sum[h][e],
                                   work.unit[h][e]);
#pragma unroll
            for (int j = 0; j < kOut / 2; ++j)
#pragma unroll
              for (int i = e; i < 4; i += 2) span[j][h][i] = both(span[j][h][i], work.o[j][h][i]);
          }
        if (tile % kSpanTiles != kSpanTiles - 1 && (tile + 1) * kTileTokens <= queries.last)
          continue;
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Join both = join(top[h][e], sum[h][e], span_top[h][e], span_sum[h][e], 1.0f);
#pragma unroll
            for (int j = 0; j < kOut / 2; ++j)
#pragma unroll
              for (int i = e; i < 4; i += 2) {
                float& x = total[((j * H + h) * 4 + i) * 32];
                x = both(x, span[j][h][i]);
              }
          }
      }
    }
#pragma unroll
    for (int h = 0; h < H; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int v = 8 * h + 2 * t + e, row = row_here(v);
        if (row < 0) continue;
        float o[kOut];
#pragma unroll
        for (int f = 0; f < kOut; ++f) o[f] = total[((f / 2 * H + h) * 4 + f % 2 * 2 + e) * 32];
        put_features(o, sum[h][e], a.out + row * a.out_stride + offset(v) + g * kOut);
      }
  }
}

template <int D, int TYPE, int H>
void launch_decode(AttentionArgs a, const Workspace& work, cudaStream_t s) {
  using Shape = DecodeShape<D, TYPE, H>;
  constexpr int kPartial = Merged<D, TYPE, H>::kPartial;
  [[maybe_unused]] static const cudaError_t raised = cudaFuncSetAttribute(
      decode_kernel<D, TYPE, H>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
  a.head_blocks = (a.group + 8 * H - 1) / (8 * H);
  const int64_t blocks = int64_t{a.end_row - a.first_row} * a.head_blocks * a.cache.kv_heads;
  // The longest context that the page table has room for. Enough blocks for six rounds of two a
  // multiprocessor, so that the last round leaves few of them idle.
  a.spans = (a.rows.max_pages * a.cache.page_tokens + kSpanTiles * kTileTokens - 1) /
            (kSpanTiles * kTileTokens);
  const int64_t want = (int64_t{12} * work.multiprocessors + blocks - 1) / blocks;
  int parts = static_cast<int>(std::min<int64_t>(want, a.spans));
  if (static_cast<size_t>(blocks * a.spans) * kPartial > work.partial_count ||
      static_cast<size_t>(blocks) > work.counter_count)
    parts = 1;
  a.partials = work.partials, a.counters = work.counters;
  const dim3 grid(static_cast<unsigned>((a.end_row - a.first_row) * a.head_blocks),
                  static_cast<unsigned>(a.cache.kv_heads), static_cast<unsigned>(parts));
  decode_kernel<D, TYPE, H><<<grid, 32 * Shape::kWarps, Shape::kBytes, s>>>(a);
}

template <int D, int TYPE, int H>
void launch_prefill(AttentionArgs a, cudaStream_t s) {
  using Shape = PrefillShape<D, TYPE, H>;
  [[maybe_unused]] static const cudaError_t raised = cudaFuncSetAttribute(
      prefill_kernel<D, TYPE, H>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
  a.head_blocks = (a.group + Shape::kVectors - 1) / Shape::kVectors;
  a.rows_a_block = std::max(1, Shape::kVectors / a.group);
  const int rows = a.end_row - a.first_row;
  const dim3 grid(
      static_cast<unsigned>((rows + a.rows_a_block - 1) / a.rows_a_block * a.head_blocks),
      static_cast<unsigned>(a.cache.kv_heads));
  prefill_kernel<D, TYPE, H><<<grid, 32 * kPrefillWarps, Shape::kBytes, s>>>(a);
}

// The variants that there are: sixteens of vectors up to heads of 128 features, eights above; for
// FP8 decode of groups of up to 8 heads of 64 and 128, eights too.
template <int D, int TYPE>
void launch_type(AttentionArgs a, const Workspace& work, cudaStream_t s) {
  constexpr int kEights = D <= 128 ? 2 : 1;
  const int decode_begin = a.rows.rows - a.rows.decode_rows;
  if (decode_begin > 0) {
    a.first_row = 0, a.end_row = decode_begin;
    launch_prefill<D, TYPE, kEights>(a, s);
  }
  if (a.rows.decode_rows == 0) return;
  a.first_row = decode_begin, a.end_row = a.rows.rows;
  if constexpr (TYPE == kKvFp8 && (D == 64 || D == 128))
    if (a.group <= 8) return launch_decode<D, TYPE, 1>(a, work, s);
  launch_decode<D, TYPE, kEights>(a, work, s);
}

template <int D>
void launch_head_size(const AttentionArgs& a, const Workspace& work, cudaStream_t s) {
  if (a.cache.type == kKvFp8) return launch_type<D, kKvFp8>(a, work, s);
  if (a.cache.type == kKvBf16) return launch_type<D, kKvBf16>(a, work, s);
  launch_type<D, kKvF32>(a, work, s);
}

}  // namespace attention_detail
}  // namespace drover::cuda

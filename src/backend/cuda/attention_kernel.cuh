// Causal attention over the paged cache: decode (the step's last rows, one row a sequence) and
// prefill (chunks), two launches.
//
// Order of sums, the same in both and of positions only, so that cutting a prompt into chunks
// changes no bit: tiles of 64 tokens (attention_tile.cuh), eight of them joined one after the other
// into a span of 512, spans joined one after the other.
//
// Decode: a block has the query heads of one row and KV head (8 or 16 of them). Its warps take
// tiles in turn, each with a ring of slots of its own that cp.async fills a tile ahead; results
// meet in shared memory. When blocks are few, spans go to blocks of their own (grid.z), results to
// the workspace, and the last block joins them in the same order. When contexts are many, blocks go
// from one to the next (attention_many.cuh). Prefill: a block has 64 query vectors (rows times
// heads of a group), 16 a warp, and all warps read the same ring.
//
// Bytes: keys and values of the context once for each row (decode) or 64 query vectors, scales too:
// with FP8 pages 2 * (D + 4) a token and KV head.
//
// Measured on an H200 (copy 4,250 GB/s), FP8, 8 KV heads with 8 query heads of 128 each:
//   decode  256 x 512 tokens    3,784 GB/s (89 %)     1,024 x 400     3,977 (94 %)
//           1,400 x 210         3,785 (89 %)          64 x 2,048      3,264 (77 %)
//           16 x 1,024          2,606 (61 %)
//           1 x 8,192           1,412 (33 %: 12.3 us, latencies one after the other)
// On an H100 (3,012 GB/s), before blocks that stay and the ring of runs: decode 83 % at 256 x 512
// and 1,024 x 400, 76 at 64 x 2,048, 55 at 16 x 1,024, 39 at 1 x 8,192; prefill 116 TFLOP/s with 4
// x 512 rows after 1,536 tokens, 92 with 8 x 512 from the start. Versions, on an H200: spans of 256
// tokens, all of grid.z taking part: 34 % at 1 x 8,192. Prefill with a span's results in registers
// 103 and 61 TFLOP/s (spills), in shared memory with three blocks 67 and 42 (more spills). Before,
// fragments straight from global memory: 38 % at 256 x 512, 44 % at 64 x 2,048, 14 % at 1 x 8,192,
// 69 TFLOP/s.
#pragma once

#include <algorithm>

#include "backend/cuda/attention_many.cuh"

namespace drover::cuda {

// FP8 prefill of heads of 128 features, of groups of up to 128 (hopper_attention.cuh).
void hopper_prefill(const attention_detail::AttentionArgs& a, const Workspace& work,
                    cudaStream_t s);

namespace attention_detail {

// Block (row and part of the group's heads, KV head, part of the spans).
template <int D, int TYPE, int H, bool RUNS>
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
        put_features(r.o[i], __fdiv_rn(1.0f, r.sum[i]),
                     a.out + row * a.out_stride + (head + r.vector(i)) * D + r.feature(i));
  };
  Result total, span_result;
  total.clear();
  dependency_launch();
  // What a step is made of is there before its layers.
  const int slot = a.rows.slot[row], position = a.rows.position[row];
  if (slot < 0) {  // padding
    dependency_wait();
#pragma unroll
    for (float& x : total.sum) x = 1;
    if (blockIdx.z == 0) write(total);
    return;
  }
  const Context context = context_of(a, slot, position);
  const int tiles = context.tiles(), spans = (tiles + kSpanTiles - 1) / kSpanTiles;
  // Of the blocks that the page table would have work for, those that the context has.
  const int parts = min(static_cast<int>(gridDim.z), spans);
  if (static_cast<int>(blockIdx.z) >= parts) return dependency_wait();
  typename Shape::template DecodeRing<RUNS> ring{memory + warp * Shape::kOfWarp};
  int span = blockIdx.z;
  // Tokens of earlier steps may be fetched already; this step's is what is waited for.
  const int first_tile = span * kSpanTiles + warp;
  const bool early = (first_tile + 1) * kTileTokens <= position;
  if (early) ring.start(a, context, first_tile);
  dependency_wait();
  if (!early && first_tile < tiles) ring.start(a, context, first_tile);

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
        ring.pass(a, context, tile, context, next < tiles ? next : -1, queries, true, work, [] {});
        __syncwarp();  // outputs may lie where all lanes have just read values
        put<D, TYPE, H>(work, Shape::outputs(memory, warp), Shape::of_vectors(memory, warp));
      }
      __syncthreads();
      for (int w = 0; w < kWarps && first + w < tiles; ++w)
        span_result.add(Shape::outputs(memory, w), Shape::of_vectors(memory, w));
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
      last_block = atomicAdd(a.counters + block, 1) + 1 == static_cast<uint32_t>(parts);
      if (last_block) a.counters[block] = 0;
    }
    __syncthreads();
    if (!last_block) return;
    __threadfence();
    // Eight spans on their way together.
    for (int begin = 0; begin < spans; begin += 8) {
      Result some[8];
#pragma unroll
      for (int s = 0; s < 8; ++s)
        some[s].each([&](float& x, int at) {
          x = __ldcg(partials + int64_t{min(begin + s, spans - 1)} * Result::kPartial + at);
        });
#pragma unroll
      for (int s = 0; s < 8; ++s)
        if (begin + s < spans) total.add(some[s]);
    }
  }
  write(total);
}

template <int D, int TYPE, int H>
struct PrefillShape {
  static constexpr int kVectors = kPrefillWarps * 8 * H;
  static constexpr int kSlots = 4 * Slot<D, TYPE>::kBytes <= 32 * 1024 ? 4 : 2;
  using PrefillRing = Ring<D, TYPE, kSlots, 32 * kPrefillWarps>;
  static constexpr int kSpan = 2 * H * (D / 8) * 32;  // floats of a warp's results
  static constexpr int kBytes = PrefillRing::kBytes + kPrefillWarps * kSpan * 4;
  static_assert(kBytes <= 99 * 1024, "more than sm_86 has");
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
  // Results in rows of 32 lanes, row (2 h + e) * kOut + f of feature g * kOut + f: the present
  // span's in shared memory; all spans', which change once in 512 tokens, in local memory (indices
  // that are not constants keep them there).
  float* span =
      reinterpret_cast<float*>(memory + Shape::PrefillRing::kBytes) + warp * Shape::kSpan + lane;
  float total[2 * H * kOut];
  const int head_block = static_cast<int>(blockIdx.x) % a.head_blocks;
  const int first_row = a.first_row + static_cast<int>(blockIdx.x) / a.head_blocks * a.rows_a_block;
  const int past = min(first_row + a.rows_a_block, a.end_row);
  const int64_t width = int64_t{a.heads + 2 * a.cache.kv_heads} * D;
  const auto row_of = [&](int i) {
    const int row = a.group_shift >= 0 ? i >> a.group_shift : i / a.group;
    return first_row + (a.head_blocks > 1 ? 0 : row);
  };
  const auto head_of = [&](int i) {
    const int head = a.group_shift >= 0 ? i & (a.group - 1) : i % a.group;
    return a.head_blocks > 1 ? head_block * Shape::kVectors + i : head;
  };

  dependency_launch();
  dependency_wait();
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
    float top[H][2], sum[H][2], span_top[H][2], span_sum[H][2];
#pragma unroll
    for (int h = 0; h < H; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        top[h][e] = -INFINITY, sum[h][e] = slot < 0 ? 1.0f : 0.0f;  // padding: zeros
    const int tiles =
        slot >= 0 ? (a.rows.position[end - 1] + kTileTokens) / kTileTokens : kSpanTiles + 1;
    const bool one_span = tiles <= kSpanTiles;  // which is the result
    if (!one_span) {
#pragma unroll 1
      for (int i = 0; i < 2 * H * kOut; ++i) total[i] = 0;
    }

    if (slot >= 0) {
      const Context context = context_of(a, slot, a.rows.position[end - 1]);
      ring.start(a, context, 0);
      Work work;
      work.load_queries(vectors, a.scale);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        if (tile % kSpanTiles == 0) {
#pragma unroll
          for (int h = 0; h < H; ++h)
#pragma unroll
            for (int e = 0; e < 2; ++e) span_top[h][e] = -INFINITY, span_sum[h][e] = 0;
#pragma unroll
          for (int i = 0; i < 2 * H * kOut; ++i) span[i * 32] = 0;
        }
        const bool needed = tile * kTileTokens <= queries.last;
        ring.pass(a, context, tile, context, tile + 1 < tiles ? tile + 1 : -1, queries, needed,
                  work, [] {});
        if (!needed) continue;
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Join both = join(span_top[h][e], span_sum[h][e], work.top[h][e], work.sum[h][e],
                                   work.unit[h][e]);
#pragma unroll
            for (int f = 0; f < kOut; ++f) {
              float& x = span[((2 * h + e) * kOut + f) * 32];
              x = both(x, work.o[f / 2][h][f % 2 * 2 + e]);
            }
          }
        if (tile % kSpanTiles != kSpanTiles - 1 && (tile + 1) * kTileTokens <= queries.last)
          continue;
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Join both = join(top[h][e], sum[h][e], span_top[h][e], span_sum[h][e], 1.0f);
            if (one_span) continue;
#pragma unroll 1
            for (int f = (2 * h + e) * kOut; f < (2 * h + e + 1) * kOut; ++f)
              total[f] = both(total[f], span[f * 32]);
          }
      }
    }
#pragma unroll
    for (int h = 0; h < H; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int v = 8 * h + 2 * t + e, row = row_here(v);
        if (row < 0) continue;
        const float inverse = __fdiv_rn(1.0f, sum[h][e]);
        Bf16* to = a.out + row * a.out_stride + offset(v) + g * kOut;
        constexpr int kWide = kOut < 8 ? kOut : 8;
#pragma unroll 1
        for (int f = 0; f < kOut; f += kWide) {
          float o[kWide];
          const int from = (2 * h + e) * kOut + f;
          if (one_span) {
#pragma unroll
            for (int i = 0; i < kWide; ++i) o[i] = span[(from + i) * 32];
          } else {
#pragma unroll
            for (int i = 0; i < kWide; ++i) o[i] = total[from + i];
          }
          put_features(o, inverse, to + f);
        }
      }
  }
}

template <int D, int TYPE, int H, bool RUNS = false>
void launch_decode(AttentionArgs a, const Workspace& work, cudaStream_t s) {
  using Shape = DecodeShape<D, TYPE, H>;
  constexpr int kPartial = Merged<D, TYPE, H>::kPartial;
  [[maybe_unused]] static const cudaError_t raised = cudaFuncSetAttribute(
      decode_kernel<D, TYPE, H, RUNS>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
  a.head_blocks = (a.group + 8 * H - 1) / (8 * H);
  const int64_t blocks = int64_t{a.end_row - a.first_row} * a.head_blocks * a.cache.kv_heads;
  // The longest context that the page table has room for. Enough blocks for three rounds of two a
  // multiprocessor, so that the last round leaves few of them idle.
  a.spans = (a.rows.max_pages * a.cache.page_tokens + kSpanTiles * kTileTokens - 1) /
            (kSpanTiles * kTileTokens);
  const int64_t want = (int64_t{6} * work.multiprocessors + blocks - 1) / blocks;
  int parts = static_cast<int>(std::min<int64_t>(want, a.spans));
  if (static_cast<size_t>(blocks * a.spans) * kPartial > work.partial_count ||
      static_cast<size_t>(blocks) > work.counter_count)
    parts = 1;
  a.partials = work.partials, a.counters = work.counters;
  const dim3 grid(static_cast<unsigned>((a.end_row - a.first_row) * a.head_blocks),
                  static_cast<unsigned>(a.cache.kv_heads), static_cast<unsigned>(parts));
  launch_dependent(decode_kernel<D, TYPE, H, RUNS>, grid, 32 * Shape::kWarps, Shape::kBytes, s, 1,
                   a);
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
  launch_dependent(prefill_kernel<D, TYPE, H>, grid, 32 * kPrefillWarps, Shape::kBytes, s, 1, a);
}

// The variants that there are: sixteens of vectors up to heads of 128 features, eights above; for
// FP8 decode of groups of up to 8 heads of 64 and 128, eights too, with the ring of whole runs
// where pages have them.
template <int D, int TYPE>
void launch_type(AttentionArgs a, const Workspace& work, cudaStream_t s) {
  constexpr int kEights = D <= 128 ? 2 : 1;
  const int decode_begin = a.rows.rows - a.rows.decode_rows;
  if (decode_begin > 0) {
    a.first_row = 0, a.end_row = decode_begin;
    const bool hopper = D == 128 && TYPE == kKvFp8 && work.hopper && a.group <= 128;
    if (hopper)
      hopper_prefill(a, work, s);
    else
      launch_prefill<D, TYPE, kEights>(a, s);
  }
  if (a.rows.decode_rows == 0) return;
  a.first_row = decode_begin, a.end_row = a.rows.rows;
  if constexpr (TYPE == kKvFp8 && (D == 64 || D == 128))
    if (a.group <= 8) {
      if (a.page_shift < 4) return launch_decode<D, TYPE, 1>(a, work, s);
      const int64_t contexts = int64_t{a.rows.decode_rows} * a.cache.kv_heads;
      // Two for each of three blocks a multiprocessor; fewer may be split into spans.
      if (contexts >= int64_t{6} * work.multiprocessors) return launch_many<D, TYPE>(a, work, s);
      return launch_decode<D, TYPE, 1, true>(a, work, s);
    }
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

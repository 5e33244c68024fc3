// Decode attention where contexts are many (FP8, groups of up to 8 heads, pages of whole runs):
// blocks stay and go from context to context, a row and a KV head each.
//
// A block of decode_kernel reads nothing from its start to its first tokens (row, page, tokens, one
// read after the other) and ever less in its last tiles. Here the rings go on: under a context's
// last tiles the first parts of the next one's are on their way, and its queries. Contexts are
// drawn from a counter, so that blocks end together, but early enough that row and position come
// under a tile's work. Three blocks a multiprocessor leave 168 registers, so what is known of
// contexts lies in shared memory: spilled registers would come back after 500 cycles and more.
//
// Whichever block a context has, its bits are the same, and those of decode_kernel.
#pragma once

#include "backend/cuda/attention_block.cuh"

namespace drover::cuda {
namespace attention_detail {

template <int D, int TYPE>
struct ManyShape : DecodeShape<D, TYPE, 1> {
  using Decode = DecodeShape<D, TYPE, 1>;
  using ManyRing = typename Decode::template DecodeRing<true>;
  // A multiprocessor. Where fewer fit, the others come when these are through.
  static constexpr int kBlocks = 3;
  // Queries of two contexts by turns, rows apart so that they do not meet in a bank.
  static constexpr int kQueryRow = D * 2 + 16, kQueries = 8 * kQueryRow;
  static constexpr int kBytes = Decode::kBytes + 2 * kQueries;
  static_assert(kSpanTiles % Decode::kWarps == 0);
  static_assert(kBytes <= 99 * 1024, "more than sm_86 has");
  __device__ static uint8_t* queries(uint8_t* memory, int item) {
    return memory + Decode::kBytes + item % 2 * kQueries;
  }
};

// A context: a row and a KV head.
struct alignas(16) ManyItem {
  int row, kv_head;    // row -1: past the last one
  int slot, position;  // of the row; slot -1: padding, or none
  __device__ int tiles() const { return slot < 0 ? 0 : position / kTileTokens + 1; }
};

// There are at least twice as many contexts as blocks.
template <int D, int TYPE>
__global__ void __launch_bounds__(ManyShape<D, TYPE>::kWarps * 32, ManyShape<D, TYPE>::kBlocks)
    many_decode_kernel(const __grid_constant__ AttentionArgs a) {
  using Shape = ManyShape<D, TYPE>;
  using Ring = typename Shape::ManyRing;
  using Result = Merged<D, TYPE, 1>;
  constexpr int kWarps = Shape::kWarps;
  extern __shared__ __align__(128) uint8_t memory[];
  // The block's contexts by number: the present one, `at`, and those that are known to follow.
  __shared__ ManyItem item_ring[4];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int kv_heads = a.cache.kv_heads, items = (a.end_row - a.first_row) * kv_heads;
  const int64_t width = int64_t{a.heads + 2 * kv_heads} * D;
  // Heads of a row follow each other, as they do in a page.
  const auto item_of = [&](int number) -> ManyItem {
    if (number >= items) return {-1, 0, -1, 0};
    const int row = number / kv_heads, of_step = a.first_row + row;
    return {of_step, number - row * kv_heads, a.rows.slot[of_step], a.rows.position[of_step]};
  };
  const auto context = [&](const ManyItem& i) -> Context {
    return {a.rows.page_table + int64_t{i.slot} * a.rows.max_pages,
            a.cache.page_tokens,
            a.page_shift,
            kv_heads,
            i.kv_head,
            i.position + 1};
  };
  const auto rounds = [](const ManyItem& i) { return max((i.tiles() + kWarps - 1) / kWarps, 1); };
  // Sends for a thread's share of an item's queries; zeros where a group has no head.
  const auto fetch_queries = [&](const ManyItem& i, int number) {
    constexpr int kChunks = D / 8, kPieces = 8 * kChunks, kThreads = 32 * kWarps;
    const uint32_t to = Ring::shared(Shape::queries(memory, number));
    const Bf16* from = a.qkv + i.row * width + int64_t{i.kv_head} * a.group * D;
#pragma unroll
    for (int n = 0; n < (kPieces + kThreads - 1) / kThreads; ++n) {
      const int piece = n * kThreads + static_cast<int>(threadIdx.x);
      if (kPieces % kThreads != 0 && piece >= kPieces) continue;
      const int head = piece / kChunks, chunk = piece % kChunks;
      const bool is = head < a.group;
      Ring::copy(to + head * Shape::kQueryRow + chunk * 16, from + (is ? head * D + chunk * 8 : 0),
                 is ? 16 : 0);
    }
  };

  dependency_launch();
  // What a step is made of is there before its layers. Tokens of earlier steps may be fetched
  // already; this step's is what is waited for.
  const ManyItem first_item = item_of(static_cast<int>(blockIdx.x));
  Ring ring{memory + warp * Shape::kOfWarp};
  const bool early = first_item.slot >= 0 && (warp + 1) * kTileTokens <= first_item.position;
  if (early) ring.start(a, context(first_item), warp);
  if (threadIdx.x == 0)
    item_ring[0] = first_item, item_ring[1] = item_of(static_cast<int>(blockIdx.x + gridDim.x));
  dependency_wait();
  if (!early && warp < first_item.tiles()) ring.start(a, context(first_item), warp);
  fetch_queries(first_item, 0);
  Ring::commit(), Ring::wait_all();
  __syncthreads();

  // How many items are known, `at` and one that is past the last included; are there more.
  int known = 2;
  bool more = true;
  Tile<D, TYPE, 1> work;
  Result total, span;
  for (int at = 0; item_ring[at % 4].row >= 0; ++at, --known) {
    const ManyItem &item = item_ring[at % 4], &next = item_ring[(at + 1) % 4];
    const int tiles = item.tiles(), item_rounds = rounds(item);
    if (warp < tiles) {
      const uint8_t* vector = Shape::queries(memory, at) + g * Shape::kQueryRow;
      const Bf16* vectors[1] = {reinterpret_cast<const Bf16*>(vector)};
      work.load_queries(vectors, a.scale);
    } else {
      // Nothing to do here, so nothing of the next item is on its way. Groups end in order: the
      // queries are there when all but a ring's are.
      if (next.row >= 0) fetch_queries(next, at + 1);
      Ring::commit();
      if (warp < next.tiles())
        ring.start(a, context(next), warp);
      else
        for (int i = 1; i < Shape::kSlots; ++i) Ring::commit();
      Ring::wait();
    }
    Queries<1> queries;
    queries.first = queries.last = item.position;
#pragma unroll
    for (int e = 0; e < 2; ++e) queries.position[0][e] = 2 * t + e < a.group ? item.position : -1;

    total.clear();
#pragma unroll 1
    for (int round = 0; round < item_rounds; ++round) {
      const int first = round * kWarps, tile = first + warp, left = item_rounds - round;
      if (first % kSpanTiles == 0) span.clear();
      // A warp's last tile may be an item's last but one round, and wants the next item. So one
      // more is drawn when no more than three rounds of known ones are left.
      const bool draw = more && known < 3 && left + (known > 1 ? rounds(next) : 0) <= 3;
      const bool drawing = draw && threadIdx.x == 0;
      int number = 0, slot = -1, position = 0;
      if (drawing)
        number = 2 * static_cast<int>(gridDim.x) + static_cast<int>(atomicAdd(a.counters, 1));
      const auto look_up = [&] {
        if (!drawing) return;
        if (number < items) {
          const int row = a.first_row + number / kv_heads;
          slot = a.rows.slot[row], position = a.rows.position[row];
        }
        // Every block draws one number too many; this is the last one.
        if (number == items + static_cast<int>(gridDim.x) - 1) *a.counters = 0;
      };
      if (tile < tiles) {
        const Context here = context(item);
        Context there = here;
        int then = tile + kWarps;
        if (then >= tiles) {
          then = warp < next.tiles() ? warp : -1;
          there = context(next);
          if (next.row >= 0) fetch_queries(next, at + 1);
        }
        ring.pass(a, here, tile, there, then, queries, true, work, look_up);
        __syncwarp();  // outputs may lie where all lanes have just read values
        put<D, TYPE, 1>(work, Shape::outputs(memory, warp), Shape::of_vectors(memory, warp));
      } else {
        look_up();
      }
      if (drawing) {
        const int row = number / kv_heads;
        item_ring[(at + known) % 4] = {number < items ? a.first_row + row : -1,
                                       number - row * kv_heads, slot, position};
      }
      __syncthreads();
      if (draw) more = item_ring[(at + known) % 4].row >= 0, ++known;
      // Reads of all four before their sums, where there are four.
      if (first + kWarps <= tiles) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
          span.add(Shape::outputs(memory, w), Shape::of_vectors(memory, w));
      } else {
#pragma unroll 1
        for (int w = 0; first + w < tiles; ++w)
          span.add(Shape::outputs(memory, w), Shape::of_vectors(memory, w));
      }
      if (left == 1 || (first + kWarps) % kSpanTiles == 0) total.add(span);
      __syncthreads();
    }
    if (tiles == 0) {  // padding: zeros
#pragma unroll
      for (float& x : total.sum) x = 1;
    }
    const int64_t head = int64_t{item.kv_head} * a.group;
#pragma unroll
    for (int i = 0; i < Result::kGroups; ++i)
      if (total.vector(i) < a.group)
        put_features(
            total.o[i], __fdiv_rn(1.0f, total.sum[i]),
            a.out + item.row * a.out_stride + (head + total.vector(i)) * D + total.feature(i));
  }
}

template <int D, int TYPE>
void launch_many(AttentionArgs a, const Workspace& work, cudaStream_t s) {
  using Shape = ManyShape<D, TYPE>;
  [[maybe_unused]] static const cudaError_t raised = cudaFuncSetAttribute(
      many_decode_kernel<D, TYPE>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
  a.counters = work.counters;
  launch_dependent(many_decode_kernel<D, TYPE>,
                   static_cast<unsigned>(Shape::kBlocks * work.multiprocessors), 32 * Shape::kWarps,
                   Shape::kBytes, s, 1, a);
}

}  // namespace attention_detail
}  // namespace drover::cuda

// Causal attention over the paged cache, for decode and prefill alike.
//
// A block has 16 query vectors of one KV head: rows of the step times query heads of the group. Its
// four warps take partitions of 128 tokens in turn, each from memory straight to mma fragments
// (m16n8k16, bf16, f32 sums): scores of the whole partition, softmax, then values. Partitions'
// results (top, sum, output) are merged in order of position. So the order of sums depends on
// nothing but positions: cutting a prompt into chunks changes no bit. When blocks are few,
// partitions go to blocks of their own (grid.z), results to the workspace, and the last block
// merges them in the same order.
//
// Bytes: keys and values of the context once for each 16 query vectors, scales too; 512-token
// decode with FP8 pages and groups of 8: 2 * 128 + 8 bytes a token and KV head.
//
// Versions: tiles of 16 query vectors, and of 8 with half the registers for decode with groups of
// up to 8. Measured on an H200 (copy 4,238 GB/s), FP8, 8 KV heads with 8 query heads of 128 each:
// decode 256 x 512 tokens 1,627 GB/s (38 %), 64 x 2,048 1,869 (44 %), 1 x 8,192 598 (14 %); prefill
// 4 x 512 rows after 1,536 tokens 69 TFLOP/s. Addresses found token by token and results in row
// order in shared memory (32-way bank conflicts): 565 GB/s, 650, 181 and 37 TFLOP/s.
//
// FP8 codes become bf16 by bits (exponents shifted, times 2^120: exact, subnormals too). Codes
// under a scale of NaN (rope.cu) give NaN through the scale. Keys past a row's position have
// probability 0; NaN or infinite values there (BF16, F32 pages) must not spoil it, which a slow way
// sees to.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>

#include "backend/cuda/kernels.h"

namespace drover::cuda {
namespace attention_detail {

using Bf16 = __nv_bfloat16;
constexpr int kWarps = 4, kPart = 128, kQueries = 16, kOwned = kPart / 32;
constexpr float kLog2e = 1.4426950408889634f;

struct AttentionArgs {
  const Bf16* qkv;
  Bf16* out;
  int heads, group;
  int rows_a_tile;  // rows of the step in a tile: 16 / group, at least 1
  int head_tiles;   // tiles that a group of more than 16 heads takes
  float scale;      // log2(e) / sqrt(head_size)
  Cache cache;
  Rows rows;
  float* partials;  // [tiles, partitions, 16 * (D + 2)]
  uint32_t* counters;
  int partitions;  // room in partials
  int page_shift;  // of page_tokens, -1 when that is no power of two
};

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for 8 query vectors: rows 8 to 15 are zero, and so is what becomes of them.
__device__ inline void mma_half(float (&c)[2], uint32_t a0, uint32_t a2, uint32_t b0, uint32_t b1) {
  [[maybe_unused]] float zero[2];
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%6,%5,%6}, {%7,%8}, "
      "{%0,%1,%9,%9};"
      : "+f"(c[0]), "+f"(c[1]), "=f"(zero[0]), "=f"(zero[1])
      : "r"(a0), "r"(a2), "r"(0), "r"(b0), "r"(b1), "f"(0.0f));
}

__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&p);
}

// Two e4m3 codes in the high bytes of the halves of `w` (low bytes: anything) as bf16.
__device__ inline uint32_t fp8_pair(uint32_t w) {
  const uint32_t bits = (w & 0x80008000u) | ((w >> 4) & 0x07f007f0u);
  const __nv_bfloat162 r = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&bits),
                                   __nv_bfloat162(__ushort_as_bfloat16(0x7b80),
                                                  __ushort_as_bfloat16(0x7b80)));  // 2^120
  return *reinterpret_cast<const uint32_t*>(&r);
}

// N bytes from an address that is aligned to the largest power of two up to 16 that divides N.
template <int N>
struct Bytes {
  static constexpr int kWords = (N + 3) / 4;
  uint32_t w[kWords];
  __device__ void load(const char* p) {
    if constexpr (N % 16 == 0) {
#pragma unroll
      for (int i = 0; i < N / 16; ++i) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(p) + i);
        w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
      }
    } else if constexpr (N == 8) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
      w[0] = v.x, w[1] = v.y;
    } else if constexpr (N == 4) {
      w[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
    } else {
      static_assert(N == 2);
      w[0] = __ldg(reinterpret_cast<const uint16_t*>(p));
    }
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[i] = 0;
  }
};

template <int TYPE>
constexpr int kElement = TYPE == kKvFp8    ? 1
                         : TYPE == kKvBf16 ? 2
                                           : 4;

// Elements 2p, 2p + 1 of a row of values as a bf16 pair.
template <int TYPE, int N>
__device__ inline uint32_t pair_of(const Bytes<N>& b, int p) {
  if constexpr (TYPE == kKvFp8)
    return fp8_pair(__byte_perm(b.w[p / 2], 0, p % 2 == 0 ? 0x1404 : 0x3424));
  else if constexpr (TYPE == kKvBf16)
    return b.w[p];
  else
    return pack(__uint_as_float(b.w[2 * p]), __uint_as_float(b.w[2 * p + 1]));
}

// Element j of two rows as a bf16 pair.
template <int TYPE, int N>
__device__ inline uint32_t across(const Bytes<N>& x, const Bytes<N>& y, int j) {
  if constexpr (TYPE == kKvFp8) {
    const uint32_t s = j % 4;
    return fp8_pair(__byte_perm(x.w[j / 4], y.w[j / 4], s << 4 | (4 + s) << 12 | s | (4 + s) << 8));
  } else if constexpr (TYPE == kKvBf16) {
    return __byte_perm(x.w[j / 2], y.w[j / 2], j % 2 == 0 ? 0x5410 : 0x7632);
  } else {
    return pack(__uint_as_float(x.w[j]), __uint_as_float(y.w[j]));
  }
}

template <int TYPE, int N>
__device__ inline bool not_finite(const Bytes<N>& b) {
  bool bad = false;
#pragma unroll
  for (int i = 0; i < Bytes<N>::kWords; ++i) {
    if constexpr (TYPE == kKvF32) bad |= (b.w[i] & 0x7f800000u) == 0x7f800000u;
    if constexpr (TYPE == kKvBf16)
      bad |= (b.w[i] & 0x7f80u) == 0x7f80u || (b.w[i] & 0x7f800000u) == 0x7f800000u;
  }
  return bad;
}

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
};

// What a warp knows of its lanes' query vectors (g and g + 8): their positions, -1 for none.
struct Queries {
  int position[2];
  int first, last;  // over the tile's vectors that there are
};

// H: query vectors a lane has, 2 (of 16) or 1 (of 8: decode with groups of up to 8).
template <int D, int TYPE, int H>
struct Attend {
  static constexpr int kVectors = 8 * H;                     // query vectors
  static constexpr int kSteps = D / 16;                      // k16 steps of a score
  static constexpr int kLaneBytes = D / 4 * kElement<TYPE>;  // of a key, a lane's share
  static constexpr int kLoad = kLaneBytes < 16 ? kLaneBytes : 16;
  static constexpr int kElements = kLoad / kElement<TYPE>;  // of one load
  static constexpr int kTiles = D / 8;                      // n8 tiles of the output
  static constexpr int kResult = kVectors * (D + 2);        // floats of a partition's result
  // Keys (n8 tiles) and values (k16 steps) that are on their way together: about 32 registers.
  static constexpr int kKeys = kLaneBytes <= 32 ? 4 : kLaneBytes <= 64 ? 2 : 1;
  static constexpr int kValues = kLaneBytes <= 32 ? 2 : 1;

  uint32_t q[kSteps][2 * H];
  float o[kTiles][2 * H];
  float top[H], sum[H];
  int vector[kOwned];  // of tokens lane + 32 i of the partition
  float key_scale[kOwned], value_scale[kOwned];

  __device__ static void multiply(float (&c)[2 * H], const uint32_t (&a)[2 * H], uint32_t b0,
                                  uint32_t b1) {
    if constexpr (H == 2)
      mma(c, a, b0, b1);
    else
      mma_half(c, a[0], a[1], b0, b1);
  }

  // Feature of a lane's element v of a key: loads of neighbouring lanes are neighbours in memory.
  __device__ static int feature(int v) {
    return v / kElements * 4 * kElements + threadIdx.x % 4 * kElements + v % kElements;
  }

  __device__ void load_queries(const Bf16* const (&vectors)[H]) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int h = 0; h < H; ++h) {
        const uint2 v = vectors[h] == nullptr
                            ? make_uint2(0, 0)
                            : *reinterpret_cast<const uint2*>(vectors[h] + feature(4 * s));
        q[s][h] = v.x, q[s][H + h] = v.y;
      }
  }

  __device__ void find(const AttentionArgs& a, const Context& c, int begin) {
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      vector[i] = c.vector(begin + i * 32 + threadIdx.x % 32);
      key_scale[i] = value_scale[i] = 1.0f;
      if constexpr (TYPE == kKvFp8) {
        key_scale[i] = __ldg(a.cache.k_scale + vector[i]);
        value_scale[i] = __ldg(a.cache.v_scale + vector[i]);
      }
    }
  }

  __device__ static void load_key(const AttentionArgs& a, int vector, Bytes<kLaneBytes>& key) {
    const char* at = static_cast<const char*>(a.cache.k) + int64_t{vector} * (D * kElement<TYPE>);
#pragma unroll
    for (int i = 0; i < kLaneBytes / kLoad; ++i) {
      Bytes<kLoad> part;
      part.load(at + (i * 4 + threadIdx.x % 4) * kLoad);
#pragma unroll
      for (int w = 0; w < Bytes<kLoad>::kWords; ++w)
        key.w[i * Bytes<kLoad>::kWords + w] = part.w[w];
    }
  }

  // Scores of 128 tokens, in units of log2; -inf where a query may not look.
  __device__ void scores(const AttentionArgs& a, const Context& c, int begin,
                         const Queries& queries, float (&s)[kPart / 8][2 * H]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int first = 0; first < kPart / 8; first += kKeys) {
#pragma unroll
      for (int u = first; u < first + kKeys; ++u)
#pragma unroll
        for (int i = 0; i < 2 * H; ++i) s[u][i] = 0;
      if (begin + first * 8 >= c.length) continue;
      Bytes<kLaneBytes> keys[kKeys];
#pragma unroll
      for (int u = 0; u < kKeys; ++u)
        load_key(a, __shfl_sync(~0u, vector[(first + u) / 4], (first + u) % 4 * 8 + lane / 4),
                 keys[u]);
#pragma unroll
      for (int u = 0; u < kKeys; ++u)
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
          multiply(s[first + u], q[k], pair_of<TYPE>(keys[u], 2 * k),
                   pair_of<TYPE>(keys[u], 2 * k + 1));
    }
#pragma unroll
    for (int u = 0; u < kPart / 8; ++u) {
      const int from = u % 4 * 8 + lane % 4 * 2;
      const float scale[2] = {__shfl_sync(~0u, key_scale[u / 4], from) * a.scale,
                              __shfl_sync(~0u, key_scale[u / 4], from + 1) * a.scale};
#pragma unroll
      for (int i = 0; i < 2 * H; ++i) {
        const bool seen = begin + u * 8 + lane % 4 * 2 + i % 2 <= queries.position[i / 2];
        s[u][i] = seen ? s[u][i] * scale[i % 2] : -INFINITY;
      }
    }
  }

  // Probabilities (not divided by their sum), and top and sum of the partition.
  __device__ void softmax(float (&s)[kPart / 8][2 * H]) {
#pragma unroll
    for (int h = 0; h < H; ++h) {
      float m = -INFINITY;
#pragma unroll
      for (int u = 0; u < kPart / 8; ++u) m = fmaxf(m, fmaxf(s[u][2 * h], s[u][2 * h + 1]));
      for (int i = 1; i < 4; i *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
      const float base = m == -INFINITY ? 0.0f : m;
      float total = 0;  // NaN if any score is
#pragma unroll
      for (int u = 0; u < kPart / 8; ++u)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) total += s[u][i] = exp2f(s[u][i] - base);
      for (int i = 1; i < 4; i *= 2) total += __shfl_xor_sync(~0u, total, i);
      top[h] = m, sum[h] = total;
    }
  }

  using Values = Bytes<D / 8 * kElement<TYPE>>;

  // Adds p[queries, 16 tokens] * v[16 tokens, D]; v[i] of a lane is token 2t, 2t+1, 2t+8, 2t+9.
  __device__ static void add_values(const uint32_t (&p)[2 * H], const Values (&v)[4],
                                    float (&to)[kTiles][2 * H]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      multiply(to[j], p, across<TYPE>(v[0], v[1], j), across<TYPE>(v[2], v[3], j));
  }

  // Some values are no numbers, and some queries must not see them: each position by itself.
  __device__ static void add_values_apart(const uint32_t (&p)[2 * H], const Values (&v)[4],
                                          int begin, const Queries& queries,
                                          float (&to)[kTiles][2 * H]) {
#pragma unroll 1
    for (int position = queries.first; position <= queries.last; ++position) {
      Values seen[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        seen[i] = v[i];
        if (begin + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8 > position) seen[i].clear();
      }
      float part[kTiles][2 * H] = {};
      add_values(p, seen, part);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2 * H; ++i)
          if (queries.position[i / 2] == position) to[j][i] += part[j][i];
    }
  }

  __device__ void values(const AttentionArgs& a, const Context& c, int begin,
                         const Queries& queries, const float (&s)[kPart / 8][2 * H]) {
    const int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2 * H; ++i) o[j][i] = 0;
#pragma unroll
    for (int first = 0; first < kPart / 16; first += kValues) {
      if (begin + first * 16 >= c.length) continue;
      Values v[kValues][4];
#pragma unroll
      for (int n = 0; n < kValues; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = (first + n) % 2 * 16 + column + i % 2 + i / 2 * 8;
          const int64_t from = __shfl_sync(~0u, vector[(first + n) / 2], at);
          v[n][i].load(static_cast<const char*>(a.cache.v) +
                       from * (D * kElement<TYPE>)+lane / 4 * (D / 8 * kElement<TYPE>));
        }
#pragma unroll
      for (int n = 0; n < kValues; ++n) {
        const int u = first + n, token = begin + u * 16 + column;
        float scale[4];
        bool bad = false;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scale[i] = __shfl_sync(~0u, value_scale[u / 2], u % 2 * 16 + column + i % 2 + i / 2 * 8);
          if (TYPE != kKvFp8 && token + i % 2 + i / 2 * 8 >= c.length) v[n][i].clear();
          bad |= not_finite<TYPE>(v[n][i]);
        }
        // A probability of 0 stays 0 under a scale of NaN.
        const auto weighed = [&](int h, int i) {
          return token + i % 2 + i / 2 * 8 > queries.position[h]
                     ? 0.0f
                     : s[2 * u + i / 2][2 * h + i % 2] * scale[i];
        };
        uint32_t p[2 * H];
#pragma unroll
        for (int h = 0; h < H; ++h) {
          p[h] = pack(weighed(h, 0), weighed(h, 1));
          p[H + h] = pack(weighed(h, 2), weighed(h, 3));
        }
        if (TYPE != kKvFp8 && __any_sync(~0u, bad) && queries.first < queries.last)
          add_values_apart(p, v[n], begin + u * 16, queries, o);
        else
          add_values(p, v[n], o);
      }
    }
  }

  // result: outputs as the fragments have them [kTiles, 2 H, lane], then tops and sums of the query
  // vectors. No bank conflicts, and a thread of Merged has to do with one query vector only.
  __device__ void put(float* result) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2 * H; ++i) result[(j * 2 * H + i) * 32 + lane] = o[j][i];
    if (lane % 4 != 0) return;
#pragma unroll
    for (int h = 0; h < H; ++h) {
      result[kVectors * D + lane / 4 + 8 * h] = top[h];
      result[kVectors * (D + 1) + lane / 4 + 8 * h] = sum[h];
    }
  }

  __device__ void run(const AttentionArgs& a, const Context& c, int partition,
                      const Queries& queries) {
    float s[kPart / 8][2 * H];
    find(a, c, partition * kPart);
    scores(a, c, partition * kPart, queries, s);
    softmax(s);
    values(a, c, partition * kPart, queries, s);
  }
};

// The merged result of a block's queries so far. A thread has every fourth of the result's rows of
// 32: always the same i (query vector), and feature(n) of its element n.
template <int D, int H>
struct Merged {
  static constexpr int kVectors = 8 * H, kOwn = kVectors * D / (32 * kWarps);
  float o[kOwn], top, sum;
  __device__ static int query() {
    const int i = threadIdx.x / 32 % (2 * H);
    return threadIdx.x % 32 / 4 + i / 2 * 8;
  }
  __device__ static int feature(int n) {
    const int row = n * kWarps + threadIdx.x / 32, i = row % (2 * H), j = row / (2 * H);
    return (threadIdx.x % 4 * 2 + i % 2) * (D / 8) + j;
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) o[i] = 0;
    sum = 0, top = -INFINITY;
  }
  // Explicit operations: the same bits wherever it is called.
  __device__ void add(const float* result, bool bypass_l1) {
    const auto get = [&](int i) { return bypass_l1 ? __ldcg(result + i) : result[i]; };
    const float part_top = get(kVectors * D + query()),
                part_sum = get(kVectors * (D + 1) + query());
    const float both = fmaxf(top, part_top), base = both == -INFINITY ? 0.0f : both;
    const float mine = exp2f(top - base), other = exp2f(part_top - base);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      o[i] = __fadd_rn(__fmul_rn(o[i], mine),
                       __fmul_rn(get(i * 32 * kWarps + static_cast<int>(threadIdx.x)), other));
    sum = __fadd_rn(__fmul_rn(sum, mine), __fmul_rn(part_sum, other));
    top = both;
  }
};

// Block: (tile of rows and heads, KV head, part of the partitions).
template <int D, int TYPE, int H>
__global__ void __launch_bounds__(32 * kWarps, D > 128  ? 1
                                               : H == 1 ? 4
                                                        : 3)
    attention_kernel(const __grid_constant__ AttentionArgs a) {
  using Work = Attend<D, TYPE, H>;
  extern __shared__ __align__(16) float results[];  // [kWarps, kResult]
  __shared__ bool last_block;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const int head_tile = blockIdx.x % a.head_tiles;
  const int first_row = blockIdx.x / a.head_tiles * a.rows_a_tile;
  const int past = min(first_row + a.rows_a_tile, a.rows.rows);
  const int64_t width = int64_t{a.heads + 2 * a.cache.kv_heads} * D;
  const int64_t tile = blockIdx.x + int64_t{gridDim.x} * blockIdx.y;

  // Query vector i of the tile: row i / group, head i % group.
  const auto row_of = [&](int i) { return first_row + (a.head_tiles > 1 ? 0 : i / a.group); };
  const auto head_of = [&](int i) {
    return a.head_tiles > 1 ? head_tile * kQueries + i : i % a.group;
  };
  Merged<D, H> merged;

  // Rows of a tile that belong to one sequence go together; there may be several such runs.
  for (int run = first_row; run < past;) {
    int end = run + 1;
    const int slot = a.rows.slot[run];
    while (end < past && a.rows.slot[end] == slot) ++end;
    Queries queries;
    const Bf16* vectors[H];
#pragma unroll
    for (int h = 0; h < H; ++h) {
      const int i = g + 8 * h, row = row_of(i), head = head_of(i);
      const bool here = row >= run && row < end && head < a.group;
      queries.position[h] = here ? a.rows.position[row] : -1;
      vectors[h] = here ? a.qkv + row * width + (blockIdx.y * a.group + head) * D : nullptr;
    }
    queries.first = a.rows.position[run], queries.last = a.rows.position[end - 1];
    const Context context{a.rows.page_table + int64_t{slot} * a.rows.max_pages,
                          a.cache.page_tokens,
                          a.page_shift,
                          a.cache.kv_heads,
                          static_cast<int>(blockIdx.y),
                          queries.last + 1};
    const int partitions = (context.length + kPart - 1) / kPart;
    Work work;
    work.load_queries(vectors);
    merged.clear();
    if (gridDim.z == 1) {
      for (int p = 0; p < partitions; p += kWarps) {
        if (p + warp < partitions) {
          work.run(a, context, p + warp, queries);
          work.put(results + warp * Work::kResult);
        }
        __syncthreads();
        for (int w = 0; w < kWarps && p + w < partitions; ++w)
          merged.add(results + w * Work::kResult, false);
        __syncthreads();
      }
    } else {
      // Decode only: a tile has one row, so one run.
      float* mine = a.partials + tile * a.partitions * Work::kResult;
      for (int p = blockIdx.z * kWarps + warp; p < partitions; p += gridDim.z * kWarps) {
        work.run(a, context, p, queries);
        work.put(mine + int64_t{p} * Work::kResult);
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        last_block = atomicAdd(a.counters + tile, 1) + 1 == gridDim.z;
        if (last_block) a.counters[tile] = 0;
      }
      __syncthreads();
      if (!last_block) return;
      __threadfence();
      for (int p = 0; p < partitions; ++p) merged.add(mine + int64_t{p} * Work::kResult, true);
    }
    const int query = merged.query(), row = row_of(query), head = head_of(query);
    if (row >= run && row < end && head < a.group) {
      Bf16* to = a.out + (int64_t{row} * a.heads + blockIdx.y * a.group + head) * D;
#pragma unroll
      for (int i = 0; i < merged.kOwn; ++i)
        to[merged.feature(i)] = __float2bfloat16_rn(__fdiv_rn(merged.o[i], merged.sum));
    }
    run = end;
  }
}

template <int D, int TYPE, int H>
void launch(AttentionArgs a, int tiles, bool decode, const Workspace& work, cudaStream_t s) {
  constexpr int kResult = Attend<D, TYPE, H>::kResult, kBytes = kWarps * kResult * 4;
  [[maybe_unused]] static const cudaError_t raised = cudaFuncSetAttribute(
      attention_kernel<D, TYPE, H>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  // The longest context that the page table has room for, in partitions.
  a.partitions = (a.rows.max_pages * a.cache.page_tokens + kPart - 1) / kPart;
  const int64_t blocks = int64_t{tiles} * a.cache.kv_heads;
  const int64_t want = (2 * work.multiprocessors + blocks - 1) / blocks;
  int splits = static_cast<int>(std::min<int64_t>(want, (a.partitions + kWarps - 1) / kWarps));
  const auto partials = static_cast<size_t>(blocks * a.partitions) * kResult;
  if (!decode || partials > work.partial_count || static_cast<size_t>(blocks) > work.counter_count)
    splits = 1;
  a.partials = work.partials, a.counters = work.counters;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(a.cache.kv_heads),
                  static_cast<unsigned>(splits));
  attention_kernel<D, TYPE, H><<<grid, 32 * kWarps, kBytes, s>>>(a);
}

template <int D, int TYPE>
void launch_tile(AttentionArgs a, const Workspace& work, cudaStream_t s) {
  const bool decode = a.rows.rows == a.rows.chunks;
  a.head_tiles = (a.group + kQueries - 1) / kQueries;
  a.rows_a_tile = decode ? 1 : std::max(1, kQueries / a.group);
  const int tiles = (a.rows.rows + a.rows_a_tile - 1) / a.rows_a_tile * a.head_tiles;
  a.page_shift = -1;
  for (int i = 0; i < 16; ++i)
    if (a.cache.page_tokens == 1 << i) a.page_shift = i;
  a.rows_a_tile* a.group <= 8 ? launch<D, TYPE, 1>(a, tiles, decode, work, s)
                              : launch<D, TYPE, 2>(a, tiles, decode, work, s);
}

template <int D>
void launch_type(const AttentionArgs& a, const Workspace& work, cudaStream_t s) {
  if (a.cache.type == kKvFp8) return launch_tile<D, kKvFp8>(a, work, s);
  if (a.cache.type == kKvBf16) return launch_tile<D, kKvBf16>(a, work, s);
  launch_tile<D, kKvF32>(a, work, s);
}

}  // namespace attention_detail
}  // namespace drover::cuda

// One tile of attention: 64 tokens of one sequence and KV head against a warp's 8 or 16 query
// vectors, from rows of the cache in shared memory straight to mma fragments (m16n8k16, f32 sums).
// Keys and values are the operand of 16 rows (tokens, then features), queries and probabilities the
// one of 8 columns, so that groups of 8 query heads waste nothing.
// Decode and prefill (attention_kernel.cuh) both work through it, so that they give the same bits;
// prefill on wgmma (hopper_attention.cuh) does not.
//
// FP8: codes become f16 by the hardware (one instruction for two from sm_89 on), exactly. Queries
// become f16 after a power of two brings a vector's largest element to 2^14, probabilities times
// the values' scales after one brings the largest scale that the query sees there. Other caches:
// bf16 (f32 rounded to it). Codes under a scale of NaN (rope.cu) are 0 and give NaN through the
// scale. Keys past a row's position have probability 0; NaN or infinite values there (bf16, f32)
// must not spoil it, which a slow way sees to.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backend/cuda/kernels.h"

namespace drover::cuda {
namespace attention_detail {

using Bf16 = __nv_bfloat16;
constexpr int kTileTokens = 64, kSlotRows = 32;

template <int TYPE>
constexpr int kElement = TYPE == kKvFp8    ? 1
                         : TYPE == kKvBf16 ? 2
                                           : 4;

// c[16, 8] += a[16, 16] * b[16, 8].
template <int TYPE>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (TYPE == kKvFp8)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The transpose of an 8 x 8 matrix of 16-bit numbers, a row's pair a lane.
__device__ inline uint32_t transpose(uint32_t x) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}

// Two numbers as the operands of a cache type.
template <int TYPE>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (TYPE == kKvFp8) {
    const __half2 p = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&p);
  } else {
    const __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&p);
  }
}

// Four e4m3 codes as f16: the first two, and the others.
__device__ inline void fp8_pairs(uint32_t codes, uint32_t& low, uint32_t& high) {
#if __CUDA_ARCH__ >= 890
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; "
      "cvt.rn.f16x2.e4m3x2 %1, h; }"
      : "=r"(low), "=r"(high)
      : "r"(codes));
#else
  // Exponents shifted, times 2^8: exact, subnormals too.
  const auto pair = [](uint32_t w) {
    const uint32_t bits = (w & 0x80008000u) | ((w & 0x7f007f00u) >> 1);
    const __half2 r = __hmul2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(256.0f));
    return *reinterpret_cast<const uint32_t*>(&r);
  };
  low = pair(__byte_perm(codes, 0, 0x1404)), high = pair(__byte_perm(codes, 0, 0x3424));
#endif
}

// 2^x, 0 below the normal numbers; the same bits in every kernel.
__device__ inline float power_of_two(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Powers of two: `up` brings a largest number to [2^14, 2^15), `down` undoes it.
struct Unit {
  float up, down;
};
__device__ inline Unit unit_for(float largest) {
  const uint32_t exponent = __float_as_uint(largest) >> 23;
  // Tiny ones stay below; infinity (141 + 127 - 141) stays as it is.
  const uint32_t e = exponent == 255 ? 141u : max(exponent, 15u);
  return {__uint_as_float((268u - e) << 23), __uint_as_float((e - 14u) << 23)};
}

// N bytes of shared memory, aligned to the largest power of two up to 16 that divides N.
template <int N>
__device__ inline void load_shared(const uint8_t* p, uint32_t* w) {
  if constexpr (N == 16) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  } else if constexpr (N == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    w[0] = v.x, w[1] = v.y;
  } else if constexpr (N == 4) {
    w[0] = *reinterpret_cast<const uint32_t*>(p);
  } else {
    static_assert(N == 2);
    w[0] = *reinterpret_cast<const uint16_t*>(p);
  }
}

// Where a warp's query vectors stand. A lane holds vectors g of each eight as operands, and of the
// scores vectors 8 h + 2 t + e (g = lane / 4, t = lane % 4).
template <int H>
struct Queries {
  int position[H][2];  // of vector 8 h + 2 t + e; -1: there is none
  int first, last;     // over the warp's vectors that there are; last -1 when there are none
};

// A slot of the ring: 32 rows of keys or values, [32, D], chunks of 16 bytes swizzled so that the
// reads below meet no bank twice, and their scales.
template <int D, int TYPE>
struct Slot {
  static constexpr int kRowBytes = D * kElement<TYPE>, kChunks = kRowBytes / 16;
  static constexpr int kBytes = kSlotRows * kRowBytes;
  static constexpr int kKeyBytes = kRowBytes / 4;    // a lane's share of a key
  static constexpr int kValueBytes = kRowBytes / 8;  // and of a value
  static constexpr int kKeyLoad = kKeyBytes < 16 ? kKeyBytes : 16;
  static constexpr int kValueLoad = kValueBytes < 16 ? kValueBytes : 16;
  static constexpr int kKeyWords = (kKeyBytes + 3) / 4, kValueWords = (kValueBytes + 3) / 4;

  // Where chunk c of a row lies.
  __device__ static int key_chunk(int row, int c) { return kChunks >= 8 ? c ^ (row % 2 * 4) : c; }
  __device__ static int value_chunk(int row, int c) {
    const int r = row / 2 % 4;
    const int x = kValueBytes <= 16 ? r * 2 : kValueBytes == 32 ? r % 2 + r / 2 * 4 : r;
    return c ^ (x % kChunks);
  }
  __device__ static void load_key(const uint8_t* slot, int row, uint32_t (&w)[kKeyWords]) {
#pragma unroll
    for (int i = 0; i < kKeyBytes / kKeyLoad; ++i) {
      const int at = (i * 4 + static_cast<int>(threadIdx.x) % 4) * kKeyLoad;
      load_shared<kKeyLoad>(slot + row * kRowBytes + key_chunk(row, at / 16) * 16 + at % 16,
                            w + i * kKeyLoad / 4);
    }
  }
  __device__ static void load_value(const uint8_t* slot, int row, uint32_t (&w)[kValueWords]) {
#pragma unroll
    for (int i = 0; i < kValueBytes / kValueLoad; ++i) {
      const int at = static_cast<int>(threadIdx.x) % 32 / 4 * kValueBytes + i * kValueLoad;
      load_shared<kValueLoad>(slot + row * kRowBytes + value_chunk(row, at / 16) * 16 + at % 16,
                              w + i * kValueLoad / 4);
    }
  }
};

// H: eights of query vectors.
template <int D, int TYPE, int H>
struct Tile {
  using S = Slot<D, TYPE>;
  static constexpr int kVectors = 8 * H;  // query vectors
  static constexpr int kSteps = D / 16;   // k16 steps of a score
  static constexpr int kOut = D / 8;      // features that a lane loads of a value
  static constexpr int kElements = S::kKeyLoad / kElement<TYPE>;  // of one load of a key

  uint32_t q[kSteps][H][2];
  float query_unit[H][2];           // of scores, log2(e) / sqrt(D) included
  float s[kTileTokens / 16][H][4];  // [c]: token g + 8 (c / 2), vector 2 t + c % 2
  float o[kOut / 2][H][4];          // [j][h][c]: feature g * kOut + 2 j + c / 2, vector as above:
                                    // sums of probability * value, to be multiplied by `unit`
  float top[H][2], sum[H][2], unit[H][2];  // of the tile: largest score (log2), sum of
                                           // probabilities

  __device__ static int g() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  __device__ static int t() { return static_cast<int>(threadIdx.x) % 4; }
  // Feature of a lane's element v of a key: loads of neighbouring lanes are neighbours in memory.
  __device__ static int feature(int v) {
    return v / kElements * 4 * kElements + t() * kElements + v % kElements;
  }

  // vectors: of the lane's operands, null for none.
  __device__ void load_queries(const Bf16* const (&vectors)[H], float scale) {
#pragma unroll
    for (int h = 0; h < H; ++h) {
      float largest = 0;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint2 v = vectors[h] == nullptr
                            ? make_uint2(0, 0)
                            : *reinterpret_cast<const uint2*>(vectors[h] + feature(4 * k));
        q[k][h][0] = v.x, q[k][h][1] = v.y;
        if constexpr (TYPE == kKvFp8)
          for (const uint32_t w : {v.x << 16, v.x & 0xffff0000u, v.y << 16, v.y & 0xffff0000u})
            largest = fmaxf(largest, fabsf(__uint_as_float(w)));
      }
      query_unit[h][0] = query_unit[h][1] = scale;
      if constexpr (TYPE == kKvFp8) {
        for (int i = 1; i < 4; i *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
        const Unit found = unit_for(largest);
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
          for (uint32_t& w : q[k][h])
            w = pack<TYPE>(__uint_as_float(w << 16) * found.up,
                           __uint_as_float(w & 0xffff0000u) * found.up);
        for (int e = 0; e < 2; ++e)
          query_unit[h][e] = __fmul_rn(__shfl_sync(~0u, found.down, (2 * t() + e) * 4), scale);
      }
    }
  }

  // Scores of 32 tokens from `begin` on, in units of log2; -inf where a query may not look.
  // HALF: which half of the tile.
  template <int HALF>
  __device__ void scores(const uint8_t* slot, const float* scales, int begin,
                         const Queries<H>& queries) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      auto& c = s[HALF * 2 + n];
      uint32_t low[S::kKeyWords], high[S::kKeyWords];
      S::load_key(slot, n * 16 + g(), low);
      S::load_key(slot, n * 16 + 8 + g(), high);
#pragma unroll
      for (int h = 0; h < H; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[h][i] = 0;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t a[4];
        key_pairs(low, k, a[0], a[2]), key_pairs(high, k, a[1], a[3]);
#pragma unroll
        for (int h = 0; h < H; ++h) mma<TYPE>(c[h], a, q[k][h]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = n * 16 + r * 8 + g();
        const float scale = TYPE == kKvFp8 ? scales[row] : 1.0f;
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[HALF * 2 + n][h][2 * r + e];
            x = __fmul_rn(x, query_unit[h][e]);
            if constexpr (TYPE == kKvFp8) x = __fmul_rn(x, scale);
            if (begin + row > queries.position[h][e]) x = -INFINITY;
          }
      }
  }
  // Elements 4 k to 4 k + 3 of a lane's share of a key.
  __device__ static void key_pairs(const uint32_t (&key)[S::kKeyWords], int k, uint32_t& a,
                                   uint32_t& b) {
    if constexpr (TYPE == kKvFp8) {
      fp8_pairs(key[k], a, b);
    } else if constexpr (TYPE == kKvBf16) {
      a = key[2 * k], b = key[2 * k + 1];
    } else {
      a = pack<TYPE>(__uint_as_float(key[4 * k]), __uint_as_float(key[4 * k + 1]));
      b = pack<TYPE>(__uint_as_float(key[4 * k + 2]), __uint_as_float(key[4 * k + 3]));
    }
  }

  // Probabilities (not divided by their sum), top of the tile, and of its sum what is the lane's.
  // Ready for values().
  __device__ void softmax() {
#pragma unroll
    for (int h = 0; h < H; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float m = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTileTokens / 16; ++n) m = fmaxf(m, fmaxf(s[n][h][e], s[n][h][2 + e]));
        for (int i = 4; i < 32; i *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
        const float base = m == -INFINITY ? 0.0f : m;
        float total = 0;  // NaN if any score is
#pragma unroll
        for (int n = 0; n < kTileTokens / 16; ++n)
#pragma unroll
          for (int i = e; i < 4; i += 2)
            total += s[n][h][i] = power_of_two(__fsub_rn(s[n][h][i], base));
        top[h][e] = m, sum[h][e] = total, unit[h][e] = 1.0f;
      }
#pragma unroll
    for (int j = 0; j < kOut / 2; ++j)
#pragma unroll
      for (int h = 0; h < H; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[j][h][i] = 0;
  }

  // The sum of the tile, after softmax().
  __device__ void add_up() {
#pragma unroll
    for (int h = 0; h < H; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        for (int i = 4; i < 32; i *= 2) sum[h][e] += __shfl_xor_sync(~0u, sum[h][e], i);
  }

  // The unit of probability * scale, of the scales that a query sees: of its position only. low,
  // high: scales of the tile's halves.
  __device__ static Unit unit_of(const float* low, const float* high, int begin, int position) {
    const int lane = threadIdx.x % 32;
    float m = fmaxf(begin + lane <= position ? low[lane] : 0.0f,
                    begin + kSlotRows + lane <= position ? high[lane] : 0.0f);
    for (int i = 1; i < 32; i *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
    return unit_for(m);
  }
  __device__ void choose_units(const float* low, const float* high, int begin,
                               const Queries<H>& queries, float (&up)[H][2]) {
    // A warp's vectors are of few rows, whose positions follow each other.
    const int last = begin + kTileTokens - 1 <= queries.first ? queries.first : queries.last;
#pragma unroll 1
    for (int position = queries.first; position <= last; ++position) {
      const Unit seen = unit_of(low, high, begin, position);
#pragma unroll
      for (int h = 0; h < H; ++h)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (last == queries.first || queries.position[h][e] == position)
            up[h][e] = seen.up, unit[h][e] = seen.down;
    }
  }

  using Value = uint32_t[S::kValueWords];

  // Adds v[16 tokens, D] under p[16 tokens, vectors]; v[i] of a lane is token 2t, 2t+1, 2t+8, 2t+9.
  __device__ static void add_values(const uint32_t (&p)[H][2], const Value (&v)[4],
                                    float (&to)[kOut / 2][H][4]) {
#pragma unroll
    for (int j = 0; j < kOut / 2; ++j) {
      uint32_t a[4];  // features 2j, 2j + 1 of tokens 2t, 2t + 1, then of 2t + 8, 2t + 9
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const Value &x = v[2 * b], &y = v[2 * b + 1];
        if constexpr (TYPE == kKvFp8) {
          fp8_pairs(__byte_perm(x[j / 2], y[j / 2], j % 2 == 0 ? 0x5140 : 0x7362), a[2 * b],
                    a[2 * b + 1]);
        } else if constexpr (TYPE == kKvBf16) {
          a[2 * b] = __byte_perm(x[j], y[j], 0x5410),
                a[2 * b + 1] = __byte_perm(x[j], y[j], 0x7632);
        } else {
          a[2 * b] = pack<TYPE>(__uint_as_float(x[2 * j]), __uint_as_float(y[2 * j]));
          a[2 * b + 1] = pack<TYPE>(__uint_as_float(x[2 * j + 1]), __uint_as_float(y[2 * j + 1]));
        }
      }
#pragma unroll
      for (int h = 0; h < H; ++h) mma<TYPE>(to[j][h], a, p[h]);
    }
  }

  __device__ static bool not_finite(const Value& v) {
    bool bad = false;
#pragma unroll
    for (int i = 0; i < S::kValueWords; ++i) {
      if constexpr (TYPE == kKvF32) bad |= (v[i] & 0x7f800000u) == 0x7f800000u;
      if constexpr (TYPE == kKvBf16)
        bad |= (v[i] & 0x7f80u) == 0x7f80u || (v[i] & 0x7f800000u) == 0x7f800000u;
    }
    return bad;
  }

  // Some values are no numbers, and some queries must not see them: each position by itself.
  __device__ static void add_values_apart(const uint32_t (&p)[H][2], const Value (&v)[4], int begin,
                                          const Queries<H>& queries, float (&to)[kOut / 2][H][4]) {
#pragma unroll 1
    for (int position = queries.first; position <= queries.last; ++position) {
      Value seen[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int w = 0; w < S::kValueWords; ++w)
          seen[i][w] = begin + t() * 2 + i % 2 + i / 2 * 8 > position ? 0u : v[i][w];
      float part[kOut / 2][H][4] = {};
      add_values(p, seen, part);
#pragma unroll
      for (int j = 0; j < kOut / 2; ++j)
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (queries.position[h][i % 2] == position) to[j][h][i] += part[j][h][i];
    }
  }

  // Adds the values of 32 tokens from `begin` on, under probabilities times `up`.
  template <int HALF>
  __device__ void values(const uint8_t* slot, const float* scales, int begin,
                         const Queries<H>& queries, const float (&up)[H][2]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t p[H][2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = n * 16 + r * 8 + g();
        const float scale = TYPE == kKvFp8 ? scales[row] : 1.0f;
#pragma unroll
        for (int h = 0; h < H; ++h) {
          float x[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            x[e] = s[HALF * 2 + n][h][2 * r + e];
            // A probability of 0 stays 0 under a scale of NaN.
            if constexpr (TYPE == kKvFp8)
              x[e] = begin + row > queries.position[h][e] ? 0.0f : x[e] * (scale * up[h][e]);
          }
          p[h][r] = transpose(pack<TYPE>(x[0], x[1]));
        }
      }
      Value v[4];
      bool bad = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        S::load_value(slot, n * 16 + t() * 2 + i % 2 + i / 2 * 8, v[i]);
        if constexpr (TYPE != kKvFp8) bad |= not_finite(v[i]);
      }
      if (TYPE != kKvFp8 && begin + n * 16 + 15 > queries.first && __any_sync(~0u, bad))
        add_values_apart(p, v, begin + n * 16, queries, o);
      else
        add_values(p, v, o);
    }
  }
};

// What joins two parts' results: mine * a + theirs * b. Explicit operations: the same bits in
// every kernel.
struct Join {
  float mine, other;
  __device__ float operator()(float a, float b) const {
    return __fmaf_rn(b, other, __fmul_rn(a, mine));
  }
};
// top, sum become those of both; `unit` is of the part's outputs.
__device__ inline Join join(float& top, float& sum, float part_top, float part_sum, float unit) {
  const float both = fmaxf(top, part_top), base = both == -INFINITY ? 0.0f : both;
  const float mine = power_of_two(__fsub_rn(top, base)),
              other = power_of_two(__fsub_rn(part_top, base));
  sum = __fmaf_rn(part_sum, other, __fmul_rn(sum, mine));
  top = both;
  return {mine, __fmul_rn(other, unit)};
}

}  // namespace attention_detail
}  // namespace drover::cuda

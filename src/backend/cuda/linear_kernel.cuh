// out [M tokens, N] = x [M, K] * W^T for INT4 and INT8 codes with group scales; x bf16, sums f32.
//
// Exact in the weights: codes less their zero point are small integers, exact in bf16. They go to
// the tensor cores as they are (mma.sync m16n8k16, weights as the 16-row operand), and a group's
// partial sum is multiplied by the group's scale in f32:  total += scale * sum_group (q - z) x  (+
// m sum x). The sums of x that minimums need come from one more mma with a matrix of ones.
//
// The same order of sums for every M, tile and split, so that a row does not depend on its batch:
// mma chain over a group, groups in order within a chunk (of QuantizedWeights::chunk blocks),
// chunks in order. Chunks run in blocks of their own (split: the last block of a tile adds them,
// from f32 partials in the workspace) or one after the other in one block.
//
// Bytes: codes and scales once for each tile of tokens (from L2 for all but the first), x once for
// each 128 weight rows (L2), out once; split: 8 bytes a sum and chunk more.
//
// Measured on an H200 (copy 4,238 GB/s; a layer of Llama-2-70B, groups of 128): M = 1 56 % of the
// copy bandwidth, 16 43 %; M = 64 161 TFLOP/s, 256 241, 1024 261, where cuBLASLt with 16-bit
// weights makes 223, 714 and 811 of one of the four. Weights through shared memory by cp.async
// instead of straight to registers: M = 1 50 %, 16 34 %, 64 and more alike. 8 x 1 warps of 16 x 64
// for M = 64: 190 TFLOP/s. mma.sync and the instructions around it are the limit from M = 16 on:
// Hopper wants wgmma.
//
// Layout of weights: tile of 16 rows, block of 128 columns, word pack of 16 bytes, lane. A lane's
// words are the fragments of its mma: for columns k16 step s, int4: one word, nibble i and i + 4
// are the pair of register i; int8: two words, bytes are registers 0 and 1, then 2 and 3. Scales
// [tile, group, 8] words: rows g and g + 8 as 16-bit halves; offsets alike (zero points as bf16
// integers to subtract, or minimums' bits).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backend/cuda/kernels.h"

namespace drover::cuda {

struct LinearArgs {
  const uint4* codes;
  const uint32_t* scales;
  const uint32_t* offsets;
  const __nv_bfloat16* x;
  const float* x_scale;  // [rows] or null
  void* out;
  float* partials;
  uint32_t* counters;
  int64_t rows;  // M
  int64_t n;     // N, without padding
  int64_t k;     // K, without padding
  int blocks;    // of 128 columns
  int chunk;     // blocks
  int chunks;
  bool f32_out;
  bool bf16_scales;
};

__device__ inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(shared)),
               "l"(global), "r"(valid ? 16 : 0));
}

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t subtract(uint32_t a, uint32_t b) {
  const __nv_bfloat162 r = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                   *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&r);
}

__device__ inline uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ inline float2 halves(uint32_t w, bool bf16) {
  if (bf16) return {__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u)};
  return __half22float2(*reinterpret_cast<const __half2*>(&w));
}

// What is subtracted from the magic numbers that codes become part of: for rows g and g + 8.
// zero: 0 symmetric, 1 zero points (z as bf16 pair), 2 minimums (nothing to subtract).
template <int BITS, int ZERO>
struct Zero;

template <int ZERO>
struct Zero<4, ZERO> {  // 0x4300 | q is the bf16 number 128 + q
  uint32_t row[2];
  __device__ explicit Zero(uint32_t offsets) {
    if constexpr (ZERO == 0) {
      row[0] = row[1] = 0x43084308u;  // 136
    } else if constexpr (ZERO == 1) {
      const float2 z = halves(offsets, true);
      const auto low = __float2bfloat162_rn(128.0f + z.x),
                 high = __float2bfloat162_rn(128.0f + z.y);
      row[0] = *reinterpret_cast<const uint32_t*>(&low);
      row[1] = *reinterpret_cast<const uint32_t*>(&high);
    } else {
      row[0] = row[1] = 0x43004300u;
    }
  }
};

template <int ZERO>
struct Zero<8, ZERO> {  // 0x4b000000 | u is the float 2^23 + u, u = q + 128
  float row[2];
  __device__ explicit Zero(uint32_t offsets) {
    row[0] = row[1] = 8388736.0f;
    if constexpr (ZERO == 1) {
      const float2 z = halves(offsets, true);
      row[0] += z.x, row[1] += z.y;
    }
  }
};

// The A fragment of k16 step `s` (0..7) of a block's words.
template <int ZERO>
__device__ inline void unpack(const uint4 (&w)[2], int s, const Zero<4, ZERO>& z,
                              uint32_t (&a)[4]) {
  const uint4& v = w[s / 4];
  const uint32_t word = s % 4 == 0 ? v.x : s % 4 == 1 ? v.y : s % 4 == 2 ? v.z : v.w;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t magic;  // (word >> 4 i) & 0x000f000f | 0x43004300, one instruction after the shift
    asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(magic) : "r"(word >> (4 * i)));
    a[i] = subtract(magic, z.row[i % 2]);
  }
}

template <int ZERO>
__device__ inline void unpack(const uint4 (&w)[4], int s, const Zero<8, ZERO>& z,
                              uint32_t (&a)[4]) {
  const uint4& v = w[s / 2];
  const uint32_t words[2] = {s % 2 == 0 ? v.x : v.z, s % 2 == 0 ? v.y : v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t biased = words[i / 2] ^ 0x80808080u;
    const float low = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440 + i % 2 * 2));
    const float high = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7441 + i % 2 * 2));
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low - z.row[i % 2], high - z.row[i % 2]);
    a[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// WN x WM warps; a warp has MT tiles of 16 weight rows and NT tiles of 8 tokens. A stage is U
// blocks of 128 columns; x goes through STAGES buffers of shared memory, weights straight to
// registers one stage ahead.
template <int BITS, int GROUP, int ZERO, int WN, int WM, int MT, int NT, int U, int STAGES,
          int BLOCKS>
struct LinearKernel {
  static constexpr int kThreads = 32 * WN * WM, kBlocks = BLOCKS;
  static constexpr int kTokens = 8 * NT * WM, kRows = 16 * MT * WN;
  static constexpr int kPitch = U * 256;  // bytes of a token's stage
  static constexpr int kStageBytes = kTokens * kPitch;
  static constexpr int kOutPitch = kRows + 4;  // floats
  static constexpr int kBuffers =
      STAGES * kStageBytes > kTokens* kOutPitch * 4 ? STAGES* kStageBytes : kTokens* kOutPitch * 4;
  static constexpr int kSums = MT * NT * 4;
  static constexpr int kMasterBytes = kSums * kThreads * 4;
  static constexpr int kPacks = BITS / 2;  // 16-byte words a lane, tile and block
  static constexpr int kGroups = 128 / GROUP;
  static_assert(kRows == 16 * kTilesOfBlock);

  struct Weights {
    uint4 codes[MT][U][kPacks];
    uint32_t scales[MT][U * kGroups];
    uint32_t offsets[ZERO == 0 ? 1 : MT][ZERO == 0 ? 1 : U * kGroups];
  };

  __device__ static void load_weights(const LinearArgs& a, int64_t tile, int block, Weights& w) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (block + u >= a.blocks) continue;
        const int64_t at = (tile + m) * a.blocks + block + u;
#pragma unroll
        for (int p = 0; p < kPacks; ++p)
          w.codes[m][u][p] = WM == 1 ? load_streaming(a.codes + (at * kPacks + p) * 32 + lane)
                                     : __ldg(a.codes + (at * kPacks + p) * 32 + lane);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const int64_t i = (at * kGroups + g) * 8 + lane / 4;
          w.scales[m][u * kGroups + g] = __ldg(a.scales + i);
          if constexpr (ZERO != 0) w.offsets[m][u * kGroups + g] = __ldg(a.offsets + i);
        }
      }
  }

  __device__ static void load_x(const LinearArgs& a, int64_t first, int block, char* stage) {
    constexpr int kChunks = kPitch / 16;
    for (int i = threadIdx.x; i < kTokens * kChunks; i += kThreads) {
      const int row = i / kChunks, c = i % kChunks;
      const int64_t k = int64_t{block} * 128 + c * 8;
      const bool valid = first + row < a.rows && k < a.k;
      copy_async(stage + row * kPitch + ((c ^ (row & 7)) * 16),
                 valid ? a.x + (first + row) * a.k + k : a.x, valid);
    }
  }

  // B fragments of all token tiles for the k16 step s of the stage.
  __device__ static void load_b(const char* stage, int token, int s, uint32_t (&b)[NT][2]) {
    const int lane = threadIdx.x % 32;
    if constexpr (NT == 1) {
      const int row = token + lane % 8, c = 2 * s + lane / 8 % 2;
      const uint32_t at = smem_address(stage + row * kPitch + ((c ^ (row & 7)) * 16));
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                   : "=r"(b[0][0]), "=r"(b[0][1])
                   : "r"(at));
    } else {
#pragma unroll
      for (int t = 0; t < NT; t += 2) {
        const int row = token + t * 8 + lane % 8 + lane / 16 * 8, c = 2 * s + lane / 8 % 2;
        const uint32_t at = smem_address(stage + row * kPitch + ((c ^ (row & 7)) * 16));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[t][0]), "=r"(b[t][1]), "=r"(b[t + 1][0]), "=r"(b[t + 1][1])
                     : "r"(at));
      }
    }
  }

  // One group: its partial sums, scaled, onto the totals.
  __device__ static void add_group(const LinearArgs& a, const Weights& w, const char* stage,
                                   int token, int u, int g, float (&total)[MT][NT][4]) {
    float part[MT][NT][4] = {};
    float x_sum[NT][4] = {};
#pragma unroll
    for (int i = 0; i < GROUP / 16; ++i) {
      const int s = g * (GROUP / 16) + i;
      uint32_t b[NT][2];
      load_b(stage, token, u * 8 + s, b);
      if constexpr (ZERO == 2) {
        const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
        for (int t = 0; t < NT; ++t) mma(x_sum[t], ones, b[t][0], b[t][1]);
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const Zero<BITS, ZERO> zero(
            ZERO == 0 ? 0 : w.offsets[ZERO == 0 ? 0 : m][ZERO == 0 ? 0 : u * kGroups + g]);
        uint32_t fragment[4];
        unpack(w.codes[m][u], s, zero, fragment);
#pragma unroll
        for (int t = 0; t < NT; ++t) mma(part[m][t], fragment, b[t][0], b[t][1]);
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const float2 scale = halves(w.scales[m][u * kGroups + g], a.bf16_scales);
      float2 minimum = {0, 0};
      if constexpr (ZERO == 2) minimum = halves(w.offsets[m][u * kGroups + g], a.bf16_scales);
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (ZERO == 2)
            total[m][t][i] = __fmaf_rn(i < 2 ? minimum.x : minimum.y, x_sum[t][i], total[m][t][i]);
          total[m][t][i] = __fmaf_rn(i < 2 ? scale.x : scale.y, part[m][t][i], total[m][t][i]);
        }
    }
  }

  // A chunk is done: its totals onto the sum of the chunks before it, in shared memory.
  __device__ static void end_chunk(float (&total)[MT][NT][4], float* master, bool first,
                                   bool last) {
    float* flat = &total[0][0][0];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float& slot = master[i * kThreads + threadIdx.x];
      const float sum = first ? flat[i] : __fadd_rn(slot, flat[i]);
      if (!last) slot = sum;
      flat[i] = last ? sum : 0.0f;
    }
  }

  __device__ static void write(const LinearArgs& a, int64_t token, int64_t n, float value) {
    if (token >= a.rows || n >= a.n) return;
    if (a.x_scale != nullptr) value *= __ldg(a.x_scale + token);
    if (a.f32_out)
      static_cast<float*>(a.out)[token * a.n + n] = value;
    else
      static_cast<__nv_bfloat16*>(a.out)[token * a.n + n] = __float2bfloat16_rn(value);
  }

  // The block's tile through shared memory, so that a token's features leave together.
  __device__ static void finish(const LinearArgs& a, char* shared, float (&total)[MT][NT][4],
                                int64_t first_token, int64_t first_n, bool split) {
    float* tile = reinterpret_cast<float*>(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int n = warp / WM * MT * 16 + lane / 4, token = warp % WM * NT * 8 + lane % 4 * 2;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          tile[(token + t * 8 + i % 2) * kOutPitch + n + m * 16 + i / 2 * 8] = total[m][t][i];
    __syncthreads();
    if (!split) {
      for (int i = threadIdx.x; i < kTokens * kRows; i += kThreads)
        write(a, first_token + i / kRows, first_n + i % kRows,
              tile[i / kRows * kOutPitch + i % kRows]);
      return;
    }
    // partials [chunk, tokens of the grid, N of the grid]
    const int64_t width = int64_t{gridDim.y} * kRows, size = width * gridDim.x * kTokens;
    float* at = a.partials + first_token * width + first_n;
    for (int i = threadIdx.x; i < kTokens * kRows; i += kThreads)
      if (first_token + i / kRows < a.rows)
        __stcg(at + blockIdx.z * size + i / kRows * width + i % kRows,
               tile[i / kRows * kOutPitch + i % kRows]);
    __threadfence();
    __syncthreads();
    __shared__ bool last;
    if (threadIdx.x == 0) {
      uint32_t* counter = a.counters + blockIdx.y * gridDim.x + blockIdx.x;
      last = atomicAdd(counter, 1) + 1 == gridDim.z;
      if (last) *counter = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x; i < kTokens * kRows; i += kThreads) {
      if (first_token + i / kRows >= a.rows) break;
      float sum = __ldcg(at + i / kRows * width + i % kRows);
      for (unsigned z = 1; z < gridDim.z; ++z)
        sum = __fadd_rn(sum, __ldcg(at + z * size + i / kRows * width + i % kRows));
      write(a, first_token + i / kRows, first_n + i % kRows, sum);
    }
  }

  // Grid (tiles of tokens, tiles of weight rows, chunks or 1).
  __device__ static void run(const LinearArgs& a, char* shared) {
    const int warp = threadIdx.x / 32;
    const int64_t first_token = int64_t{blockIdx.x} * kTokens;
    const int64_t tile = int64_t{blockIdx.y} * kTilesOfBlock + warp / WM * MT;
    const int token = warp % WM * NT * 8;
    const bool split = gridDim.z > 1;
    const int begin = split ? blockIdx.z * a.chunk : 0;
    const int end = split ? min(begin + a.chunk, a.blocks) : a.blocks;
    float* master = reinterpret_cast<float*>(shared + kBuffers);
    float total[MT][NT][4] = {};
    Weights next;
    load_weights(a, tile, begin, next);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
      if (begin + i * U < end) load_x(a, first_token, begin + i * U, shared + i * kStageBytes);
      asm volatile("cp.async.commit_group;");
    }
    int buffer = 0, chunk_end = begin + a.chunk;
    for (int block = begin; block < end; block += U) {
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
      __syncthreads();
      const Weights now = next;
      if (block + U < end) load_weights(a, tile, block + U, next);
      const int ahead = block + (STAGES - 1) * U;
      if (ahead < end)
        load_x(a, first_token, ahead, shared + (buffer + STAGES - 1) % STAGES * kStageBytes);
      asm volatile("cp.async.commit_group;");
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (u == 0 || block + u < end)
#pragma unroll
          for (int g = 0; g < kGroups; ++g)
            add_group(a, now, shared + buffer * kStageBytes, token, u, g, total);
      buffer = (buffer + 1) % STAGES;
      const bool done = block + U >= end;
      if (!split && a.chunks > 1 && (done || block + U >= chunk_end)) {
        end_chunk(total, master, chunk_end == a.chunk, done);
        chunk_end += a.chunk;
      }
    }
    asm volatile("cp.async.wait_group 0;");
    finish(a, shared, total, first_token, int64_t{blockIdx.y} * kRows, split);
  }
};

template <typename K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    linear_kernel(const __grid_constant__ LinearArgs a) {
  extern __shared__ __align__(128) char shared[];
  K::run(a, shared);
}

template <typename K>
void launch_linear(const LinearArgs& a, const LinearConfig& c, int64_t tiles, cudaStream_t s) {
  const int bytes = K::kBuffers + (!c.split && a.chunks > 1 ? K::kMasterBytes : 0);
  // Raised once to the most that any launch asks for; the attribute is the function's, not the
  // call's. Where a GPU has less (sm_86, sm_89), launches that need more fail and say so.
  [[maybe_unused]] static const cudaError_t raised = cudaFuncSetAttribute(
      linear_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kBuffers + K::kMasterBytes);
  const dim3 grid(static_cast<unsigned>((a.rows + K::kTokens - 1) / K::kTokens),
                  static_cast<unsigned>(tiles / kTilesOfBlock),
                  static_cast<unsigned>(c.split ? a.chunks : 1));
  linear_kernel<K><<<grid, K::kThreads, bytes, s>>>(a);
}

// Every tile size for one kind of weights.
template <int BITS, int GROUP, int ZERO>
void launch_tiles(const LinearArgs& a, const LinearConfig& c, int64_t tiles, cudaStream_t s) {
  if (c.tokens_tile == 8)
    launch_linear<LinearKernel<BITS, GROUP, ZERO, 8, 1, 1, 1, 2, 3, 3>>(a, c, tiles, s);
  else if (c.tokens_tile == 16)
    launch_linear<LinearKernel<BITS, GROUP, ZERO, 8, 1, 1, 2, 2, 3, 3>>(a, c, tiles, s);
  else if (c.tokens_tile == 32)
    launch_linear<LinearKernel<BITS, GROUP, ZERO, 8, 1, 1, 4, 2, 3, 2>>(a, c, tiles, s);
  else if (c.tokens_tile == 64)
    launch_linear<LinearKernel<BITS, GROUP, ZERO, 4, 2, 2, 4, 1, 4, 1>>(a, c, tiles, s);
  else
    launch_linear<LinearKernel<BITS, GROUP, ZERO, 4, 2, 2, 8, 1, 3, 1>>(a, c, tiles, s);
}

}  // namespace drover::cuda
